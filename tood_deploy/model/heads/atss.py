"""Build the heads of ATSS and of PAA, which are one network with two meanings.

What ATSS trains as centre-ness, PAA trains as the overlap of the box with its object; the scores
differ accordingly. Source: reference/SPEC_FAMILY.md sections 1 and 3.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from tood_deploy.model.boxes import decode_deltas
from tood_deploy.model.head import (
    PRIOR_BIAS,
    CenternessTowers,
    HeadMaps,
    geometric_mean_probability,
    init_convs,
)
from tood_deploy.presets import Preset


class AtssHead(CenternessTowers):
    """The head of ATSS: deltas against one square anchor; score is class times centre-ness.

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
    """The head of PAA: score is the geometric mean of class and predicted overlap."""

    def scores(self, maps: HeadMaps) -> list[Tensor]:
        """Return sqrt(class probability * overlap)."""
        return [
            geometric_mean_probability(logits.float(), quality.float())
            for logits, quality in zip(maps.classes, maps.quality, strict=True)
        ]

    def ranking(self, maps: HeadMaps) -> list[Tensor]:
        """Return no tensors: the scores rank themselves."""
        return []
