"""Build the detector that PyTorch runs fastest, and the one that a user has without doing anything.

The first is in half precision, channels last, and has no loop on the data, so that it can be
compiled as one graph and recorded as a CUDA graph. Whether the fixed number of rounds of
suppression was enough is part of the result; where it was not, `repair` does that part again with
the exact loop, so that no answer is wrong.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tood_deploy.errors import ToodError
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.model.postprocess import (
    MAX_DET,
    BatchResult,
    Candidates,
    suppress,
    suppress_unrolled,
)

BOX = 4


class PackedResult(NamedTuple):
    """The result of one call.

    Attributes:
        packed: (B, 2 + 6 D) float32, so that one copy brings all to the host: whether the
            detections are exact, their count, boxes, scores, labels.
        candidates: the input of suppression, for `repair`.
    """

    packed: Tensor
    candidates: Candidates


class StaticDetector(nn.Module):
    """`FusedDetector` without a loop on the data.

    The network is in `dtype`, everything from the logits on in float32.
    """

    def __init__(
        self, model: DenseDetector, dtype: torch.dtype = torch.float32, max_det: int = MAX_DET
    ) -> None:
        super().__init__()
        converted: nn.Module = convert_network(model, dtype)
        converted = converted.to(memory_format=torch.channels_last)  # pyright: ignore - not in stubs
        self.fused = FusedDetector(converted, max_det).eval()  # pyright: ignore - a `DenseDetector` still
        self.dtype = dtype

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> PackedResult:
        """Return the packed result; arguments as of `FusedDetector.forward`."""
        pixels = self.fused.normalise(images, valid_hw).to(
            self.dtype, memory_format=torch.channels_last
        )
        network = self.fused.model
        candidates = self.fused.select_candidates(network(pixels), valid_hw, score_threshold)
        detections, exact = suppress_unrolled(candidates, iou_threshold, self.fused.max_det)
        return PackedResult(pack(detections, exact), candidates)


class EagerDetector(nn.Module):
    """`FusedDetector` as it is, under PyTorch's autocast for half precision."""

    def __init__(
        self, model: DenseDetector, dtype: torch.dtype = torch.float32, max_det: int = MAX_DET
    ) -> None:
        super().__init__()
        # A copy, because it is then moved to its device.
        self.fused = FusedDetector(copy.deepcopy(model), max_det).eval()
        self.dtype = dtype

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> PackedResult:
        """Return the packed result; arguments as of `FusedDetector.forward`."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            stages = self.fused(images, valid_hw, score_threshold, iou_threshold)
        exact = torch.ones_like(stages.detections.num_dets, dtype=torch.bool)
        return PackedResult(pack(stages.detections, exact), stages.candidates)


def convert_network(model: DenseDetector, dtype: torch.dtype) -> DenseDetector:
    """Return a copy whose convolutions compute in `dtype`.

    Batch norms and the scales of the boxes keep their numbers in float32.

    Raises:
        ToodError: it has deformable convolutions, whose read positions half precision cannot hold.
    """
    if dtype != torch.float32 and model.preset.is_deformable:
        problem = "has deformable convolutions, which PyTorch is measured with in fp32 alone"
        raise ToodError(f"{model.preset.name} {problem}; leave fp16 and bf16 out")
    converted = copy.deepcopy(model)
    for module in converted.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.to(dtype)
    return converted


def pack(result: BatchResult, exact: Tensor) -> Tensor:
    """Return `PackedResult.packed`; its whole numbers are small enough for float32 to be exact."""
    columns = (
        exact.unsqueeze(1),
        result.num_dets.unsqueeze(1),
        result.boxes_net.flatten(1),
        result.scores,
        result.labels,
    )
    return torch.cat([column.float() for column in columns], dim=1)


def unpack(packed: Tensor) -> tuple[BatchResult, Tensor]:
    """Return detections, and whether they are exact (B,), from `PackedResult.packed`."""
    rows = (packed.shape[1] - 2) // (BOX + 2)
    exact, num_dets, boxes, scores, labels = packed.split([1, 1, rows * BOX, rows, rows], dim=1)
    boxes = boxes.reshape(len(packed), rows, BOX)
    return BatchResult(num_dets.squeeze(1).int(), boxes, scores, labels.int()), exact.squeeze(1) > 0


def repair(result: PackedResult, iou_threshold: Tensor) -> PackedResult:
    """Suppress again, exactly, in a batch for which the fixed number of rounds was not enough."""
    max_det = unpack(result.packed)[0].scores.shape[1]
    detections = suppress(result.candidates, iou_threshold, max_det)
    exact = torch.ones_like(detections.num_dets, dtype=torch.bool)
    return PackedResult(pack(detections, exact), result.candidates)
