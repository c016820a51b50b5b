"""What runs the exported graph, so that two of them can be compared: the network in PyTorch, an .onnx artefact in ONNX Runtime."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from tood_deploy.export.graph import HEAD_OUTPUTS, INPUTS, OUTPUTS
from tood_deploy.export.onnx_artefact import OnnxArtefact
from tood_deploy.export.to_onnx import with_outputs
from tood_deploy.model.fused import FusedDetector
from tood_deploy.model.tood import Tood
from tood_deploy.onnx_session import open_session

Maps = list[NDArray[Any]]


class Runner(Protocol):
    """Runs the graph of DESIGN section 4 with the head's maps as further outputs.

    Attributes:
        name: runtime, version, precision and device, for the verdict.
    """

    name: str

    def __call__(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> Maps:
        """What `OUTPUTS` and `HEAD_OUTPUTS` name, in this order; the arrays are the caller's."""
        ...


class TorchRunner:
    """The network in PyTorch: the reference."""

    def __init__(self, detector: FusedDetector) -> None:
        self.detector = detector.eval()
        self.name = f"PyTorch {torch.__version__}, float32"

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> Maps:
        """See `Runner`."""
        stages = self.detector(torch.from_numpy(images), torch.from_numpy(valid_hw), score_threshold, iou_threshold)
        return [tensor.numpy() for tensor in (*stages.detections, *stages.head.scores, *stages.head.boxes_strides)]

    @torch.inference_mode()
    def in_float64(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> Maps:
        """What `HEAD_OUTPUTS` names, computed in float64."""
        pixels = self.detector.normalise(torch.from_numpy(images), torch.from_numpy(valid_hw))
        head = copy.deepcopy(self.detector.model).double()(pixels.double())
        return [tensor.float().numpy() for tensor in (*head.scores, *head.boxes_strides)]


class OnnxRunner:
    """An .onnx artefact, with the head's maps added as outputs in memory."""

    def __init__(self, artefact: Path | onnx.ModelProto) -> None:
        """Opens the artefact, a file or a graph in memory.

        Raises:
            ArtefactError: the graph does not hold the head's maps.
        """
        model = artefact if isinstance(artefact, onnx.ModelProto) else onnx.load(artefact)
        extended = with_outputs(model, HEAD_OUTPUTS).SerializeToString()
        self.session = open_session(extended)
        self.name = f"ONNX Runtime {ort.__version__}, CPU"

    def __call__(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> Maps:
        """See `Runner`."""
        found: Any = self.session.run([*OUTPUTS, *HEAD_OUTPUTS], graph_inputs(images, valid_hw, score_threshold, iou_threshold))
        return found


@dataclass(frozen=True)
class Reference:
    """What an artefact is compared with.

    Attributes:
        run: runs it.
        imgsz: (short side, long side) in pixels that users' pictures are scaled to fit.
        in_float64: the head's maps in float64, to tell the noise of float32; None where nothing computes them.
    """

    run: Runner
    imgsz: tuple[int, int]
    in_float64: Callable[[NDArray[np.uint8], NDArray[np.int32]], Maps] | None = None


def torch_reference(model: Tood, max_det: int) -> Reference:
    """The network itself."""
    run = TorchRunner(FusedDetector(model, max_det))
    return Reference(run, model.preset.imgsz, run.in_float64)


def onnx_reference(artefact: OnnxArtefact) -> Reference:
    """An .onnx artefact that was proven equal to its network when it was made."""
    run = OnnxRunner(artefact.model)
    run.name = f"{artefact.path.name} in {run.name}"
    return Reference(run, artefact.manifest.preset.imgsz)


def graph_inputs(
    images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float
) -> dict[str, NDArray[Any]]:
    """The graph's inputs by name."""
    values = (images, valid_hw, np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32))
    return dict(zip(INPUTS, values, strict=True))
