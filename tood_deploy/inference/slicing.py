"""Sliced inference: what windows an image is searched in, and how their detections become one.

Windows are those of `tood_deploy.windows`; merging equals SAHI's NMS, NMM and GREEDYNMM on the same
boxes (github.com/obss/sahi 0.12). NumPy alone; knows no engine and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError
from tood_deploy.windows import DEFAULT_OVERLAP, check_overlap, check_window_size, slice_windows

Merge = Literal["greedy_nmm", "nmm", "nms"]
MERGES = ("greedy_nmm", "nmm", "nms")
Metric = Literal["ios", "iou"]
METRICS = ("ios", "iou")
CHUNK_PAIRS = 1_000_000  # of boxes that are compared at once: bounds memory


@dataclass(frozen=True)
class Slicing:
    """Search an image in overlapping windows, and merge what is detected in them.

    Attributes:
        size: rows and columns of a window in pixels of the image; one number for both.
        overlap: of neighbouring windows, as a share of the window's side, 0 to 0.9.
        whole: whether the whole image is searched, too, for objects larger than a window.
        merge: "greedy_nmm" joins to the best box those that overlap it, "nmm" also those that
            overlap these, "nms" keeps the best box alone.
        metric: overlap over the smaller of two boxes ("ios") or over their union ("iou").
        threshold: overlap from which two boxes are one object, above 0 and at most 1.
        class_agnostic: whether boxes of different classes are merged, too.
    """

    size: int | Sequence[int]
    overlap: float = DEFAULT_OVERLAP
    whole: bool = True
    merge: Merge = "greedy_nmm"
    metric: Metric = "ios"
    threshold: float = 0.5
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_window_size(self.size))
        check_overlap(self.overlap)
        for name, allowed in (("merge", MERGES), ("metric", METRICS)):
            if getattr(self, name) not in allowed:
                raise ToodError(
                    f"{name} of slices is {getattr(self, name)!r}; expected {', '.join(allowed)}"
                )
        if not 0 < self.threshold <= 1:
            raise ToodError(
                f"the threshold for merging slices is {self.threshold}; expected a number above 0 "
                "and at most 1"
            )

    @property
    def size_hw(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return check_window_size(self.size)

    def windows(self, image_hw: tuple[int, int]) -> NDArray[np.int64]:
        """Return (N, 4) xyxy, the windows of an image of these rows and columns."""
        return slice_windows(image_hw, self.size_hw, self.overlap)

    def __str__(self) -> str:
        height, width = self.size_hw
        whole = "with" if self.whole else "without"
        classes = ", across classes" if self.class_agnostic else ""
        return (
            f"slices of {height} x {width}, overlap {self.overlap:g}, {whole} the whole image, "
            f"merged by {self.merge} at {self.metric} {self.threshold:g}{classes}"
        )


def shift(detections: Detections, window: NDArray[np.int64]) -> Detections:
    """Return detections in a window, (4,) xyxy, with boxes in pixels of the image."""
    corner = np.tile(window[:2], 2).astype(np.float32)
    return Detections(
        detections.boxes + corner, detections.scores, detections.class_ids, detections.class_names
    )


def merge_windows(parts: Sequence[Detections], slicing: Slicing) -> Detections:
    """Return the objects of an image from the detections of its parts.

    Args:
        parts: of every window, and of the whole image where it was searched, all with boxes in
            pixels of the image; at least one.
        slicing: says what overlaps count as one object.
    """
    together = Detections(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.class_ids for part in parts]),
        parts[0].class_names,
    )
    return merge_detections(together, slicing) if len(parts) > 1 else together


def merge_detections(detections: Detections, slicing: Slicing) -> Detections:
    """Merge detections that overlap, and return the rest as they are, best first.

    Args:
        detections: of an image, in any order.
        slicing: says what overlaps count as one object.
    """
    boxes, scores = detections.boxes, detections.scores
    groups = np.zeros_like(detections.class_ids) if slicing.class_agnostic else detections.class_ids
    first, second = overlapping_pairs(boxes, groups, slicing.metric, slicing.threshold)
    # Equal scores go by position, so that the order of the windows does not matter.
    order = np.lexsort((boxes[:, 3], boxes[:, 2], boxes[:, 1], boxes[:, 0], -scores))
    if slicing.merge == "nmm":
        owner, merged = _merge_transitively(boxes, scores, order, first, second)
    else:
        owner, merged = _merge_greedily(order, first, second)
    kept = order[owner[order] == order]
    class_ids = detections.class_ids
    if slicing.merge != "nms":
        boxes, class_ids = _join_boxes(detections, merged, slicing)
    return Detections(boxes[kept], scores[kept], class_ids[kept], detections.class_names)


def overlapping_pairs(
    boxes: NDArray[np.float32], groups: NDArray[np.int32], metric: Metric, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs of boxes of one group that overlap by a threshold or more.

    Args:
        boxes: (D, 4) xyxy.
        groups: (D,) numbers; boxes of different groups are no pair.
        metric: what overlap is.
        threshold: above 0.

    Returns:
        (P,) and (P,) positions of the boxes of every pair, each pair once.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for first, second in _touching_pairs(boxes, groups):
        low = np.maximum(boxes[first, :2], boxes[second, :2])
        high = np.minimum(boxes[first, 2:], boxes[second, 2:])
        shared = np.prod(np.maximum(high - low, np.float32(0)), axis=1)
        if metric == "iou":
            base = areas[first] + areas[second] - shared
        else:
            base = np.minimum(areas[first], areas[second])
        ratio = np.divide(shared, base, out=np.zeros_like(shared), where=base > 0)
        pairs.append((first[ratio >= threshold], second[ratio >= threshold]))
    first, second = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return first, second


def _touching_pairs(
    boxes: NDArray[np.float32], groups: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs of boxes of a group that share pixels, some at a time.

    Along the side on which fewer boxes share columns (or rows), sorted by where they begin, the
    partners of a box are those that begin before it ends.
    """
    sweeps = [_sweep(boxes[:, axis], boxes[:, axis + 2], groups) for axis in (0, 1)]
    axis = int(sweeps[1][1].sum() < sweeps[0][1].sum())
    order, counts = sweeps[axis]
    across = 1 - axis
    low, high = boxes[order, across], boxes[order, across + 2]
    ends = np.cumsum(counts)
    start = 0
    while start < len(order):
        reached = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, reached + CHUNK_PAIRS, "right")))
        part = counts[start:stop]
        first = np.repeat(np.arange(start, stop), part)
        second = np.arange(part.sum()) - np.repeat(np.cumsum(part) - part, part) + first + 1
        touch = (low[first] < high[second]) & (low[second] < high[first])
        yield order[first[touch]], order[second[touch]]
        start = stop


