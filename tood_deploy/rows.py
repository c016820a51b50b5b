"""Detections of one picture in the network's own frame, and which of two runs belong together. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAIR_IOU = 0.75  # above every sensible threshold of suppression, so that no kept neighbour is taken for the box itself


@dataclass(frozen=True)
class Rows:
    """Detections of one picture: boxes (D, 4) xyxy pixels, scores (D,), labels (D,)."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)


def batch_rows(outputs: Sequence[NDArray[Any]]) -> list[Rows]:
    """Per picture, the rows of `num_dets`, `boxes`, `scores`, `labels` that hold detections."""
    return [Rows(boxes[:count], scores[:count], labels[:count]) for count, boxes, scores, labels in zip(*outputs[:4], strict=True)]


def pair_rows(reference: Rows, found: Rows) -> NDArray[np.intp]:
    """Positions (P, 2) of boxes of one class that overlap by more than `PAIR_IOU`; each is used once.

    Boxes at the same place of both lists go first, then the best box of the reference takes what overlaps it most.
    """
    ranked = min(len(reference), len(found))
    same = (reference.labels[:ranked] == found.labels[:ranked]) & (row_iou(reference.boxes[:ranked], found.boxes[:ranked]) > PAIR_IOU)
    pairs = [(i, i) for i in np.flatnonzero(same).tolist()]
    rest, free = np.setdiff1d(np.arange(len(reference)), np.flatnonzero(same)), np.ones(len(found), bool)
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
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    overlap = sides.clip(0).prod(axis=-1)
    union = (first[..., 2:] - first[..., :2]).prod(axis=-1) + (second[..., 2:] - second[..., :2]).prod(axis=-1) - overlap
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((first == second).all(axis=-1), 1.0, np.nan_to_num(overlap / union, nan=0.0, posinf=0.0, neginf=0.0))
