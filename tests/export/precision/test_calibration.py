"""Calibration on images: against the activations themselves, interrupted and resumed, kept and refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import ArtefactError, InputError
from tood_deploy.export.precision import calibrate as calibration_module
from tood_deploy.export.precision.activations import iterate_activations
from tood_deploy.export.precision.calibrate import Calibration, calibrate, choose_images

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
        found = list(iterate_activations(model, folder, IMGSZ, VALUES))
        for name, (low, high) in whole.ranges("minmax").items():
            arrays = [some[name] for some in found if name in some]
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
        said: list[str] = []
        calibrate(model, VALUES[:1], folder, IMGSZ, cache=tmp_path, most=2, say=said.append)
        assert len(said) == 1
        assert "2 images to calibrate on; with fewer than 64" in said[0]

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

        def interrupt(done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path, progress=interrupt)
        seen: list[int] = []
        resumed = calibrate(
            model,
            VALUES,
            folder,
            IMGSZ,
            cache=tmp_path,
            progress=lambda done, total: seen.append(done),
        )
        assert seen == [2, 3, 4, 5]
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
        said: list[str] = []
        assert_equal(
            calibrate(model, VALUES, folder, IMGSZ, cache=tmp_path, say=said.append), whole
        )
        assert any("calibrating anew" in line for line in said)


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

    def test_a_image_that_is_none(
        self, model: onnx.ModelProto, folder: Path, tmp_path: Path
    ) -> None:
        broken = shutil.copytree(folder, tmp_path / "broken")
        (broken / "1.png").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"1\.png: cannot be read"):
            calibrate(model, VALUES, broken, IMGSZ, cache=tmp_path)
