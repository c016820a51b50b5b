"""Build the head of FCOS, with its centre-ness on the box tower and distances in strides.

Source: reference/SPEC_FAMILY.md section 4.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.boxes import decode_distances
from tood_deploy.model.head import PRIOR_BIAS, CenternessTowers, HeadMaps, init_convs
from tood_deploy.presets import Preset


class FcosHead(CenternessTowers):
    """The head of FCOS: rectified distances from cell centres; score is class times centre-ness.

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
