"""The stages of a checkpoint in PyTorch, run eagerly: the reference of every comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tood_deploy.benchmark.stages import STAGES, Stage, StageRunner, Values
from tood_deploy.export.graph import inner_values
from tood_deploy.graph_io import OUTPUTS
from tood_deploy.model.fused import FusedDetector
from tood_deploy.model.head import HeadOutput
from tood_deploy.model.postprocess import Candidates, suppress
from tood_deploy.parity.conditioning import Conditioning, measure_conditioning
from tood_deploy.presets import STRIDES

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStages(StageRunner):
    """A network in PyTorch, float32 unless `autocast` says otherwise; decoding and what follows always are."""

    has_stages = True

    def __init__(self, detector: FusedDetector, autocast: torch.dtype | None = None) -> None:
        """Takes a detector in eval mode, on its device; `autocast` is the type of the network's arithmetic, None for float32."""
        self.detector, self.autocast = detector, autocast
        self.device = detector.mean.device
        self.name = f"PyTorch {torch.__version__}, eager"

    @torch.inference_mode()
    def run_all(self, inputs: Values) -> Values:
        """All stages."""
        with self._arithmetic():
            stages = self.detector(*self._tensors(inputs, "images", "valid_hw"), *_thresholds(inputs))
        names = [name for stage in STAGES[:-1] for name in stage.gives]
        return inputs | _arrays(names, inner_values(stages)) | _arrays(OUTPUTS, stages.detections)

    def measure_noise(self, inputs: Values) -> Conditioning:
        """Measures how far float32 itself is off on these inputs; on the CPU, wherever the network is."""
        detector = self.detector if self.device.type == "cpu" else copy.deepcopy(self.detector).cpu()
        return measure_conditioning(detector, inputs["images"], inputs["valid_hw"], *_thresholds(inputs))

    @torch.inference_mode()
    def run(self, stage: Stage, values: Values) -> Values:
        """One stage."""
        with self._arithmetic():
            return _arrays(stage.gives, self._outputs(stage, values))

    def _outputs(self, stage: Stage, values: Values) -> Any:
        """The stage's tensors, in the order of their names."""
        given, model = self._tensors(values, *stage.reads), self.detector.model
        score_threshold, iou_threshold = _thresholds(values)
        images, valid_hw = self._tensors(values, "images", "valid_hw")
        match stage.name:
            case "pixels":
                return [self.detector.normalise(images, valid_hw)]
            case "backbone":
                return model.backbone(given[0])
            case "pyramid":
                return model.neck(given)
            case "head":
                head = model.bbox_head(given)
                return [*head.scores, *head.boxes_strides]
            case "candidates":
                head = HeadOutput(given[: len(STRIDES)], given[len(STRIDES) :])
                return self.detector.select_candidates(head, valid_hw, score_threshold)
        return suppress(Candidates(*given), iou_threshold, self.detector.max_det)

    def _tensors(self, values: Values, *names: str) -> list[Tensor]:
        return [torch.from_numpy(values[name]).to(self.device) for name in names]

    def _arithmetic(self) -> Any:
        if self.autocast is not None:
            return torch.autocast(self.device.type, self.autocast)
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # PyTorch rounds float32 to 10 bits on a GPU unless told not to


def _thresholds(values: Values) -> tuple[float, float]:
    return float(values["score_threshold"]), float(values["iou_threshold"])


def _arrays(names: Any, tensors: Any) -> Values:
    def array(tensor: Tensor) -> Any:
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()

    return {name: array(tensor) for name, tensor in zip(names, tensors, strict=True)}
