"""Build the head of VFNet: first boxes, and a look along their outlines that refines them.

Source: reference/SPEC_FAMILY.md section 5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.boxes import decode_distances
from tood_deploy.model.deform import OffsetConv2d
from tood_deploy.model.head import PRIOR_BIAS, ConvNorm, HeadMaps, Scale, SeparateTowers, init_convs
from tood_deploy.presets import STRIDES, Preset

# Of the distances that an exponential of 1 stands for: 64 pixels on the level of stride 8, and so
# on in step with the strides.
UNIT_STRIDES = 8.0


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
    """The head of VFNet: the class probability, trained to be the overlap, is the score.

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
