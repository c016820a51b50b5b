"""How far arrays of numbers are from a reference, gathered over any number of pictures in flat memory. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BINS_PER_DECADE, LOWEST_POWER, HIGHEST_POWER = 40, -12, 8
LARGEST_SAMPLE = 50_000  # elements of one array that the quantile looks at


def _no_counts() -> NDArray[np.int64]:
    return np.zeros((HIGHEST_POWER - LOWEST_POWER) * BINS_PER_DECADE + 1, np.int64)


@dataclass
class Deviation:
    """Absolute differences from a reference.

    Attributes:
        tolerance: what counts as outside lies above it.
        relative: whether the tolerance is in units of the reference's root mean square, array by array.
        elements: numbers compared.
        outside: of these, outside the tolerance; what is not a number is.
        not_numbers: NaN or infinite where the reference is not, or without a counterpart because shapes differ.
        largest: the largest difference of numbers.
        squares, reference_squares: sums of squares, for the relative L2 norm.
        counts: how many of a sample lie in which power of ten.
    """

    tolerance: float = 0.0
    relative: bool = False
    elements: int = 0
    outside: int = 0
    not_numbers: int = 0
    largest: float = 0.0
    squares: float = 0.0
    reference_squares: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=_no_counts, repr=False)

    def add(self, reference: NDArray[np.floating], found: NDArray[np.floating]) -> None:
        """Adds two arrays; with other shapes nothing of them can be compared, and all of it counts as not a number."""
        if reference.shape != found.shape:
            found = np.full_like(reference, np.nan)
        known = np.isfinite(reference)
        both = known & np.isfinite(found)
        difference = np.abs(np.where(both, found, 0) - np.where(both, reference, 0)).ravel()
        reference = np.where(known, reference, 0)
        not_numbers = int(known.sum() - both.sum())
        self.elements += difference.size
        self.not_numbers += not_numbers
        unit = float(np.sqrt(np.square(reference, dtype=np.float64).mean())) if self.relative and reference.size else 1.0
        self.outside += int((difference > self.tolerance * unit).sum()) + not_numbers
        self.largest = max(self.largest, float(difference.max(initial=0)))
        self.squares += float(np.square(difference, dtype=np.float64).sum())
        self.reference_squares += float(np.square(reference, dtype=np.float64).sum())
        self._count(difference[:: max(1, difference.size // LARGEST_SAMPLE)])

    def _count(self, sample: NDArray[np.floating]) -> None:
        powers = np.log10(np.maximum(sample, 10.0**LOWEST_POWER)) - LOWEST_POWER
        bins = np.ceil(powers * BINS_PER_DECADE).astype(int).clip(0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def __add__(self, other: Deviation) -> Deviation:
        """Both together."""
        return Deviation(
            max(self.tolerance, other.tolerance),
            self.relative,
            self.elements + other.elements,
            self.outside + other.outside,
            self.not_numbers + other.not_numbers,
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.reference_squares + other.reference_squares,
            self.counts + other.counts,
        )

    @property
    def p99(self) -> float:
        """99 of 100 differences are at most this, to within 6%; 0 below 1e-12."""
        if not self.counts.sum():
            return 0.0
        bin_number = int(np.searchsorted(self.counts.cumsum(), 0.99 * self.counts.sum()))
        return min(self.largest, 10.0 ** (LOWEST_POWER + bin_number / BINS_PER_DECADE)) if bin_number else 0.0

    @property
    def relative_l2(self) -> float:
        """L2 norm of the difference over that of the reference; infinite where anything is not a number."""
        if self.not_numbers:
            return float("inf")
        return float(np.sqrt(self.squares / self.reference_squares)) if self.reference_squares else float(self.squares > 0)

    @property
    def worst(self) -> float:
        """The largest difference; infinite where anything is not a number."""
        return float("inf") if self.not_numbers else self.largest

    @property
    def outside_share(self) -> float:
        """0 to 1."""
        return self.outside / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """Plain values."""
        return {
            "max": self.worst,
            "p99": self.p99,
            "relative_l2": self.relative_l2,
            "outside_share": self.outside_share,
            "tolerance": self.tolerance,
            "elements": self.elements,
            "not_numbers": self.not_numbers,
        }
