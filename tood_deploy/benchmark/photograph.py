"""Real pictures without a folder: crops of the photograph that matplotlib brings along, of the shape that an input size has.

Comes in: an input size. Goes out: a set of pictures. matplotlib itself is not imported: its memory would count as the measured model's.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.picture_set import Picture, PictureSet
from tood_deploy.errors import InputError
from tood_deploy.inference.images import decode_image
from tood_deploy.preprocess import fit_size, pad_size

PHOTOGRAPH = Path("matplotlib/mpl-data/sample_data/grace_hopper.jpg")  # an official portrait, in the public domain


def photograph_crops(imgsz: tuple[int, int], count: int) -> PictureSet:
    """Different parts of the photograph, every second one mirrored.

    Pre-processing scales them to the padded size that a picture of `imgsz` has, landscape.

    Args:
        imgsz: (short side, long side).
        count: how many.

    Raises:
        InputError: the photograph is not there, or is too small to have such a shape.
    """
    try:
        package = distribution("matplotlib")
        data = Path(str(package.locate_file(PHOTOGRAPH))).read_bytes()
    except (PackageNotFoundError, OSError) as error:
        raise InputError(
            f"{PHOTOGRAPH.name}: the photograph of matplotlib, which is measured on by default, cannot be read ({error}); "
            "give pictures of your own with --images DIR"
        ) from error
    photograph = decode_image(data, PHOTOGRAPH.name)
    height, width = crop_size(photograph.shape[:2], imgsz)
    pictures = tuple(Picture(f"crop {i}", i + 1, lambda i=i: _crop(photograph, (height, width), i, count)) for i in range(count))
    return PictureSet(f"{count} crops, {height}x{width}, of a photograph, {PHOTOGRAPH.name} of matplotlib {package.version}", pictures)


def crop_size(image_hw: tuple[int, ...], imgsz: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the widest part of a picture that pre-processing brings to the padded size of `imgsz`.

    Args:
        image_hw: rows and columns of the picture.
        imgsz: (short side, long side).

    Raises:
        InputError: no part has such a shape.
    """
    short, long = imgsz
    for width in range(image_hw[1], 0, -1):
        size = (round(width * short / long), width)
        if 0 < size[0] <= image_hw[0] and pad_size(fit_size(size, imgsz)) == pad_size(imgsz):
            return size
    raise InputError(f"imgsz is {short} {long}: no part of {PHOTOGRAPH.name} has that shape; give pictures of your own with --images DIR")


def _crop(photograph: NDArray[np.uint8], size_hw: tuple[int, int], number: int, count: int) -> NDArray[np.uint8]:
    """One of `count` parts of a size, spread evenly from the upper left to the lower right."""
    place = number / max(count - 1, 1)
    top, left = (int(place * (whole - part)) for whole, part in zip(photograph.shape[:2], size_hw, strict=True))
    crop = photograph[top : top + size_hw[0], left : left + size_hw[1]]
    return np.ascontiguousarray(crop[:, ::-1] if number % 2 else crop)
