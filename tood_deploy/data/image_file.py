"""The pixels of one image file: 8-bit BGR, upright, whatever its depth, palette or orientation.

Bytes in, images out; the header decides how. Pillow decodes animations, and the formats that OpenCV
lacks or turns wrongly; OpenCV decodes the others; pi-heif, where it is installed, HEIC.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.image_header import (
    HEIF,
    JPEG_START,
    MAX_PIXELS,
    PNG_START,
    RADIANCE,
    ImageHeader,
    check_header,
    check_pixels,
    lacks_passes,
    open_with_pillow,
    orientation_of,
)
from tood_deploy.errors import InputError, ToodError, not_installed
from tood_deploy.preprocess import ImageSize, fit_size

if TYPE_CHECKING:
    from PIL.Image import Image

BIT_DEPTHS = range(9, 17)  # that --bit-depth takes
DEFAULT_FRAME_MS = 100  # of an animation that states no duration, as browsers show it

OPENCV_FORMATS = frozenset("BMP JPEG JPEG2000 MPO PNG SUN TIFF WEBP".split())
DEEP_FORMATS = frozenset(("", "JPEG2000", "PNG", "TIFF"))  # may be deep
DECODING = {  # OpenCV's way of reading, by how many times smaller a JPEG is decoded
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
JPEG_END, PNG_END, PADDING = b"\xff\xd9", b"IEND", 64
LAST_BLOCK = 4  # pixels of a side; of what is coded together, those next to other data may differ
ALL_BITS = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH


@dataclass(frozen=True)
class ReadOptions:
    """How image files are read.

    Attributes:
        max_pixels: refuse more, by the header, before anything is decoded.
        bit_depth: how many bits of 16 hold data, 9 to 16, where the file does not say; None: what
            it says, else all.
        first_page: take the first page or frame of a file alone.
    """

    max_pixels: int = MAX_PIXELS
    bit_depth: int | None = None
    first_page: bool = False

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ToodError(f"max_pixels is {self.max_pixels}; expected a positive number")
        if self.bit_depth is not None and self.bit_depth not in BIT_DEPTHS:
            raise ToodError(
                f"bit_depth is {self.bit_depth}; expected {BIT_DEPTHS[0]} to {BIT_DEPTHS[-1]}, how "
                "many of 16 bits hold data"
            )


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An image's pixels.

    Attributes:
        image_bgr: (H, W, 3) uint8 BGR, upright.
        original_hw: rows and columns, upright, of the file's image, where it was decoded smaller.
        notes: what a user should know of it, a sentence each.
    """

    image_bgr: NDArray[np.uint8]
    original_hw: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def decode_file(
    data: bytes,
    name: str,
    options: ReadOptions = ReadOptions(),
    fit: ImageSize | None = None,
    position: int | None = None,
) -> DecodedImage:
    """Decode one image of a file.

    Args:
        data: the whole file.
        name: of the file, for errors.
        options: how to read it.
        fit: (short side, long side) that the image will be scaled to fit: a JPEG file may then be
            decoded at 1/2, 1/4 or 1/8 of its size, where libjpeg-turbo leaves out what is not
            needed and a pixel is about the mean of 2 x 2, 4 x 4 or 8 x 8 pixels of the file; None:
            all of its pixels.
        position: of the page or frame in the file; the first one where not given.

    Raises:
        InputError: not an image, cut, damaged, or too large.
    """
    header = check_header(data, name, options.max_pixels)
    place = header.positions[0] if position is None else position
    if header.format == HEIF:
        return DecodedImage(_decode_heif(data, name, options.max_pixels))
    if header.format and (header.format not in OPENCV_FORMATS or header.moving):
        image = _decode_with_pillow(data, name, place)
        image, notes = _to_8_bits(image, None, header, name, options.bit_depth)
        return DecodedImage(image, notes=notes)
    factor = 1
    if fit is not None and data.startswith(JPEG_START) and header.size_hw is not None:
        factor = reduction(header.size_hw, fit)
    if header.format in DEEP_FORMATS and not data.startswith(RADIANCE):
        image = _decode_page(data, name, place, ALL_BITS)
        plain = None if image.dtype == np.uint8 else _imdecode(data, place, cv2.IMREAD_COLOR)
        image, notes = _to_8_bits(image, plain, header, name, options.bit_depth)
    else:
        image, notes = _decode_jpeg_or_such(data, name, DECODING[factor])
        if header.format == "JPEG" and _last_block_is_flat(image, header.orientation, factor):
            _check_end(data, name)
    check_pixels(image.shape, name, options.max_pixels)
    if factor == 1 or header.size_hw is None:
        return DecodedImage(image, None, notes)
    # Damaged EXIF data may say one thing to Pillow and another to OpenCV, which has turned it.
    height, width = header.size_hw
    as_header = image.shape[:2] == (-(-height // factor), -(-width // factor))
    return DecodedImage(image, (height, width) if as_header else (width, height), notes)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a file's bytes; depths above 8 bits are scaled down, orientation is applied.

    Args:
        data: the whole file.
        name: of the file, for errors.
        max_pixels: refuse more, by the header, before anything is decoded.

    Returns:
        (H, W, 3) uint8 BGR, the first page or frame of several.

    Raises:
        InputError: not an image, cut, damaged, or too large.
    """
    return decode_file(data, name, ReadOptions(max_pixels)).image_bgr


def decode_frames(
    data: bytes, name: str, options: ReadOptions
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Yield every frame (H, W, 3) uint8 BGR of an animation, as it is shown, with milliseconds.

    Args:
        data: the whole file.
        name: of the file, for errors.
        options: how to read it.

    Raises:
        InputError: not an image, too large, or a frame is cut or damaged.
    """
    header = check_header(data, name, options.max_pixels)
    image = open_with_pillow(io.BytesIO(data), name)
    if image is None:
        raise InputError(f"{name}: not an animation; expected a GIF, WebP, PNG or AVIF")
    for position in header.positions:
        try:
            image.seek(position)
            frame = upright(_bgr_from_pillow(image), orientation_of(image))
        except Exception as error:  # Pillow's plugins raise what they meet
            raise InputError(
                f"{name}: frame {position} is cut or damaged ({error}); copy or convert the file "
                "again"
            ) from error
        duration = round(float(image.info.get("duration") or 0))
        yield np.asarray(frame, np.uint8), duration if duration > 0 else DEFAULT_FRAME_MS


def reduction(image_hw: tuple[int, int], fit: ImageSize) -> int:
    """Return by how many times smaller an image may be decoded: 1, 2, 4 or 8.

    It is no smaller then than scaled to fit.

    Args:
        image_hw: rows and columns by the header, upright.
        fit: (short side, long side) that the image will be scaled to fit.
    """
    fitted_hw = fit_size(image_hw, fit)
    # libjpeg-turbo rounds rows and columns up
    return max(
        factor
        for factor in DECODING
        if factor == 1
        or (-(-image_hw[0] // factor) >= fitted_hw[0] and -(-image_hw[1] // factor) >= fitted_hw[1])
    )


def upright(image: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Return an image (H, W, C) turned and mirrored as its EXIF orientation, 1 to 8, says."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def as_stored(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return an upright image (H, W, 3) as it lies in its file, by its EXIF orientation, 1 to 8."""
    back = {6: 8, 8: 6}.get(orientation, orientation)
    return np.asarray(upright(image, back), np.uint8)


def _decode_heif(data: bytes, name: str, max_pixels: int) -> NDArray[np.uint8]:
    try:
        import pi_heif
    except ImportError as error:
        raise InputError(f"{name}: a HEIC image, and {not_installed('pi_heif')}") from error
    try:
        image = pi_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True, bgr_mode=True)
        check_pixels(image.size[::-1], name, max_pixels)
        pixels = np.array(image)  # a copy: the memory of `image` goes with it
    except InputError:
        raise
    except Exception as error:  # libheif's and Python's own
        raise InputError(
            f"{name}: cut, damaged or of an unusual form ({error}); copy or convert it again"
        ) from error
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(3, 2)
    return np.ascontiguousarray(pixels[..., :3])


def _decode_with_pillow(data: bytes, name: str, position: int) -> NDArray[np.generic]:
    """Return (H, W, 3) BGR, upright, uint8 or uint16."""
    image = open_with_pillow(io.BytesIO(data), name)
    try:
        assert image is not None
        if position:
            image.seek(position)
        return upright(_bgr_from_pillow(image), orientation_of(image))
    except Exception as error:  # Pillow's plugins raise what they meet
        raise InputError(
            f"{name}: cut, damaged or of an unusual form ({error}); copy or convert it again"
        ) from error


def _bgr_from_pillow(image: Image) -> NDArray[np.generic]:
    """Return (H, W, 3) BGR, alpha left out; uint16 where the image is grey and deep."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        deep = np.clip(values, 0, 65535).astype(np.uint16)
        return deep[..., None].repeat(3, 2)
    if image.mode == "F":
        return np.asarray(image)[..., None].repeat(3, 2)
    has_alpha = image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa")
    converted = image.convert("RGBA" if has_alpha else "RGB")
    return np.asarray(converted)[..., 2::-1]


def _imdecode(data: bytes, position: int, flags: int) -> NDArray[np.generic] | None:
    """Return what OpenCV decodes of a file's page, None where it cannot."""
    if not position:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    done, pages = cv2.imdecodemulti(
        np.frombuffer(data, np.uint8), flags, range=(position, position + 1)
    )
    return pages[0] if done and pages else None


def _in_three_channels(image: NDArray[np.generic] | None) -> NDArray[np.generic] | None:
    if image is None or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        return None
    grey = image.ndim == 2 or image.shape[2] == 1
    return image.reshape(*image.shape[:2], 1).repeat(3, 2) if grey else image[..., :3]


def _png_chunks_fit(data: bytes) -> bool:
    """Return whether no chunk of a PNG file claims more bytes than there are.

    OpenCV would take gigabytes for a chunk that says so, and seconds to find out.
    """
    place = len(PNG_START)
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4])
        if place + 12 + size > len(data):
            return False
        if data[place + 4 : place + 8] == b"IEND":
            return True
        place += 12 + size
    return True


def _decode_page(data: bytes, name: str, position: int, flags: int) -> NDArray[np.generic]:
    """Return what OpenCV decodes of a file's page.

    Raises:
        InputError: it cannot.
    """
    try:
        # A PNG without its end is known beforehand: libpng would write lines of its own to stderr.
        cut = data.startswith(PNG_START) and not (PNG_END in data and _png_chunks_fit(data))
        image = None if cut else _imdecode(data, position, flags)
        if image is None and flags == ALL_BITS and not cut:  # grey ones of 32 bits
            image = _in_three_channels(_imdecode(data, position, cv2.IMREAD_UNCHANGED))
    except cv2.error as error:
        raise InputError(
            f"{name}: OpenCV cannot decode it ({error.err}); convert it to 8-bit PNG or JPEG"
        ) from error
    if image is None:
        raise InputError(
            f"{name}: cut, damaged or of an unusual form: "
            "the header is an image's, decoding fails; copy or convert it again"
        )
    return image


def _decode_jpeg_or_such(
    data: bytes, name: str, flags: int
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return an image of 8 bits, and a note on a JPEG that lacks its end marker or passes."""
    coarse = (
        f"{name}: a progressive JPEG whose last passes are missing, so that it is coarser than it "
        "was; used as it is",
    ) * (data.startswith(JPEG_START) and lacks_passes(data))
    try:
        return np.asarray(_decode_page(data, name, 0, flags), np.uint8), coarse
    except InputError:
        completed = _with_end_marker(data)
        if completed is None:
            raise
        note = f"{name}: the end marker is missing, and nothing else; used as it is"
        return np.asarray(_decode_page(completed, name, 0, flags), np.uint8), coarse or (note,)


def _with_end_marker(data: bytes) -> bytes | None:
    """Return a JPEG with the end marker it lacks; None where more is missing."""
    if not data.startswith(JPEG_START):
        return None
    data = data.rstrip(b"\xff")
    return data + JPEG_END if _has_all_data(data) else None


def _has_all_data(data: bytes) -> bool:
    """Tell whether nothing but the end marker is missing from a JPEG.

    Where more is missing, the decoder takes what follows for it: two different fillings then give
    two different images.
    """
    images = []
    for filling in (b"\x00", b"\x55"):
        try:
            image = open_with_pillow(io.BytesIO(data + filling * PADDING + JPEG_END), "")
            if image is None:
                return False
            images.append(np.asarray(image))
        except Exception:  # Pillow's plugins raise what they meet
            return False
    return np.array_equal(images[0], images[1])


def _last_block_is_flat(image: NDArray[np.uint8], orientation: int, factor: int) -> bool:
    """Tell whether the corner that a file has last is of one colour, as it is where data are cut.

    Args:
        image: (H, W, 3), upright.
        orientation: EXIF's, 1 to 8, that it was turned by.
        factor: by how many times smaller it was decoded.
    """
    side = max(2, LAST_BLOCK // factor)
    rows = slice(-side, None) if orientation in (1, 2, 5, 6) else slice(side)
    columns = slice(-side, None) if orientation in (1, 4, 5, 8) else slice(side)
    corner = image[rows, columns]
    return bool((corner == corner[:1, :1]).all())


def _check_end(data: bytes, name: str) -> None:
    """Refuse a JPEG that was cut and closed with an end marker, which decoders fill with a colour.

    Files with something behind the end marker are not looked at.

    Raises:
        InputError: its data do not reach its last row.
    """
    if data.endswith(JPEG_END) and not _has_all_data(data[: -len(JPEG_END)]):
        raise InputError(
            f"{name}: cut: its data end before its last row, and an end marker follows; copy or "
            "convert it again"
        )


def _to_8_bits(
    image: NDArray[np.generic],
    plain: NDArray[np.generic] | None,
    header: ImageHeader,
    name: str,
    bit_depth: int | None,
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return (H, W, 3) uint8, and a note where a deep image is dark for want of a declared range.

    Args:
        image: (H, W, 3) of any depth.
        plain: the same as OpenCV makes 8 bits of it, where it can.
        header: of the file.
        name: of the file, for errors.
        bit_depth: bits of 16 that hold data, where the user knows.
    """
    if image.dtype == np.uint8:
        return np.asarray(image, np.uint8), ()
    if image.dtype.kind == "f":
        return _from_float(image, name)
    if image.dtype != np.uint16:
        raise InputError(
            f"{name}: values of type {image.dtype}; expected 8 or 16 bits without sign: convert it"
        )
    largest = int(image.max())
    max_value = header.max_value
    if max_value is not None and largest > max_value:
        max_value = None  # scaled to all bits already, as PNG asks for
    if bit_depth is not None:
        max_value = 2**bit_depth - 1
    if max_value is not None and max_value < 65535:
        scaled = np.minimum(np.rint(image.astype(np.float32) * (255 / max_value)), 255)
        return scaled.astype(np.uint8), ()
    eight = plain if plain is not None else np.asarray(image, np.uint16) >> 8
    note = (
        f"{name}: its 16-bit values go to {largest} of 65535, so that it is nearly black; where "
        f"they are of {max(9, largest.bit_length())} bits, add --bit-depth "
        f"{max(9, largest.bit_length())}"
    )
    dark = 255 < largest < 2**14
    return np.asarray(eight, np.uint8), (note,) if dark else ()


def _from_float(image: NDArray[np.generic], name: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return uint8 of values from 0 to 1, or from 0 to 255, and a note on the latter.

    Raises:
        InputError: of any other range.
    """
    values = np.asarray(image, np.float32)
    finite = values[np.isfinite(values)]
    smallest, largest = float(finite.min(initial=0)), float(finite.max(initial=0))
    if not (smallest >= 0 and largest <= 255):
        raise InputError(
            f"{name}: floating-point values from {smallest:g} to {largest:g}; expected 0 to 1 or 0 "
            "to 255: scale and convert it to 8 bits"
        )
    factor = 255 if largest <= 1 else 1
    eight = np.rint(np.nan_to_num(values, posinf=0, neginf=0) * factor).astype(np.uint8)
    note = f"{name}: floating-point values up to {largest:g} are taken as those from 0 to 255"
    return eight, () if factor == 255 else (note,)
