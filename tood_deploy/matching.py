"""Detections in pixels of the network's input, and which of two runs belong together.

NumPy arrays come in, positions of pairs and their differences go out. Knows no runtime and no
limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Above every sensible threshold of suppression, so that a neighbour that was kept is never taken
# for the box itself.
MIN_IOU = 0.75


@dataclass(frozen=True)
class NetDetections:
    """Detections of one image, in pixels of the network's input.

    Attributes:
        boxes: (D, 4) float32 xyxy.
        scores: (D,) float32, 0 to 1.
        labels: (D,) int32 class numbers.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> NetDetections:
        """Return those with a score above this one."""
        chosen = self.scores > score
        return NetDetections(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


def split_batch(outputs: Sequence[NDArray[Any]]) -> list[NetDetections]:
    """Return the detections of every image of a batch, without the rows that hold none.

    Args:
        outputs: `num_dets` (B,), `boxes` (B, D, 4), `scores` (B, D), `labels` (B, D); what comes
            after these is ignored.
    """
    return [
        NetDetections(boxes[:count], scores[:count], labels[:count])
        for count, boxes, scores, labels in zip(*outputs[:4], strict=True)
    ]


@dataclass(frozen=True)
class MatchCounts:
    """How the detections of two runs correspond, over any number of images.

    Attributes:
        reference: detections of the reference.
        matched: of these, those that the other run has too.
        added: detections that only the other run has.
        score_deviation: the largest difference of a pair's scores.
        box_deviation_px: the largest difference of a pair's coordinates.
    """

    reference: int = 0
    matched: int = 0
    added: int = 0
    score_deviation: float = 0.0
    box_deviation_px: float = 0.0

    def __add__(self, other: MatchCounts) -> MatchCounts:
        """Return both together."""
        return MatchCounts(
            self.reference + other.reference,
            self.matched + other.matched,
            self.added + other.added,
            max(self.score_deviation, other.score_deviation),
            max(self.box_deviation_px, other.box_deviation_px),
        )

    @property
    def exchanged(self) -> int:
        """Detections that only one of the two has, counted on the side that has more of them."""
        return max(self.reference - self.matched, self.added)

    @property
    def matched_share(self) -> float:
        """Share of the detections of either run that both have, 0 to 1; 1 where there are none."""
        either = self.reference + self.added
        return self.matched / either if either else 1.0


@dataclass(frozen=True, eq=False)
class BoxMatches:
    """The pairs of one image.

    Attributes:
        pairs: (P, 2) positions in the reference and in the other run; each is used once.
        iou: (P,) overlap of each pair, 0 to 1.
        score_differences: (P,) absolute.
        box_differences_px: (P,) the largest absolute difference of a pair's four coordinates.
        counts: how many there are.
    """

    pairs: NDArray[np.intp]
    iou: NDArray[np.floating]
    score_differences: NDArray[np.floating]
    box_differences_px: NDArray[np.floating]
    counts: MatchCounts


def match_boxes(
    reference: NetDetections,
    other: NetDetections,
    *,
    min_iou: float = MIN_IOU,
    max_score_difference: float = np.inf,
    max_box_difference_px: float = np.inf,
) -> BoxMatches:
    """Pair detections of one class that agree within limits, each used once.

    Detections at the same position of both lists go first, so that equal runs pair in place. Then,
    best first, each of the reference takes what overlaps it most of what is left.

    Args:
        reference: detections of one image, best first.
        other: those of another run on the same image, in the same frame.
        min_iou: overlap that a pair must have, 0 to 1.
        max_score_difference: by how much the scores of a pair may differ.
        max_box_difference_px: by how much each coordinate of a pair may differ, in pixels.
    """

    def agree(i: Any, j: Any) -> NDArray[np.bool_]:
        boxes_off = np.abs(reference.boxes[i] - other.boxes[j]).max(axis=-1, initial=0)
        # NaN compares false, so that what is not a number has no partner.
        return (
            (reference.labels[i] == other.labels[j])
            & (np.abs(reference.scores[i] - other.scores[j]) <= max_score_difference)
            & (boxes_off <= max_box_difference_px)
            & (box_iou(reference.boxes[i], other.boxes[j]) >= min_iou)
        )

    shared = np.arange(min(len(reference), len(other)))
    in_place = shared[agree(shared, shared)]
    pairs = [(i, i) for i in in_place.tolist()]
    free = np.ones(len(other), bool)
    free[in_place] = False
    for i in np.setdiff1d(np.arange(len(reference)), in_place).tolist():
        left = np.flatnonzero(free)
        if len(fitting := left[agree(i, left)]):
            best = int(fitting[box_iou(reference.boxes[i], other.boxes[fitting]).argmax()])
            free[best] = False
            pairs.append((i, best))
    return _measure(reference, other, np.array(pairs, np.intp).reshape(-1, 2))


def _measure(reference: NetDetections, other: NetDetections, pairs: NDArray[np.intp]) -> BoxMatches:
    first, second = pairs.T
    scores = np.abs(reference.scores[first] - other.scores[second])
    boxes_px = np.abs(reference.boxes[first] - other.boxes[second]).max(axis=1, initial=0)
    counts = MatchCounts(
        len(reference),
        len(pairs),
        len(other) - len(pairs),
        float(scores.max(initial=0)),
        float(boxes_px.max(initial=0)),
    )
    iou = box_iou(reference.boxes[first], other.boxes[second])
    return BoxMatches(pairs, iou, scores, boxes_px, counts)


def box_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the overlap of boxes, row by row.

    Args:
        first: (N, 4) xyxy, or one box (4,).
        second: (N, 4) xyxy.

    Returns:
        (N,) overlaps; 1 for a box with itself, even one without area, and 0 for NaN.
    """
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(
        first[..., :2], second[..., :2]
    )
    overlap = sides.clip(0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (first, second)]
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = overlap / (areas[0] + areas[1] - overlap)
    equal = (first == second).all(axis=-1)
    return np.where(equal, 1.0, np.nan_to_num(iou, nan=0.0, posinf=0.0, neginf=0.0))
