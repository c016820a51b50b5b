"""How the numbers of one activation are distributed, gathered over any number of pictures, and the range that 8 bits should span."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

Method = Literal["entropy", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 4096
SAMPLES = 2**15  # of one array; its smallest and largest number are exact
PERCENTILE = 99.99
ENTROPY_BINS = 1024  # the search takes time with the square of them
NOTHING = 1e-30  # what is smaller counts as zero
ENTROPY_LEVELS = 256  # of the whole range, as 8 bits have


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(BINS, np.int64)


@dataclass
class Histogram:
    """The distribution of one activation, of flat size.

    Attributes:
        counts: (BINS,) how many numbers lie in each of equal parts of -limit to limit; a sample of large arrays.
        limit: grows by doubling, which joins bins in pairs and so loses no count.
        low, high: the smallest and the largest number of all.
    """

    counts: NDArray[np.int64] = field(default_factory=_no_counts)
    limit: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def add(self, array: NDArray[Any]) -> None:
        """Adds the numbers of an array, which must be finite and at least one."""
        low, high = float(array.min()), float(array.max())
        self.low, self.high = (min(self.low, low), max(self.high, high)) if self.counts.any() else (low, high)
        self._grow(max(-low, high))
        step = -(-array.size // SAMPLES) | 1  # odd, so that not always the same columns of a map are met
        self.counts += np.histogram(array.ravel()[::step], BINS, (-self.limit or -1.0, self.limit or 1.0))[0]

    def _grow(self, largest: float) -> None:
        if not self.limit and largest > NOTHING:
            counts, self.limit = self.counts.sum(), largest
            self.counts[:] = 0
            self.counts[BINS // 2] = counts  # all zeros so far
        while 0 < self.limit < largest:
            self.limit *= 2
            self.counts = np.pad(_pairs_joined(self.counts), BINS // 4)

    def range(self, method: Method) -> tuple[float, float]:
        """The lowest and the highest number that 8 bits should hold; what lies beyond is clipped."""
        if method == "minmax" or not self.limit:
            return self.low, self.high
        low, high = self._percentile_range() if method == "percentile" else self._entropy_range()
        return max(low, self.low), min(high, self.high)

    def _percentile_range(self) -> tuple[float, float]:
        """Leaves the rarest 1 of 10,000 numbers out, half of them at each end."""
        cut = (100 - PERCENTILE) / 200
        shares = self.counts.cumsum() / self.counts.sum()
        first, last = np.searchsorted(shares, (cut, 1 - cut))
        edges = self._edges(BINS)
        return float(edges[first]), float(edges[last + 1])

    def _entropy_range(self) -> tuple[float, float]:
        """Where clipping loses least information, by the divergence of the quantised distribution from the real one."""
        counts = self.counts
        while len(counts) > ENTROPY_BINS:
            counts = _pairs_joined(counts)
        counts = counts.copy()
        counts[ENTROPY_BINS // 2] = counts[ENTROPY_BINS // 2 + 1]  # what a ReLU makes zero is exact in 8 bits, and would hide the rest
        edges = self._edges(ENTROPY_BINS).astype(np.float32)
        collector = HistogramCollector("entropy", False, ENTROPY_BINS, ENTROPY_LEVELS, PERCENTILE, "same")
        low, high = collector.get_entropy_threshold((counts, edges, edges[0], edges[-1], self.limit), ENTROPY_LEVELS)
        return float(low), float(high)

    def _edges(self, bins: int) -> NDArray[np.float64]:
        return np.linspace(-self.limit, self.limit, bins + 1)


def _pairs_joined(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return counts.reshape(-1, 2).sum(axis=1)
