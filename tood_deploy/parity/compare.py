"""Which detections of two runs are the same. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tood_deploy.rows import Rows, pair_rows, row_iou


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


def match_detections(reference: Rows, found: Rows, score_tolerance: float, box_tolerance_px: float) -> Match:
    """Pair detections of one class whose scores and coordinates agree within the tolerances; each is used once, best first."""
    free = np.ones(len(found), bool)
    pairs: list[tuple[float, float]] = []
    for box, score, label in zip(reference.boxes, reference.scores, reference.labels, strict=True):
        score_off = np.abs(found.scores - score)
        box_off = np.abs(found.boxes - box).max(axis=1, initial=0)
        fitting = np.flatnonzero(free & (found.labels == label) & (score_off <= score_tolerance) & (box_off <= box_tolerance_px))
        if len(fitting):
            best = fitting[box_off[fitting].argmin()]
            free[best] = False
            pairs.append((float(score_off[best]), float(box_off[best])))
    score_deviation, box_deviation = (max(values, default=0.0) for values in (zip(*pairs, strict=True) if pairs else ((), ())))
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
