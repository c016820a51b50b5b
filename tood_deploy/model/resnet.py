"""Build ResNet and ResNeXt backbones, plain or deformable.

Images in, the maps C3, C4, C5 out, in torchvision's and MMDetection's state-dict layout. Knows
nothing of pyramids, heads or training (reference/SPEC.md section 1).
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.errors import ToodError
from tood_deploy.model.deform import DeformConv2d
from tood_deploy.presets import Preset

STAGE_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity."""

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int, preset: Preset, deform: bool
    ) -> None:
        """Build it, with random initial weights.

        Args:
            in_channels: of the input.
            planes: channels of the convolutions.
            stride: of the first convolution.
            preset: whose batch norms it has.
            deform: refused if True: there is no deformable block of this kind.
        """
        super().__init__()
        if deform or preset.groups != 1:
            raise ToodError(
                f"preset {preset.name}: depth {preset.depth} has basic blocks, which take neither "
                "groups nor deformable convolutions; take depth 50, 101 or 152 for these"
            )
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, eps=preset.batch_norm_eps)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=preset.batch_norm_eps)
        self.downsample = _downsample(in_channels, planes, stride, preset)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', H / stride, W / stride) for x (B, C, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries groups and deformation), 1x1, and the identity.

    The stride sits on the 3x3 convolution, in Caffe's style on the first one.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int, preset: Preset, deform: bool
    ) -> None:
        """Build it, with random initial weights.

        Args:
            in_channels: of the input.
            planes: channels of the stage before the expansion by four.
            stride: of the block.
            preset: whose style, groups, widths and batch norms it has.
            deform: make the 3x3 convolution a deformable one.
        """
        super().__init__()
        width = planes
        if preset.groups > 1:
            width = planes * preset.base_width // preset.base_channels * preset.groups
        conv3x3 = DeformConv2d if deform else partial(nn.Conv2d, bias=False)
        first, middle = (stride, 1) if preset.backbone_style == "caffe" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=preset.batch_norm_eps)
        self.conv2 = conv3x3(width, width, 3, stride=middle, padding=1, groups=preset.groups)
        self.bn2 = nn.BatchNorm2d(width, eps=preset.batch_norm_eps)
        self.conv3 = nn.Conv2d(width, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4, eps=preset.batch_norm_eps)
        self.downsample = _downsample(in_channels, planes * 4, stride, preset)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', H / stride, W / stride) for x (B, C, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _downsample(
    in_channels: int, out_channels: int, stride: int, preset: Preset
) -> nn.Sequential | None:
    """Return the projection beside a block, or None where the identity fits.

    Args:
        in_channels, out_channels: of the block.
        stride: of the block.
        preset: whose batch norms it has.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    norm = nn.BatchNorm2d(out_channels, eps=preset.batch_norm_eps)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm)


class ResNet(nn.Module):
    """The backbone of a preset.

    Attributes:
        out_channels: channels of C3, C4, C5.
    """

    def __init__(self, preset: Preset) -> None:
        """Build it, with random initial weights.

        Raises:
            ToodError: the preset wants basic blocks with groups or deformable convolutions.
        """
        super().__init__()
        block = BasicBlock if preset.depth < 50 else Bottleneck
        stem = preset.base_channels
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem, eps=preset.batch_norm_eps)
        channels, outputs = stem, []
        for number, count in enumerate(STAGE_BLOCKS[preset.depth], start=1):
            planes, deform = stem * 2 ** (number - 1), number in preset.deform_stages
            blocks = []
            for i in range(count):
                stride = 2 if i == 0 and number > 1 else 1
                blocks.append(block(channels, planes, stride, preset, deform))
                channels = planes * block.expansion
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            outputs.append(channels)
        self.out_channels = tuple(outputs[1:])
        self._init_weights()

    def _init_weights(self) -> None:
        # Offsets last: what gives them is an ordinary convolution, too, and starts at zero.
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DeformConv2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.init_offsets()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return C3, C4, C5 (strides 8, 16, 32) of normalised images (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            maps.append(x)
        return maps[1:]
