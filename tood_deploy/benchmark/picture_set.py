"""The pictures of a benchmark, read one at a time: annotated ones, a folder's, or built-in synthetic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.prediction import picture_files
from tood_deploy.benchmark.truth import Truth
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.images import PICTURE_SUFFIXES, decode_image
from tood_deploy.parity.sample_images import synthetic_picture

SYNTHETIC, SYNTHETIC_COUNT = "built-in synthetic pictures", 8


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        name: for reports.
        image_id: in the annotations; a running number where there are none.
        read: gives (H, W, 3) uint8 BGR; raises InputError where it cannot be read.
    """

    name: str
    image_id: int
    read: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Pictures in a fixed order.

    Attributes:
        description: what they are, for reports.
        pictures: all of them.
        truth: their annotations, of these pictures alone.
    """

    description: str
    pictures: tuple[Picture, ...]
    truth: Truth | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)


def open_pictures(folder: Path | None, truth: Truth | None, imgsz: tuple[int, int], most: int | None = None) -> PictureSet:
    """The pictures to run on.

    Args:
        folder: of pictures; synthetic ones of `imgsz` where not given.
        truth: annotations of pictures in that folder.
        imgsz: (short side, long side).
        most: take the first of them only.

    Raises:
        InputError: no such folder, nothing in it, or an annotated picture is missing.
        ToodError: annotations without a folder, or `most` is not positive.
    """
    if most is not None and most < 1:
        raise ToodError(f"--limit is {most}; expected a positive number of pictures")
    if folder is None:
        if truth is not None:
            raise ToodError(f"{truth.path}: annotations without their pictures; add --images DIR")
        return PictureSet(f"{SYNTHETIC}, seeds 0 to {(most or SYNTHETIC_COUNT) - 1}", _synthetic(imgsz, most or SYNTHETIC_COUNT))
    if truth is None:
        files = dict(enumerate(_files(folder)[:most], 1))
    else:
        truth = _first(truth, most)
        files = picture_files(truth, folder)
    pictures = tuple(Picture(path.name, key, lambda path=path: _read(path)) for key, path in files.items())
    return PictureSet(f"{len(pictures)} pictures of {folder}", pictures, truth)


def _synthetic(imgsz: tuple[int, int], count: int) -> tuple[Picture, ...]:
    return tuple(Picture(f"synthetic {seed}", seed + 1, lambda seed=seed: synthetic_picture(*imgsz, seed)) for seed in range(count))


def _first(truth: Truth, most: int | None) -> Truth:
    """The first pictures of the annotations, in order of their ids, and what is annotated on them."""
    images = dict(list(truth.images.items())[:most])
    return replace(truth, images=images, boxes=truth.boxes.pick(np.isin(truth.boxes.image_ids, list(images))))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of pictures")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise InputError(f"{folder}: no picture in it; expected files such as {', '.join(sorted(PICTURE_SUFFIXES)[:4])}")
    return files


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a picture") from error
