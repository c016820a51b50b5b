"""The probe of 8-bit sums: the graph is what its description says, and both outcomes are told apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tood_deploy.engines.precision_support import (
    CHANNELS,
    EXACT,
    INPUT,
    OUTPUT,
    PROBE,
    SIDE,
    is_saturated,
    probe_input,
)

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
