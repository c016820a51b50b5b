"""Run a network in PyTorch as an engine of the package.

Eagerly, without a loop on the data, as a CUDA graph, or compiled and then as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.settings import Cell, Mode, Precision
from benchmarks.gpu.static_detector import (
    EagerDetector,
    PackedResult,
    StaticDetector,
    repair,
    unpack,
)
from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.manifest import Manifest
from tood_deploy.model.detector import DenseDetector

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
TITLES: dict[Mode, str] = {
    "eager": "eager",
    "static": "unrolled, channels last",
    "graph": "channels last, CUDA graph",
    "compiled": "compiled, channels last, CUDA graph",
}
WARM_UPS = 3

Inputs = tuple[Tensor, ...]


class Recorded:
    """A function on tensors of fixed shapes, recorded once as a CUDA graph and replayed."""

    def __init__(self, function: Callable[..., Any], inputs: Inputs) -> None:
        """Warm the function up on copies of the inputs, and record it."""
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay on these inputs; the result is overwritten by the next call."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not given:
                mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs


class TorchVariant(Engine):
    """A network in PyTorch, in one mode and precision, for one size and batch.

    Attributes:
        repeated: batches whose suppression had to be done again, exactly.
    """

    def __init__(
        self,
        model: DenseDetector,
        mode: Mode,
        precision: Precision,
        cell: Cell,
        device: str,
        compile_mode: str = "default",
    ) -> None:
        """Build the detector, and compile and record it as the mode says.

        Args:
            model: the network, which is copied.
            mode, precision: how to run it.
            cell: size and batch.
            device: "cuda" or "cpu".
            compile_mode: of `torch.compile`.
        """
        kind = EagerDetector if mode == "eager" else StaticDetector
        detector = kind(model, DTYPES[precision]).to(device)
        self.manifest = Manifest(model.preset, max_det=detector.fused.max_det)
        self.device, self.name = device, f"PyTorch {torch.__version__}"
        self.input_shapes_hw, self.max_batch = (cell.size_hw,), cell.batch
        self.repeated = 0
        self._function: Callable[..., PackedResult] = detector
        if mode == "compiled":
            self._function = torch.compile(
                detector, dynamic=False, fullgraph=True, mode=compile_mode
            )
        if mode in ("graph", "compiled") and device == "cuda":
            images = torch.zeros((cell.batch, *cell.size_hw, 3), dtype=torch.uint8, device=device)
            valid_hw = torch.tensor([cell.size_hw] * cell.batch, dtype=torch.int32, device=device)
            inputs = (images, valid_hw, *self._thresholds(0.0, 0.6))
            with torch.no_grad():
                self._function = Recorded(self._function, inputs)

    def resident(
        self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float
    ) -> Callable[[], BatchDetections]:
        """Return a call on inputs that are on the device already.

        Args:
            images: (B, H, W, 3) uint8 RGB.
            valid_hw: (B, 2) rows and columns that hold real pixels.
            conf, iou: thresholds.
        """
        inputs = self._upload(images, valid_hw, conf, iou)
        if isinstance(self._function, Recorded):
            self._function(*inputs)
            inputs = self._function.inputs
        return lambda: self._detect(inputs)

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        return self._detect(self._upload(images, valid_hw, score_threshold, iou_threshold))

    @torch.no_grad()
    def _detect(self, inputs: Inputs) -> BatchDetections:
        packed = self._function(*inputs)
        result, exact = unpack(packed.packed.cpu())
        if not exact.all():
            self.repeated += 1
            result, _ = unpack(repair(packed, inputs[3]).packed.cpu())
        return BatchDetections(*(tensor.numpy() for tensor in result))

    def _upload(
        self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float
    ) -> Inputs:
        source_images, rows = (
            torch.from_numpy(array).to(self.device) for array in (images, valid_hw)
        )
        return (source_images, rows, *self._thresholds(conf, iou))

    def _thresholds(self, conf: float, iou: float) -> tuple[Tensor, Tensor]:
        first, second = (torch.tensor(value, device=self.device) for value in (conf, iou))
        return first, second

    def close(self) -> None:
        """Free the network and the recording."""
        super().close()
        vars(self).pop("_function", None)


def forget_compiled() -> None:
    """Free the memory that compiling and recording keep."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether PyTorch had no room on the device."""
    return isinstance(error, torch.OutOfMemoryError)


def versions() -> dict[str, Any]:
    """Return the versions of PyTorch and of the libraries in it."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
