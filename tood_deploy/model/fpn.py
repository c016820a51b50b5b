"""Build the feature pyramid: C3, C4, C5 in, P3 to P7 out (reference/SPEC.md section 1).

Knows neither which backbone its maps come from nor which head reads them.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class _Conv(nn.Module):
    """One convolution under the name `conv`, as the state-dict layout has it."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """The pyramid network.

    Lateral 1x1 convolutions, a sum from the top down, 3x3 output convolutions, and two more levels
    from P5's output.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        """Build it for maps of `in_channels`, with `channels` in every level."""
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Conv(count, channels, 1) for count in in_channels)
        self.fpn_convs = nn.ModuleList(
            _Conv(channels, channels, 3, stride) for stride in (1, 1, 1, 2, 2)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return P3 to P7, (B, C, H/s, W/s) at strides s of 8, 16, 32, 64, 128.

        Args:
            maps: C3, C4, C5 of the backbone, at strides of 8, 16, 32.
        """
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (1, 0):  # P5 into P4, then that into P3
            laterals[i] = laterals[i] + F.interpolate(
                laterals[i + 1], size=laterals[i].shape[2:], mode="nearest"
            )
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        for conv in list(self.fpn_convs)[len(laterals) :]:
            levels.append(conv(levels[-1]))  # no activation between P6 and P7
        return levels
