"""Build the feature pyramid: C3, C4, C5 in, P3 to P7 out.

Sources: reference/SPEC.md section 1; reference/SPEC_FAMILY.md section 0.

Knows neither which backbone its maps come from nor which head reads them.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.presets import Preset


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
    from P5's output or from C5.
    """

    def __init__(self, in_channels: Sequence[int], preset: Preset) -> None:
        """Build it for maps of `in_channels`."""
        super().__init__()
        channels = preset.channels
        self.reads_input = preset.extra_levels == "input"
        self.relu_before_p7 = preset.relu_before_p7
        p6_channels = in_channels[-1] if self.reads_input else channels
        self.lateral_convs = nn.ModuleList(_Conv(count, channels, 1) for count in in_channels)
        self.fpn_convs = nn.ModuleList(
            [
                *(_Conv(channels, channels, 3) for _ in in_channels),
                _Conv(p6_channels, channels, 3, 2),
                _Conv(channels, channels, 3, 2),
            ]
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
        to_p6, to_p7 = list(self.fpn_convs)[len(laterals) :]
        p6 = to_p6(maps[-1] if self.reads_input else levels[-1])
        p7 = to_p7(F.relu(p6) if self.relu_before_p7 else p6)  # P6 itself stays without ReLU
        return [*levels, p6, p7]
