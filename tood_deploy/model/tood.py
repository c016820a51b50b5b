"""The whole network: backbone, pyramid, head. Normalised images in, `HeadOutput` out."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from tood_deploy.model.fpn import FPN
from tood_deploy.model.head import HeadOutput, TaskAlignedHead
from tood_deploy.model.resnet import ResNet
from tood_deploy.presets import Preset, get_preset


class Tood(nn.Module):
    """A TOOD detector in MMDetection's state-dict layout.

    Attributes:
        preset: what it was built from; says classes, input statistics and test-time convention.
        checkpoint_sha256: of the file its weights are from; empty where there is none.
    """

    checkpoint_sha256: str = ""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        self.backbone = ResNet(preset)
        self.neck = FPN(self.backbone.out_channels, preset.channels)
        self.bbox_head = TaskAlignedHead(preset)

    def forward(self, images: Tensor) -> HeadOutput:
        """Scores and boxes per level.

        Args:
            images: (B, 3, H, W) float32 RGB, normalised; H and W multiples of 32, zeros where padded.
        """
        return self.bbox_head(self.neck(self.backbone(images)))

    if TYPE_CHECKING:

        def __call__(self, images: Tensor) -> HeadOutput:
            """`forward`, for type checkers: they would otherwise take what `nn.Module` gives for anything."""
            ...


def build_model(preset: str | Preset) -> Tood:
    """The network of a preset, by name or as such, in eval mode, with random initial weights (reference/SPEC.md section 2).

    Raises:
        ToodError: no such preset, or one that contradicts itself.
    """
    return Tood(get_preset(preset) if isinstance(preset, str) else preset).eval()
