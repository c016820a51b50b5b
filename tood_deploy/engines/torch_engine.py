"""PyTorch: runs a checkpoint as it is, eagerly, in float32.

The reference that every artefact is compared with; `torch_fast` is for speed.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.engines.torch_fast import check_device
from tood_deploy.errors import ToodError
from tood_deploy.manifest import Manifest
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.model.detector import DenseDetector, FusedDetector


class TorchEngine(Engine):
    """A checkpoint in PyTorch, float32."""

    def __init__(
        self,
        checkpoint: str | PathLike[str] | DenseDetector,
        *,
        device: str = "cpu",
        threads: int | None = None,
        **load_options: Any,
    ) -> None:
        """Load the checkpoint.

        Args:
            checkpoint: a file, a preset's name, or a network that is loaded already.
            device: "cpu" or "cuda".
            threads: of the CPU; PyTorch's own choice where not given. Holds for the whole process.
            **load_options: passed on to `load_checkpoint`.

        Raises:
            ToodError: the checkpoint cannot be loaded, or the device is not there.
        """
        check_device(device)
        if threads is not None:
            if threads < 1:
                raise ToodError(f"threads is {threads}; expected a positive number")
            torch.set_num_threads(threads)
        model = (
            checkpoint
            if isinstance(checkpoint, DenseDetector)
            else load_checkpoint(checkpoint, **load_options)
        )
        self.detector = FusedDetector(model).to(device).eval()
        self.manifest = Manifest(
            model.preset, max_det=self.detector.max_det, checkpoint_sha256=model.checkpoint_sha256
        )
        self.device = device
        self.name = f"PyTorch {torch.__version__}"

    @torch.inference_mode()
    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        inputs = (torch.from_numpy(array).to(self.device) for array in (images, valid_hw))
        outputs = self.detector(*inputs, score_threshold, iou_threshold).detections
        return BatchDetections(*(tensor.cpu().numpy() for tensor in outputs))

    def close(self) -> None:
        """Free the network; may be called again."""
        super().close()
        vars(self).pop("detector", None)
