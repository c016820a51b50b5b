"""Calls something until its time no longer changes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 5
STABLE_WITHIN = 0.03


@dataclass(frozen=True)
class WarmUp:
    """How a warm-up went.

    Attributes:
        calls: how many it took.
        seconds: how long.
        stable: whether the medians of the last two windows of 5 calls agree within 3%; otherwise time ran out.
        times_ms: of every call, in order.
    """

    calls: int
    seconds: float
    stable: bool
    times_ms: tuple[float, ...]


def warm_up(call: Callable[[], object], most_seconds: float, clock: Callable[[], float] = time.perf_counter) -> WarmUp:
    """Calls until stable, at least twice, at most for about `most_seconds`."""
    started = clock()
    times_ms: list[float] = []
    stable = False
    while not stable and (len(times_ms) < 2 or clock() - started < most_seconds):
        before = clock()
        call()
        times_ms.append((clock() - before) * 1000)
        stable = is_stable(times_ms)
    return WarmUp(len(times_ms), clock() - started, stable, tuple(times_ms))


def is_stable(times_ms: list[float]) -> bool:
    """Whether the medians of the last two windows agree."""
    if len(times_ms) < 2 * WINDOW:
        return False
    before, last = statistics.median(times_ms[-2 * WINDOW : -WINDOW]), statistics.median(times_ms[-WINDOW:])
    return abs(last - before) <= STABLE_WITHIN * before
