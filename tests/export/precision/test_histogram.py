"""Histograms that grow, and the ranges they give: against NumPy's quantiles and ONNX Runtime's own entropy search."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from tood_deploy.export.precision.calibrate import (
    BINS,
    ENTROPY_BINS,
    ENTROPY_LEVELS,
    METHODS,
    PERCENTILE,
    SAMPLES,
    Histogram,
)


def histogram_of(*arrays: NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def normal(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


class TestGathering:
    def test_one_number(self) -> None:
        histogram = histogram_of(np.array([-3.0], np.float32))
        assert (histogram.low, histogram.high, histogram.counts.sum()) == (-3.0, -3.0, 1)
        assert all(histogram.range(method) == (-3.0, -3.0) for method in METHODS)

    def test_zeros_alone_have_a_range_of_zero(self) -> None:
        histogram = histogram_of(np.zeros(7, np.float32), np.zeros(5, np.float32))
        assert histogram.counts.sum() == 12
        assert all(histogram.range(method) == (0.0, 0.0) for method in METHODS)

    def test_zeros_before_other_numbers_stay_zeros(self) -> None:
        zeros_first = histogram_of(np.zeros(9, np.float32), np.array([2.0, -1.0], np.float32))
        at_once = histogram_of(np.array([2.0, -1.0, *[0] * 9], np.float32))
        np.testing.assert_array_equal(zeros_first.counts, at_once.counts)
        assert (zeros_first.low, zeros_first.high) == (-1.0, 2.0)

    @given(
        st.lists(
            st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
            min_size=1,
            max_size=6,
        )
    )
    @settings(max_examples=100, deadline=None)
    def test_growing_loses_nothing(self, lists: Sequence[Sequence[float]]) -> None:
        arrays = [np.array(numbers, np.float32) for numbers in lists]
        histogram, every = histogram_of(*arrays), np.concatenate(arrays)
        assume(histogram.limit)
        assert histogram.counts.sum() == len(every)
        assert (histogram.low, histogram.high) == (every.min(), every.max())
        assert histogram.limit >= np.abs(every).max()
        width = 2 * histogram.limit / BINS
        below = np.cumsum(histogram.counts)
        for position in range(
            0, BINS, 97
        ):  # each number lies in its bin, but for the rounding of the edges
            edge = -histogram.limit + (position + 1) * width
            assert (every < edge - width).sum() <= below[position] <= (every < edge + width).sum()

    def test_of_large_arrays_a_sample_and_the_exact_ends(self) -> None:
        array = normal(20 * SAMPLES).reshape(20, 64, -1)
        array[13, 7, 5] = 99.0
        histogram = histogram_of(array)
        assert histogram.counts.sum() <= SAMPLES
        assert histogram.high == 99.0


class TestRanges:
    def test_minmax_is_exact(self) -> None:
        array = normal(1000)
        assert histogram_of(array[:400], array[400:]).range("minmax") == (array.min(), array.max())

    def test_percentile_equals_numpy(self) -> None:
        parts = [normal(30_000, seed) * scale for seed, scale in enumerate((1, 3, 0.5))]
        histogram = histogram_of(*parts)
        cut = (100 - PERCENTILE) / 2
        expected = np.percentile(np.concatenate(parts), (cut, 100 - cut))
        # Ten numbers lie beyond, so that quantiles themselves are uncertain by some bins.
        np.testing.assert_allclose(
            histogram.range("percentile"), expected, atol=20 * 2 * histogram.limit / BINS
        )

    def test_percentile_equals_onnxruntime(self) -> None:
        histogram = histogram_of(normal(50_000)[:SAMPLES])
        collector = HistogramCollector(
            "percentile", False, BINS, ENTROPY_LEVELS, PERCENTILE, "same"
        )
        edges = np.linspace(-histogram.limit, histogram.limit, BINS + 1).astype(np.float32)
        collector.histogram_dict = {"x": (histogram.counts, edges, histogram.low, histogram.high)}
        with contextlib.redirect_stdout(io.StringIO()):
            expected = collector.compute_percentile()["x"][:2]
        np.testing.assert_allclose(
            histogram.range("percentile"), expected, atol=1.01 * 2 * histogram.limit / BINS
        )

    @pytest.mark.parametrize("power", [1, 3])
    def test_entropy_equals_onnxruntime(self, power: int) -> None:
        array = normal(SAMPLES - 10) ** power
        histogram = histogram_of(array)
        counts, edges = np.histogram(array, ENTROPY_BINS, (-histogram.limit, histogram.limit))
        counts[ENTROPY_BINS // 2] = counts[ENTROPY_BINS // 2 + 1]
        collector = HistogramCollector(
            "entropy", False, ENTROPY_BINS, ENTROPY_LEVELS, PERCENTILE, "same"
        )
        ends = edges.astype(np.float32)[[0, -1]]
        expected = collector.get_entropy_threshold(
            (counts, edges.astype(np.float32), *ends, histogram.limit), ENTROPY_LEVELS
        )
        low, high = histogram.range("entropy")
        assert (low, high) == pytest.approx(
            (max(expected[0], histogram.low), min(expected[1], histogram.high)), rel=0.02
        )

    def test_zeros_of_a_relu_do_not_make_entropy_clip(self) -> None:
        array = np.maximum(normal(SAMPLES - 10) - 0.5, 0)
        assert (array == 0).mean() > 0.6
        assert histogram_of(array).range("entropy")[1] > 0.8 * np.quantile(array, 0.999)

    def test_an_outlier_is_clipped_by_percentile_not_by_minmax(self) -> None:
        array = normal(SAMPLES - 10)
        array[5] = 1000.0
        histogram = histogram_of(array)
        assert histogram.range("minmax")[1] == 1000.0
        assert histogram.range("percentile")[1] < 10.0
        assert histogram.range("entropy")[1] < 500.0
