"""Define what the heads of all detectors share: their output, and the parts they are built from.

A head reads pyramid maps and gives probabilities and boxes; each has a file in `heads`. Holds no
loss and no mode switch; knows neither candidates nor suppression.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.boxes import anchor_points
from tood_deploy.model.deform import DeformConv2d
from tood_deploy.presets import STRIDES, Preset

TOWER_OFFSET_GROUPS = 4
PRIOR_BIAS = -math.log(99)  # every class starts at a probability of 0.01


class HeadOutput(NamedTuple):
    """The head's output, a tensor for each level.

    Attributes:
        scores: (B, K, h, w) probabilities; nothing downstream applies a sigmoid.
        boxes_strides: (B, 4, h, w) xyxy in units of the level's stride, not clipped.
    """

    scores: list[Tensor]
    boxes_strides: list[Tensor]


class HeadMaps(NamedTuple):
    """The raw maps of a head with separate towers, a tensor for each level: what losses read.

    Attributes:
        classes: (B, A*K, h, w) logits, anchor by anchor; A is 1 but in RetinaNet.
        regression: (B, C, h, w) after the level's scale, in the coding that the head's `decode`
            reads: deltas (ATSS, PAA, RetinaNet), logits of 4 sides' bins (GFL), distances in
            strides (FCOS, VFNet).
        quality: (B, 1, h, w) logits of centre-ness (ATSS, FCOS) or overlap (PAA); no tensors where
            the head predicts neither.
    """

    classes: list[Tensor]
    regression: list[Tensor]
    quality: list[Tensor]


class ConvNorm(nn.Module):
    """Convolution, GroupNorm, ReLU."""

    def __init__(
        self,
        preset: Preset,
        in_channels: int,
        kernel_size: int,
        deform: bool = False,
        bias: bool = False,
    ) -> None:
        """Build it, with random initial weights.

        Args:
            preset: gives the output channels and the norm's settings.
            in_channels: of the input.
            kernel_size: rows and columns of the kernel.
            deform: make the convolution a deformable one.
            bias: of an ordinary convolution.
        """
        super().__init__()
        channels, padding = preset.channels, kernel_size // 2
        if deform:
            self.conv = DeformConv2d(
                in_channels,
                channels,
                kernel_size,
                padding=padding,
                offset_groups=TOWER_OFFSET_GROUPS,
            )
        else:
            self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, bias=bias)
            if self.conv.bias is not None:
                nn.init.zeros_(self.conv.bias)
        self.gn = nn.GroupNorm(preset.norm_groups, channels, eps=preset.norm_eps)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', H, W) for x (B, C, H, W)."""
        return F.relu(self.gn(self.conv(x)))


class Scale(nn.Module):
    """A learnt scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, times the scalar."""
        return x * self.scale


def init_convs(module: nn.Module, std: float, bias: float = 0.0) -> None:
    """Give all convolutions of a module normal weights and constant biases.

    Args:
        module: with convolutions.
        std: of the weights, whose mean is zero.
        bias: of every output channel.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=std)
            if conv.bias is not None:
                nn.init.constant_(conv.bias, bias)


def probability(logits: Tensor) -> Tensor:
    """Return sigmoid(logits), in float32.

    Computed through softplus, because ONNX Runtime's Sigmoid has steps of 6e-8: of a level where
    nothing is seen, and all probabilities are small, that is far more than float32 explains.
    """
    return (-F.softplus(-logits.float())).exp()


def geometric_mean_probability(first: Tensor, second: Tensor) -> Tensor:
    """Return sqrt(sigmoid(first) * sigmoid(second)) of logits.

    Computed through logarithms, because the square root's own gradient is infinite where a sigmoid
    underflows: the gradient is then g * p * (1 - sigmoid) / 2. And through softplus, because ONNX
    Runtime's Sigmoid is 0 below -18 and has steps of 6e-8, which a root turns into errors of 7e-5.
    """
    return (-(F.softplus(-first) + F.softplus(-second)) / 2).exp()


class SeparateTowers(nn.Module, ABC):
    """A head of two towers, one that scores classes and one that finds boxes.

    It is shared by all levels but for one scale each. What the towers' last convolutions are, and
    what their maps mean, is each detector's own.
    """

    def __init__(self, preset: Preset) -> None:
        """Build the towers and the scales, with random initial weights."""
        super().__init__()
        self.anchor_side, self.anchor_offset = preset.anchor_side, preset.anchor_offset
        self.cls_convs = self._tower(preset)
        self.reg_convs = self._tower(preset)
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def _tower(self, preset: Preset) -> nn.Sequential:
        """Return one tower."""
        channels, bias = preset.channels, preset.tower_bias
        return nn.Sequential(
            *(ConvNorm(preset, channels, 3, bias=bias) for _ in range(preset.tower_stages))
        )

    def forward(self, levels: Sequence[Tensor]) -> HeadOutput:
        """Return scores and boxes of every level, from P3 to P7 (B, C, h, w)."""
        return self.decode(self.maps(levels))

    def predict(self, levels: Sequence[Tensor]) -> tuple[HeadOutput, list[Tensor]]:
        """Return `forward`'s result and `ranking`'s."""
        maps = self.maps(levels)
        return self.decode(maps), self.ranking(maps)

    @abstractmethod
    def maps(self, levels: Sequence[Tensor]) -> HeadMaps:
        """Return the raw maps of every level, from P3 to P7 (B, C, h, w)."""

    def decode(self, maps: HeadMaps) -> HeadOutput:
        """Return scores and boxes of raw maps. From here on all is float32.

        An fp16 coordinate near cell 160 moves in steps of a pixel.
        """
        boxes = [self.boxes(x.float(), level) for level, x in enumerate(maps.regression)]
        return HeadOutput(self.scores(maps), boxes)

    def scores(self, maps: HeadMaps) -> list[Tensor]:
        """Return final probabilities (B, K, h, w) of every level."""
        return [probability(logits) for logits in maps.classes]

    def ranking(self, maps: HeadMaps) -> list[Tensor]:
        """Return the probabilities (B, K, h, w) that thresholds and limits look at.

        No tensors where these are the scores themselves.
        """
        return []

    @abstractmethod
    def boxes(self, regression: Tensor, level: int) -> Tensor:
        """Return boxes (B, 4, h, w) xyxy in strides of one level's regression map, in float32."""

    def points(self, regression: Tensor) -> Tensor:
        """Return x, y of the anchor points of a level's map, (2, h, w), in strides."""
        size_hw = regression.shape[2], regression.shape[3]
        return anchor_points(size_hw, regression, self.anchor_offset)


class CenternessTowers(SeparateTowers):
    """Separate towers whose score is class probability times centre-ness (ATSS, FCOS).

    Thresholds and limits look at the class probability alone, before the factor.
    """

    def scores(self, maps: HeadMaps) -> list[Tensor]:
        """Return class probability times centre-ness."""
        return [
            of_class * probability(quality)
            for of_class, quality in zip(self.ranking(maps), maps.quality, strict=True)
        ]

    def ranking(self, maps: HeadMaps) -> list[Tensor]:
        """Return the class probability alone."""
        return [probability(logits) for logits in maps.classes]
