"""Pictures from files: 8-bit BGR, upright, whatever their depth, palette, colour space or orientation. OpenCV decodes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagesize
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError
from tood_deploy.inference.frame import Frame, Source
from tood_deploy.preprocess import ImageSize, fit_size

PICTURE_SUFFIXES = frozenset(".avif .bmp .dib .gif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
MAX_PIXELS = 200_000_000
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
JPEG_START = b"\xff\xd8\xff"
DECODING = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The picture (H, W, 3) uint8 BGR in a file's bytes; depths above 8 bits are scaled down, EXIF orientation is applied.

    Args:
        data: the whole file.
        name: of the file, for errors.
        max_pixels: refuse more, by the header, before anything is decoded.

    Raises:
        InputError: not a picture, cut, damaged, or too large.
    """
    return decode_to_fit(data, name, None, max_pixels)[0]


def decode_to_fit(
    data: bytes, name: str, fit: ImageSize | None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    """The picture as `decode_image` gives it; of a JPEG file smaller, where that is enough: libjpeg-turbo leaves out what is not needed.

    At 1/2, 1/4 or 1/8 a pixel is about the mean of 2 x 2, 4 x 4 or 8 x 8 pixels of the file: the low frequencies of JPEG's blocks.

    Args:
        data, name, max_pixels: as `decode_image` takes them.
        fit: (short side, long side) that the picture will be scaled to fit; None: all of its pixels.

    Returns:
        (H, W, 3) uint8 BGR, no smaller than what it will be scaled to unless the file's is; and the file's rows and columns, turned as
        EXIF says, where the picture is smaller than that.

    Raises:
        InputError: as `decode_image`.
    """
    if not data:
        raise InputError(f"{name}: empty file; expected a picture")
    header_hw = _header_size(data, name)
    pixels = header_hw[0] * header_hw[1]
    if pixels > max_pixels:
        raise InputError(f"{name}: {pixels:,} pixels, more than {max_pixels:,}; if you trust the file, raise the limit with --max-pixels")
    factor = reduction(header_hw, fit) if fit is not None and data.startswith(JPEG_START) else 1
    try:
        image = None if _is_cut_png(data) else cv2.imdecode(np.frombuffer(data, np.uint8), DECODING[factor])
    except cv2.error as error:
        raise InputError(f"{name}: OpenCV cannot decode it ({error.err}); convert it to 8-bit PNG or JPEG") from error
    if image is None:
        raise InputError(f"{name}: cut, damaged or of an unusual form: the header is a picture's, decoding fails; copy or convert it again")
    upright_hw = header_hw if image.shape[:2] == _reduced(header_hw, factor) else (header_hw[1], header_hw[0])
    return np.asarray(image, np.uint8), None if factor == 1 else upright_hw


def reduction(image_hw: tuple[int, int], fit: ImageSize) -> int:
    """By how much a picture of these rows and columns may be decoded smaller and not be smaller than scaled to `fit`: 1, 2, 4 or 8.

    Less where rows and columns would become equal that are not: nothing would tell then whether decoding has turned the picture.
    """
    fitted_hw, best = fit_size(image_hw, fit), 1
    for factor in DECODING:
        rows, columns = _reduced(image_hw, factor)
        if rows >= fitted_hw[0] and columns >= fitted_hw[1] and (rows == columns) == (image_hw[0] == image_hw[1]):
            best = factor
    return best


def _reduced(image_hw: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns as libjpeg-turbo rounds them."""
    return -(-image_hw[0] // factor), -(-image_hw[1] // factor)


def _header_size(data: bytes, name: str) -> tuple[int, int]:
    """Rows and columns by the header alone, not turned. OpenCV tells them only after decoding, when a decompression bomb has gone off."""
    width, height = imagesize.get(io.BytesIO(data), exif_rotation=False)
    if width < 1 or height < 1:
        raise InputError(f"{name}: not a picture; expected one of {', '.join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))}")
    return int(height), int(width)


def _is_cut_png(data: bytes) -> bool:
    """A PNG without its end; asked beforehand because libpng would write lines of its own to stderr."""
    return data.startswith(PNG_START) and PNG_END not in data


class ImageSource(Source):
    """One picture file."""

    kind = "images"

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__((str(path),), 1)
        self.path, self.max_pixels = path, max_pixels

    def __iter__(self) -> Iterator[Frame]:
        """Raises InputError where the picture cannot be read."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); expected a picture") from error
        image, original_hw = decode_to_fit(data, str(self.path), self.fit, self.max_pixels)
        yield Frame(image, str(self.path), original_hw=original_hw)
