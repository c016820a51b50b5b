"""Image files of every kind: known by their content, decoded upright and at their full range."""

import base64
import io
import re
import struct
import sys
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
from inference.fakes import red_image
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence

from tood_deploy.data import image_file
from tood_deploy.data.image_file import (
    ReadOptions,
    as_stored,
    decode_file,
    decode_frames,
    decode_image,
)
from tood_deploy.data.image_header import ImageHeader, read_header
from tood_deploy.errors import InputError, ToodError

# 64 x 48 pixels, a red square at (8, 8), stored so that it is to be turned right by a quarter: the
# container says so, and its EXIF data say so again.
TURNED_HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAA"
    "AAAAAAAAAAADRpbG9jAAAAAERAAAIAAQAAAAAB7AABAAAAAAAAAGUAAgAAAAACUQABAAAAAAAAACQAAAA4aWluZgAA"
    "AAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcn"
    "AAAADmaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroC"
    "QGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm"
    "5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AA"
    "AAACAAAAEHBpeGkAAAAAAwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAA"
    "AOY2RzYwACAAEAAQAAAJFtZGF0AAAAYSgBr1gf6fCPX1/MOfnm74kSfFoHQ3W94qNS9HAB+7qwflgBQi3btg+7fCEp"
    "Y6m1dQbO/9O5o44OxTZCjjsU///Ds6EUd5zmbo+WH5EqUEUCXeFaLfFvRD9Ew/aBmV4OkbwAAAAGRXhpZgAATU0AKg"
    "AAAAgAAQESAAMAAAABAAYAAAAAAAA="
)


