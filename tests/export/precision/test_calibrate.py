"""Histograms and ranges of a graph's values on images."""

import contextlib
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector
from recording import RecordingReporter

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.data.images import read_image
from tood_deploy.errors import ArtefactError, InputError
from tood_deploy.export.config import CalibrationMethod
from tood_deploy.export.precision import calibrate as calibration_module
from tood_deploy.export.precision.activations import ActivationReader
from tood_deploy.export.precision.calibrate import (
    BINS,
    ENTROPY_BINS,
    ENTROPY_LEVELS,
    FP16_MIN_NORMAL,
    PERCENTILE,
    SAMPLES,
    Calibration,
    Histogram,
    ValueRange,
    array_range,
    calibrate,
    choose_images,
    measure_ranges,
    values_at_risk,
)
from tood_deploy.preprocess import resize_and_pad

IMGSZ = (64, 96)
VALUES = ("pixels", "c3", "p5")
IMAGES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(IMAGES):
        cv2.imwrite(str(folder / f"{seed}.png"), synthetic_image(50 + 20 * seed, 90, seed))
    return folder


@pytest.fixture(scope="module")
def whole(
    model: onnx.ModelProto, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Calibration:
    return calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path_factory.mktemp("cache"))


def assert_equal(first: Calibration, second: Calibration) -> None:
    assert first.histograms.keys() == second.histograms.keys()
    for name, histogram in first.histograms.items():
        other = second.histograms[name]
        np.testing.assert_array_equal(histogram.counts, other.counts)
        assert (histogram.limit, histogram.low, histogram.high) == (
            other.limit,
            other.low,
            other.high,
        )


class TestGathering:
    def test_ranges_are_those_of_the_activations(
        self, whole: Calibration, model: onnx.ModelProto, folder: Path
    ) -> None:
        reader = ActivationReader(model, VALUES)
        prepared = [resize_and_pad(read_image(path), IMGSZ) for path in sorted(folder.iterdir())]
        parts = [
            part
            for image, transform in prepared
            for part in reader.read(image, transform.resized_hw)
        ]
        for name, (low, high) in whole.ranges("minmax").items():
            arrays = [part[name] for part in parts if name in part]
            assert len(arrays) == IMAGES
            assert (low, high) == (
                min(array.min() for array in arrays),
                max(array.max() for array in arrays),
            )
        assert whole.ranges("minmax")["c3"][0] == 0.0  # behind a ReLU

    def test_same_preprocessing_as_the_detector(self, whole: Calibration) -> None:
        low, high = whole.ranges("minmax")["pixels"]
        assert -2.2 < low < -1.5
        assert 1.5 < high < 2.7  # normalised, not 0 to 255

    def test_images_are_spread_over_the_folder(self, folder: Path) -> None:
        assert [path.name for path in choose_images(folder, 3)] == ["0.png", "2.png", "4.png"]
        assert len(choose_images(folder, 99)) == IMAGES

    def test_few_images_are_a_warning(
        self, model: onnx.ModelProto, folder: Path, tmp_path: Path
    ) -> None:
        reporter = RecordingReporter()
        calibrate(model, VALUES[:1], folder, IMGSZ, cache=tmp_path, max_images=2, reporter=reporter)
        (line,) = reporter.lines
        assert line.startswith("warning: ")
        assert "fewer than 64" in line

    def test_numbers_that_are_none_are_refused(
        self, model: onnx.ModelProto, folder: Path, tmp_path: Path
    ) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        bias = next(
            value
            for value in broken.graph.initializer
            if value.name.endswith("backbone.conv1.weight_bias")
        )
        array = onnx.numpy_helper.to_array(bias).copy()
        array[0] = np.nan
        bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
        with pytest.raises(ArtefactError, match=r"not numbers in (c3|p5)"):
            calibrate(broken, VALUES, folder, IMGSZ, cache=tmp_path)


class TestKept:
    def test_an_interrupted_run_goes_on(
        self,
        whole: Calibration,
        model: onnx.ModelProto,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(calibration_module, "SAVE_EVERY", 2)
        add_image, added = calibration_module._add_image, list[str]()

        def interrupted(*arguments: Any) -> None:
            added.append(arguments[2].name)
            if len(added) == 4:
                raise KeyboardInterrupt
            add_image(*arguments)

        monkeypatch.setattr(calibration_module, "_add_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path)
        resumed = calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path)
        assert added[4:] == ["2.png", "3.png", "4.png"], "two images were kept"
        assert_equal(resumed, whole)

    def test_what_is_done_is_not_run_again(
        self,
        whole: Calibration,
        model: onnx.ModelProto,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path)
        monkeypatch.setattr(calibration_module, "ActivationReader", None)
        assert_equal(calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path), whole)

    def test_another_image_size_or_graph_is_another_calibration(
        self, whole: Calibration, model: onnx.ModelProto, folder: Path, tmp_path: Path
    ) -> None:
        changed = shutil.copytree(folder, tmp_path / "changed")
        cv2.imwrite(str(changed / "3.png"), synthetic_image(40, 90, 99))
        other = onnx.ModelProto()
        other.CopyFrom(model)
        other.graph.initializer[0].doc_string = "another"
        runs: list[Callable[[], Calibration]] = [
            lambda: calibrate(model, VALUES, changed, IMGSZ, cache=tmp_path),
            lambda: calibrate(model, VALUES, folder, (64, 64), cache=tmp_path),
            lambda: calibrate(other, VALUES, folder, IMGSZ, cache=tmp_path),
        ]
        assert len({run().key for run in runs} | {whole.key}) == 4

    @pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut"])
    def test_a_damaged_file_is_told_and_made_anew(
        self,
        content: bytes,
        whole: Calibration,
        model: onnx.ModelProto,
        folder: Path,
        tmp_path: Path,
    ) -> None:
        (tmp_path / f"{whole.key[:32]}.npz").write_bytes(content)
        reporter = RecordingReporter()
        made = calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path, reporter=reporter)
        assert_equal(made, whole)
        assert any("calibrating anew" in line for line in reporter.lines)


