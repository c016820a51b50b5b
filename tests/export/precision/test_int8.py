"""The way from a float32 artefact to an int8 one, as `tood-export` goes it."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import onnx
import pytest

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import InputError, ToodError
from tood_deploy.export.precision import convert as int8_module
from tood_deploy.export.precision.convert import Int8Options, int8_from_onnx
from tood_deploy.export.precision.sensitivity import DetectionMismatch, Sensitivity
from tood_deploy.manifest import METADATA_KEY, Manifest, read_manifest

OPTIONS = Int8Options(method="minmax")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), synthetic_image(90, 120, seed))
    return folder


def manifest_inside(path: Path) -> Manifest:
    return Manifest.from_json(
        {prop.key: prop.value for prop in onnx.load(path).metadata_props}[METADATA_KEY], str(path)
    )


def test_writes_the_graph_and_tells_how(tiny_artefact: Path, images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    output = tmp_path / "int8.onnx"
    options = Int8Options(scheme="s8s8", method="minmax", keep=("backbone.conv1",))
    told = int8_from_onnx(
        tiny_artefact,
        output,
        images,
        options,
        progress=lambda *done: seen.append(done),
        say=said.append,
    )
    assert json.loads(json.dumps(told.to_dict()))["int8"] | {"calibration": ""} == {
        "scheme": "s8s8",
        "needs": "TensorRT",
        "method": "minmax",
        "keep": ["backbone.conv1"],
        "max_drop": None,
        "max_images": 128,
        "images": 2,
        "calibration": "",
    }
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert len(said) == 1
    assert "fewer than 64" in said[0]
    source, inside = read_manifest(tiny_artefact), manifest_inside(output)
    assert source is not None
    assert (inside.precision, inside.parity, inside.artefact_sha256) == ("int8", None, "")
    assert (inside.preset, inside.checkpoint_sha256) == (source.preset, source.checkpoint_sha256)
    assert inside.build.to_dict() == json.loads(json.dumps(told.to_dict()))
    assert output.stat().st_size < 0.4 * tiny_artefact.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx"]


def test_keeps_as_many_layers_as_quality_asks_for(
    tiny_artefact: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = [Sensitivity(f"backbone.layer{i}.*", 1 / i) for i in range(1, 5)]
    monkeypatch.setattr(int8_module, "measure_sensitivity", lambda *args, **kwargs: ranked)

    asked: list[onnx.ModelProto] = []

    def share_of_8_bits(model: onnx.ModelProto) -> float:
        asked.append(model)
        return (
            100
            * sum(
                value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1
                for value in model.graph.initializer
            )
            / 58
        )

    told = int8_from_onnx(
        tiny_artefact,
        tmp_path / "int8.onnx",
        images,
        Int8Options(method="minmax", keep=("neck.*",), max_drop=75.0),
        quality=share_of_8_bits,
    ).int8
    assert told is not None
    details: Any = told.details
    assert told.keep == (
        "neck.*",
        "backbone.layer1.*",
        "backbone.layer2.*",
    )  # 8, 4 and 5 of 58 layers
    assert details["drop"] == pytest.approx(100 * 41 / 58)
    assert [count for count, _ in details["trials"]] == [0, 1, 2]
    assert len(asked) == 3  # nothing is measured twice
    assert [one["group"] for one in details["ranked"]] == [one.group for one in ranked]


def test_without_annotations_detections_are_compared(
    tiny_artefact: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        int8_module, "DetectionMismatch", partial(DetectionMismatch, score_threshold=0.05)
    )
    told = int8_from_onnx(
        tiny_artefact, tmp_path / "int8.onnx", images, Int8Options(method="minmax", max_drop=100.0)
    ).int8
    assert told is not None
    details: Any = told.details
    assert 0 < details["drop"] <= 100
    assert told.keep == ()


class TestBadInput:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"scheme": "u4"}, "scheme is u4; expected one of s8s8, u8s8"),
            ({"method": "mean"}, "method is mean; expected one of entropy, percentile, minmax"),
            ({"max_drop": -0.1}, "largest drop is -0.1; expected 0 or more"),
            ({"max_drop": float("nan")}, "largest drop is nan"),
        ],
    )
    def test_options_out_of_range(self, wrong: dict[str, object], message: str) -> None:
        with pytest.raises(ToodError, match=message):
            Int8Options(**wrong)  # pyright: ignore[reportArgumentType]

    def test_an_artefact_in_int8_already(
        self, tiny_artefact: Path, images: Path, tmp_path: Path
    ) -> None:
        int8_from_onnx(tiny_artefact, tmp_path / "int8.onnx", images, OPTIONS)
        with pytest.raises(ToodError, match="is in int8 already; start from the float32 artefact"):
            int8_from_onnx(tmp_path / "int8.onnx", tmp_path / "again.onnx", images, OPTIONS)

    def test_a_failure_leaves_what_was_there(
        self, tiny_artefact: Path, images: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "int8.onnx"
        output.write_bytes(b"before")
        (tmp_path / "empty").mkdir()
        (tmp_path / "one").mkdir()
        shutil.copy(images / "0.png", tmp_path / "one")
        for folder in ("empty", "one", "absent"):
            with pytest.raises(InputError):
                int8_from_onnx(tiny_artefact, output, tmp_path / folder, OPTIONS)
        with pytest.raises(ToodError, match="no 8-bit layer is called nothing"):
            int8_from_onnx(tiny_artefact, output, images, Int8Options(keep=("nothing",)))
        assert output.read_bytes() == b"before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "int8.onnx", "one"]
