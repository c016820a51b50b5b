"""The images of a benchmark, read one at a time, and images that need no files.

A folder, annotations or nothing in; annotated images, a folder's, crops of a photograph or
synthetic images out. Knows no detector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.coco import Annotations
from tood_deploy.data.image_file import decode_image
from tood_deploy.data.images import (
    find_image,
    image_paths,
    left_out_note,
    missing_image_cure,
    read_image,
)
from tood_deploy.errors import InputError, ToodError
from tood_deploy.files import absolute_path
from tood_deploy.preprocess import fit_size, pad_size

BLOCK = 16
RECTANGLES = 12
CROP_HW = (384, 480)
# An official portrait, in the public domain.
PHOTOGRAPH = Path("matplotlib/mpl-data/sample_data/grace_hopper.jpg")


def synthetic_image(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Draw coloured blocks, rectangles and grain, the same for the same seed.

    Args:
        height, width: in pixels.
        seed: of the random numbers.

    Returns:
        (height, width, 3) uint8 BGR.
    """
    rng = np.random.default_rng(seed)
    blocks = rng.integers(64, 192, (-(-height // BLOCK), -(-width // BLOCK), 3))
    image = blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[:height, :width]
    for _ in range(RECTANGLES):
        top, left = rng.integers(0, height), rng.integers(0, width)
        rows, columns = (
            8 + rng.integers(0, max(1, height // 2)),
            8 + rng.integers(0, max(1, width // 2)),
        )
        image[top : top + rows, left : left + columns] = rng.integers(0, 256, 3)
    return (image + rng.integers(0, 8, image.shape)).clip(0, 255).astype(np.uint8)


def read_photograph() -> tuple[NDArray[np.uint8], str]:
    """Read the photograph that matplotlib brings along, without importing it.

    Returns:
        (H, W, 3) uint8 BGR, and where it is from.

    Raises:
        InputError: it is not there.
    """
    try:
        package = distribution("matplotlib")
        data = Path(str(package.locate_file(PHOTOGRAPH))).read_bytes()
    except (PackageNotFoundError, OSError) as error:
        raise InputError(
            f"{PHOTOGRAPH.name}: the photograph of matplotlib, which is used by default, "
            f"cannot be read ({error}); give images of your own"
        ) from error
    return decode_image(data, PHOTOGRAPH.name), f"{PHOTOGRAPH.name} of matplotlib {package.version}"


def crop_size(image_hw: tuple[int, ...], imgsz: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the widest part that is padded as an image of `imgsz` is.

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
    raise InputError(
        f"imgsz is {short} {long}: no part of {PHOTOGRAPH.name} has that shape; "
        "give images of your own"
    )


def crop_evenly(
    image: NDArray[np.uint8], size_hw: tuple[int, int], number: int, count: int
) -> NDArray[np.uint8]:
    """Return one of several parts, spread evenly from the upper left to the lower right.

    Every second one is mirrored.

    Args:
        image: (H, W, 3) uint8.
        size_hw: rows and columns of a part.
        number: of the part, from 0.
        count: of all parts.
    """
    place = number / max(count - 1, 1)
    top, left = (
        int(place * (whole - part)) for whole, part in zip(image.shape[:2], size_hw, strict=True)
    )
    crop = image[top : top + size_hw[0], left : left + size_hw[1]]
    return np.ascontiguousarray(crop[:, ::-1] if number % 2 else crop)


def photograph_crops(count: int) -> list[NDArray[np.uint8]]:
    """Return `count` landscape crops of the photograph, (384, 480, 3) uint8 BGR.

    Raises:
        InputError: the photograph is not there.
    """
    photograph, _ = read_photograph()
    return [crop_evenly(photograph, CROP_HW, number, count) for number in range(count)]


SYNTHETIC, SYNTHETIC_COUNT = "built-in synthetic images", 8


@dataclass(frozen=True, eq=False)
class ImageEntry:
    """One image.

    Attributes:
        name: for reports.
        image_id: in the annotations; a running number where there are none.
        read: gives (H, W, 3) uint8 BGR; raises InputError where it cannot be read.
    """

    name: str
    image_id: int
    read: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order.

    Attributes:
        description: what they are, for reports.
        images: all of them.
        truth: their annotations, of these images alone.
    """

    description: str
    images: tuple[ImageEntry, ...]
    truth: Annotations | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageEntry]:
        return iter(self.images)


def open_image_set(
    folder: Path | None, truth: Annotations | None, imgsz: tuple[int, int], limit: int | None = None
) -> ImageSet:
    """Open the images to run on.

    Args:
        folder: of images; synthetic ones of `imgsz` where not given.
        truth: annotations of images in that folder.
        imgsz: (short side, long side).
        limit: take the first of them only.

    Raises:
        InputError: no such folder, nothing in it, or an annotated image is missing.
        ToodError: annotations without a folder, or `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ToodError(f"--limit is {limit}; expected a positive number of images")
    if folder is None:
        if truth is not None:
            raise ToodError(f"{truth.path}: annotations without their images; add --images DIR")
        return ImageSet(
            f"{SYNTHETIC}, seeds 0 to {(limit or SYNTHETIC_COUNT) - 1}",
            _synthetic(imgsz, limit or SYNTHETIC_COUNT),
        )
    if truth is None:
        files = dict(enumerate(image_paths(folder, limit), 1))
    else:
        truth = truth.first(limit)
        files = list_image_files(truth, folder)
    images = tuple(
        ImageEntry(path.name, key, lambda path=path: read_image(path))
        for key, path in files.items()
    )
    left_out = left_out_note(folder) if truth is None else ""
    what = f"{len(images)} images of {folder}"
    return ImageSet(f"{what} ({left_out.partition(': ')[2]})" if left_out else what, images, truth)


def _synthetic(imgsz: tuple[int, int], count: int) -> tuple[ImageEntry, ...]:
    return tuple(
        ImageEntry(f"synthetic {seed}", seed + 1, lambda seed=seed: synthetic_image(*imgsz, seed))
        for seed in range(count)
    )


def photograph_set(imgsz: tuple[int, int], count: int) -> ImageSet:
    """Return different parts of the photograph, every second one mirrored.

    Pre-processing scales them to the padded size that an image of `imgsz` has, landscape.

    Args:
        imgsz: (short side, long side).
        count: how many.

    Raises:
        InputError: the photograph is not there, or is too small to have such a shape.
    """
    photograph, origin = read_photograph()
    size_hw = crop_size(photograph.shape[:2], imgsz)
    images = tuple(
        ImageEntry(f"crop {i}", i + 1, lambda i=i: crop_evenly(photograph, size_hw, i, count))
        for i in range(count)
    )
    return ImageSet(f"{count} crops, {size_hw[0]}x{size_hw[1]}, of a photograph, {origin}", images)


def list_image_files(truth: Annotations, folder: Path) -> dict[int, Path]:
    """Find the file of every image of the annotations, by image id.

    Raises:
        InputError: no such folder, or an image is not in it.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected the {len(truth.images)} images of {truth.path}"
        )
    files: dict[int, Path] = {}
    missing: list[str] = []
    for key, image in truth.images.items():
        if (path := find_image(folder, image.file_name)) is None:
            missing.append(image.file_name)
        else:
            files[key] = absolute_path(path)
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of the {len(truth.images)} images of {truth.path} are "
            "missing, "
            f"the first is {missing[0]}; {missing_image_cure(folder, missing[0])}"
        )
    return files
