"""Build the task-aligned head (T-Head) of TOOD: pyramid maps in, probabilities and boxes out.

Source: reference/SPEC.md section 2; the paper's section 3.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.boxes import anchor_points, decode_deltas, decode_distances
from tood_deploy.model.deform import align_boxes
from tood_deploy.model.head import (
    PRIOR_BIAS,
    ConvNorm,
    HeadOutput,
    Scale,
    geometric_mean_probability,
    init_convs,
)
from tood_deploy.presets import STRIDES, Preset

DOWN_RATE = 8  # channels of the tower for one hidden channel of the decomposition's attention


class TowerMaps(NamedTuple):
    """The tower's features of one level.

    Attributes:
        stages: (B, C, h, w) of each of its S convolutions, in order.
        joined: the same, concatenated, (B, S*C, h, w).
        pooled: their means over rows and columns, (B, S*C, 1, 1).
    """

    stages: list[Tensor]
    joined: Tensor
    pooled: Tensor


class TaskDecomposition(nn.Module):
    """Layer attention: the tower's stages, weighed for one task and image, reduced to one map."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        channels, stages = preset.channels, preset.tower_stages
        hidden = channels // DOWN_RATE
        self.stages = stages
        self.layer_attention = nn.Sequential(
            nn.Conv2d(channels * stages, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, stages, 1),
            nn.Sigmoid(),
        )
        self.reduction_conv = ConvNorm(preset, channels * stages, 1)
        init_convs(self.layer_attention, std=0.001)

    def forward(self, tower: TowerMaps) -> Tensor:
        """Return the task's map (B, C, h, w)."""
        return F.relu(self.reduction_conv.gn(self.reduce(tower)))

    def reduce(self, tower: TowerMaps) -> Tensor:
        """Put the stages, times their weights for the image, through one 1x1 convolution.

        Returns:
            (B, C, h, w), before norm and ReLU.
        """
        batch, _, height, width = tower.joined.shape
        kernel = self.reduction_conv.conv.weight
        channels = kernel.shape[0]
        # The same as weighing the features, but the kernel is the smaller of the two.
        weights = self.stage_weights(tower).unsqueeze(1).unsqueeze(3)
        kernel = kernel.reshape(1, channels, self.stages, channels) * weights
        reduced = torch.bmm(kernel.reshape(batch, channels, -1), tower.joined.flatten(2))
        return reduced.reshape(batch, channels, height, width)

    def stage_weights(self, tower: TowerMaps) -> Tensor:
        """Return the weights of the S stages for each image, (B, S), from 0 to 1."""
        return self.layer_attention(tower.pooled).flatten(1)


class Alignment(nn.Sequential):
    """The predictor of alignment maps: 1x1 convolution of all stages, ReLU, 3x3 convolution."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        """Build it, with random initial weights.

        Args:
            in_channels: of all stages together.
            hidden: channels between the two convolutions.
            out_channels: C'.
        """
        super().__init__(
            nn.Conv2d(in_channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 3, padding=1),
        )

    def forward(self, input: TowerMaps) -> Tensor:
        """Return (B, C', h, w) for the tower's features of a level."""
        return super().forward(input.joined)


class TaskAlignedHead(nn.Module):
    """The head of a preset, shared by all levels but for one scale each."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        channels, stages = preset.channels, preset.tower_stages
        self.anchor_free = preset.anchor == "free"
        self.anchor_side, self.anchor_offset = preset.anchor_side, preset.anchor_offset
        self.delta_means, self.delta_stds = preset.delta_means, preset.delta_stds
        self.keep_inverted = preset.convention == "authors"
        self.inter_convs = nn.ModuleList(
            ConvNorm(preset, channels, 3, deform=i < preset.deform_tower) for i in range(stages)
        )
        self.cls_decomp = TaskDecomposition(preset)
        self.reg_decomp = TaskDecomposition(preset)
        self.tood_cls = nn.Conv2d(channels, preset.num_classes, 3, padding=1)
        self.tood_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.cls_prob_module = Alignment(channels * stages, channels // 4, 1)
        self.reg_offset_module = Alignment(channels * stages, channels // 4, 8)
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)
        self._init_weights()

    def _init_weights(self) -> None:
        init_convs(self.tood_cls, std=0.01, bias=PRIOR_BIAS)
        init_convs(self.tood_reg, std=0.01)
        init_convs(self.cls_prob_module[0], std=0.01)
        init_convs(self.cls_prob_module[2], std=0.01, bias=PRIOR_BIAS)
        init_convs(self.reg_offset_module, std=0.001)

    def forward(self, levels: Sequence[Tensor]) -> HeadOutput:
        """Return scores and boxes of every level, from P3 to P7 (B, C, h, w)."""
        outputs = [
            self._forward_level(x, scale) for x, scale in zip(levels, self.scales, strict=True)
        ]
        return HeadOutput([scores for scores, _ in outputs], [boxes for _, boxes in outputs])

    def predict(self, levels: Sequence[Tensor]) -> tuple[HeadOutput, list[Tensor]]:
        """Return `forward`'s result, and no ranking: the scores rank themselves."""
        return self(levels), []

    def _forward_level(self, x: Tensor, scale: nn.Module) -> tuple[Tensor, Tensor]:
        # From the logits on all is float32, even where the network is not: an fp16 coordinate near
        # cell 160 moves in steps of a pixel.
        tower = self._tower(x)
        logits = self.tood_cls(self.cls_decomp(tower))
        scores = geometric_mean_probability(logits.float(), self.cls_prob_module(tower).float())
        regression = self.tood_reg(self.reg_decomp(tower)).float()
        boxes = self._decode(regression, scale)
        aligned = align_boxes(boxes, self.reg_offset_module(tower).float())
        return scores, aligned if self.keep_inverted else _restore_inverted(aligned, boxes)

    def _tower(self, x: Tensor) -> TowerMaps:
        stages = []
        for conv in self.inter_convs:
            x = conv(x)
            stages.append(x)
        pooled = torch.cat([stage.mean((2, 3), keepdim=True) for stage in stages], dim=1)
        return TowerMaps(stages, torch.cat(stages, dim=1), pooled)

    def _decode(self, regression: Tensor, scale: nn.Module) -> Tensor:
        """Return boxes (B, 4, h, w) xyxy in strides; the scale multiplies after the exponential."""
        size_hw = regression.shape[2], regression.shape[3]
        points = anchor_points(size_hw, regression, self.anchor_offset)
        if self.anchor_free:
            return decode_distances(scale(regression.exp()), points)
        return decode_deltas(
            scale(regression), points, self.anchor_side, self.delta_means, self.delta_stds
        )


def _restore_inverted(aligned: Tensor, boxes: Tensor) -> Tensor:
    """Return aligned boxes, save those turned inside out, which stay as they were before.

    MMDetection's fix, pull request 7567; the authors' code lacks it.
    """
    x1, y1, x2, y2 = aligned.split(1, dim=1)
    return torch.where((x1 > x2) | (y1 > y2), boxes, aligned)
