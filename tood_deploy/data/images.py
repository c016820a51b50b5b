"""Image files: which files of a folder are images, what their headers say, and their pixels.

The only reader of them. Files in; 8-bit BGR images out, upright, whatever their depth, palette,
colour space or orientation. OpenCV decodes. Knows no annotations, no videos and no models.
"""

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

from tood_deploy.data import MIN_CALIBRATION_IMAGES
from tood_deploy.errors import InputError
from tood_deploy.preprocess import ImageSize, fit_size

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
MAX_PIXELS = 200_000_000
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
JPEG_START = b"\xff\xd8\xff"
DECODING = {  # OpenCV's way of reading, by how many times smaller a JPEG is decoded
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
AS_STORED = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
CHECK_SECONDS = 1.0  # of looking at images before a long run
NAMED_IMAGES = 3  # at most so many unreadable ones are named in one message


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a file's bytes; depths above 8 bits are scaled down, EXIF orientation is applied.

    Args:
        data: the whole file.
        name: of the file, for errors.
        max_pixels: refuse more, by the header, before anything is decoded.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        InputError: not an image, cut, damaged, or too large.
    """
    return decode_to_fit(data, name, None, max_pixels)[0]


def decode_to_fit(
    data: bytes, name: str, fit: ImageSize | None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    """Decode as `decode_image` does, but a JPEG file no larger than it will be needed.

    At 1/2, 1/4 or 1/8 libjpeg-turbo leaves out what is not needed: a pixel is about the mean of 2 x
    2, 4 x 4 or 8 x 8 pixels of the file, the low frequencies of JPEG's blocks.

    Args:
        data: the whole file.
        name: of the file, for errors.
        fit: (short side, long side) that the image will be scaled to fit; None: all of its pixels.
        max_pixels: refuse more, by the header, before anything is decoded.

    Returns:
        (H, W, 3) uint8 BGR, no smaller than what it will be scaled to unless the file's is; and the
        file's rows and columns, turned as EXIF says, where the image is smaller than that.

    Raises:
        InputError: as `decode_image`.
    """
    header_hw = _check_header(data, name, max_pixels)
    factor = reduction(header_hw, fit) if fit is not None and data.startswith(JPEG_START) else 1
    image = _decode(data, name, DECODING[factor])
    # The header's rows and columns are not turned: where they are not the image's, EXIF has swapped
    # them.
    as_stored = image.shape[:2] == _reduced(header_hw, factor)
    upright_hw = header_hw if as_stored else (header_hw[1], header_hw[0])
    return image, None if factor == 1 else upright_hw


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read one image, (H, W, 3) uint8 BGR, upright.

    Raises:
        InputError: it cannot be read.
    """
    return decode_image(_read_bytes(path), str(path))


def read_image_of_size(path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Read one image as stored, or turned upright by EXIF, whichever has the annotated size.

    Some annotation tools draw boxes on the image as stored, others on the upright one; the
    annotated size tells which.

    Args:
        path: of the file.
        size_hw: rows and columns that the annotations give.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        InputError: it cannot be read, or has that size in neither way.
    """
    data, name = _read_bytes(path), str(path)
    header_hw = _check_header(data, name, MAX_PIXELS)
    for flags in (AS_STORED, cv2.IMREAD_COLOR):
        image = _decode(data, name, flags)
        if image.shape[:2] == size_hw:
            return image
    raise InputError(
        f"{name}: is {header_hw[1]} x {header_hw[0]} pixels, "
        f"the annotations say {size_hw[1]} x {size_hw[0]}; "
        "correct their width and height, or leave these out"
    )


def read_images(folder: Path, limit: int) -> list[NDArray[np.uint8]]:
    """Read the first images of a folder in order of their names, (H, W, 3) uint8 BGR.

    Raises:
        InputError: no such folder, no image in it, or one that cannot be read.
    """
    return [read_image(path) for path in image_paths(folder, limit)]


def read_image_size(path: Path) -> tuple[int, int]:
    """Read an image's rows and columns from its header, turned as its EXIF orientation says.

    Raises:
        InputError: not an image.
    """
    try:
        width, height = imagesize.get(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: its size cannot be read ({error}); expected an image") from error
    if width < 1 or height < 1:
        raise InputError(
            f"{path}: its size cannot be read; expected an image: remove or replace it"
        )
    return int(height), int(width)


def reduction(image_hw: tuple[int, int], fit: ImageSize) -> int:
    """Return by how many times smaller an image may be decoded: 1, 2, 4 or 8.

    It is no smaller then than scaled to fit.

    Less where rows and columns would become equal that are not: nothing would tell then whether
    decoding has turned the image.

    Args:
        image_hw: rows and columns by the header.
        fit: (short side, long side) that the image will be scaled to fit.
    """
    fitted_hw, best = fit_size(image_hw, fit), 1
    for factor in DECODING:
        rows, columns = _reduced(image_hw, factor)
        large_enough = rows >= fitted_hw[0] and columns >= fitted_hw[1]
        if large_enough and (rows == columns) == (image_hw[0] == image_hw[1]):
            best = factor
    return best


def _reduced(image_hw: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return rows and columns as libjpeg-turbo rounds them."""
    return -(-image_hw[0] // factor), -(-image_hw[1] // factor)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image") from error


def _check_header(data: bytes, name: str, max_pixels: int) -> tuple[int, int]:
    """Return rows and columns by the header alone, not turned.

    Raise InputError where there are none, or too many pixels.

    OpenCV tells them only after decoding, when a decompression bomb has gone off.
    """
    if not data:
        raise InputError(f"{name}: empty file; expected an image")
    width, height = imagesize.get(io.BytesIO(data), exif_rotation=False)
    if width < 1 or height < 1:
        kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InputError(f"{name}: not an image; expected one of {kinds}")
    if width * height > max_pixels:
        raise InputError(
            f"{name}: {width * height:,} pixels, more than {max_pixels:,}; "
            "scale it down, or, if you trust the file, raise the limit where the command has "
            "--max-pixels"
        )
    return int(height), int(width)


def _decode(data: bytes, name: str, flags: int) -> NDArray[np.uint8]:
    try:
        # A PNG without its end is known beforehand: libpng would write lines of its own to stderr.
        cut = data.startswith(PNG_START) and PNG_END not in data
        image = None if cut else cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise InputError(
            f"{name}: OpenCV cannot decode it ({error.err}); convert it to 8-bit PNG or JPEG"
        ) from error
    if image is None:
        raise InputError(
            f"{name}: cut, damaged or of an unusual form: "
            "the header is an image's, decoding fails; copy or convert it again"
        )
    return np.asarray(image, np.uint8)


def image_paths(folder: Path, limit: int | None = None) -> list[Path]:
    """List the first images of a folder in order of their names; all where no limit is given.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{folder}: no images in it; expected files ending in {kinds}")
    return paths[:limit]


def choose_images(folder: Path, limit: int) -> list[Path]:
    """List at most so many images of a folder, evenly spread over it.

    Raises:
        InputError: fewer than two.
    """
    paths = image_paths(folder)
    count = min(len(paths), limit)
    if count < 2:
        raise InputError(
            f"{folder}: {count} image to calibrate on; expected {MIN_CALIBRATION_IMAGES} or more, "
            "like those to come"
        )
    return [paths[i] for i in np.linspace(0, len(paths) - 1, count).round().astype(int)]


def find_image(folder: Path, file_name: str) -> Path | None:
    """Return the file that annotations name, or None where it is not there.

    Annotations written on Windows separate folders by backslashes; elsewhere a file's name may hold
    one, so the name as it stands goes first.
    """
    for name in dict.fromkeys((file_name, file_name.replace("\\", "/"))):
        if (folder / name).is_file():
            return folder / name
    return None


def missing_image_cure(folder: Path, file_name: str) -> str:
    """Return what to do about an image that `find_image` does not find, for an error."""
    parts = Path(file_name.replace("\\", "/")).parts
    for start in range(1, len(parts)):
        if folder.joinpath(*parts[start:]).is_file():
            leading = file_name[: len("/".join(parts[:start])) + 1]
            there = Path(*parts[start:])
            return f"{there} is there: take {leading} out of the annotations' file names"
    return "give the folder that the annotations' file names start from"


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


def check_images(sets: Sequence[ImagesToCheck], seconds: float = CHECK_SECONDS) -> None:
    """Look at headers first and then at whole images, spread evenly over each set.

    Args:
        sets: whose `decode` is None has its headers looked at alone.
        seconds: for all sets together; of every set at least one image is decoded, however long it
            takes.

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
            raise InputError(_unread_message(images, unread))


def spread_evenly(count: int) -> list[int]:
    """Return the numbers below `count`, in an order whose every beginning is spread evenly."""
    return sorted(range(count), key=lambda number: f"{number:032b}"[::-1])


def _without_header(paths: Sequence[Path], deadline: float) -> Iterator[Path]:
    """Yield those that have no image's header, while there is time."""
    for number in spread_evenly(len(paths)):
        try:
            read_image_size(paths[number])
        except InputError:
            yield paths[number]
        if time.perf_counter() > deadline:
            return


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


def _unread_message(images: ImagesToCheck, unread: Sequence[Path]) -> str:
    named = ", ".join(map(str, sorted(unread)[:NAMED_IMAGES]))
    more = f" and {len(unread) - NAMED_IMAGES} more" if len(unread) > NAMED_IMAGES else ""
    return (
        f"{images.option}: {len(unread)} of {len(images.paths)} images cannot be read: "
        f"{named}{more}; "
        "expected whole image files: remove or replace them"
    )
