"""What an image file's header says: its kind, its size, its pages or frames, its range of values.

A file in, decided by its content and not by its name; nothing is decoded. Pillow reads headers;
pi-heif, where it is installed, those of HEIC.
"""

from __future__ import annotations

import importlib.util
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import imagesize

from tood_deploy.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

IMAGE_SUFFIXES = frozenset(
    (
        ".apng .avif .avifs .bmp .bw .cur .dcx .dds .dib .gif .hdr .heic .heics .heif .hif .icb "
        ".icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pam .pbm .pcx .pfm "
        ".pgm .pic .png .pnm .ppm .psd .pxm .qoi .ras .rgb .rgba .sgi .sr .tga .tif .tiff .vda "
        ".vst .webp .xbm .xpm"
    ).split()
)
KNOWN_KINDS = "JPEG, PNG, WebP, TIFF, GIF, AVIF, HEIC, BMP or another format of OpenCV or Pillow"
MAX_PIXELS = 200_000_000
# By content. The others of Pillow's, whose headers are too short to be sure, go by the ending of
# the name as well; those in UNREAD run programs, are no images, or have no decoder in Pillow.
BY_CONTENT = (
    "JPEG PNG TIFF WEBP GIF BMP AVIF JPEG2000 PPM QOI PSD ICNS SUN SGI DDS XPM XBM ICO CUR DCX"
).split()
UNREAD = frozenset("BUFR EPS FITS GRIB HDF5 IPTC MCIDAS MPEG PCD PDF WMF".split())
RADIANCE = (b"#?RADIANCE", b"#?RGBE")  # OpenCV maps its floats to 8 bits
OPENCV_ONLY = (*RADIANCE, b"P7\n", b"PF\n", b"Pf\n")  # no header reader knows these
MOVING_FORMATS = frozenset("AVIF FLI GIF PNG WEBP".split())
HEIF = "HEIF"
HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1".split())

JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF 6.0, section 8
IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, ORIENTATION, SUBFILE_TYPE = 256, 257, 258, 274, 254
MAX_SAMPLE_VALUES = (281, 341)  # MaxSampleValue, SMaxSampleValue
REDUCED_OR_MASK = 0b101  # of SUBFILE_TYPE: a preview or a mask, no page
MAX_TIFF_PAGES = 100_000
# ITU-T T.81: a marker, apart from those that stand within coded data or between its restarts.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
PROGRESSIVE, SCAN, END_OF_IMAGE = (b"\xc2", b"\xca"), b"\xda", b"\xd9"


@dataclass(frozen=True)
class ImageHeader:
    """What a file's header says.

    Attributes:
        format: Pillow's name of it, or "HEIF"; "" where no header reader knows it, but OpenCV may.
        size_hw: rows and columns, upright; None where only decoding can tell.
        positions: of the pages or frames in the file; previews and masks are left out.
        moving: whether it is an animation.
        orientation: EXIF's, 1 to 8, that the image is turned by; 1 where the decoder always turns.
        max_value: the largest that its 16-bit values may have, where it says that they do not use
            all bits.
    """

    format: str
    size_hw: tuple[int, int] | None
    positions: tuple[int, ...] = (0,)
    moving: bool = False
    orientation: int = 1
    max_value: int | None = None


def read_header(stream: BinaryIO, name: str) -> ImageHeader | None:
    """Read what kind of image a file is, by its content; None where it is none.

    Args:
        stream: the file, at its start.
        name: of the file; its ending counts for a few formats whose content leaves doubts.

    Raises:
        OSError: it cannot be read.
    """
    start = stream.read(16)
    if start.startswith(TIFF_STARTS):
        header = _tiff_header(stream)
    elif start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and not _is_avif(stream):
        header = _heif_header(stream)
    else:
        header = _pillow_header(stream, name)
    if header is not None:
        return header
    stream.seek(0)
    width, height = imagesize.get(io.BytesIO(stream.read()), exif_rotation=False)
    if width > 0 and height > 0:
        return ImageHeader("", (int(height), int(width)))
    return ImageHeader("", None) if start.startswith(OPENCV_ONLY) else None


