"""Build the head of RetinaNet: several anchors in every cell, towers without norms.

Source: reference/SPEC_FAMILY.md sections 0 and 6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.boxes import decode_deltas
from tood_deploy.model.head import PRIOR_BIAS, HeadMaps, SeparateTowers, init_convs, probability
from tood_deploy.presets import Preset


class _ConvReLU(nn.Module):
    """A 3x3 convolution, under the name `conv`, and a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        init_convs(self.conv, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def anchor_sizes(side: float, octaves: int, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Return widths and heights of a cell's A anchors, in strides, ratio by ratio.

    Args:
        side: of the smallest square anchor, in strides.
        octaves: anchors of a ratio, each 2^(1/octaves) as large as the one before.
        ratios: of height to width.
    """
    sides = [side * 2 ** (i / octaves) for i in range(octaves)]
    return [(side / ratio**0.5, side * ratio**0.5) for ratio in ratios for side in sides]


class RetinaHead(SeparateTowers):
    """The head of RetinaNet: the class probability is the score.

    `maps` gives: class logits (B, A*K, h, w) and deltas (B, A*4, h, w), anchor by anchor. In
    `HeadOutput` the anchors of a cell lie side by side: A times as many columns as the map.
    """

    def __init__(self, preset: Preset) -> None:
        """Build it, with random initial weights."""
        super().__init__(preset)
        del self.scales
        self.delta_means, self.delta_stds = preset.delta_means, preset.delta_stds
        sizes = anchor_sizes(preset.anchor_side, preset.anchor_octaves, preset.anchor_ratios)
        self.count = count = len(sizes)
        # (2, A, 1, 1) widths and heights; no buffer, as it is in no state dict and never on "meta".
        self.sizes = torch.tensor(sizes, device="cpu").T[:, :, None, None]
        self.retina_cls = nn.Conv2d(preset.channels, count * preset.num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(preset.channels, count * 4, 3, padding=1)
        init_convs(self.retina_cls, std=0.01, bias=PRIOR_BIAS)
        init_convs(self.retina_reg, std=0.01)

    def _tower(self, preset: Preset) -> nn.Sequential:
        return nn.Sequential(*(_ConvReLU(preset.channels) for _ in range(preset.tower_stages)))

    def maps(self, levels: Sequence[Tensor]) -> HeadMaps:
        """Return class logits and deltas of every level."""
        classes = [self.retina_cls(self.cls_convs(x)) for x in levels]
        return HeadMaps(classes, [self.retina_reg(self.reg_convs(x)) for x in levels], [])

    def scores(self, maps: HeadMaps) -> list[Tensor]:
        """Return class probabilities (B, K, h, w*A)."""
        return [_side_by_side(self._by_anchor(probability(x))) for x in maps.classes]

    def boxes(self, regression: Tensor, level: int) -> Tensor:
        """Return boxes (B, 4, h, w*A) of deltas."""
        moved = regression.device != self.sizes.device or regression.dtype != self.sizes.dtype
        sizes = self.sizes.to(regression) if moved else self.sizes
        points = self.points(regression).unsqueeze(1)
        deltas = self._by_anchor(regression)
        return _side_by_side(
            decode_deltas(deltas, points, sizes, self.delta_means, self.delta_stds)
        )

    def _by_anchor(self, x: Tensor) -> Tensor:
        """Return (B, C, A, h, w) of a map (B, A*C, h, w)."""
        batch, channels, height, width = x.shape
        by_anchor = x.reshape(batch, self.count, channels // self.count, height, width)
        return by_anchor.transpose(1, 2)


def _side_by_side(x: Tensor) -> Tensor:
    """Return (B, C, h, w*A) of (B, C, A, h, w): flattened, an order of row, column, anchor."""
    return x.permute(0, 1, 3, 4, 2).flatten(3)
