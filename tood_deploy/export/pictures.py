"""Folders of a user's images, to verify and to calibrate on. NumPy and OpenCV alone."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FEWEST_PICTURES, MOST_PICTURES = 64, 128  # to calibrate on; of fewer a warning is given, of more some are taken


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
