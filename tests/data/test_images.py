import base64
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from inference.fakes import red_image, write_image
from numpy.typing import NDArray
from PIL import Image as PillowImage

from tood_deploy.data import images as module
from tood_deploy.data.image_file import decode_image
from tood_deploy.data.images import (
    ImagesToCheck,
    check_images,
    choose_images,
    find_image,
    image_paths,
    left_out_note,
    missing_image_cure,
    read_image,
    read_image_of_size,
    read_image_size,
    spread_evenly,
)
from tood_deploy.errors import InputError, InputWarning
from tood_deploy.inference.source import ImageSource

# 24 x 16 pixels: red (220, 30, 40), green (30, 200, 60) and blue (40, 60, 210) thirds, from left to
# right.
CMYK_JPEG = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4LCx"
    "AWEBETFBUVFQwPFxgWFBgSFBUU/8AAFAgAEAAYBEMRAE0RAFkRAEsRAP/EAB8AAAEFAQEBAQEBAAAAAAAAAAABAgME"
    "BQYHCAkKC//EALUQAAIBAwMCBAMFBQQEAAABfQECAwAEEQUSITFBBhNRYQcicRQygZGhCCNCscEVUtHwJDNicoIJCh"
    "YXGBkaJSYnKCkqNDU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6g4SFhoeIiYqSk5SVlpeYmZqi"
    "o6Slpqeoqaqys7S1tre4ubrCw8TFxsfIycrS09TV1tfY2drh4uPk5ebn6Onq8fLz9PX29/j5+v/aAA4EQwBNAFkASw"
    "AAPwD71r8+q+FK/VOvwFr9xa7aitqvyKr9kKK/eCvL6/DmivwFr9xa7aitqvyKr9kKK//Z"
)
PALETTE_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABgAAAAQAgMAAABxSlcGAAAACVBMVEUeyDwoPNLcHihH9Rs4AAAAF0lEQVR4nGNcxR"
    "DGEMrAxMDAwMBABwoAmUsBdauEyyYAAAAASUVORK5CYII="
)
THIRDS_BGR = [(40, 30, 220), (60, 200, 30), (210, 60, 40)]


