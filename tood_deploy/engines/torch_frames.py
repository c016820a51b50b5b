"""Resize, pad and order the channels of frames on the device: uint8 frames go up once.

Comes in: frames on the device, and what becomes of each. Goes out: what a detector takes. Equal to
`preprocess.resize_and_pad` within one grey level: OpenCV computes with 11 bits of weight, this in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.preprocess import ImageTransform


def resize_and_pad_frames(
    frames: Sequence[Tensor], transforms: Sequence[ImageTransform]
) -> tuple[Tensor, Tensor]:
    """Return the images of a batch, and the rows and columns of each that hold real pixels.

    Args:
        frames: (H, W, 3) uint8 BGR, of any sizes.
        transforms: of the frames, to one padded size.

    Returns:
        (B, rows, columns, 3) uint8 RGB, zeros where padded; and (B, 2) int32.
    """
    (net_hw,) = {transform.net_hw for transform in transforms}
    images = torch.zeros((len(frames), *net_hw, 3), dtype=torch.uint8, device=frames[0].device)
    for image, frame, transform in zip(images, frames, transforms, strict=True):
        rows, columns = transform.resized_hw
        image[:rows, :columns] = _resize(frame, transform.resized_hw).flip(2)
    sizes = [transform.resized_hw for transform in transforms]
    return images, torch.tensor(sizes, dtype=torch.int32).to(images.device, non_blocking=True)


def _resize(frame: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return a frame (H, W, 3) uint8 in another size, bilinearly between the centres of pixels."""
    if tuple(frame.shape[:2]) == size_hw:
        return frame
    planes = frame.permute(2, 0, 1).unsqueeze(0).float()
    resized = F.interpolate(planes, size=size_hw, mode="bilinear", align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
