"""Run a network in PyTorch as an engine of the package.

Eagerly, as a user has it without doing anything, or in the package's own fast form: without a loop
on the data, as a CUDA graph, or compiled and then as a CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.settings import Cell, Mode, Precision
from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.engines.torch_fast import FastTorchEngine
from tood_deploy.manifest import Manifest
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.model.static_detector import DTYPES

TITLES: dict[Mode, str] = {
    "eager": "eager",
    "static": "folded, channels last",
    "graph": "channels last, CUDA graph",
    "compiled": "compiled, channels last, CUDA graph",
}

Inputs = tuple[Tensor, ...]


class EagerVariant(Engine):
    """`FusedDetector` as it is, under PyTorch's autocast for half precision."""

    def __init__(self, model: DenseDetector, precision: Precision, cell: Cell, device: str) -> None:
        """Copy the network to the device.

        Args:
            model: the network.
            precision: of the autocast.
            cell: size and batch.
            device: "cuda" or "cpu".
        """
        # A copy, because it is then moved to its device.
        self.fused = FusedDetector(copy.deepcopy(model)).to(device).eval()
        self.manifest = Manifest(model.preset, max_det=self.fused.max_det)
        self.device, self.name = device, f"PyTorch {torch.__version__}"
        self.input_shapes_hw, self.max_batch = (cell.size_hw,), cell.batch
        self._dtype = DTYPES[precision]

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        inputs = (torch.from_numpy(array).to(self.device) for array in (images, valid_hw))
        return self.detect((*inputs, torch.tensor(score_threshold), torch.tensor(iou_threshold)))

    @torch.no_grad()
    def detect(self, inputs: Inputs) -> BatchDetections:
        """Run inputs that are on the device."""
        with torch.autocast(self.device, self._dtype, enabled=self._dtype != torch.float32):
            stages = self.fused(*inputs)
        return BatchDetections(*(tensor.cpu().numpy() for tensor in stages.detections))

    def close(self) -> None:
        """Free the network."""
        super().close()
        vars(self).pop("fused", None)


TorchVariant = EagerVariant | FastTorchEngine


def open_variant(
    model: DenseDetector, mode: Mode, precision: Precision, cell: Cell, device: str
) -> TorchVariant:
    """Return the network as an engine.

    Args:
        model: the network, which is copied.
        mode, precision: how to run it.
        cell: size and batch.
        device: "cuda" or "cpu".
    """
    if mode == "eager":
        return EagerVariant(model, precision, cell, device)
    engine = FastTorchEngine(
        model,
        device=device,
        precision=precision,
        compile=mode == "compiled",
        cuda_graph=mode in ("graph", "compiled"),
    )
    engine.input_shapes_hw, engine.max_batch = (cell.size_hw,), cell.batch
    return engine


def resident(
    engine: TorchVariant,
    images: NDArray[np.uint8],
    valid_hw: NDArray[np.int32],
    conf: float,
    iou: float,
) -> Callable[[], BatchDetections]:
    """Return a call on inputs that are on the device already.

    Args:
        engine: open.
        images: (B, H, W, 3) uint8 RGB.
        valid_hw: (B, 2) rows and columns that hold real pixels.
        conf, iou: thresholds.
    """
    if isinstance(engine, FastTorchEngine):
        return engine.resident(images, valid_hw, conf, iou)
    arrays = (torch.from_numpy(array).to(engine.device) for array in (images, valid_hw))
    thresholds = (torch.tensor(value, device=engine.device) for value in (conf, iou))
    inputs = (*arrays, *thresholds)
    return lambda: engine.detect(inputs)


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
