"""The detector as PyTorch runs it fastest: half precision, channels last, and nothing that depends on the data.

Without a loop on the data it can be compiled as one graph and recorded as a CUDA graph. Whether the fixed number of rounds of
suppression was enough is part of the result; where it was not, `repair` does that part again with the exact loop, so no answer is wrong.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tood_deploy.errors import ToodError
from tood_deploy.model.postprocess import (
    MAX_DET,
    BatchResult,
    Candidates,
    suppress,
    suppress_unrolled,
)
from tood_deploy.model.tood import FusedDetector, Tood

BOX = 4


class Found(NamedTuple):
    """What one call gives.

    Attributes:
        packed: (B, 2 + 6 D) float32, so that one copy brings all to the host: whether the detections are exact, their count, boxes,
            scores, labels.
        candidates: what suppression started from, for `repair`.
    """

    packed: Tensor
    candidates: Candidates


class StaticDetector(nn.Module):
    """`FusedDetector` without a loop on the data; the network in `dtype`, everything from the logits on in float32."""

    def __init__(
        self, model: Tood, dtype: torch.dtype = torch.float32, max_det: int = MAX_DET
    ) -> None:
        super().__init__()
        lowered: nn.Module = lower_network(model, dtype)
        self.fused = FusedDetector(lowered.to(memory_format=torch.channels_last), max_det).eval()  # pyright: ignore - torch's stubs lack it
        self.dtype = dtype

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> Found:
        """As `FusedDetector.forward`, packed."""
        pixels = self.fused.normalise(images, valid_hw).to(
            self.dtype, memory_format=torch.channels_last
        )
        network = self.fused.model
        candidates = self.fused.select_candidates(network(pixels), valid_hw, score_threshold)
        return Found(
            pack(*suppress_unrolled(candidates, iou_threshold, self.fused.max_det)), candidates
        )


class EagerDetector(nn.Module):
    """`FusedDetector` as it is, under PyTorch's autocast for half precision: what a user has without doing anything."""

    def __init__(
        self, model: Tood, dtype: torch.dtype = torch.float32, max_det: int = MAX_DET
    ) -> None:
        super().__init__()
        self.fused = FusedDetector(
            copy.deepcopy(model), max_det
        ).eval()  # a copy, as it is then moved to its device
        self.dtype = dtype

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> Found:
        """As `FusedDetector.forward`, packed."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            stages = self.fused(images, valid_hw, score_threshold, iou_threshold)
        exact = torch.ones_like(stages.detections.num_dets, dtype=torch.bool)
        return Found(pack(stages.detections, exact), stages.candidates)


def lower_network(model: Tood, dtype: torch.dtype) -> Tood:
    """A copy whose convolutions compute in `dtype`. Batch norms and the scales of the boxes keep their numbers in float32.

    Raises:
        ToodError: it has deformable convolutions, whose sampling positions half precision cannot hold.
    """
    if dtype != torch.float32 and (model.preset.deform_stages or model.preset.deform_tower):
        raise ToodError(
            f"{model.preset.name} has deformable convolutions; in PyTorch they are measured in fp32 alone"
        )
    lowered = copy.deepcopy(model)
    for module in lowered.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.to(dtype)
    return lowered


def pack(found: BatchResult, exact: Tensor) -> Tensor:
    """See `Found.packed`; whole numbers are far below what a float32 holds exactly."""
    columns = (
        exact.unsqueeze(1),
        found.num_dets.unsqueeze(1),
        found.boxes_net.flatten(1),
        found.scores,
        found.labels,
    )
    return torch.cat([column.float() for column in columns], dim=1)


def unpack(packed: Tensor) -> tuple[BatchResult, Tensor]:
    """Detections and whether they are exact (B,), from `Found.packed`."""
    rows = (packed.shape[1] - 2) // (BOX + 2)
    exact, num_dets, boxes, scores, labels = packed.split([1, 1, rows * BOX, rows, rows], dim=1)
    boxes = boxes.reshape(len(packed), rows, BOX)
    return BatchResult(num_dets.squeeze(1).int(), boxes, scores, labels.int()), exact.squeeze(1) > 0


def repair(found: Found, iou_threshold: Tensor) -> Found:
    """The same with exact suppression, for a batch in which the fixed number of rounds was not enough."""
    result, _ = unpack(found.packed)
    detections = suppress(found.candidates, iou_threshold, result.scores.shape[1])
    return Found(
        pack(detections, torch.ones_like(detections.num_dets, dtype=torch.bool)), found.candidates
    )
