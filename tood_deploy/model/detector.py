"""Put the network together, its feature pyramid included, and the detector around it.

`FPN` makes P3 to P7 of C3, C4 and C5 (reference/SPEC.md section 1, SPEC_FAMILY.md section 0).
`DenseDetector` is backbone, pyramid and head: normalised images in, `HeadOutput` out.
`FusedDetector` adds what an artefact holds too: uint8 images and thresholds in, detections out.
Knows nothing of checkpoints, training or export.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.head import HeadOutput
from tood_deploy.model.heads import build_head
from tood_deploy.model.postprocess import (
    BatchResult,
    Candidates,
    rules_of,
    select_candidates,
    suppress,
    vote,
)
from tood_deploy.model.resnet import ResNet
from tood_deploy.presets import Preset, get_preset


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


class DenseDetector(nn.Module):
    """A detector of the family in MMDetection's state-dict layout.

    Attributes:
        preset: what it was built from; holds classes, input statistics and test-time convention.
        checkpoint_sha256: of the file that its weights are from; "" where there is none.
    """

    checkpoint_sha256: str = ""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        self.backbone = ResNet(preset)
        self.neck = FPN(self.backbone.out_channels, preset)
        self.bbox_head = build_head(preset)

    def forward(self, images: Tensor) -> HeadOutput:
        """Return scores and boxes of every level.

        Args:
            images: (B, 3, H, W) float32, normalised, channels in the preset's order; H and W
                multiples of 32, zeros where padded.
        """
        return self.bbox_head(self.neck(self.backbone(images)))

    if TYPE_CHECKING:

        def __call__(self, images: Tensor) -> HeadOutput:
            """Call `forward`: for type checkers, to which a call of an `nn.Module` gives `Any`."""
            ...


def build_model(preset: str | Preset) -> DenseDetector:
    """Return the network of a preset, in eval mode, with random initial weights.

    Args:
        preset: the preset or its name. Initial weights: reference/SPEC.md section 2.

    Raises:
        ToodError: no such preset, or one that contradicts itself.
    """
    return DenseDetector(get_preset(preset) if isinstance(preset, str) else preset).eval()


class Stages(NamedTuple):
    """The detections and all stages on the way to them, in order.

    Attributes:
        pixels: (B, 3, H, W) normalised input of the network.
        backbone: C3, C4, C5.
        pyramid: P3 to P7.
        head: probabilities and boxes of every level.
        ranking: probabilities (B, K, h, w) of every level that thresholds and limits look at; no
            tensors where these are the head's.
        candidates: the input of suppression.
        detections: its output.
    """

    pixels: Tensor
    backbone: list[Tensor]
    pyramid: list[Tensor]
    head: HeadOutput
    ranking: list[Tensor]
    candidates: Candidates
    detections: BatchResult


class FusedDetector(nn.Module):
    """A `DenseDetector` between normalisation and suppression.

    Attributes:
        max_det: detections of an image at most.
    """

    mean: Tensor
    std: Tensor
    pad_value: Tensor

    def __init__(self, model: DenseDetector, max_det: int | None = None) -> None:
        """Wrap the network; `max_det` is the preset's where it is None."""
        super().__init__()
        preset = model.preset
        self.model = model
        self.max_det = preset.max_det if max_det is None else max_det
        self.pads_with_zeros = not any(preset.pad_value)
        self.takes_bgr = preset.channel_order == "bgr"
        self.register_buffer("mean", torch.tensor(preset.mean), persistent=False)
        self.register_buffer("std", torch.tensor(preset.std), persistent=False)
        pad_value = torch.tensor(preset.pad_value)[:, None, None]
        self.register_buffer("pad_value", pad_value, persistent=False)

    def normalise(self, images: Tensor, valid_hw: Tensor) -> Tensor:
        """Normalise, pad and put the channels in the network's order.

        Args:
            images: (B, H, W, 3) uint8 RGB.
            valid_hw: (B, 2) rows and columns that hold real pixels.

        Returns:
            (B, 3, H, W) float32; outside `valid_hw` exactly the preset's pad value, which is zero
            in the published models.
        """
        # Cast before the transposition: TensorRT's parser refuses a uint8 Transpose.
        x = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        rows = torch.arange(x.shape[2], device=x.device) < valid_hw[:, :1]
        columns = torch.arange(x.shape[3], device=x.device) < valid_hw[:, 1:]
        real = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
        x = torch.where(real, x, 0.0 if self.pads_with_zeros else self.pad_value)
        return (x[:, [2, 1, 0]] if self.takes_bgr else x).contiguous()

    def forward(
        self,
        images: Tensor,
        valid_hw: Tensor,
        score_threshold: Tensor | float,
        iou_threshold: Tensor | float,
    ) -> Stages:
        """Return detections, and all stages on the way to them.

        Args:
            images: (B, H, W, 3) uint8 RGB; H and W multiples of 32.
            valid_hw: (B, 2) int32 rows and columns that hold real pixels.
            score_threshold: scalar; detections have a score above it.
            iou_threshold: scalar; of two boxes of a class that overlap by more, the one with the
                lower score goes.
        """
        pixels = self.normalise(images, valid_hw)
        backbone = self.model.backbone(pixels)
        pyramid = self.model.neck(backbone)
        head, ranking = self.model.bbox_head.predict(pyramid)
        candidates = self.select_candidates(head, valid_hw, score_threshold, ranking)
        detections = self.suppress(candidates, iou_threshold)
        return Stages(pixels, backbone, pyramid, head, ranking, candidates, detections)

    def select_candidates(
        self,
        head: HeadOutput,
        valid_hw: Tensor,
        score_threshold: Tensor | float,
        ranking: Sequence[Tensor] = (),
    ) -> Candidates:
        """Select the input of suppression by the preset's rules.

        Args:
            head: probabilities and boxes of every level.
            valid_hw: (B, 2) rows and columns that hold real pixels.
            score_threshold: scalar; candidates have a score above it.
            ranking: see `Stages`.
        """
        preset = self.model.preset
        return select_candidates(
            head,
            valid_hw,
            score_threshold,
            rules=rules_of(preset),
            per_level=preset.candidates_per_level,
            ranking=ranking,
        )

    def suppress(self, candidates: Candidates, iou_threshold: Tensor | float) -> BatchResult:
        """Suppress candidates class by class, and vote where the preset does.

        Args:
            candidates: best first.
            iou_threshold: of two boxes of a class that overlap by more, the one with the lower
                score goes.
        """
        detections = suppress(candidates, iou_threshold, self.max_det)
        return vote(detections, candidates) if self.model.preset.score_voting else detections
