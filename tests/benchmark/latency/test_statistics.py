import numpy as np
import pytest

from tood_deploy.benchmark.latency.measure import speedup, summarise
from tood_deploy.benchmark.latency.worker import is_stable, warm_up


def test_a_summary_by_hand() -> None:
    found = summarise([1, 2, 3, 4, 100])
    assert (found.count, found.median, found.mean, found.spread) == (5, 3, 22, 2)
    assert found.p90 < found.p95 < found.p99 < 100


def test_one_measurement() -> None:
    found = summarise([7])
    assert (found.median, found.p99, found.spread) == (7, 7, 0)


def test_drift_that_hits_both_sides_cancels_out() -> None:
    drift = np.linspace(1, 3, 12)
    first, second = [[10 * d] * 3 for d in drift], [[5 * d] * 3 for d in drift]
    found = speedup(first, second)
    assert found.value == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2, 2))


def test_noise_widens_the_interval() -> None:
    random = np.random.default_rng(1)
    first = [random.normal(10, 1, 5).tolist() for _ in range(10)]
    second = [random.normal(8, 1, 5).tolist() for _ in range(10)]
    found = speedup(first, second)
    assert found.low < found.value < found.high
    assert found.low > 1
    assert found.high < 1.6


def test_the_interval_is_the_same_every_time() -> None:
    first, second = [[10.0, 11], [12, 9], [10, 10]], [[5.0, 7], [6, 5], [5, 5]]
    assert speedup(first, second) == speedup(first, second)


class Clock:
    """Time that goes on when a call is made."""

    def __init__(self, times_s: list[float]) -> None:
        self.now, self.times_s, self.calls = 0.0, times_s, 0

    def call(self) -> None:
        self.now += self.times_s[min(self.calls, len(self.times_s) - 1)]
        self.calls += 1


def test_a_warm_up_ends_when_times_no_longer_change() -> None:
    clock = Clock([1.0, 0.5, 0.3, 0.2] + [0.1] * 20)
    found = warm_up(clock.call, 100, lambda: clock.now)
    assert found.stable
    assert (
        found.calls == clock.calls == 12
    )  # ten calls whose two halves have the same median, after two slow ones
    assert found.times_ms[0] == pytest.approx(1000)
    assert found.seconds == pytest.approx(clock.now)


def test_a_warm_up_gives_up_and_says_so() -> None:
    clock = Clock([2.0**-i for i in range(40)])
    found = warm_up(clock.call, 1.9, lambda: clock.now)
    assert not found.stable
    assert found.calls < 10


def test_stability_needs_two_windows() -> None:
    assert not is_stable([1.0] * 9)
    assert is_stable([1.0] * 10)
    assert not is_stable([1.0] * 5 + [1.05] * 5)
