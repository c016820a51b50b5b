"""Ranges of values over images, and what fp16 cannot hold: found, kept in float32, and reported."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from manifest_values import plain
from onnx import numpy_helper

from tood_deploy.engines import open_engine
from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.export.precision.calibrate import (
    FP16_LEAST_NORMAL,
    ValueRange,
    array_range,
    measure_ranges,
    values_at_risk,
)
from tood_deploy.export.precision.convert import low_precision_onnx
from tood_deploy.export.precision.half import emulate_low_precision
from tood_deploy.manifest import METADATA_KEY, Manifest

TOWER = "detector.model.bbox_head.inter_convs.0.conv.weight"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, synth_image_bgr: Any) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, size in enumerate([(48, 64), (64, 64), (64, 40)]):
        cv2.imwrite(str(folder / f"{i}.png"), synth_image_bgr(*size))
    return folder


@pytest.fixture(scope="module")
def small_artefact(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported network, for small images, without a manifest beside it."""
    return rewritten(tiny_artefact, tmp_path_factory.mktemp("small") / "small.onnx")


def rewritten(source: Path, path: Path, factor: float = 1.0) -> Path:
    """A copy for images of 64 x 96, the kernel of whose tower's first stage is `factor` times as large."""
    model = onnx.load(source)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == TOWER)
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), TOWER)
    )
    manifest = Manifest.from_json(model.metadata_props[0].value, "metadata")
    values = manifest.preset.to_dict() | {"imgsz": [64, 96]}
    onnx.helper.set_model_props(
        model, {METADATA_KEY: Manifest(type(manifest.preset).from_dict(values)).to_json()}
    )
    onnx.save(model, path)
    return path


def rounded(path: Path) -> Path:
    """A copy in which nothing is left unrounded: ONNX Runtime computes fp16 layers in float32 and leaves out casts between them."""
    copy = path.with_stem(f"{path.stem}-rounded")
    onnx.save(emulate_low_precision(onnx.load(path)), copy)
    return copy


class TestArrayRange:
    def test_of_known_numbers(self) -> None:
        found = array_range(
            np.array([[0, -3.0], [FP16_LEAST_NORMAL / 2, FP16_LEAST_NORMAL]], np.float32)
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


def test_ranges_over_a_folder(small_artefact: Path, images: Path) -> None:
    told = []
    found = measure_ranges(
        small_artefact,
        ["c3", "p3"],
        images,
        (64, 96),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    once = measure_ranges(small_artefact, ["c3", "p3"], images, (64, 96), most=2)
    for name in ("c3", "p3"):
        assert found[name].largest >= once[name].largest >= once[name].p9999 > 0
        assert found[name].nonzero > once[name].nonzero


class TestHalfPrecisionArtefact:
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_says_what_it_is(self, small_artefact: Path, tmp_path: Path, precision: Any) -> None:
        output = tmp_path / "half.onnx"
        build = low_precision_onnx(small_artefact, output, precision, keep=["*tood_reg"])
        options: Any = json.loads(json.dumps(build.to_dict()))
        model = onnx.load(output)
        manifest = Manifest.from_json(model.metadata_props[0].value, "metadata")
        assert manifest.precision == precision
        assert plain(manifest)["options"] == options
        assert options["opset"] == model.opset_import[0].version
        assert options["half_precision"]["kept"]["bbox_head.tood_reg"] == "*tood_reg: asked for"
        assert "backbone.conv1" in options["half_precision"]["lowered"]
        assert output.stat().st_size < 0.6 * small_artefact.stat().st_size

    @pytest.mark.slow
    def test_overflow_is_found_kept_and_reported(
        self, tiny_artefact: Path, images: Path, tmp_path: Path, synth_image_bgr: Any
    ) -> None:
        wild = rewritten(
            tiny_artefact, tmp_path / "wild.onnx", 1e5
        )  # normalisation behind it takes the factor out again
        image, valid_hw = synth_image_bgr(64, 96)[None], np.array([[64, 96]], np.int32)
        low_precision_onnx(wild, tmp_path / "blind.onnx", "fp16")
        with (
            open_engine(rounded(tmp_path / "blind.onnx")) as engine,
            pytest.raises(ArtefactError, match="NaN"),
        ):
            engine.infer(image, valid_hw, 0.05, 0.6)
        said: list[str] = []
        build = low_precision_onnx(
            wild, tmp_path / "careful.onnx", "fp16", calib_data=images, say=said.append
        )
        options: Any = json.loads(json.dumps(build.to_dict()))
        assert "3 images to calibrate on; with fewer than 64" in said[0]
        assert "fp16 cannot hold" in said[1]
        assert any("stays float32: " in line and "reaches" in line for line in said[2:])
        report = options["half_precision"]
        assert [name for name, reason in report["kept"].items() if "reaches" in reason] == [
            "bbox_head.inter_convs.0.conv"
        ]
        assert any("reaches" in found["risk"] for found in report["ranges"].values())
        with open_engine(rounded(tmp_path / "careful.onnx")) as half, open_engine(wild) as full:
            found, expected = (engine.infer(image, valid_hw, 0.05, 0.6) for engine in (half, full))
        np.testing.assert_allclose(found.scores[0, :5], expected.scores[0, :5], atol=0.01)

    def test_bad_input(self, small_artefact: Path, tmp_path: Path) -> None:
        low_precision_onnx(small_artefact, tmp_path / "half.onnx", "fp16")
        with pytest.raises(ToodError, match="is in fp16 already"):
            low_precision_onnx(tmp_path / "half.onnx", tmp_path / "again.onnx", "bf16")
        with pytest.raises(ToodError, match="no such folder"):
            low_precision_onnx(
                small_artefact, tmp_path / "again.onnx", "fp16", calib_data=tmp_path / "absent"
            )
        assert not (tmp_path / "again.onnx").exists()
