"""One 8-bit convolution that tells whether a CPU adds exactly: without VNNI instructions pairs of products saturate in 16 bits.

The graph, `int8_probe.onnx`, convolves ones: 255 times 127, 576 times over. tests/test_int8_probe.py makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.onnx_session import open_session
from tood_deploy.openvino_model import CPU, TYPES, shared_core

PROBE = Path(__file__).with_name("int8_probe.onnx")
INPUT, OUTPUT = "x", "y"
CHANNELS, SIDE = 64, 8
EXACT = CHANNELS * 9.0  # away from the border; saturated it is about half


def probe_input() -> NDArray[np.float32]:
    """Return the input, (1, C, 8, 8)."""
    return np.ones((1, CHANNELS, SIDE, SIDE), np.float32)


def is_saturated(output: Any) -> bool:
    """Tell whether the probe's output, (1, C', 8, 8), is that of a CPU that saturates."""
    return bool(np.abs(np.asarray(output)[..., 1:-1, 1:-1] - EXACT).max() > 0.01 * EXACT)


def saturates_in_onnxruntime() -> bool:
    """Tell whether ONNX Runtime's sums of 8-bit products saturate on this CPU."""
    return is_saturated(open_session(PROBE, threads=1).run([OUTPUT], {INPUT: probe_input()})[0])


def saturates_in_openvino() -> bool:
    """Tell whether OpenVINO's sums of 8-bit products saturate on this CPU.

    Raises:
        DeviceError: OpenVINO is not installed.
    """
    compiled = shared_core().compile_model(PROBE, CPU, {"INFERENCE_PRECISION_HINT": TYPES["fp32"]})
    return is_saturated(compiled({INPUT: probe_input()})[0])
