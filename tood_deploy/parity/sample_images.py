"""Images to verify on where a user gives none: seeded synthetic ones, and crops of a photograph. NumPy and OpenCV alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError
from tood_deploy.preprocess import fit_size, pad_size

BLOCK = 16
RECTANGLES = 12
CROP_HW = (384, 480)
PHOTOGRAPH = Path("matplotlib/mpl-data/sample_data/grace_hopper.jpg")  # an official portrait, in the public domain


def synthetic_picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Draw coloured blocks, rectangles and grain: (height, width, 3) uint8 BGR, the same for the same seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(64, 192, (-(-height // BLOCK), -(-width // BLOCK), 3))
    image = blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[:height, :width]
    for _ in range(RECTANGLES):
        top, left = rng.integers(0, height), rng.integers(0, width)
        rows, columns = 8 + rng.integers(0, max(1, height // 2)), 8 + rng.integers(0, max(1, width // 2))
        image[top : top + rows, left : left + columns] = rng.integers(0, 256, 3)
    return (image + rng.integers(0, 8, image.shape)).clip(0, 255).astype(np.uint8)


def read_photograph() -> tuple[NDArray[np.uint8], str]:
    """Read the photograph that matplotlib brings along, without importing it: (H, W, 3) uint8 BGR, and where it is from.

    Raises:
        InputError: it is not there.
    """
    try:
        package = distribution("matplotlib")
        data = Path(str(package.locate_file(PHOTOGRAPH))).read_bytes()
    except (PackageNotFoundError, OSError) as error:
        raise InputError(
            f"{PHOTOGRAPH.name}: the photograph of matplotlib, which is used by default, cannot be read ({error}); give images of your own"
        ) from error
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return np.asarray(image, np.uint8), f"{PHOTOGRAPH.name} of matplotlib {package.version}"


def crop_size(image_hw: tuple[int, ...], imgsz: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the widest part of an image that pre-processing brings to the padded size of `imgsz`.

    Args:
        image_hw: rows and columns of the image.
        imgsz: (short side, long side).

    Raises:
        InputError: no part has such a shape.
    """
    short, long = imgsz
    for width in range(image_hw[1], 0, -1):
        size = (round(width * short / long), width)
        if 0 < size[0] <= image_hw[0] and pad_size(fit_size(size, imgsz)) == pad_size(imgsz):
            return size
    raise InputError(f"imgsz is {short} {long}: no part of {PHOTOGRAPH.name} has that shape; give images of your own")


def crop_evenly(image: NDArray[np.uint8], size_hw: tuple[int, int], number: int, count: int) -> NDArray[np.uint8]:
    """Return one of `count` parts of a size, spread evenly from the upper left to the lower right, every second one mirrored."""
    place = number / max(count - 1, 1)
    top, left = (int(place * (whole - part)) for whole, part in zip(image.shape[:2], size_hw, strict=True))
    crop = image[top : top + size_hw[0], left : left + size_hw[1]]
    return np.ascontiguousarray(crop[:, ::-1] if number % 2 else crop)


def photograph_crops(count: int) -> list[NDArray[np.uint8]]:
    """Return `count` landscape crops of the photograph, (384, 480, 3) uint8 BGR.

    Raises:
        InputError: the photograph is not there.
    """
    photograph, _ = read_photograph()
    return [crop_evenly(photograph, CROP_HW, number, count) for number in range(count)]
