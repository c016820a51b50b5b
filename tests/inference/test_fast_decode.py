"""JPEG images decoded only as large as the network takes them."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from data.test_images import CMYK_JPEG, THIRDS_BGR, encode, png_bomb, with_orientation
from hypothesis import given
from hypothesis import strategies as st
from inference.fakes import RedEngine, moving_images, red_image, write_image, write_video
from numpy.typing import NDArray

from tood_deploy import Detector
from tood_deploy.data.image_file import DECODING, ReadOptions, decode_file, decode_image, reduction
from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.errors import InputError
from tood_deploy.inference.frame import Frame
from tood_deploy.preprocess import fit_size

IMGSZ = (48, 64)


def decode_to_fit(
    data: bytes, name: str, fit: tuple[int, int] | None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    decoded = decode_file(data, name, ReadOptions(max_pixels), fit)
    return decoded.image_bgr, decoded.original_hw


def smooth_image(height: int, width: int) -> NDArray[np.uint8]:
    """A image that differs in all directions, without detail that JPEG loses."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack(
        [200 * rows / height + 20, 200 * columns / width + 20, np.full((height, width), 90)]
    ).astype(np.uint8)


@pytest.mark.parametrize(
    ("size_hw", "fit", "decoded_hw"),
    [
        ((96, 128), (48, 64), (48, 64)),
        ((95, 127), (48, 64), (48, 64)),  # what is scaled to 48 x 64 has no less when rounded up
        ((94, 127), (48, 64), (47, 64)),
        ((191, 256), (48, 64), (48, 64)),
        ((400, 520), (48, 64), (50, 65)),
        ((4000, 30), (48, 64), (500, 4)),
        ((96, 100), (48, 64), (48, 50)),
    ],
)
def test_no_larger_than_needed(
    size_hw: tuple[int, int], fit: tuple[int, int], decoded_hw: tuple[int, int]
) -> None:
    image, original_hw = decode_to_fit(encode(smooth_image(*size_hw), ".jpg"), "a.jpg", fit)
    assert (image.shape[:2], original_hw) == (decoded_hw, size_hw)
    whole = decode_image(encode(smooth_image(*size_hw), ".jpg"), "a.jpg")
    expected = cv2.resize(whole, (decoded_hw[1], decoded_hw[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("fit", [None, (49, 65), (800, 1333)])
def test_all_pixels_where_they_are_needed(fit: tuple[int, int] | None) -> None:
    data = encode(smooth_image(96, 128), ".jpg")
    image, original_hw = decode_to_fit(data, "a.jpg", fit)
    assert original_hw is None
    assert (image == decode_image(data, "a.jpg")).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff"])
def test_only_jpeg_has_it(suffix: str) -> None:
    image, original_hw = decode_to_fit(encode(smooth_image(96, 128), suffix), "a", IMGSZ)
    assert (image.shape, original_hw) == ((96, 128, 3), None)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1000), st.integers(0, 1000))
def test_never_smaller_than_what_it_is_scaled_to(
    height: int, width: int, short: int, more: int
) -> None:
    fit = short, short + more
    factor = reduction((height, width), fit)
    assert factor in DECODING
    if factor > 1:
        assert -(-height // factor) >= fit_size((height, width), fit)[0]
        assert -(-width // factor) >= fit_size((height, width), fit)[1]


@pytest.mark.parametrize(
    "size_hw", [(192, 256), (193, 257), (200, 197), (198, 198), (201, 200), (190, 256)]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it_as_it_turns_the_whole(size_hw: tuple[int, int], orientation: int) -> None:
    data = with_orientation(encode(smooth_image(*size_hw), ".jpg"), orientation)
    whole = decode_image(data, "a.jpg")
    image, original_hw = decode_to_fit(data, "a.jpg", (24, 32))
    assert original_hw == whole.shape[:2]
    assert max(image.shape) <= max(whole.shape) // 2 + 1
    expected = cv2.resize(whole, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - expected).mean() < 4


def test_grey_and_cmyk_become_bgr() -> None:
    grey, original_hw = decode_to_fit(encode(smooth_image(96, 128)[..., 0], ".jpg"), "grey", IMGSZ)
    assert (grey.shape, original_hw) == ((48, 64, 3), (96, 128))
    assert (grey[..., 0] == grey[..., 2]).all()
    thirds, original_hw = decode_to_fit(CMYK_JPEG, "thirds", (8, 12))
    assert (thirds.shape, original_hw) == ((8, 12, 3), (16, 24))
    for third, colour in enumerate(THIRDS_BGR):
        np.testing.assert_allclose(thirds[4, 1 + 4 * third], colour, atol=12)


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_a_truncated_image_is_refused(kept: float) -> None:
    data = encode(np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8), ".jpg")
    assert decode_to_fit(data, "whole", (32, 32))[0].shape == (32, 32, 3)
    with pytest.raises(InputError, match="cut"):
        decode_to_fit(data[: int(kept * len(data))], "cut", (32, 32))


def test_the_pixel_limit_is_that_of_the_whole_image() -> None:
    with pytest.raises(InputError, match="12,288 pixels, more than 12,287"):
        decode_to_fit(
            encode(smooth_image(96, 128), ".jpg"), "a.jpg", IMGSZ, max_pixels=96 * 128 - 1
        )
    with pytest.raises(InputError, match="900,000,000 pixels"):
        decode_to_fit(png_bomb(30000, 30000), "bomb.png", IMGSZ)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Large JPEG images of several sizes, and a PNG."""
    for i, (height, width) in enumerate([(192, 256), (300, 400), (256, 192), (401, 300)]):
        write_image(
            tmp_path / "images" / f"{i}.jpg", red_image(height, width, left=64, top=32, side=96)
        )
    write_image(tmp_path / "images" / "4.png", red_image(192, 256, left=64, top=32, side=96))
    return tmp_path / "images"


@pytest.mark.parametrize("input_shapes_hw", [(), ((64, 64), (96, 96))])
def test_the_same_boxes_in_pixels_of_the_whole_image(
    images: Path, input_shapes_hw: tuple[tuple[int, int], ...]
) -> None:
    def results(fast: bool) -> list:
        engine = RedEngine()
        engine.input_shapes_hw = input_shapes_hw
        return list(Detector(engine, imgsz=IMGSZ, fast_decode=fast).stream(images))

    for (whole_frame, whole), (frame, found) in zip(results(False), results(True), strict=True):
        assert frame.size_hw == whole_frame.size_hw == whole_frame.image_bgr.shape[:2]
        pixel = max(frame.size_hw) / 64  # of the network's input, in pixels of the image
        np.testing.assert_allclose(found.boxes, whole.boxes, atol=1.01 * pixel)
        assert (frame.image_bgr.size < whole_frame.image_bgr.size) == frame.name.endswith(".jpg")


def test_what_the_network_takes_has_the_same_size() -> None:
    detector = Detector(RedEngine(), imgsz=(100, 167))
    for size_hw in ((401, 533), (533, 401), (799, 799), (1201, 203)):
        data = encode(smooth_image(*size_hw), ".jpg")
        image, original_hw = decode_to_fit(data, "a.jpg", detector.imgsz)
        assert original_hw == size_hw
        assert (
            detector.prepare(image, original_hw).transform
            == detector.prepare(decode_image(data, "a.jpg")).transform
        )


def test_one_image_and_several_in_batches(images: Path) -> None:
    detector = Detector(RedEngine(), imgsz=IMGSZ, fast_decode=True)
    ((frame, _),) = detector.stream(images / "1.jpg")
    assert (frame.image_bgr.shape[:2], frame.size_hw) == ((75, 100), (300, 400))
    alone = [found.boxes for _, found in detector.stream(images)]
    for one, other in zip(
        alone, (found.boxes for _, found in detector.stream(images, batch=3)), strict=True
    ):
        assert (one == other).all()


def test_not_for_videos(tmp_path: Path) -> None:
    detector = Detector(RedEngine(), imgsz=IMGSZ, fast_decode=True)
    video = write_video(tmp_path / "a.mp4", moving_images(3))
    for source in (video, [video, write_image(tmp_path / "b.jpg")]):
        with pytest.raises(
            InputError, match=r"a video or stream has no smaller decoding.*leave --fast-decode out"
        ):
            detector.stream(source)


def test_a_frame_knows_the_size_of_its_file() -> None:
    frame = Frame(red_image(), "a", original_hw=(96, 128))
    assert frame.size_hw == (96, 128)
    assert replace(frame, original_hw=None).size_hw == (48, 64)
