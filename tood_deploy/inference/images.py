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

PICTURE_SUFFIXES = frozenset(".avif .bmp .dib .gif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
MAX_PIXELS = 200_000_000
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The picture (H, W, 3) uint8 BGR in a file's bytes; depths above 8 bits are scaled down, EXIF orientation is applied.

    Args:
        data: the whole file.
        name: of the file, for errors.
        max_pixels: refuse more, by the header, before anything is decoded.

    Raises:
        InputError: not a picture, cut, damaged, or too large.
    """
    if not data:
        raise InputError(f"{name}: empty file; expected a picture")
    pixels = _header_pixels(data, name)
    if pixels > max_pixels:
        raise InputError(f"{name}: {pixels:,} pixels, more than {max_pixels:,}; if you trust the file, raise the limit with --max-pixels")
    try:
        image = None if _is_cut_png(data) else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise InputError(f"{name}: OpenCV cannot decode it ({error.err}); convert it to 8-bit PNG or JPEG") from error
    if image is None:
        raise InputError(f"{name}: cut, damaged or of an unusual form: the header is a picture's, decoding fails; copy or convert it again")
    return np.asarray(image, np.uint8)


def _header_pixels(data: bytes, name: str) -> int:
    """Rows times columns by the header alone. OpenCV tells the size only after decoding, when a decompression bomb has gone off."""
    width, height = imagesize.get(io.BytesIO(data), exif_rotation=False)
    if width < 1 or height < 1:
        raise InputError(f"{name}: not a picture; expected one of {', '.join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))}")
    return int(width) * int(height)


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
        yield Frame(decode_image(data, str(self.path), self.max_pixels), str(self.path))