def _sweep(
    low: NDArray[np.float32], high: NDArray[np.float32], groups: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort by group and beginning; count for each box those after it that begin before its end.

    Args:
        low, high: (D,) where boxes begin and end along one side.
        groups: (D,) numbers.

    Returns:
        (D,) positions in the sorted order, and (D,) counts in that order.
    """
    order = np.lexsort((low, groups))
    # Groups become stretches of one axis that do not meet, so that one search serves all of them.
    _, number = np.unique(groups[order], return_inverse=True)
    shift_by = np.float64(np.ptp(np.concatenate([low, high]))) + 1 if len(low) else 0.0
    begins = low[order].astype(np.float64) + number * shift_by
    ends = np.maximum(high[order], low[order]).astype(np.float64) + number * shift_by
    counts = np.searchsorted(begins, ends, "left") - np.arange(len(order)) - 1
    return order, np.maximum(counts, 0)


def _neighbours(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> list[list[int]]:
    """Return the partners of every box, in ascending order of their positions."""
    both = np.concatenate([first, second]), np.concatenate([second, first])
    order = np.lexsort((both[1], both[0]))
    starts = np.searchsorted(both[0][order], np.arange(count + 1)).tolist()
    partners = both[1][order].tolist()
    return [partners[start:end] for start, end in pairwise(starts)]


def _merge_greedily(
    order: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> tuple[NDArray[np.int64], dict[int, list[int]]]:
    """Let the best box take all that overlap it, then the best of the rest, and so on.

    Args:
        order: (D,) positions, best first.
        first, second: (P,) positions of boxes that overlap.

    Returns:
        (D,) position of the box that each was taken by, its own where it stays; and what was taken
        by a box, best first.
    """
    count = len(order)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    partners = _neighbours(count, rank[first], rank[second])  # ranks: their order is the score's
    owner: list[int] = list(range(count))
    merged: dict[int, list[int]] = {}
    positions = order.tolist()
    for i in np.unique(np.concatenate([rank[first], rank[second]])).tolist():
        if owner[i] != i:
            continue
        taken = [j for j in partners[i] if j > i and owner[j] == j]
        for j in taken:
            owner[j] = i
        merged[positions[i]] = [positions[j] for j in taken]
    result = np.empty(count, np.int64)
    result[order] = order[np.array(owner, np.int64)]
    return result, merged


def _merge_transitively(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    order: NDArray[np.int64],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> tuple[NDArray[np.int64], dict[int, list[int]]]:
    """Let boxes take those that overlap them, and what these overlap in turn.

    Args:
        boxes: (D, 4) xyxy.
        scores: (D,).
        order: (D,) positions, best first.
        first, second: (P,) positions of boxes that overlap.

    Returns:
        As `_merge_greedily`.
    """
    partners = _neighbours(len(order), first, second)
    # Of equal scores a box takes those whose corners do not come after its own.
    keys = [(score, *box) for score, box in zip(scores.tolist(), boxes.tolist(), strict=True)]
    owner: dict[int, int] = {}
    merged: dict[int, list[int]] = {}
    for i in order.tolist():
        if not partners[i]:
            continue
        keeper = owner.setdefault(i, i)
        for j in partners[i]:
            if j not in owner and keys[j] <= keys[i]:
                owner[j] = keeper
                merged.setdefault(keeper, []).append(j)
    result = np.arange(len(order))
    for i, keeper in owner.items():
        result[i] = keeper
    return result, merged


def _join_boxes(
    detections: Detections, merged: dict[int, list[int]], slicing: Slicing
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Grow every box around those that it takes, one after another.

    One that overlaps the box as it has grown by less than the threshold is dropped.

    Args:
        detections: of an image.
        merged: what each box takes, by positions.
        slicing: says what overlaps count as one object.

    Returns:
        (D, 4) boxes and (D,) classes: of equal scores SAHI gives a joined box the class of the
        last.
    """
    boxes, class_ids = detections.boxes.copy(), detections.class_ids.copy()
    values, scores = detections.boxes.tolist(), detections.scores.tolist()
    for keeper, taken in merged.items():
        box = values[keeper]
        for other in taken:
            if _overlap(box, values[other], slicing.metric) >= slicing.threshold:
                x1, y1, x2, y2 = values[other]
                box = [min(box[0], x1), min(box[1], y1), max(box[2], x2), max(box[3], y2)]
                if scores[other] >= scores[keeper]:
                    class_ids[keeper] = detections.class_ids[other]
        boxes[keeper] = box
    return boxes, class_ids


def _overlap(box: Sequence[float], other: Sequence[float], metric: Metric) -> float:
    """Return the overlap of two boxes, xyxy; 0 where one of them has no area."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, other)]
    base = sum(areas) - shared if metric == "iou" else min(areas)
    return shared / base if base > 0 else 0.0