def pattern() -> NDArray[np.uint8]:
    """A image (40, 60, 3) RGB that no turn or mirror leaves as it is."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, 60)
    image[..., 1] = np.linspace(0, 255, 40)[:, None]
    image[5:15, 5:25] = (250, 10, 10)
    return image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def header_of(data: bytes, name: str = "x") -> ImageHeader:
    header = read_header(io.BytesIO(data), name)
    assert header is not None
    return header


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_of_every_format(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    }.get(kind, {})
    options |= {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    data = saved(Image.fromarray(pattern()), kind, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = decode_image(data, "a")
    assert image.shape == upright.shape
    assert header_of(data).size_hw == image.shape[:2]
    assert np.abs(image[..., ::-1].astype(int) - upright).mean() < 4
    stored = as_stored(image, orientation)
    assert np.abs(stored[..., ::-1].astype(int) - pattern()).mean() < 5


@pytest.mark.parametrize("kind", "BMP DIB GIF JPEG2000 PCX PNG PPM QOI SGI TGA TIFF".split())
@pytest.mark.parametrize("name", ["a", "a.jpg"])
def test_the_content_tells_the_kind(kind: str, name: str) -> None:
    if kind in ("DIB", "PCX", "TGA"):  # whose beginnings leave doubts
        name = f"a.{kind.lower()}"
    image = (
        Image.fromarray(pattern()).quantize(200) if kind == "GIF" else Image.fromarray(pattern())
    )
    decoded = decode_image(saved(image, kind), name)
    assert (decoded[..., ::-1] == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("suffix", [".sr", ".pam", ".hdr", ".webp"])
def test_formats_of_opencv(suffix: str) -> None:
    image = np.ascontiguousarray(pattern()[..., ::-1])
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
    decoded = decode_image(cv2.imencode(suffix, image, options)[1].tobytes(), "a")
    assert np.abs(decoded.astype(int) - image).max() <= 4


def test_a_program_and_a_page_are_no_images() -> None:
    postscript = saved(Image.fromarray(pattern()), "EPS")
    for data in (postscript, saved(Image.fromarray(pattern()), "PDF"), b"text\n" * 99):
        assert read_header(io.BytesIO(data), "a.eps") is None


def test_heic_is_turned_once() -> None:
    pytest.importorskip("pi_heif")
    image = decode_image(TURNED_HEIC, "a.heic")
    assert header_of(TURNED_HEIC).size_hw == image.shape[:2] == (64, 48)
    rows, columns = np.nonzero((image[..., 2] > 200) & (image[..., 1] < 100))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 23, 24, 39)


def test_heic_without_its_package_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(InputError, match=r"a\.heic: a HEIC image, and .*\[heif\]"):
        decode_image(TURNED_HEIC, "a.heic")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("end", [b"", b"\xff"])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_used_with_a_note(
    progressive: bool, end: bytes
) -> None:
    data = saved(Image.fromarray(pattern()), "JPEG", progressive=progressive)
    decoded = decode_file(data[:-2] + end, "a.jpg")
    assert (decoded.image_bgr == decode_image(data, "a.jpg")).all()
    assert len(decoded.notes) == 1
    assert decode_file(data, "a.jpg").notes == ()
    for cut in (6, 30, len(data) // 2):
        with pytest.raises(InputError, match="cut"):
            decode_image(data[:-cut], "a.jpg")


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_progressive_jpeg_that_lacks_passes_is_told(mode: str, end: bytes) -> None:
    image = Image.fromarray(pattern()).convert(mode)
    data = saved(image, "JPEG", progressive=True, quality=90)
    assert decode_file(data, "a.jpg").notes == ()
    passes = [match.start() for match in re.finditer(rb"\xff\xc4[^\xff]+\xff\xda", data)]
    for start in passes[1:]:
        decoded = decode_file(data[:start] + end, "a.jpg")
        assert ["passes are missing" in note for note in decoded.notes] == [True]
    shrunk = decode_file(data[: passes[-1]] + end, "a.jpg", fit=(8, 8))
    assert "passes are missing" in shrunk.notes[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 4}, {"subsampling": 0}])
def test_a_cut_jpeg_that_was_closed_again_is_refused(
    orientation: int, options: dict[str, int]
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(Image.fromarray(pattern()), "JPEG", exif=exif, quality=95, **options)
    decode_image(data, "a.jpg")
    for share, fit in ((0.9, None), (0.6, None), (0.6, (8, 8))):
        closed = data[: round(len(data) * share)] + data[-2:]
        with pytest.raises(InputError, match="cut"):
            decode_file(closed, "a.jpg", fit=fit)


def test_a_jpeg_with_a_flat_corner_is_whole() -> None:
    image = pattern()
    image[-24:] = 255
    decode_image(saved(Image.fromarray(image), "JPEG"), "a.jpg")


def deep(bits: int) -> NDArray[np.uint16]:
    """Grey values (40, 60) of so many bits, from 0 to the largest."""
    return np.linspace(0, 2**bits - 1, 2400).reshape(40, 60).astype(np.uint16)


def expected_of(values: NDArray[np.uint16], bits: int) -> NDArray[np.float64]:
    return values / (2**bits - 1) * 255


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("tag", [281, 341])
def test_a_tiff_states_its_range(bits: int, tag: int) -> None:
    data = saved(Image.fromarray(deep(bits)), "TIFF", tiffinfo={tag: 2**bits - 1})
    decoded = decode_file(data, "a.tif")
    assert np.abs(decoded.image_bgr[..., 0] - expected_of(deep(bits), bits)).max() <= 1
    assert decoded.notes == ()


def with_significant_bits(png: bytes, bits: int) -> bytes:
    """Puts an sBIT chunk behind the header of a grey PNG."""
    body = b"sBIT" + bytes([bits])
    return png[:33] + struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


def test_a_png_states_its_range() -> None:
    low = with_significant_bits(saved(Image.fromarray(deep(12)), "PNG"), 12)
    decoded = decode_file(low, "a.png")
    assert np.abs(decoded.image_bgr[..., 0] - expected_of(deep(12), 12)).max() <= 1
    full = with_significant_bits(saved(Image.fromarray(deep(12) << 4), "PNG"), 12)
    assert np.abs(decode_image(full, "a.png")[..., 0] - expected_of(deep(12), 12)).max() <= 1


@pytest.mark.parametrize("maximum", [15, 1023, 4095, 65535])
def test_a_ppm_states_its_range(maximum: int) -> None:
    kind = np.uint8 if maximum < 256 else ">u2"
    values = np.linspace(0, maximum, 24).astype(kind)
    data = b"P6\n4 2\n%d\n" % maximum + values.tobytes()
    image = decode_image(data, "a.ppm")
    assert np.abs(image[..., ::-1].reshape(-1) - values.astype(int) / maximum * 255).max() <= 1


def test_a_range_that_is_not_stated_is_told_or_given() -> None:
    data = saved(Image.fromarray(deep(12)), "TIFF")
    dark = decode_file(data, "a.tif")
    assert dark.image_bgr.max() <= 16
    (note,) = dark.notes
    assert "add --bit-depth 12" in note
    given = decode_file(data, "a.tif", ReadOptions(bit_depth=12))
    assert np.abs(given.image_bgr[..., 0] - expected_of(deep(12), 12)).max() <= 1
    assert given.notes == ()
    assert decode_file(saved(Image.fromarray(deep(16)), "PNG"), "a.png").notes == ()
    with pytest.raises(ToodError, match="bit_depth is 8"):
        ReadOptions(bit_depth=8)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_of_a_tiff(bits: int) -> None:
    values = np.linspace(0, 2**bits - 1, 32).astype(int)
    packed = "".join(f"{value:0{bits}b}" for value in values)
    raw = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    tags = [(256, 8), (257, 4), (258, bits), (259, 1), (262, 1), (273, 0), (277, 1), (278, 4)]
    tags.append((279, len(raw)))
    start = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(
        struct.pack("<HHII", tag, 4, 1, value or start * (tag == 273)) for tag, value in tags
    )
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + raw
    image = decode_file(data, "a.tif")
    assert np.abs(image.image_bgr[..., 0].reshape(-1) - values / (2**bits - 1) * 255).max() <= 1
    assert image.notes == ()


@pytest.mark.parametrize("suffix", [".tiff", ".pfm"])
def test_floats(suffix: str) -> None:
    image = pattern().astype(np.float32) / 255
    decoded = decode_image(cv2.imencode(suffix, image)[1].tobytes(), "a")
    assert np.abs(decoded.astype(int) - pattern()).max() <= 1
    with pytest.raises(InputError, match="floating-point values from 0 to 1000"):
        decode_image(cv2.imencode(suffix, image * 1000)[1].tobytes(), "a")


def test_the_pages_of_a_tiff_without_its_previews() -> None:
    pages = [Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)) for i in range(3)]
    preview = Image.fromarray(np.full((10, 15, 3), 255, np.uint8))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    data = saved(pages[0], "TIFF", save_all=True, append_images=[preview, *pages[1:]])
    header = header_of(data)
    assert (header.positions, header.moving) == ((0, 2, 3), False)
    values = [decode_file(data, "a", position=i).image_bgr.mean() for i in header.positions]
    assert values == [0, 40, 80]


def moving(kind: str, **options: object) -> bytes:
    """Five frames, of which every second one is transparent where nothing is drawn."""
    frames = []
    for i in range(5):
        frame = Image.new("RGBA", (80, 60), (0, 0, 0, 0) if i % 2 else (200, 200, 200, 255))
        frame.paste((250, 30 * i, 20, 255), (5 + 10 * i, 10, 20 + 10 * i, 30))
        frames.append(frame)
    durations = [100, 250, 40, 500, 70]
    return saved(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=durations, **options
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GIF", {"disposal": 1}),
        ("GIF", {"disposal": 2}),
        ("GIF", {"disposal": 3}),
        ("PNG", {"disposal": 0, "blend": 1}),
        ("PNG", {"disposal": 2}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_an_animation_is_what_is_shown_with_its_times(kind: str, options: dict[str, int]) -> None:
    data = moving(kind, **options)
    assert header_of(data).moving
    frames = list(decode_frames(data, "a", ReadOptions()))
    shown = ImageSequence.all_frames(Image.open(io.BytesIO(data)))
    assert [duration for _, duration in frames] == [100, 250, 40, 500, 70]
    for (frame, _), truth in zip(frames, shown, strict=True):
        visible = np.asarray(truth.convert("RGBA"))[..., 3] > 0
        expected = np.asarray(truth.convert("RGBA"))[..., 2::-1]
        assert np.abs(frame.astype(int) - expected)[visible].max() <= 2
    assert decode_image(data, "a").shape == (60, 80, 3)


def test_the_still_image_of_a_moving_png_is_no_frame() -> None:
    still = Image.fromarray(np.full((20, 30, 3), 9, np.uint8))
    frames = [Image.fromarray(np.full((20, 30, 3), 50 * i, np.uint8)) for i in (1, 2, 3)]
    data = saved(still, "PNG", save_all=True, append_images=frames, default_image=True)
    means = [frame.mean() for frame, _ in decode_frames(data, "a", ReadOptions())]
    assert means == [50, 100, 150]


def test_a_still_one_of_a_kind_that_moves() -> None:
    data = saved(Image.fromarray(pattern()), "GIF")
    assert (header_of(data).moving, header_of(data).positions) == (False, (0,))


def test_damaged_headers_are_no_tracebacks() -> None:
    rng = np.random.default_rng(0)
    kinds = ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "AVIF", "JPEG2000", "BMP", "TGA")
    wholes = [saved(Image.fromarray(red_image()), kind) for kind in kinds]
    for data, kind in zip(wholes, kinds, strict=True):
        for _ in range(20):
            changed = bytearray(data)
            for place in rng.integers(0, min(len(data), 200), 4):
                changed[place] = rng.integers(0, 256)
            with suppress(InputError):
                decode_image(bytes(changed), f"a.{kind.lower()}", max_pixels=10**6)


def test_a_png_chunk_that_claims_gigabytes_is_refused_before_they_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    place = data.index(b"IDAT") - 4
    damaged = data[:place] + (0xF0000000).to_bytes(4) + data[place + 4 :]
    monkeypatch.setattr(image_file, "_imdecode", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(InputError, match="cut, damaged"):
        image_file.decode_image(damaged, "a.png")
