"""Pairs the boxes of two runs on the same picture by class and overlap. NumPy alone; knows no thresholds of detectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.deviation import Deviation
from tood_deploy.export.compare import Rows

PAIR_IOU = 0.75  # above every sensible threshold of suppression, so that no kept neighbour is taken for the box itself


def pair_rows(reference: Rows, found: Rows) -> NDArray[np.intp]:
    """Positions (P, 2) of boxes of one class that overlap by more than `PAIR_IOU`; each is used once.

    Boxes at the same place of both lists go first, then the best box of the reference takes what overlaps it most.
    """
    ranked = min(len(reference), len(found))
    same = (reference.labels[:ranked] == found.labels[:ranked]) & (_row_iou(reference.boxes[:ranked], found.boxes[:ranked]) > PAIR_IOU)
    pairs = [(i, i) for i in np.flatnonzero(same).tolist()]
    rest, free = np.setdiff1d(np.arange(len(reference)), np.flatnonzero(same)), np.ones(len(found), bool)
    free[:ranked] = ~same
    for i in rest.tolist():
        fitting = np.flatnonzero(free & (found.labels == reference.labels[i]))
        if len(fitting):
            overlaps = _row_iou(reference.boxes[i], found.boxes[fitting])
            if overlaps.max() > PAIR_IOU:
                best = fitting[overlaps.argmax()]
                free[best] = False
                pairs.append((i, int(best)))
    return np.array(pairs, np.intp).reshape(-1, 2)


def _row_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.floating]:
    """Overlap (N,) of boxes (N, 4) xyxy, or of one box (4,), with (N, 4); 1 for a box with itself, even one without area."""
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    overlap = sides.clip(0).prod(axis=-1)
    union = (first[..., 2:] - first[..., :2]).prod(axis=-1) + (second[..., 2:] - second[..., :2]).prod(axis=-1) - overlap
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((first == second).all(axis=-1), 1.0, np.nan_to_num(overlap / union, nan=0.0, posinf=0.0, neginf=0.0))


@dataclass
class RowDeviation:
    """What became of the reference's boxes, over all pictures.

    Attributes:
        score, box_px: shifts of the paired boxes' scores and coordinates (pixels).
        reference: boxes of the reference.
        matched: of these, found again.
        added: boxes that only the other has.
        not_numbers: boxes with a NaN or infinite coordinate or score.
    """

    score: Deviation = field(default_factory=Deviation)
    box_px: Deviation = field(default_factory=Deviation)
    reference: int = 0
    matched: int = 0
    added: int = 0
    not_numbers: int = 0

    def add(self, reference: Rows, found: Rows) -> NDArray[np.intp]:
        """Adds one picture; gives the pairs, as `pair_rows` does."""
        self.not_numbers += int((~np.isfinite(found.scores) | ~np.isfinite(found.boxes).all(axis=1)).sum())
        pairs = pair_rows(reference, found)
        self.score.add(reference.scores[pairs[:, 0]], found.scores[pairs[:, 1]])
        self.box_px.add(reference.boxes[pairs[:, 0]], found.boxes[pairs[:, 1]])
        self.reference += len(reference)
        self.matched += len(pairs)
        self.added += len(found) - len(pairs)
        return pairs

    @property
    def lost(self) -> int:
        """Boxes that only the reference has."""
        return self.reference - self.matched

    @property
    def matched_share(self) -> float:
        """Of the boxes of either run, those that both have: 0 to 1; 1 where there are none."""
        either = self.reference + self.added
        return self.matched / either if either else 1.0

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {
            "reference": self.reference,
            "matched": self.matched,
            "lost": self.lost,
            "added": self.added,
            "matched_share": self.matched_share,
            "not_numbers": self.not_numbers,
            "score": self.score.to_dict(),
            "box_px": self.box_px.to_dict(),
        }
