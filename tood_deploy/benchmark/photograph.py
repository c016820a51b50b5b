"""Real images without a folder, as a set: crops of the photograph that matplotlib brings along, of the shape that an input size has."""

from __future__ import annotations

from tood_deploy.benchmark.picture_set import Picture, PictureSet
from tood_deploy.parity.sample_images import crop_evenly, crop_size, read_photograph


def photograph_crops(imgsz: tuple[int, int], count: int) -> PictureSet:
    """Different parts of the photograph, every second one mirrored.

    Pre-processing scales them to the padded size that a picture of `imgsz` has, landscape.

    Args:
        imgsz: (short side, long side).
        count: how many.

    Raises:
        InputError: the photograph is not there, or is too small to have such a shape.
    """
    photograph, origin = read_photograph()
    size_hw = crop_size(photograph.shape[:2], imgsz)
    pictures = tuple(Picture(f"crop {i}", i + 1, lambda i=i: crop_evenly(photograph, size_hw, i, count)) for i in range(count))
    return PictureSet(f"{count} crops, {size_hw[0]}x{size_hw[1]}, of a photograph, {origin}", pictures)
