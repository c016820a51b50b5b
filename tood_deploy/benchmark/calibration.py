"""Whether a score means what it says: of the detections with a score of about 0.7, how many are right?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.coco_ap import OVERLAPS, Matches
from tood_deploy.benchmark.results import Results

BINS = 20


@dataclass(frozen=True, eq=False)
class Calibration:
    """Detections by score, in bins of equal width from 0 to 1.

    Attributes:
        counts: (N,) detections in each bin; crowds' are not counted.
        scores: (N,) mean score; NaN in empty bins.
        right50, right75: (N,) share that overlaps an object by 0.50 and 0.75 (IoU); NaN in empty bins.
    """

    counts: NDArray[np.int64]
    scores: NDArray[np.float64]
    right50: NDArray[np.float64]
    right75: NDArray[np.float64]

    @property
    def error50(self) -> float:
        """Expected calibration error at an overlap of 0.50."""
        return self._error(self.right50)

    @property
    def error75(self) -> float:
        """Expected calibration error at an overlap of 0.75."""
        return self._error(self.right75)

    def _error(self, right: NDArray[np.float64]) -> float:
        filled = self.counts > 0
        return float(np.sum(self.counts[filled] * np.abs(self.scores - right)[filled]) / max(self.counts.sum(), 1))


def calibrate(results: Results, matches: Matches) -> Calibration | None:
    """The calibration of all classes together; None where scores are no probabilities (outside 0 to 1)."""
    scores = results.scores[matches.rows]
    if len(scores) and (scores.min() < 0 or scores.max() > 1):
        return None
    sums = [_bin_sums(scores, ~matches.ignored[:, 0], scores)]
    for overlap in (0.50, 0.75):
        at = int(np.argmin(np.abs(np.array(OVERLAPS) - overlap)))
        sums.append(_bin_sums(scores, ~matches.ignored[:, 0], matches.found[:, at]))
    counts = _bin_sums(scores, ~matches.ignored[:, 0], np.ones_like(scores))
    means = (np.where(counts > 0, total / np.maximum(counts, 1), np.nan) for total in sums)
    return Calibration(counts.astype(np.int64), *means)


def _bin_sums(
    scores: NDArray[np.float64], counted: NDArray[np.bool_], values: NDArray[np.float64] | NDArray[np.bool_]
) -> NDArray[np.float64]:
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    return np.asarray(np.bincount(bins[counted], values[counted].astype(np.float64), BINS), np.float64)