def encode(image: NDArray[np.uint8] | NDArray[np.uint16], suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Puts an EXIF block with this orientation behind the start of a JPEG."""
    tiff = b"MM\x00\x2a" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("data", [CMYK_JPEG, PALETTE_PNG], ids=["cmyk", "palette"])
def test_cmyk_and_palette_become_bgr(data: bytes) -> None:
    image = decode_image(data, "thirds")
    assert image.shape == (16, 24, 3)
    for third, colour in enumerate(THIRDS_BGR):
        np.testing.assert_allclose(image[8, 4 + 8 * third], colour, atol=4)  # JPEG's loss


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".ppm"])
def test_sixteen_bits_are_scaled_down(suffix: str) -> None:
    values = np.linspace(0, 65535, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint16)
    image = decode_image(encode(values, suffix), "deep")
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image, values / 257, atol=1)


def test_grey_and_alpha_become_bgr() -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert (decode_image(encode(grey), "grey") == grey[..., None]).all()
    transparent = np.dstack([red_image(), np.zeros((48, 64), np.uint8)])
    assert (decode_image(encode(transparent), "alpha") == red_image()).all()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, cv2.ROTATE_180), (6, cv2.ROTATE_90_CLOCKWISE), (8, cv2.ROTATE_90_COUNTERCLOCKWISE)],
)
def test_exif_orientation_is_honoured(orientation: int, turn: int) -> None:
    jpeg = encode(red_image(), ".jpg")
    upright = cv2.rotate(decode_image(jpeg, "plain"), turn)
    assert (decode_image(with_orientation(jpeg, orientation), "turned") == upright).all()


@pytest.mark.parametrize(
    "suffix", [".jpg", ".png", ".bmp", ".tiff", ".webp", ".jp2", ".gif", ".ppm", ".avif"]
)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_image_is_refused(suffix: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    data = encode(noise, suffix)
    assert decode_image(data, "whole").shape == (64, 64, 3)
    with pytest.raises(InputError, match="cut"):
        decode_image(data[: int(kept * len(data))], "cut")


def test_a_jpeg_without_its_last_rows_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    data = encode(noise, ".jpg")
    with pytest.raises(InputError, match="cut"):
        decode_image(data[:-20], "cut")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"this is a text file\n" * 20, "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an image"),
        (b"<svg width='10' height='10'></svg>", "not an image|cut, damaged"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        decode_image(data, "a.jpg")
    assert str(caught.value).startswith("a.jpg: ")


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(
        InputError, match=r"900,000,000 pixels, more than 200,000,000; .*--max-pixels"
    ):
        decode_image(png_bomb(30000, 30000), "bomb.png")


def test_the_pixel_limit_can_be_raised_and_lowered() -> None:
    data = encode(red_image())
    assert decode_image(data, "a", max_pixels=48 * 64).shape == (48, 64, 3)
    with pytest.raises(InputError, match="3,072 pixels, more than 3,071"):
        decode_image(data, "a", max_pixels=48 * 64 - 1)


@pytest.mark.parametrize("size", [(1, 1), (20, 20000), (20000, 20)])
def test_odd_sizes_work(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 77, np.uint8)
    assert (decode_image(encode(image), "odd") == image).all()


def test_an_image_with_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        decode_image(encode(red_image())[:-20], "cut.png")
    assert capfd.readouterr().err == ""


def test_source_gives_one_frame(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a b.png")
    source = ImageSource(path)
    (frame,) = source
    assert (frame.name, frame.index, frame.timestamp_s, frame.pts) == (str(path), 0, None, None)
    assert (frame.image_bgr == red_image()).all()
    assert (source.kind, source.length, source.names) == ("images", 1, (str(path),))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        next(iter(ImageSource(tmp_path / "none.jpg")))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_one(tmp_path / f"{number}.png") for number in range(6)]


def write_one(path: Path) -> Path:
    write_image(path, red_image())
    return path


@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
def test_every_beginning_is_spread(count: int) -> None:
    order = spread_evenly(count)
    assert sorted(order) == list(range(count))
    if count == 8:
        assert order == [0, 4, 2, 6, 1, 5, 3, 7]


def test_whole_images_pass(images: Sequence[Path]) -> None:
    check_images([])
    check_images([ImagesToCheck("--a", images), ImagesToCheck("--b", images[:1])])


def test_all_headers_come_before_the_first_whole_image(images: Sequence[Path]) -> None:
    images[5].write_bytes(b"")
    decoded: list[Path] = []
    with pytest.raises(
        InputError,
        match=r"^--a: 1 of 6 images cannot be read: .*5\.png; expected whole image files",
    ):
        check_images([ImagesToCheck("--a", images, decoded.append)])
    assert not decoded


def test_a_missing_file_is_named(images: Sequence[Path]) -> None:
    images[2].unlink()
    with pytest.raises(InputError, match=r"2\.png"):
        check_images([ImagesToCheck("--a", images, decode=None)])


def test_the_first_are_named_and_the_others_counted(images: Sequence[Path]) -> None:
    for path in images[:5]:
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        InputError,
        match=r"5 of 6 images cannot be read: \S+0\.png, \S+1\.png, \S+2\.png and 2 more;",
    ):
        check_images([ImagesToCheck("--a", images)], seconds=60)


def test_no_longer_than_there_is_time(
    images: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which every decoded image takes a second."""
    now = [0.0]
    decoded: list[str] = []

    def decode(path: Path) -> None:
        now[0] += 1
        decoded.append(path.name)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    check_images(
        [ImagesToCheck("--a", images, decode), ImagesToCheck("--b", images, decode)], seconds=5
    )
    assert decoded == ["0.png", "4.png", "2.png", *["0.png", "4.png", "2.png"]], (
        "half of the time each"
    )
    decoded.clear()
    check_images([ImagesToCheck("--a", images, decode)], seconds=0)
    assert decoded == ["0.png"], "one at least"


def test_a_folder_lists_images_of_every_kind_in_order(tmp_path: Path) -> None:
    for name in ("c.tif", "a.JPG", "b.tiff", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_paths(tmp_path)] == ["a.JPG", "b.tiff", "c.tif"]
    assert [path.name for path in image_paths(tmp_path, 1)] == ["a.JPG"]
    assert [path.name for path in choose_images(tmp_path, 2)] == ["a.JPG", "c.tif"]
    with pytest.raises(InputError, match="1 image to calibrate on"):
        choose_images(tmp_path, 1)
    with pytest.raises(InputError, match="no such folder"):
        image_paths(tmp_path / "none")


def test_a_folder_of_tif_is_read_as_one_of_png(tmp_path: Path) -> None:
    deep = (red_image().astype(np.uint16) * 257).astype(np.uint16)
    (tmp_path / "deep.tif").write_bytes(encode(deep, ".tif"))
    assert (read_image(image_paths(tmp_path)[0]) == red_image()).all()
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / "none.tif")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_stored_or_upright_whichever_has_the_annotated_size(
    tmp_path: Path, orientation: int
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(with_orientation(encode(red_image(32, 64), ".jpg"), orientation))
    assert read_image_of_size(path, (32, 64)).shape == (32, 64, 3)
    upright = (64, 32) if orientation == 6 else (32, 64)
    assert read_image_size(path) == read_image(path).shape[:2] == upright
    assert read_image_of_size(path, upright).shape[:2] == upright
    with pytest.raises(InputError, match="64 x 32 pixels, the annotations say 32 x 30"):
        read_image_of_size(path, (30, 32))


def test_an_image_is_found_by_a_name_written_on_windows(tmp_path: Path) -> None:
    write_one(tmp_path / "images" / "1" / "a.png")
    found = tmp_path / "images" / "1" / "a.png"
    assert (
        find_image(tmp_path, "images\\1\\a.png") == find_image(tmp_path, "images/1/a.png") == found
    )
    assert find_image(tmp_path / "images", "images\\1\\a.png") is None
    odd = write_one(tmp_path / "images\\1\\a.png")  # a name with backslashes in it
    assert find_image(tmp_path, "images\\1\\a.png") == odd


@pytest.mark.parametrize(
    ("folder", "cure"),
    [
        ("images/1", r"a\.png is there: take images\\1\\ out of"),
        ("images", r"1/a\.png is there: take images\\ out of"),
        ("other", "give the folder that"),
    ],
)
def test_a_missing_image_has_a_cure(tmp_path: Path, folder: str, cure: str) -> None:
    write_one(tmp_path / "images" / "1" / "a.png")
    assert re.match(cure, missing_image_cure(tmp_path / folder, "images\\1\\a.png"))


def test_the_first_page_is_taken_with_a_note(tmp_path: Path) -> None:
    pages = [PillowImage.fromarray(np.full((8, 9, 3), 80 * i, np.uint8)) for i in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    write_one(tmp_path / "b.png")
    (tmp_path / "notes.md").write_text("text")
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(InputWarning, match=r"a\.tif: has 2 pages") as warned:  # noqa: PT031
        assert read_image(tmp_path / "a.tif").mean() == 80
        assert read_image_of_size(tmp_path / "c.tif", (8, 9)).mean() == 80
    assert len(warned) == 1  # of the folder
    assert left_out_note(tmp_path) == f"{tmp_path}: 1 files are no images: {tmp_path / 'notes.md'}"
    (tmp_path / "notes.md").unlink()
    assert left_out_note(tmp_path) == ""


def test_a_folder_has_images_under_any_name(tmp_path: Path) -> None:
    write_one(tmp_path / "a.png").rename(tmp_path / "no-ending")
    write_one(tmp_path / "a.png").rename(tmp_path / "b.JFIF")
    (tmp_path / "c.csv").write_text("1,2\n")
    assert [path.name for path in image_paths(tmp_path)] == ["b.JFIF", "no-ending"]
