"""Summaries of times, and how many times faster one series is than another.

Milliseconds come in, numbers go out. Knows nothing of what was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
CONFIDENCE_PERCENT = 95


@dataclass(frozen=True)
class Summary:
    """Of times in milliseconds.

    Attributes:
        count: measurements.
        median: in milliseconds, as all that follow.
        mean: of all.
        p90: 90th percentile.
        p95: 95th percentile.
        p99: 99th percentile; of few measurements that is their largest.
        spread: distance between the first and third quartile.
    """

    count: int
    median: float
    mean: float
    p90: float
    p95: float
    p99: float
    spread: float


def summarise(times_ms: Sequence[float] | NDArray[np.float64]) -> Summary:
    """Summarise at least one measurement."""
    values = np.asarray(times_ms, np.float64)
    first, median, third, p90, p95, p99 = np.percentile(values, [25, 50, 75, 90, 95, 99]).tolist()
    return Summary(len(values), median, float(values.mean()), p90, p95, p99, third - first)


@dataclass(frozen=True)
class Ratio:
    """A ratio and the interval that holds it with `CONFIDENCE_PERCENT` percent confidence."""

    value: float
    low: float
    high: float


def speedup(
    baseline_ms: Sequence[Sequence[float]], times_ms: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """Return how many times faster than a baseline it is: ratio of medians, bootstrap interval.

    Rounds are drawn with replacement, both sides of a round together, so that drift, which hits
    both, cancels out.

    Args:
        baseline_ms: times of every round; rounds in order.
        times_ms: the same rounds of what is compared.
        seed: of the resampling.
    """
    both = np.array(
        [
            [np.median(first), np.median(second)]
            for first, second in zip(baseline_ms, times_ms, strict=True)
        ]
    )
    drawn = np.random.default_rng(seed).integers(0, len(both), (RESAMPLES, len(both)))
    medians = np.median(both[drawn], axis=1)
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(medians[:, 0] / medians[:, 1], [tail, 100 - tail]).tolist()
    middle = np.median(both, axis=0)
    return Ratio(float(middle[0] / middle[1]), low, high)
