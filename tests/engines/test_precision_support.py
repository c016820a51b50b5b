"""Which runtimes are right for low precision, by the manifest and by a probe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export.small_graph import save_small
from manifest_values import changed, stated
from onnx import TensorProto, helper, numpy_helper

from tood_deploy.engines import open_engine
from tood_deploy.engines.precision_support import (
    CHANNELS,
    EXACT,
    INPUT,
    OUTPUT,
    PROBE,
    SIDE,
    advise_on,
    half_precision_of,
    is_saturated,
    mixes_int8_and_half,
    probe_input,
    why_not_on_cpus,
)
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
    with pytest.raises(DeviceError, match=f"in int8 beside {precision}"):
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
        ArtefactError, match=r"ONNX Runtime \S+ lacks an operator .*--runtime openvino"
    ):
        open_engine(tmp_path / "half.onnx")


def manifest(precision: str, beside: str = "") -> Manifest:
    options: dict[str, Any] = {"half_precision": {"precision": beside}} if beside else {}
    return stated(precision, options=options)


@pytest.mark.parametrize(
    ("found", "half", "runs"),
    [
        (manifest("fp32"), "", True),
        (manifest("int8"), "", True),
        (manifest("fp16"), "fp16", True),
        (manifest("bf16"), "bf16", False),
        (manifest("int8", "bf16"), "bf16", False),
        (manifest("int8", "fp16"), "fp16", False),
    ],
)
def test_what_runs_on_cpus(found: Manifest, half: str, runs: bool) -> None:
    assert half_precision_of(found) == half
    assert mixes_int8_and_half(found) == (found.precision == "int8" and bool(half))
    assert (why_not_on_cpus("a.onnx", found) == "") == runs
    assert bool(advise_on("a.onnx", found)) == bool(half)


def test_the_commands_name_the_file() -> None:
    lines = advise_on("a.onnx", manifest("bf16"))
    assert (
        "next, in OpenVINO, on a CPU with bf16: tood-infer a.onnx IMAGES --output DIR --runtime "
        "openvino" in lines
    )
    assert any(
        "tood-infer a.onnx IMAGES --output DIR --device cuda" in line
        for line in advise_on("a.onnx", manifest("fp16"))
    )
    assert not any("openvino" in line for line in advise_on("a.onnx", manifest("fp16")))


OUT_CHANNELS = 8


def make_probe() -> onnx.ModelProto:
    """Q/DQ around one 3x3 convolution whose inputs and weights are all the largest there are."""
    constants = {
        "x_scale": np.array(1 / 255, np.float32),
        "x_zero": np.array(0, np.uint8),
        "w_quantized": np.full((OUT_CHANNELS, CHANNELS, 3, 3), 127, np.int8),
        "w_scale": np.full(OUT_CHANNELS, 1 / 127, np.float32),
        "w_zero": np.zeros(OUT_CHANNELS, np.int8),
        "y_scale": np.array(EXACT / 255, np.float32),
        "y_zero": np.array(0, np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", [INPUT, "x_scale", "x_zero"], ["x_quantized"]),
        helper.make_node("DequantizeLinear", ["x_quantized", "x_scale", "x_zero"], ["x_restored"]),
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["x_restored", "w"], ["sums"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["sums", "y_scale", "y_zero"], ["y_quantized"]),
        helper.make_node("DequantizeLinear", ["y_quantized", "y_scale", "y_zero"], [OUTPUT]),
    ]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, SIDE, SIDE])
        for name, channels in ((INPUT, CHANNELS), (OUTPUT, OUT_CHANNELS))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "int8_probe", values[:1], values[1:], initializers)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
        producer_name="tood_deploy",
    )


def test_the_shipped_graph_is_this_one() -> None:
    assert onnx.load(PROBE) == make_probe()


def test_exact_and_saturated_sums_are_told_apart() -> None:
    border = np.full((1, OUT_CHANNELS, SIDE, SIDE), 0.5 * EXACT, np.float32)
    exact, saturated = border.copy(), border
    exact[..., 1:-1, 1:-1] = EXACT
    assert not is_saturated(exact)
    assert is_saturated(saturated)


PROBES = """
import json
import onnxruntime, openvino
from tood_deploy.engines.precision_support import INPUT, PROBE, is_saturated, probe_input
session = onnxruntime.InferenceSession(PROBE, providers=["CPUExecutionProvider"])
compiled = openvino.Core().compile_model(PROBE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
feeds = {INPUT: probe_input()}
print(json.dumps([is_saturated(session.run(None, feeds)[0]), is_saturated(compiled(feeds)[0])]))
"""


@pytest.mark.shared
def test_a_cpu_without_vnni_saturates_in_both_runtimes(shared: Path) -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed: apt-get install qemu-user")
    command = [str(shared / "tools" / "old_cpu.sh"), "avx2", sys.executable, "-c", PROBES]
    output = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert json.loads(output.stdout.splitlines()[-1]) == [True, True]
    assert probe_input().max() == 1
