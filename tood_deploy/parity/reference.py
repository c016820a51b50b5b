"""What an artefact is compared with: a runner that gives maps and detections, and how noisy float32 is on the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tood_deploy.model.fused import FusedDetector
from tood_deploy.model.tood import Tood
from tood_deploy.parity.conditioning import Conditioning, measure_conditioning, stage_maps

Outputs = list[NDArray[Any]]
Measure = Callable[[NDArray[np.uint8], NDArray[np.int32], float, float], Conditioning]


class Runner(Protocol):
    """Runs the graph of DESIGN section 4.

    Attributes:
        name: runtime, version, precision and device, for the verdict.
    """

    name: str

    def __call__(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> Outputs:
        """Return what `OUTPUTS` names, then, if opened with maps, what `MAP_NAMES` names; the arrays are the caller's."""
        ...


@dataclass(frozen=True)
class Reference:
    """What an artefact is compared with.

    Attributes:
        run: runs it.
        imgsz: (short side, long side) in pixels that users' images are scaled to fit.
        measure: measures the float32 noise of its maps on a batch.
    """

    run: Runner
    imgsz: tuple[int, int]
    measure: Measure


class TorchRunner:
    """The network in PyTorch, float32, with its maps."""

    def __init__(self, detector: FusedDetector) -> None:
        self.detector = detector.eval()
        self.name = f"PyTorch {torch.__version__}, float32"

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> Outputs:
        """See `Runner`."""
        stages = self.detector(torch.from_numpy(images), torch.from_numpy(valid_hw), score_threshold, iou_threshold)
        return [tensor.numpy() for tensor in (*stages.detections, *stage_maps(stages))]


def torch_reference(model: Tood, max_det: int) -> Reference:
    """The network itself."""
    detector = FusedDetector(model, max_det).eval()
    return Reference(TorchRunner(detector), model.preset.imgsz, lambda *inputs: measure_conditioning(detector, *inputs))
