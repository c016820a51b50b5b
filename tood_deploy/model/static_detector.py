"""Build the form of a detector that PyTorch runs fastest.

Batch norms are folded, the network may be in half precision, and no loop depends on the data, so
that all of it can be compiled, recorded as a CUDA graph, or exported. Whether the fixed number of
rounds of suppression was enough is part of the result: `finish_exactly` does that part again where
it was not, so that no answer is wrong. Knows no device and no file.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from tood_deploy.errors import ToodError
from tood_deploy.model.deform import DeformConv2d
from tood_deploy.model.detector import DenseDetector, FusedDetector, Stages
from tood_deploy.model.postprocess import BatchResult, Candidates, suppress, suppress_unrolled, vote
from tood_deploy.model.resnet import BasicBlock, Bottleneck, ResNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOX = 4


class StaticResult(NamedTuple):
    """The result of one call.

    Attributes:
        detections: of the batch.
        exact: (B,) bool, whether these are for sure what `FusedDetector` gives.
        stages: on the way to them, what `Stages` has, its detections left out.
    """

    detections: BatchResult
    exact: Tensor
    stages: Stages


class StaticDetector(nn.Module):
    """`FusedDetector` without a loop on the data; the network is a copy in a precision.

    From the logits on everything is in float32.
    """

    def __init__(
        self, model: DenseDetector, precision: str = "fp32", max_det: int | None = None
    ) -> None:
        """Copy and convert the network.

        Args:
            model: the network, which stays as it is.
            precision: of convolutions and group norms, a key of `DTYPES`.
            max_det: detections of an image at most; the preset's where it is None.

        Raises:
            ToodError: a precision that the network cannot be in.
        """
        super().__init__()
        self.fused = FusedDetector(convert_network(model, precision), max_det).eval()
        self.dtype = DTYPES[precision]

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> StaticResult:
        """Return detections, whether they are exact, and the stages before them.

        Args:
            images: (B, H, W, 3) uint8 RGB; H and W multiples of 32.
            valid_hw: (B, 2) int32 rows and columns that hold real pixels.
            score_threshold, iou_threshold: scalars, as `FusedDetector` takes them.
        """
        stages = self.find_candidates(images, valid_hw, score_threshold)
        fused = self.fused
        detections, exact = suppress_unrolled(stages.candidates, iou_threshold, fused.max_det)
        if fused.model.preset.score_voting:
            detections = vote(detections, stages.candidates)
        return StaticResult(detections, exact, stages._replace(detections=detections))

    def find_candidates(self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor) -> Stages:
        """Return the stages up to the input of suppression, the detections empty.

        Args:
            images, valid_hw, score_threshold: as `forward` takes them.
        """
        fused = self.fused
        pixels = fused.normalise(images, valid_hw)
        backbone = fused.model.backbone(pixels.to(self.dtype))
        pyramid = fused.model.neck(backbone)
        head, ranking = fused.model.bbox_head.predict(pyramid)
        candidates = fused.select_candidates(head, valid_hw, score_threshold, ranking)
        nothing = BatchResult(*(candidates.scores[:, :0] for _ in BatchResult._fields))
        return Stages(pixels, backbone, pyramid, head, ranking, candidates, nothing)


def finish_exactly(
    candidates: Candidates, iou_threshold: Tensor | float, max_det: int, *, voting: bool
) -> BatchResult:
    """Return the detections of a batch with the exact loop of suppression.

    Args:
        candidates: best first.
        iou_threshold: of two boxes of a class that overlap by more, the one with the lower score
            goes.
        max_det: detections of an image at most.
        voting: whether candidates vote on the boxes that are kept, as PAA's do.
    """
    detections = suppress(candidates, iou_threshold, max_det)
    return vote(detections, candidates) if voting else detections


def convert_network(model: DenseDetector, precision: str) -> DenseDetector:
    """Return a copy with folded batch norms, whose convolutions compute in a precision.

    Weights are channels last. The scales of the boxes keep their numbers in float32.

    Raises:
        ToodError: it has deformable convolutions, whose read positions half precision cannot hold.
    """
    dtype = DTYPES[precision]
    if dtype != torch.float32 and model.preset.is_deformable:
        raise ToodError(
            f"{model.preset.name}: has deformable convolutions, whose read positions {precision} "
            "cannot hold; PyTorch runs it in fp32 alone, leave --precision out"
        )
    converted = copy.deepcopy(model)
    fold_batch_norms(converted)
    for module in converted.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.to(dtype)
    for parameter in converted.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return converted.requires_grad_(False)


class Bias(nn.Module):
    """What is left of a batch norm whose scale went into the convolution before it."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) with the bias added, for x of that shape."""
        return x + self.bias[:, None, None]


@torch.no_grad()
def fold_batch_norms(model: DenseDetector) -> None:
    """Fold every batch norm of the backbone into the convolution before it, in place."""
    fold_deformable_batch_norms(model)
    for block in model.modules():
        if isinstance(block, ResNet | BasicBlock | Bottleneck):
            for number in (1, 2, 3):
                _fold(block, f"conv{number}", f"bn{number}")
            if isinstance(downsample := getattr(block, "downsample", None), nn.Sequential):
                _fold(downsample, "0", "1")


def _fold(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold a plain batch norm, if the parent has one of this name.

    Args:
        parent: of both layers.
        conv_name, norm_name: of the layers.
    """
    conv, norm = getattr(parent, conv_name, None), getattr(parent, norm_name, None)
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
        setattr(parent, norm_name, nn.Identity())


def fold_deformable_batch_norms(model: DenseDetector) -> None:
    """Fold the batch norms behind deformable convolutions into their weights, in place."""
    for block in model.modules():
        if isinstance(block, Bottleneck) and isinstance(block.conv2, DeformConv2d):
            norm = block.bn2
            assert norm.running_mean is not None
            assert norm.running_var is not None
            block.conv2.weight, bias = fuse_conv_bn_weights(
                block.conv2.weight,
                None,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            block.add_module("bn2", Bias(bias))


def pack(detections: BatchResult, exact: Tensor) -> Tensor:
    """Return detections and flags as one tensor, so that one copy brings all to the host.

    Args:
        detections: of B images, D rows each; whole numbers small enough for float32 to be exact.
        exact: (B,) bool.

    Returns:
        (B, 2 + 6 D) float32: whether the detections are exact, their count, boxes, scores, labels.
    """
    columns = (
        exact.unsqueeze(1),
        detections.num_dets.unsqueeze(1),
        detections.boxes_net.flatten(1),
        detections.scores,
        detections.labels,
    )
    return torch.cat([column.float() for column in columns], dim=1)


def unpack(packed: Tensor) -> tuple[BatchResult, Tensor]:
    """Return detections, and whether they are exact (B,), from what `pack` gave."""
    rows = (packed.shape[1] - 2) // (BOX + 2)
    exact, num_dets, boxes, scores, labels = packed.split([1, 1, rows * BOX, rows, rows], dim=1)
    boxes = boxes.reshape(len(packed), rows, BOX)
    return BatchResult(num_dets.squeeze(1).int(), boxes, scores, labels.int()), exact.squeeze(1) > 0
