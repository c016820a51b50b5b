"""What the network shall find in one image, and the anchor points it answers at. Knows no loss and no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tood_deploy.errors import ToodError
from tood_deploy.preprocess import pad_size
from tood_deploy.presets import STRIDES


@dataclass(frozen=True, eq=False)
class Targets:
    """The ground truth of one image of a batch.

    Attributes:
        boxes: (G, 4) float32 xyxy, in pixels of the network input.
        labels: (G,) int64 class numbers.
        valid_hw: rows and columns of the input that hold real pixels.
    """

    boxes: Tensor
    labels: Tensor
    valid_hw: tuple[int, int]

    def __post_init__(self) -> None:
        count = self.labels.numel()
        if self.labels.shape != (count,) or self.boxes.shape != (count, 4):
            raise ToodError(f"targets: boxes {tuple(self.boxes.shape)} and labels {tuple(self.labels.shape)}; expected (G, 4) and (G,)")

    def to(self, device: torch.device | str) -> Targets:
        """The same on another device."""
        return Targets(self.boxes.to(device, torch.float32), self.labels.to(device, torch.int64), self.valid_hw)


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """The anchor points of all levels, level by level, row by row.

    Attributes:
        sizes_hw: rows and columns of every level.
        points: (A, 2) x, y in pixels of the network input.
        strides: (A,) float32.
        anchor_side: of the square anchors, in strides.
        anchor_offset: of the points from their cells' upper left corners, in strides.
    """

    sizes_hw: tuple[tuple[int, int], ...]
    points: Tensor
    strides: Tensor
    anchor_side: float = 8.0
    anchor_offset: float = 0.0

    @classmethod
    def of_maps(cls, maps: Sequence[Tensor], anchor_side: float = 8.0, anchor_offset: float = 0.0) -> AnchorGrid:
        """Return the grid behind maps (..., h, w) of stride 8 to 128; side and offset of the anchors in strides."""
        sizes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        points, strides = [], []
        for (height, width), stride in zip(sizes, STRIDES, strict=True):
            y, x = (
                torch.arange(side, device=maps[0].device, dtype=torch.float32) * stride + anchor_offset * stride for side in (height, width)
            )
            points.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=2).reshape(-1, 2))
            strides.append(x.new_full((height * width,), float(stride)))
        return cls(sizes, torch.cat(points), torch.cat(strides), anchor_side, anchor_offset)

    @property
    def level_lengths(self) -> list[int]:
        """Anchor points of every level."""
        return [height * width for height, width in self.sizes_hw]

    def valid_sizes(self, valid_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of every level that lie on the image padded by itself to a multiple of 32 (reference/SPEC.md section 3)."""
        padded = pad_size(valid_hw)
        return [
            (min(height, -(-padded[0] // stride)), min(width, -(-padded[1] // stride)))
            for (height, width), stride in zip(self.sizes_hw, STRIDES, strict=True)
        ]

    def valid_mask(self, valid_hw: tuple[int, int]) -> Tensor:
        """(A,) bool: the anchor points of `valid_sizes`."""
        masks = []
        for (height, width), (rows, columns) in zip(self.sizes_hw, self.valid_sizes(valid_hw), strict=True):
            mask = torch.zeros(height, width, dtype=torch.bool, device=self.points.device)
            mask[:rows, :columns] = True
            masks.append(mask.flatten())
        return torch.cat(masks)
