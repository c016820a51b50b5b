"""Open engines of ONNX Runtime and TensorRT, and call them on inputs that stay on the device.

Paths in, engines of the package and timed calls out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.errors import DeviceError
from tood_deploy.graph_io import INPUTS, OUTPUTS

Call = Callable[[], BatchDetections]


def check_onnx(device: str) -> None:
    """Raise what says that ONNX Runtime does not run on a device here, if it does not.

    Raises:
        ImportError: it is not installed.
        DeviceError: it has nothing for the device.
    """
    import onnxruntime

    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"this onnxruntime has {', '.join(onnxruntime.get_available_providers())}; carry "
            "onnxruntime-gpu for rows of ONNX Runtime"
        )


def check_tensorrt(device: str) -> None:
    """Raise what says that TensorRT does not run on a device here, if it does not.

    Raises:
        DeviceError: it is not installed, or has no kernels for the GPU.
    """
    if device != "cuda":
        raise DeviceError(f"device is {device}; TensorRT runs on GPUs")
    from tood_deploy.engines.tensorrt.library import load_flavour

    flavour = load_flavour(None)
    from tood_deploy.engines.tensorrt.cuda import visible_gpu

    if gpu := visible_gpu():
        name, capability = gpu
        flavour.check_gpu(capability, name)


def open_onnx(path: Path, device: str) -> Engine:
    """Open an .onnx file in ONNX Runtime."""
    from tood_deploy.engines.onnx_engine import OnnxEngine

    return OnnxEngine(path, device=device)


def open_tensorrt(path: Path) -> Engine:
    """Open a plan in TensorRT or TensorRT-RTX."""
    from tood_deploy.engines.tensorrt.engine import TensorRTEngine

    return TensorRTEngine(path)


def resident_onnx(
    engine: Any, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float
) -> Call:
    """Return a call of ONNX Runtime on images that are on the device already.

    Args:
        engine: open, an `OnnxEngine`.
        images: (B, H, W, 3) uint8 RGB.
        valid_hw: (B, 2) rows and columns that hold real pixels.
        conf, iou: thresholds.

    Returns:
        The call, whose detections come to the host.
    """
    binding = engine.session.io_binding()
    on_device = [torch.from_numpy(array).to(engine.device) for array in (images, valid_hw)]
    for name, tensor, array in zip(INPUTS[:2], on_device, (images, valid_hw), strict=True):
        binding.bind_input(name, engine.device, 0, array.dtype.type, array.shape, tensor.data_ptr())
    for name, value in zip(INPUTS[2:], (conf, iou), strict=True):
        binding.bind_cpu_input(name, np.array(value, np.float32))
    for name in OUTPUTS:
        binding.bind_output(name, "cpu")

    def call() -> BatchDetections:
        assert on_device  # the binding holds addresses, this the memory behind them
        engine.session.run_with_iobinding(binding)
        return BatchDetections(*binding.copy_outputs_to_cpu())

    return call


def resident_tensorrt(
    engine: Any, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float
) -> Call:
    """Return a call of a TensorRT engine on images that are on the GPU already.

    Arguments and result are those of `resident_onnx`.
    """
    source_images, rows = (torch.from_numpy(array).to("cuda") for array in (images, valid_hw))
    torch.cuda.synchronize()
    return lambda: engine.infer(source_images, rows, conf, iou)
