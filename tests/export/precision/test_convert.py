"""From a float32 artefact to one in int8 or half precision, in memory, and how the two compare."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from manifest_values import plain
from onnx import numpy_helper
from recording import RecordingReporter

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import open_engine
from tood_deploy.errors import ArtefactError, InputError, ToodError
from tood_deploy.export.precision import convert as convert_module
from tood_deploy.export.precision.convert import (
    Int8Options,
    image_statistics,
    lower_artefact,
    quantize_artefact,
)
from tood_deploy.export.precision.half import emulate_low_precision
from tood_deploy.export.precision.sensitivity import DetectionMismatch, Sensitivity
from tood_deploy.onnx_file import OnnxArtefact, artefact_in_memory, read_onnx, write_onnx
from tood_deploy.parity.onnx_reference import onnx_reference

OPTIONS = Int8Options(method="minmax")
TOWER = "detector.model.bbox_head.inter_convs.0.conv.weight"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), synthetic_image(90, 120, seed))
    return folder


@pytest.fixture(scope="module")
def artefact(tiny_artefact: Path) -> OnnxArtefact:
    return read_onnx(tiny_artefact)


@pytest.fixture(scope="module")
def small(artefact: OnnxArtefact) -> OnnxArtefact:
    """The exported network, for small images."""
    return with_tower(artefact, 1.0)


def with_tower(artefact: OnnxArtefact, factor: float) -> OnnxArtefact:
    """For images of 64 x 96; the kernel of the tower's first stage is `factor` times as large."""
    model = onnx.ModelProto()
    model.CopyFrom(artefact.model)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == TOWER)
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), TOWER)
    )
    preset = artefact.manifest.preset
    values = preset.to_dict() | {"imgsz": [64, 96]}
    manifest = replace(artefact.manifest, preset=type(preset).from_dict(values))
    return artefact_in_memory(artefact.path, model, manifest)


class TestInt8:
    def test_the_graph_and_its_manifest(self, small: OnnxArtefact, images: Path) -> None:
        reporter, before = RecordingReporter(), small.model.SerializeToString()
        options = Int8Options(scheme="s8s8", method="minmax", keep=("backbone.conv1",))
        quantized = quantize_artefact(small, images, options, reporter=reporter)
        source, manifest = small.manifest, quantized.manifest
        assert small.model.SerializeToString() == before
        assert plain(manifest)["options"]["int8"] | {"calibration": ""} == {
            "scheme": "s8s8",
            "needs": "TensorRT",
            "method": "minmax",
            "keep": ["backbone.conv1"],
            "max_drop": None,
            "max_images": 128,
            "images": 2,
            "calibration": "",
        }
        assert (manifest.precision, manifest.parity, manifest.self_test) == ("int8", None, None)
        assert (manifest.preset, manifest.checkpoint_sha256) == (
            source.preset,
            source.checkpoint_sha256,
        )
        assert quantized.model.ByteSize() < 0.4 * small.model.ByteSize()
        assert "fewer than 64" in " ".join(reporter.lines)

    def test_keeps_as_many_layers_as_quality_asks_for(
        self, small: OnnxArtefact, images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ranked = [Sensitivity(f"backbone.layer{i}.*", 1 / i) for i in range(1, 5)]
        monkeypatch.setattr(convert_module, "measure_sensitivity", lambda *args, **kwargs: ranked)
        measured: list[onnx.ModelProto] = []

        def share_of_8_bits(model: onnx.ModelProto) -> float:
            measured.append(model)
            weights = [
                value
                for value in model.graph.initializer
                if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1
            ]
            return 100 * len(weights) / 58

        quantized = quantize_artefact(
            small,
            images,
            Int8Options(method="minmax", keep=("neck.*",), max_drop=75.0),
            quality=share_of_8_bits,
        ).manifest
        described = plain(quantized)["options"]["int8"]
        # 8, 4 and 5 of 58 layers
        assert described["keep"] == ["neck.*", "backbone.layer1.*", "backbone.layer2.*"]
        assert described["drop"] == pytest.approx(100 * 41 / 58)
        assert [count for count, _ in described["trials"]] == [0, 1, 2]
        assert len(measured) == 3, "nothing is measured twice"
        assert [one["group"] for one in described["ranked"]] == [one.group for one in ranked]

    def test_without_annotations_detections_are_compared(
        self, small: OnnxArtefact, images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            convert_module, "DetectionMismatch", partial(DetectionMismatch, score_threshold=0.05)
        )
        options = Int8Options(method="minmax", max_drop=100.0)
        quantized = quantize_artefact(small, images, options)
        described = plain(quantized.manifest)["options"]["int8"]
        assert 0 < described["drop"] <= 100
        assert described["keep"] == []

    @pytest.mark.parametrize(
        "wrong", [{"scheme": "u4"}, {"method": "mean"}, {"max_drop": -0.1}, {"max_drop": np.nan}]
    )
    def test_options_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ToodError, match="expected"):
            Int8Options(**wrong)

    def test_bad_input(self, artefact: OnnxArtefact, images: Path, tmp_path: Path) -> None:
        for folder in ("empty", "one"):
            (tmp_path / folder).mkdir()
        shutil.copy(images / "0.png", tmp_path / "one")
        for folder in ("empty", "one", "absent"):
            with pytest.raises(InputError):
                quantize_artefact(artefact, tmp_path / folder, OPTIONS)
        with pytest.raises(ToodError, match="no 8-bit layer is called nothing"):
            quantize_artefact(artefact, images, Int8Options(keep=("nothing",)))
        quantized = replace(artefact, manifest=replace(artefact.manifest, precision="int8"))
        with pytest.raises(ToodError, match="is in int8 already"):
            quantize_artefact(quantized, images, OPTIONS)


