"""ONNX Runtime is not given what it does not compute on CPUs: it is refused by name, with what to do."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from export.small_graph import save_small
from manifest_values import changed
from onnx import TensorProto

from tood_deploy.engines import open_engine
from tood_deploy.errors import ArtefactError, DeviceError
from tood_deploy.files import write_text
from tood_deploy.manifest import METADATA_KEY, Manifest, manifest_path


def save_stated(path: Path, **fields: Any) -> Path:
    """A graph of one convolution whose manifest says something else of its precision."""
    save_small(path)
    inside = {prop.key: prop.value for prop in onnx.load(path).metadata_props}[METADATA_KEY]
    write_text(
        manifest_path(path),
        changed(Manifest.from_json(inside, "small"), **fields).with_artefact(path).to_json(),
    )
    return path


def test_bf16_by_its_manifest(tmp_path: Path) -> None:
    path = save_stated(tmp_path / "half.onnx", precision="bf16")
    with pytest.raises(
        DeviceError, match=r"half\.onnx: is in bf16; .*--runtime openvino.*--to engine"
    ):
        open_engine(path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_int8_beside_half_precision(precision: str, tmp_path: Path) -> None:
    path = save_stated(
        tmp_path / "mixed.onnx",
        precision="int8",
        options={"half_precision": {"precision": precision}},
    )
    with pytest.raises(
        DeviceError, match=f"in int8 beside {precision}, which ONNX Runtime computes wrongly"
    ):
        open_engine(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_all_others_open(precision: str, tmp_path: Path) -> None:
    with open_engine(
        save_stated(tmp_path / "a.onnx", precision=precision), self_test=False
    ) as engine:
        assert engine.manifest.precision == precision


def test_bf16_without_its_manifest(tmp_path: Path) -> None:
    """The runtime's own refusal is told as such, not as a damaged file."""
    model = onnx.load(save_small(tmp_path / "fp16.onnx", "fp16"))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    model.opset_import[0].version = 22
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(
        ArtefactError,
        match=r"half\.onnx: ONNX Runtime \S+ lacks an operator of it in its precision .*--runtime openvino",
    ):
        open_engine(tmp_path / "half.onnx")
