"""Images from files: 8-bit BGR, upright, whatever their depth, palette, colour space or orientation. OpenCV decodes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagesize
import numpy as np
from numpy.typing import NDArray

from tood_deploy.data import FEWEST_CALIBRATION_IMAGES
from tood_deploy.errors import InputError
from tood_deploy.preprocess import ImageSize, fit_size

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
MAX_PIXELS = 200_000_000
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
JPEG_START = b"\xff\xd8\xff"
DECODING = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The image (H, W, 3) uint8 BGR in a file's bytes; depths above 8 bits are scaled down, EXIF orientation is applied.

    Args:
        data: the whole file.
        name: of the file, for errors.
        max_pixels: refuse more, by the header, before anything is decoded.

    Raises:
        InputError: not a image, cut, damaged, or too large.
    """
    return decode_to_fit(data, name, None, max_pixels)[0]


def decode_to_fit(
    data: bytes, name: str, fit: ImageSize | None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    """The image as `decode_image` gives it; of a JPEG file smaller, where that is enough: libjpeg-turbo leaves out what is not needed.

    At 1/2, 1/4 or 1/8 a pixel is about the mean of 2 x 2, 4 x 4 or 8 x 8 pixels of the file: the low frequencies of JPEG's blocks.

    Args:
        data, name, max_pixels: as `decode_image` takes them.
        fit: (short side, long side) that the image will be scaled to fit; None: all of its pixels.

    Returns:
        (H, W, 3) uint8 BGR, no smaller than what it will be scaled to unless the file's is; and the file's rows and columns, turned as
        EXIF says, where the image is smaller than that.

    Raises:
        InputError: as `decode_image`.
    """
    if not data:
        raise InputError(f"{name}: empty file; expected a image")
    header_hw = _header_size(data, name)
    pixels = header_hw[0] * header_hw[1]
    if pixels > max_pixels:
        raise InputError(
            f"{name}: {pixels:,} pixels, more than {max_pixels:,}; if you trust the file, raise the limit with --max-pixels"
        )
    factor = reduction(header_hw, fit) if fit is not None and data.startswith(JPEG_START) else 1
    try:
        image = (
            None
            if _is_cut_png(data)
            else cv2.imdecode(np.frombuffer(data, np.uint8), DECODING[factor])
        )
    except cv2.error as error:
        raise InputError(
            f"{name}: OpenCV cannot decode it ({error.err}); convert it to 8-bit PNG or JPEG"
        ) from error
    if image is None:
        raise InputError(
            f"{name}: cut, damaged or of an unusual form: the header is a image's, decoding fails; copy or convert it again"
        )
    upright_hw = (
        header_hw
        if image.shape[:2] == _reduced(header_hw, factor)
        else (header_hw[1], header_hw[0])
    )
    return np.asarray(image, np.uint8), None if factor == 1 else upright_hw


def reduction(image_hw: tuple[int, int], fit: ImageSize) -> int:
    """By how much a image of these rows and columns may be decoded smaller and not be smaller than scaled to `fit`: 1, 2, 4 or 8.

    Less where rows and columns would become equal that are not: nothing would tell then whether decoding has turned the image.
    """
    fitted_hw, best = fit_size(image_hw, fit), 1
    for factor in DECODING:
        rows, columns = _reduced(image_hw, factor)
        if (
            rows >= fitted_hw[0]
            and columns >= fitted_hw[1]
            and (rows == columns) == (image_hw[0] == image_hw[1])
        ):
            best = factor
    return best


def _reduced(image_hw: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns as libjpeg-turbo rounds them."""
    return -(-image_hw[0] // factor), -(-image_hw[1] // factor)


def _header_size(data: bytes, name: str) -> tuple[int, int]:
    """Rows and columns by the header alone, not turned. OpenCV tells them only after decoding, when a decompression bomb has gone off."""
    width, height = imagesize.get(io.BytesIO(data), exif_rotation=False)
    if width < 1 or height < 1:
        raise InputError(
            f"{name}: not a image; expected one of {', '.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))}"
        )
    return int(height), int(width)


def _is_cut_png(data: bytes) -> bool:
    """A PNG without its end; asked beforehand because libpng would write lines of its own to stderr."""
    return data.startswith(PNG_START) and PNG_END not in data


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# to calibrate on; of fewer a warning is given, of more some are taken


def image_paths(folder: Path, most: int | None = None) -> list[Path]:
    """The first images of a folder in order of their names; all where `most` is not given.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected a folder of images ({', '.join(SUFFIXES)})"
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:most]
    if not paths:
        raise InputError(
            f"{folder}: no images in it; expected files ending in {', '.join(SUFFIXES)}"
        )
    return paths


def choose_images(folder: Path, most: int) -> list[Path]:
    """At most so many images of a folder, evenly spread over it.

    Raises:
        InputError: fewer than two.
    """
    paths = image_paths(folder)
    if min(len(paths), most) < 2:
        raise InputError(
            f"{folder}: {min(len(paths), most)} image to calibrate on; expected {FEWEST_CALIBRATION_IMAGES} or more, like those to come"
        )
    return [
        paths[i] for i in np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    ]


def read_images(folder: Path, most: int) -> list[NDArray[np.uint8]]:
    """The first images of a folder in order of their names, (H, W, 3) uint8 BGR.

    Raises:
        InputError: no such folder, no image in it, or one that cannot be read.
    """
    return [read_image(path) for path in image_paths(folder, most)]


def read_image(path: Path) -> NDArray[np.uint8]:
    """One image, (H, W, 3) uint8 BGR.

    Raises:
        InputError: it cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise InputError(f"{path}: cannot be read as a image; remove or replace it")
    return np.asarray(image, np.uint8)


BUDGET_S = 1.0
MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class ImagesToCheck:
    """Images that one option has named.

    Attributes:
        option: as it is written on the command line.
        paths: all that will be read, at least one.
        decode: reads one whole, as it will be read; raises InputError where it cannot.
    """

    option: str
    paths: Sequence[Path]
    decode: Callable[[Path], object] | None = read_image


def check_images(sets: Sequence[ImagesToCheck], seconds: float = BUDGET_S) -> None:
    """Look at headers first and then at whole images, spread evenly over each set.

    Args:
        sets: whose `decode` is None has its headers looked at alone.
        seconds: for all sets together; of every set at least one image is decoded, however long it takes.

    Raises:
        InputError: some cannot be read; the message names the first of them.
    """
    for images in sets:
        started = time.perf_counter()
        share = seconds / len(sets)
        unread = list(_without_header(images.paths, started + share / 2))
        if not unread and images.decode is not None:
            unread = list(_undecoded(images, started + share))
        if unread:
            raise InputError(_complaint(images, unread))


def spread_evenly(count: int) -> list[int]:
    """Return the numbers below `count` in an order whose every beginning is spread over all of them."""
    return sorted(range(count), key=lambda number: f"{number:032b}"[::-1])


def _without_header(paths: Sequence[Path], deadline: float) -> Iterator[Path]:
    """Yield those that have no image's header, while there is time."""
    for number in spread_evenly(len(paths)):
        if not _has_header(paths[number]):
            yield paths[number]
        if time.perf_counter() > deadline:
            return


def _has_header(path: Path) -> bool:
    try:
        return min(imagesize.get(path)) > 0
    except (OSError, ValueError):
        return False


def _undecoded(images: ImagesToCheck, deadline: float) -> Iterator[Path]:
    """Yield those that cannot be decoded, while there is time."""
    assert images.decode is not None
    for number in spread_evenly(len(images.paths)):
        try:
            images.decode(images.paths[number])
        except InputError:
            yield images.paths[number]
        if time.perf_counter() > deadline:
            return


def _complaint(images: ImagesToCheck, unread: Sequence[Path]) -> str:
    named = ", ".join(map(str, sorted(unread)[:MOST_NAMED]))
    more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
    return (
        f"{images.option}: {len(unread)} of {len(images.paths)} images cannot be read: {named}{more}; "
        "expected whole image files: remove or replace them"
    )
