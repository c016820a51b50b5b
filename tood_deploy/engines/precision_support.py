"""Which runtimes are right for an .onnx in half precision, and what to do with one.

Knows manifests, no runtime.

Seen with ONNX Runtime 1.31.1 on CPUs: bf16 is not opened (no convolution in it), fp16 is computed
in float32 between casts, as fast as float32 at best. OpenVINO 2026.4 runs a graph in bf16 as it is,
where the CPU has the instructions, and computes one in fp16 in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.openvino_runtime import CPU, TYPES, shared_core
from tood_deploy.manifest import Manifest
from tood_deploy.onnx_file import open_session

RUNTIMES = {"bf16": ("openvino", "tensorrt"), "fp16": ("onnxruntime-cuda", "tensorrt")}
ON_CPUS = {
    "bf16": "ONNX Runtime has no bf16 convolutions on CPUs, and does not open it there",
    "fp16": "ONNX Runtime on CPUs emulates fp16 by casts to float32, no faster than float32",
}
COMMANDS = {
    "openvino": "in OpenVINO, on a CPU with bf16: "
    "tood-infer {0} IMAGES --output DIR --runtime openvino",
    "onnxruntime-cuda": "in ONNX Runtime, on a GPU: "
    "tood-infer {0} IMAGES --output DIR --device cuda",
    "tensorrt": "in TensorRT, on a GPU: tood-export {0} --to engine",
}


def half_precision_of(manifest: Manifest) -> str:
    """Return the half precision that an .onnx computes in, alone or beside 8 bits.

    "bf16", "fp16", or "" for none.
    """
    if manifest.precision in RUNTIMES:
        return manifest.precision
    return manifest.build.half.precision if manifest.build.half else ""


def mixes_int8_and_half(manifest: Manifest) -> bool:
    """Tell whether what is not 8-bit is in half precision, which ONNX Runtime computes wrongly."""
    return manifest.precision == "int8" and bool(half_precision_of(manifest))


def advise_on(name: str, manifest: Manifest) -> list[str]:
    """Return lines on what an .onnx in half precision is for; none for any other.

    Args:
        name: of the file, as commands take it.
        manifest: of the file.
    """
    half = half_precision_of(manifest)
    if not half:
        return []
    return [
        f"note: {ON_CPUS[half]}",
        *(f"next, {COMMANDS[runtime].format(name)}" for runtime in RUNTIMES[half]),
    ]


def why_not_on_cpus(name: str, manifest: Manifest) -> str:
    """Return why ONNX Runtime on the CPU does not run an .onnx, and what to do, as one sentence.

    "" where it does.

    Args:
        name: of the file, as commands take it.
        manifest: of the file.
    """
    half = half_precision_of(manifest)
    if mixes_int8_and_half(manifest):
        command = COMMANDS["tensorrt"].format(name)
        return f"{name}: is in int8 beside {half}, which ONNX Runtime gets wrong: run it {command}"
    if half == "bf16":
        commands = ", or ".join(COMMANDS[runtime].format(name) for runtime in RUNTIMES[half])
        return f"{name}: is in bf16; {ON_CPUS[half]}: run it {commands}"
    return ""


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
