"""Detections of one image in the network's own frame, and which of two runs belong together. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAIR_IOU = 0.75  # above every sensible threshold of suppression, so that no kept neighbour is taken for the box itself


@dataclass(frozen=True)
class Rows:
    """Detections of one image: boxes (D, 4) xyxy pixels, scores (D,), labels (D,)."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)


def batch_rows(outputs: Sequence[NDArray[Any]]) -> list[Rows]:
    """Per image, the rows of `num_dets`, `boxes`, `scores`, `labels` that hold detections."""
    return [
        Rows(boxes[:count], scores[:count], labels[:count])
        for count, boxes, scores, labels in zip(*outputs[:4], strict=True)
    ]


def pair_rows(reference: Rows, found: Rows) -> NDArray[np.intp]:
    """Positions (P, 2) of boxes of one class that overlap by more than `PAIR_IOU`; each is used once.

    Boxes at the same place of both lists go first, then the best box of the reference takes what overlaps it most.
    """
    ranked = min(len(reference), len(found))
    same = (reference.labels[:ranked] == found.labels[:ranked]) & (
        row_iou(reference.boxes[:ranked], found.boxes[:ranked]) > PAIR_IOU
    )
    pairs = [(i, i) for i in np.flatnonzero(same).tolist()]
    rest, free = (
        np.setdiff1d(np.arange(len(reference)), np.flatnonzero(same)),
        np.ones(len(found), bool),
    )
    free[:ranked] = ~same
    for i in rest.tolist():
        fitting = np.flatnonzero(free & (found.labels == reference.labels[i]))
        if len(fitting):
            overlaps = row_iou(reference.boxes[i], found.boxes[fitting])
            if overlaps.max() > PAIR_IOU:
                best = fitting[overlaps.argmax()]
                free[best] = False
                pairs.append((i, int(best)))
    return np.array(pairs, np.intp).reshape(-1, 2)


def row_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.floating]:
    """Overlap (N,) of boxes (N, 4) xyxy, or of one box (4,), with (N, 4); 1 for a box with itself, even one without area."""
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(
        first[..., :2], second[..., :2]
    )
    overlap = sides.clip(0).prod(axis=-1)
    union = (
        (first[..., 2:] - first[..., :2]).prod(axis=-1)
        + (second[..., 2:] - second[..., :2]).prod(axis=-1)
        - overlap
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            (first == second).all(axis=-1),
            1.0,
            np.nan_to_num(overlap / union, nan=0.0, posinf=0.0, neginf=0.0),
        )


@dataclass(frozen=True)
class Match:
    """How the detections of two runs correspond.

    Attributes:
        reference: how many the reference found.
        matched: how many of these the other found too.
        added: how many only the other found.
        score_deviation: the largest difference of a matched pair's scores.
        box_deviation_px: the largest difference of a matched pair's coordinates.
    """

    reference: int = 0
    matched: int = 0
    added: int = 0
    score_deviation: float = 0.0
    box_deviation_px: float = 0.0

    def __add__(self, other: Match) -> Match:
        """Both together."""
        return Match(
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


def match_detections(
    reference: Rows, found: Rows, score_tolerance: float, box_tolerance_px: float
) -> Match:
    """Pair detections of one class whose scores and coordinates agree within the tolerances; each is used once, best first."""
    free = np.ones(len(found), bool)
    pairs: list[tuple[float, float]] = []
    for box, score, label in zip(reference.boxes, reference.scores, reference.labels, strict=True):
        score_off = np.abs(found.scores - score)
        box_off = np.abs(found.boxes - box).max(axis=1, initial=0)
        fitting = np.flatnonzero(
            free
            & (found.labels == label)
            & (score_off <= score_tolerance)
            & (box_off <= box_tolerance_px)
        )
        if len(fitting):
            best = fitting[box_off[fitting].argmin()]
            free[best] = False
            pairs.append((float(score_off[best]), float(box_off[best])))
    score_deviation, box_deviation = (
        max(values, default=0.0) for values in (zip(*pairs, strict=True) if pairs else ((), ()))
    )
    return Match(len(reference), len(pairs), int(free.sum()), score_deviation, box_deviation)


def match_overlapping(
    reference: Rows, found: Rows, score_tolerance: float, least_iou: float = 0.0
) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """Pair detections of one class that overlap, and whose scores agree.

    Args:
        reference, found: detections of one image, in one frame.
        score_tolerance: by how much the scores of a pair may differ.
        least_iou: overlap that a pair must have; never below `PAIR_IOU`.

    Returns:
        Positions (P, 2) in both lists, each used once, and the overlaps (P,).
    """
    pairs = pair_rows(reference, found)
    overlaps = row_iou(reference.boxes[pairs[:, 0]], found.boxes[pairs[:, 1]])
    score_off = np.abs(reference.scores[pairs[:, 0]] - found.scores[pairs[:, 1]])
    agree = (score_off <= score_tolerance) & (overlaps >= least_iou)
    return pairs[agree], overlaps[agree]