def check_header(data: bytes, name: str, max_pixels: int) -> ImageHeader:
    """Return what the header says.

    OpenCV tells the size only after decoding, when a decompression bomb has gone off.

    Raises:
        InputError: not an image, or too many pixels.
    """
    if not data:
        raise InputError(f"{name}: empty file; expected an image")
    header = read_header(io.BytesIO(data), name)
    if header is None:
        raise InputError(f"{name}: not an image; expected {KNOWN_KINDS}")
    if header.size_hw is not None:
        check_pixels(header.size_hw, name, max_pixels)
    return header


def check_pixels(size_hw: tuple[int, ...], name: str, max_pixels: int) -> None:
    """Raise InputError where an image of so many rows and columns has too many pixels."""
    if size_hw[0] * size_hw[1] > max_pixels:
        raise InputError(
            f"{name}: {size_hw[0] * size_hw[1]:,} pixels, more than {max_pixels:,}; "
            "scale it down, or, if you trust the file, raise the limit where the command has "
            "--max-pixels"
        )


def _pillow_header(stream: BinaryIO, name: str) -> ImageHeader | None:
    image = open_with_pillow(stream, name)
    if image is None:
        return None
    width, height = image.size
    orientation = orientation_of(image)
    size_hw = (width, height) if orientation >= 5 else (height, width)
    count = 1
    format_name = str(image.format)
    if format_name in MOVING_FORMATS or format_name == "DCX":
        count = int(getattr(image, "n_frames", 1))
    moving = count > 1 and format_name in MOVING_FORMATS
    # A PNG's still image, for readers that know no animations, need not be one of the frames.
    first = 1 if moving and getattr(image, "default_image", False) and count > 2 else 0
    max_value = _png_max_value(stream) if format_name == "PNG" and not moving else None
    positions = tuple(range(first, count))
    return ImageHeader(format_name, size_hw, positions, moving, orientation, max_value)


def open_with_pillow(stream: BinaryIO, name: str) -> Image | None:
    """Open a file with the plugin of Pillow that knows its content; None where none does.

    Not by `Image.open`: its limit of pixels is its own, and all its formats are more than images.
    """
    from PIL import Image

    stream.seek(0)
    start = stream.read(16)
    for load_plugins in (Image.preinit, Image.init):  # those of the usual formats, then all
        load_plugins()
        if (image := _open_with_plugins(stream, start, name)) is not None:
            return image
    return None


def _open_with_plugins(stream: BinaryIO, start: bytes, name: str) -> Image | None:
    """Open a file with the first plugin that takes it, of those that are loaded."""
    from PIL import Image

    by_name = Image.EXTENSION.get(f".{name.rpartition('.')[2].lower()}", "")
    formats = dict.fromkeys((*BY_CONTENT, *([by_name] if by_name not in UNREAD else ())))
    for format_name in formats:
        factory, accept = Image.OPEN.get(format_name, (None, None))
        accepted = accept is None or accept(start)
        if factory is None or not accepted or isinstance(accepted, str):  # a text says why not
            continue
        stream.seek(0)
        try:
            image = factory(stream, "")
        except Exception:  # plugins raise what they meet; the next one may know the file
            continue
        if min(image.size) > 0:
            return image
    return None


