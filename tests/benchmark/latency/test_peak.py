import pytest

from tood_deploy.benchmark.latency import peak
from tood_deploy.benchmark.latency.peak import Peak, measure_peak, network_cost
from tood_deploy.presets import PRESETS


def test_a_peak_is_of_the_work_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "PRODUCT_SIDE", 64)
    monkeypatch.setattr(peak, "CONV_HW", (8, 8))
    monkeypatch.setattr(peak, "_best_seconds", lambda run, values, repeats: 0.5)
    measured = measure_peak(threads=1)
    assert measured.product == pytest.approx(2 * 64**3 / 1e9)
    assert measured.convolution == pytest.approx(2 * 8 * 8 * 9 * 256 * 256 / 1e9)
    assert measured.best == measured.convolution


def test_both_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "PRODUCT_SIDE", 64)
    monkeypatch.setattr(peak, "CONV_HW", (8, 8))
    measured = measure_peak(threads=1, repeats=1)
    assert measured.product > 0
    assert measured.convolution > 0


def test_the_better_of_two_measurements() -> None:
    assert Peak(1, 4, 2).better_of(Peak(3, 2, 2)) == Peak(3, 4, 2)


def test_the_cost_is_that_of_the_paper() -> None:
    parameters, gmacs = network_cost(PRESETS["r50-1x"], (800, 1344))
    assert parameters / 1e6 == pytest.approx(32.2, abs=0.05)
    assert gmacs == pytest.approx(210.4, abs=0.1)
