"""Build the heads of two towers, one for classes and one for boxes: TOOD's relatives.

Source: reference/SPEC_FAMILY.md, whose sections the classes name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.boxes import decode_deltas, decode_distances
from tood_deploy.model.deform import OffsetConv2d
from tood_deploy.model.head import (
    PRIOR_BIAS,
    CenternessTowers,
    ConvNorm,
    HeadMaps,
    Scale,
    SeparateTowers,
    geometric_mean_probability,
    init_convs,
    probability,
)
from tood_deploy.presets import STRIDES, Preset

# VFNet: of the distances that an exponential of 1 stands for: 64 pixels on the level of stride 8,
# and so on in step with the strides.
UNIT_STRIDES = 8.0


class AtssHead(CenternessTowers):
    """The head of ATSS (section 1): deltas against one square anchor.

    The score is class times centre-ness.

    `maps` gives: class logits (B, K, h, w), deltas (B, 4, h, w) after the scale, and the logits of
    centre-ness (B, 1, h, w).
    """

    def __init__(self, preset: Preset) -> None:
        """Build it, with random initial weights."""
        super().__init__(preset)
        self.delta_means, self.delta_stds = preset.delta_means, preset.delta_stds
        self.atss_cls = nn.Conv2d(preset.channels, preset.num_classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(preset.channels, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(preset.channels, 1, 3, padding=1)
        init_convs(self.atss_cls, std=0.01, bias=PRIOR_BIAS)
        init_convs(self.atss_reg, std=0.01)
        init_convs(self.atss_centerness, std=0.01)

    def maps(self, levels: Sequence[Tensor]) -> HeadMaps:
        """Return class logits, deltas and centre-ness logits of every level."""
        maps = HeadMaps([], [], [])
        for x, scale in zip(levels, self.scales, strict=True):
            features = self.reg_convs(x)
            maps.classes.append(self.atss_cls(self.cls_convs(x)))
            maps.regression.append(scale(self.atss_reg(features)))
            maps.quality.append(self.atss_centerness(features))
        return maps

    def boxes(self, regression: Tensor, level: int) -> Tensor:
        """Return boxes of deltas."""
        points = self.points(regression)
        return decode_deltas(
            regression, points, self.anchor_side, self.delta_means, self.delta_stds
        )


class PaaHead(AtssHead):
    """The head of PAA (section 3), the network of ATSS with another meaning.

    What ATSS trains as centre-ness is trained as the overlap of the box with its object; the score
    is the geometric mean of class and overlap.
    """

    def scores(self, maps: HeadMaps) -> list[Tensor]:
        """Return sqrt(class probability * overlap)."""
        return [
            geometric_mean_probability(logits.float(), quality.float())
            for logits, quality in zip(maps.classes, maps.quality, strict=True)
        ]

    def ranking(self, maps: HeadMaps) -> list[Tensor]:
        """Return no tensors: the scores rank themselves."""
        return []


class FcosHead(CenternessTowers):
    """The head of FCOS (section 4): rectified distances from cell centres.

    Centre-ness is on the box tower; the score is class times centre-ness.

    `maps` gives: class logits (B, K, h, w), distances (B, 4, h, w) in strides, rectified, and the
    logits of centre-ness (B, 1, h, w).
    """

    def __init__(self, preset: Preset) -> None:
        """Build it, with random initial weights."""
        super().__init__(preset)
        self.conv_cls = nn.Conv2d(preset.channels, preset.num_classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(preset.channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(preset.channels, 1, 3, padding=1)
        init_convs(self.conv_cls, std=0.01, bias=PRIOR_BIAS)
        init_convs(self.conv_reg, std=0.01)
        init_convs(self.conv_centerness, std=0.01)

    def maps(self, levels: Sequence[Tensor]) -> HeadMaps:
        """Return class logits, distances and centre-ness logits of every level."""
        maps = HeadMaps([], [], [])
        for x, scale in zip(levels, self.scales, strict=True):
            features = self.reg_convs(x)
            maps.classes.append(self.conv_cls(self.cls_convs(x)))
            maps.regression.append(F.relu(scale(self.conv_reg(features))))
            maps.quality.append(self.conv_centerness(features))
        return maps

    def boxes(self, regression: Tensor, level: int) -> Tensor:
        """Return boxes of distances."""
        return decode_distances(regression, self.points(regression))


class Integral(nn.Module):
    """Gives the mean of a distribution over bins.

    Attributes:
        project: (N,) the bins' distances 0, 1, ... N - 1, in strides; a buffer of the state dict.
    """

    project: Tensor

    def __init__(self, bins: int) -> None:
        """Build it for N bins."""
        super().__init__()
        self.register_buffer("project", torch.arange(bins, dtype=torch.float32))

    def forward(self, logits: Tensor) -> Tensor:
        """Return distances (B, 4, h, w) in strides, of logits (B, 4*N, h, w), side by side."""
        bins = self.project.shape[0]
        batch, channels, height, width = logits.shape
        by_side = logits.reshape(batch, channels // bins, bins, height, width)
        return (by_side.softmax(2) * self.project[:, None, None]).sum(2)


class GflHead(SeparateTowers):
    """The head of GFL (section 2): every distance is a distribution over bins.

    The class probability, trained to be the overlap, is the score.

    `maps` gives: class logits (B, K, h, w) and, after the scale, the logits of the distributions
    (B, 4*N, h, w), channel side * N + bin, sides left, top, right, bottom.
    """

    def __init__(self, preset: Preset) -> None:
        """Build it, with random initial weights."""
        super().__init__(preset)
        self.gfl_cls = nn.Conv2d(preset.channels, preset.num_classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(preset.channels, 4 * preset.bins, 3, padding=1)
        self.integral = Integral(preset.bins)
        init_convs(self.gfl_cls, std=0.01, bias=PRIOR_BIAS)
        init_convs(self.gfl_reg, std=0.01)

    def maps(self, levels: Sequence[Tensor]) -> HeadMaps:
        """Return class logits and distribution logits of every level."""
        maps = HeadMaps([], [], [])
        for x, scale in zip(levels, self.scales, strict=True):
            maps.classes.append(self.gfl_cls(self.cls_convs(x)))
            maps.regression.append(scale(self.gfl_reg(self.reg_convs(x))))
        return maps

    def boxes(self, regression: Tensor, level: int) -> Tensor:
        """Return boxes of the distributions' means."""
        return decode_distances(self.integral(regression), self.points(regression))


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
    """The head of RetinaNet (section 6): several anchors in every cell, towers without norms.

    The class probability is the score.

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


def star_offsets(distances: Tensor) -> Tensor:
    """Return the offsets of nine taps that read a cell, and its box's corners and sides' centres.

    Args:
        distances: (B, 4, h, w) left, top, right, bottom, in strides, which are cells.

    Returns:
        (B, 18, h, w): dy, dx of every tap of a 3x3 kernel in row-major order, from where the tap
        reads without an offset.
    """
    left, top, right, bottom = distances.unbind(1)
    still = torch.zeros_like(left)
    rows, columns = (1 - top, still, bottom - 1), (1 - left, still, right - 1)
    return torch.stack([shift for dy in rows for dx in columns for shift in (dy, dx)], dim=1)


class VfnetHead(SeparateTowers):
    """The head of VFNet (section 5): first boxes, refined by a look along their outlines.

    The class probability, trained to be the overlap, is the score.

    `maps` gives: class logits (B, K, h, w) and refined distances (B, 4, h, w) in strides.
    """

    def __init__(self, preset: Preset) -> None:
        """Build it, with random initial weights."""
        super().__init__(preset)
        channels = preset.channels
        self.vfnet_reg_conv = ConvNorm(preset, channels, 3)
        self.vfnet_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.vfnet_reg_refine_dconv = OffsetConv2d(channels, channels, 3, padding=1)
        self.vfnet_reg_refine = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales_refine = nn.ModuleList(Scale() for _ in STRIDES)
        self.vfnet_cls_dconv = OffsetConv2d(channels, channels, 3, padding=1)
        self.vfnet_cls = nn.Conv2d(channels, preset.num_classes, 3, padding=1)
        init_convs(self.vfnet_reg, std=0.01)
        init_convs(self.vfnet_reg_refine, std=0.01)
        init_convs(self.vfnet_cls, std=0.01, bias=PRIOR_BIAS)

    def maps(self, levels: Sequence[Tensor]) -> HeadMaps:
        """Return class logits and refined distances of every level."""
        maps = HeadMaps([], [], [])
        for x, scale, refine in zip(levels, self.scales, self.scales_refine, strict=True):
            features = self.reg_convs(x)
            first = scale(self.vfnet_reg(self.vfnet_reg_conv(features))).float().exp()
            first = first * UNIT_STRIDES
            offsets = star_offsets(first)
            along = F.relu(self.vfnet_reg_refine_dconv(features, offsets))
            maps.regression.append(refine(self.vfnet_reg_refine(along)).float().exp() * first)
            seen = F.relu(self.vfnet_cls_dconv(self.cls_convs(x), offsets))
            maps.classes.append(self.vfnet_cls(seen))
        return maps

    def boxes(self, regression: Tensor, level: int) -> Tensor:
        """Return boxes of distances."""
        return decode_distances(regression, self.points(regression))