def orientation_of(image: Image) -> int:
    """Return the orientation in an image's EXIF data, 1 to 8; 1, upright, where there is none."""
    from PIL.Image import Exif

    exif = Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        value = exif.get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def lacks_passes(data: bytes) -> bool:
    """Tell whether a progressive JPEG ends before its last pass, and so shows a coarser image.

    Decoders take this for whole. No library tells which bits of which coefficients a file has; the
    headers of its passes, which are read here, do (ITU-T T.81, annex G).
    """
    bits: dict[int, dict[int, int]] = {}  # by component and coefficient: low ones that are missing
    place = 2
    while (marker := JPEG_MARKER.search(data, place)) is not None:
        kind, start = marker[1], marker.end()
        if kind == END_OF_IMAGE:
            break
        place = start + int.from_bytes(data[start : start + 2])
        segment = data[start + 2 : place]
        if kind in PROGRESSIVE:
            bits = {component: {} for component in segment[6::3]}
        elif kind == SCAN and len(segment) >= 4:
            if not bits:  # a baseline JPEG
                return False
            first, last, approximation = segment[-3:]
            for component in segment[1:-3:2]:
                of_scan = dict.fromkeys(range(first, last + 1), approximation & 15)
                bits.setdefault(component, {}).update(of_scan)
    return any(len(known) < 64 or any(known.values()) for known in bits.values())


def _png_max_value(stream: BinaryIO) -> int | None:
    """Return the largest value by a PNG's sBIT chunk; None where it has none of 9 to 15 bits."""
    from PIL.PngImagePlugin import ChunkStream

    stream.seek(len(PNG_START))
    chunks = ChunkStream(stream)
    for _ in range(32):  # it comes before the palette and the data
        try:
            kind, _, length = chunks.read()
            data = stream.read(length)
            stream.read(4)
        except Exception:  # a damaged file is found out by decoding
            return None
        if kind == b"sBIT":
            return _max_value_of(max(data, default=0))
        if kind in (b"IDAT", b"PLTE"):
            return None
    return None


def _max_value_of(bits: int) -> int | None:
    return 2**bits - 1 if 8 < bits < 16 else None


def _tiff_header(stream: BinaryIO) -> ImageHeader | None:
    """Return the header of a TIFF by its directories: Pillow refuses some kinds of pixels."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    stream.seek(0)
    start = stream.read(8)
    start += stream.read(8) if start[2] == 43 or start[3] == 43 else b""  # BigTIFF
    positions: list[int] = []
    first: tuple[tuple[int, int], int | None] | None = None
    seen: set[int] = set()
    try:
        directory = ImageFileDirectory_v2(start)
        for position in range(MAX_TIFF_PAGES):
            offset = directory.next
            if not offset or offset in seen:
                break
            seen.add(offset)
            stream.seek(offset)
            directory.load(stream)
            if position and int(directory.get(SUBFILE_TYPE, 0)) & REDUCED_OR_MASK:
                continue
            positions.append(position)
            first = first or _tiff_size_and_range(directory)
    except Exception:  # damaged: what was read counts
        pass
    if first is None:
        return None
    return ImageHeader("TIFF", first[0], tuple(positions) or (0,), max_value=first[1])


def _tiff_size_and_range(directory: ImageFileDirectory_v2) -> tuple[tuple[int, int], int | None]:
    """Return upright rows and columns of a page, and its largest value if that is not 65535."""
    size_hw = int(directory[IMAGE_LENGTH]), int(directory[IMAGE_WIDTH])
    if min(size_hw) < 1:
        raise ValueError("no rows or columns")
    if directory.get(ORIENTATION, 1) in (5, 6, 7, 8):
        size_hw = size_hw[1], size_hw[0]
    if 16 not in directory.get(BITS_PER_SAMPLE, ()):
        return size_hw, None  # OpenCV has scaled 10, 12 and 14 bits
    for tag in MAX_SAMPLE_VALUES:
        values = directory.get(tag, ())
        largest = max(values if isinstance(values, tuple) else (values,), default=0)
        if 255 < largest < 65535:
            return size_hw, int(largest)
    return size_hw, None


def _is_avif(stream: BinaryIO) -> bool:
    stream.seek(0)
    start = stream.read(64)
    return b"avif" in start or b"avis" in start


def _heif_header(stream: BinaryIO) -> ImageHeader:
    if importlib.util.find_spec("pi_heif") is None:
        return ImageHeader(HEIF, None)
    import pi_heif

    stream.seek(0)
    try:
        width, height = pi_heif.open_heif(stream).size
    except Exception:  # decoding says why
        return ImageHeader(HEIF, None)
    return ImageHeader(HEIF, (height, width))
