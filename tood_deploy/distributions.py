"""How images and what is detected in them are distributed, and how far two of these are apart.

Sizes of images and their detections come in; counts for a manifest and shares for metrics go out.
Exports count the images of calibration, the server those that it is sent. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tood_deploy.manifest_sections import ImageStatistics

# Detections above this score count, on both sides: below it are more guesses than objects.
COUNTED_CONF = 0.3
SCORE_BINS = 14  # of 0.05 each, from `COUNTED_CONF` to 1
# An image's size is the root of its pixels; a bin is a factor of the root of two.
SMALLEST_SIZE, SIZE_BINS = 64.0, 16
KINDS = ("scores", "classes", "sizes")
# Added to the counts of bins that one side has seen, so that the other's zero gives no infinity.
PSEUDO_COUNT = 0.5


class ImageCounter:
    """Counts images and their detections.

    Attributes:
        images: how many were counted; of a window, its weight.
        counts: by a name of `KINDS`, of every bin.
    """

    def __init__(self, classes: int, window: int | None = None) -> None:
        """Count nothing yet.

        Args:
            classes: K of the model.
            window: about how many of the last images count; all where not given.
        """
        self._keep = 1.0 if window is None else 1 - 1 / window
        self.images = 0.0
        self.counts = {
            "scores": np.zeros(SCORE_BINS),
            "classes": np.zeros(classes),
            "sizes": np.zeros(SIZE_BINS),
        }

    def add(
        self, size_hw: tuple[int, int], scores: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> None:
        """Count an image.

        Args:
            size_hw: rows and columns of the original.
            scores: (D,) of its detections, those up to `COUNTED_CONF` are left out.
            labels: (D,) their class numbers.
        """
        kept = scores > COUNTED_CONF
        places = (scores[kept] - COUNTED_CONF) / (1 - COUNTED_CONF) * SCORE_BINS
        bins = {
            "scores": np.clip(places.astype(int), 0, SCORE_BINS - 1),
            "classes": labels[kept],
            "sizes": np.array([size_bin(size_hw)]),
        }
        self.images = self.images * self._keep + 1
        for kind, counts in self.counts.items():
            counts *= self._keep
            counts += np.bincount(bins[kind], minlength=len(counts))

    def statistics(self) -> ImageStatistics:
        """Return the counts for a manifest."""
        scores, classes, sizes = (
            tuple(int(count) for count in self.counts[kind]) for kind in KINDS
        )
        return ImageStatistics(round(self.images), COUNTED_CONF, scores, classes, sizes)


def size_bin(size_hw: tuple[int, int]) -> int:
    """Return the number of the bin of an image's size."""
    size = np.sqrt(size_hw[0] * size_hw[1])
    return int(np.clip(np.floor(2 * np.log2(size / SMALLEST_SIZE)) + 1, 0, SIZE_BINS - 1))


def bin_names(kind: str, class_names: Sequence[str]) -> list[str]:
    """Return the names of the bins: class names, else the lower edges.

    Args:
        kind: one of `KINDS`.
        class_names: of the model.
    """
    if kind == "classes":
        return [*class_names]
    if kind == "scores":
        step = (1 - COUNTED_CONF) / SCORE_BINS
        return [f"{COUNTED_CONF + number * step:.2f}" for number in range(SCORE_BINS)]
    edges = SMALLEST_SIZE * 2 ** (np.arange(SIZE_BINS - 1) / 2)
    return ["0", *(f"{edge:.0f}" for edge in edges)]


def shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of every bin; zeros where nothing was counted."""
    total = counts.sum()
    return counts / total if total else np.zeros_like(counts)


def stability_index(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """Return the population stability index of two sets of counts over the same bins.

    The sum over bins of (a - e) ln(a / e): 0 where they are alike, above 0.25 by custom a change
    that somebody should look at. Few counts alone make about (bins - 1)(1 / n + 1 / m).

    Args:
        expected, actual: counts.
    """
    seen = (expected + actual) > 0
    first, second = (
        (counts[seen] + PSEUDO_COUNT) / (counts.sum() + PSEUDO_COUNT * seen.sum())
        for counts in (expected, actual)
    )
    return float(((second - first) * np.log(second / first)).sum())
