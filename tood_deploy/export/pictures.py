"""Pictures to verify an export on and to calibrate on: built-in synthetic ones, and the user's own. NumPy and OpenCV alone."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
BLOCK = 16
RECTANGLES = 12
FEWEST_PICTURES, MOST_PICTURES = 64, 128  # to calibrate on; of fewer a warning is given, of more some are taken


def synthetic_picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Coloured blocks, rectangles and grain, (height, width, 3) uint8 BGR; the same for the same seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(64, 192, (-(-height // BLOCK), -(-width // BLOCK), 3))
    picture = blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[:height, :width]
    for _ in range(RECTANGLES):
        top, left = rng.integers(0, height), rng.integers(0, width)
        rows, columns = 8 + rng.integers(0, max(1, height // 2)), 8 + rng.integers(0, max(1, width // 2))
        picture[top : top + rows, left : left + columns] = rng.integers(0, 256, 3)
    return (picture + rng.integers(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)


def picture_paths(folder: Path, most: int | None = None) -> list[Path]:
    """The first pictures of a folder in order of their names; all where `most` is not given.

    Raises:
        InputError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of pictures ({', '.join(SUFFIXES)})")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:most]
    if not paths:
        raise InputError(f"{folder}: no pictures in it; expected files ending in {', '.join(SUFFIXES)}")
    return paths


def choose_pictures(folder: Path, most: int) -> list[Path]:
    """At most so many pictures of a folder, evenly spread over it.

    Raises:
        InputError: fewer than two.
    """
    paths = picture_paths(folder)
    if min(len(paths), most) < 2:
        raise InputError(
            f"{folder}: {min(len(paths), most)} picture to calibrate on; expected {FEWEST_PICTURES} or more, like those to come"
        )
    return [paths[i] for i in np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)]


def read_pictures(folder: Path, most: int) -> list[NDArray[np.uint8]]:
    """The first pictures of a folder in order of their names, (H, W, 3) uint8 BGR.

    Raises:
        InputError: no such folder, no picture in it, or one that cannot be read.
    """
    return [read_picture(path) for path in picture_paths(folder, most)]


def read_picture(path: Path) -> NDArray[np.uint8]:
    """One picture, (H, W, 3) uint8 BGR.

    Raises:
        InputError: it cannot be read.
    """
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise InputError(f"{path}: cannot be read as a picture; remove or replace it")
    return np.asarray(picture, np.uint8)