class TestHalfPrecision:
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_the_graph_and_its_manifest(self, small: OnnxArtefact, precision: Any) -> None:
        half = lower_artefact(small, precision, keep=["*tood_reg"])
        options = plain(half.manifest)["options"]
        assert half.manifest.precision == precision
        assert options["opset"] == half.model.opset_import[0].version
        assert options["half_precision"]["kept"]["bbox_head.tood_reg"] == "*tood_reg: asked for"
        assert "backbone.conv1" in options["half_precision"]["lowered"]
        assert half.model.ByteSize() < 0.6 * small.model.ByteSize()

    @pytest.mark.slow
    def test_overflow_is_detected_kept_and_reported(
        self, artefact: OnnxArtefact, images: Path, tmp_path: Path, synth_image_bgr: Any
    ) -> None:
        # Normalisation behind the tower takes the factor out again.
        wild = with_tower(artefact, 1e5)
        image, valid_hw = synth_image_bgr(64, 96)[None], np.array([[64, 96]], np.int32)
        blind = written(lower_artefact(wild, "fp16"), tmp_path / "blind.onnx")
        with open_engine(blind) as engine, pytest.raises(ArtefactError, match="NaN"):
            engine.infer(image, valid_hw, 0.05, 0.6)
        reporter = RecordingReporter()
        careful = lower_artefact(wild, "fp16", calib_data=images, reporter=reporter)
        assert any("fp16 cannot hold" in line for line in reporter.lines)
        report = plain(careful.manifest)["options"]["half_precision"]
        assert [name for name, reason in report["kept"].items() if "reaches" in reason] == [
            "bbox_head.inter_convs.0.conv"
        ]
        assert any("reaches" in measured["risk"] for measured in report["ranges"].values())
        paths = written(careful, tmp_path / "careful.onnx"), tmp_path / "wild.onnx"
        write_onnx(wild, paths[1])
        with open_engine(paths[0]) as half, open_engine(paths[1]) as full:
            given, expected = (engine.infer(image, valid_hw, 0.05, 0.6) for engine in (half, full))
        np.testing.assert_allclose(given.scores[0, :5], expected.scores[0, :5], atol=0.01)

    def test_bad_input(self, small: OnnxArtefact, tmp_path: Path) -> None:
        half = lower_artefact(small, "fp16")
        with pytest.raises(ToodError, match="is in fp16 already"):
            lower_artefact(half, "bf16")
        with pytest.raises(ToodError, match="no such folder"):
            lower_artefact(small, "fp16", calib_data=tmp_path / "absent")


def written(artefact: OnnxArtefact, path: Path) -> Path:
    """Write a graph in which nothing is left unrounded.

    ONNX Runtime computes fp16 layers in float32 and leaves out casts between them.
    """
    rounded = emulate_low_precision(artefact.model)
    plain = replace(artefact.manifest, precision="fp32")
    write_onnx(artefact_in_memory(path, rounded, plain), path)
    return path


def test_statistics_are_those_of_the_reference(artefact: OnnxArtefact, tiny_artefact: Path) -> None:
    images = [synthetic_image(90, 120, 0), synthetic_image(300, 200, 1)]
    with Detector(tiny_artefact, conf=0.3) as detector:
        ids = np.concatenate([detector(image).class_ids for image in images])
    statistics = image_statistics(onnx_reference(artefact), 80, images)
    assert statistics.images == sum(statistics.sizes) == 2
    assert sum(statistics.scores) == len(ids)
    assert statistics.classes == tuple(np.bincount(ids, minlength=80).tolist())