class TestBadInput:
    def test_an_empty_folder(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no images in it"):
            calibrate(model, VALUES, tmp_path, IMGSZ, cache=tmp_path)

    def test_one_image(self, model: onnx.ModelProto, folder: Path, tmp_path: Path) -> None:
        shutil.copy(folder / "0.png", tmp_path)
        with pytest.raises(InputError, match="1 image to calibrate on; expected 64 or more"):
            calibrate(model, VALUES, tmp_path, IMGSZ, cache=tmp_path)
        with pytest.raises(InputError, match="1 image"):
            choose_images(folder, 1)

    def test_an_image_that_is_none(
        self, model: onnx.ModelProto, folder: Path, tmp_path: Path
    ) -> None:
        broken = shutil.copytree(folder, tmp_path / "broken")
        (broken / "1.png").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"1\.png: not an image"):
            calibrate(model, VALUES, broken, IMGSZ, cache=tmp_path)


def histogram_of(*arrays: NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def normal(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


class TestHistogram:
    def test_one_number(self) -> None:
        histogram = histogram_of(np.array([-3.0], np.float32))
        assert (histogram.low, histogram.high, histogram.counts.sum()) == (-3.0, -3.0, 1)
        assert all(
            histogram.range(method) == (-3.0, -3.0) for method in get_args(CalibrationMethod)
        )

    def test_zeros_alone_have_a_range_of_zero(self) -> None:
        histogram = histogram_of(np.zeros(7, np.float32), np.zeros(5, np.float32))
        assert histogram.counts.sum() == 12
        assert all(histogram.range(method) == (0.0, 0.0) for method in get_args(CalibrationMethod))

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


class TestArrayRange:
    def test_of_known_numbers(self) -> None:
        found = array_range(
            np.array([[0, -3.0], [FP16_MIN_NORMAL / 2, FP16_MIN_NORMAL]], np.float32)
        )
        assert (found.largest, found.nonzero, found.subnormal) == (3.0, 3, 1)
        assert found.p9999 == pytest.approx(3.0, rel=1e-3)

    def test_of_nothing(self) -> None:
        assert array_range(np.zeros((2, 0), np.float32)) == ValueRange()
        assert array_range(np.zeros(5, np.float32)).subnormal_share == 0

    def test_the_percentile_leaves_out_the_rare(self) -> None:
        numbers = np.linspace(0, 1, 100_000, dtype=np.float32)
        numbers[7] = 1000
        found = array_range(numbers)
        assert found.largest == 1000
        assert found.p9999 == pytest.approx(1, abs=1e-3)

    def test_a_union_is_over_both(self) -> None:
        first, second = ValueRange(1.0, 0.5, 10, 1), ValueRange(0.7, 0.6, 30, 3)
        assert first | second == second | first == ValueRange(1.0, 0.6, 40, 4)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (ValueRange(100, 90, 1000, 10), ""),
        (ValueRange(16_000, 1, 1000, 0), ""),
        (ValueRange(17_000, 1, 1000, 0), "reaches 1.7e+04"),
        (ValueRange(float("inf"), 1, 1000, 0), "reaches inf"),
        (ValueRange(float("nan"), 1, 1000, 0), "reaches nan"),
        (ValueRange(0.01, 0.01, 1000, 60), "6% of its numbers"),
    ],
)
def test_risk(found: ValueRange, word: str) -> None:
    assert bool(values_at_risk({"value": found})) == bool(word)
    assert word in found.risk


def test_ranges_over_a_folder(model: onnx.ModelProto, folder: Path) -> None:
    every = measure_ranges(model, ["c3", "p3"], folder, IMGSZ)
    first = measure_ranges(model, ["c3", "p3"], folder, IMGSZ, max_images=2)
    for name in ("c3", "p3"):
        assert every[name].largest >= first[name].largest >= first[name].p9999 > 0
        assert every[name].nonzero > first[name].nonzero
