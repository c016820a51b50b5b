"""Build the head of GFL: every distance as a distribution over bins.

Source: reference/SPEC_FAMILY.md section 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tood_deploy.model.boxes import decode_distances
from tood_deploy.model.head import PRIOR_BIAS, HeadMaps, SeparateTowers, init_convs
from tood_deploy.presets import Preset


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
    """The head of GFL: the class probability, trained to be the overlap, is the score.

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
