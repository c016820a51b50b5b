import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tood_deploy.errors import InputError, ToodError
from tood_deploy.preprocess import (
    ImageTransform,
    check_imgsz,
    choose_canvas,
    fit_imgsz,
    fit_size,
    pad_size,
    padded_size,
    resize,
    resize_and_pad,
    with_imgsz,
)
from tood_deploy.presets import PRESETS, Sizing

Goldens = Callable[[str], dict[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def demo(shared: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(shared / "reference" / "images" / "demo.jpg")), np.uint8)


@pytest.mark.shared
def test_equals_the_reference_byte_for_byte(demo: NDArray[np.uint8], goldens: Goldens) -> None:
    golden = goldens("input__demo__320")
    resized_hw = tuple(int(side) for side in golden["img_shape"][:2])
    image, transform = resize_and_pad(demo, (320, 320))
    assert (resize(demo, (320, 320)).transpose(2, 0, 1) == golden["resized_bgr_u8"]).all()
    assert transform.resized_hw == resized_hw
    assert transform.net_hw == tuple(int(side) for side in golden["pad_shape"][:2])
    assert transform.image_hw == tuple(int(side) for side in golden["ori_shape"][:2])
    assert (
        image[: resized_hw[0], : resized_hw[1], ::-1].transpose(2, 0, 1) == golden["resized_bgr_u8"]
    ).all()


@pytest.mark.shared
def test_equals_the_reference_normalised(demo: NDArray[np.uint8], goldens: Goldens) -> None:
    golden = goldens("input__demo__320")["input"]
    image, transform = resize_and_pad(demo, (320, 320))
    rows, columns = transform.resized_hw
    normalised = np.zeros(golden.shape, np.float32)
    mean, std = (
        np.array([123.675, 116.28, 103.53], np.float32),
        np.array([58.395, 57.12, 57.375], np.float32),
    )
    normalised[0, :, :rows, :columns] = ((image[:rows, :columns] - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(normalised, golden, atol=1e-6)  # float32 rounding of one division


@pytest.mark.shared
def test_equals_the_reference_at_full_size(demo: NDArray[np.uint8], goldens: Goldens) -> None:
    golden = goldens("tood_r50_fpn_1x_coco__demo__800x1333")
    resized = np.ascontiguousarray(resize(demo, (800, 1333)).transpose(2, 0, 1))
    assert hashlib.sha256(resized.tobytes()).hexdigest() == str(golden["resized_u8_sha256"])


@pytest.mark.parametrize(
    ("image_hw", "imgsz", "resized_hw", "net_hw"),
    [
        ((427, 640), (800, 1333), (800, 1199), (800, 1216)),
        ((640, 427), (800, 1333), (1199, 800), (1216, 800)),
        ((1, 1), (800, 1333), (800, 800), (800, 800)),
        ((20000, 20), (800, 1333), (1333, 1), (1344, 32)),
        ((20, 20000), (800, 1333), (1, 1333), (32, 1344)),
        (
            (1, 100000),
            (240, 320),
            (1, 320),
            (32, 320),
        ),  # scaled, one side would have no pixel at all
        ((32, 32), (32, 32), (32, 32), (32, 32)),
    ],
)
def test_sizes(
    image_hw: tuple[int, int],
    imgsz: tuple[int, int],
    resized_hw: tuple[int, int],
    net_hw: tuple[int, int],
) -> None:
    image, transform = resize_and_pad(np.full((*image_hw, 3), 200, np.uint8), imgsz)
    assert transform == ImageTransform(image_hw, resized_hw, net_hw)
    assert image.shape == (*net_hw, 3)
    assert (image[: resized_hw[0], : resized_hw[1]] == 200).all()
    assert not image[resized_hw[0] :].any()
    assert not image[:, resized_hw[1] :].any()


def test_a_image_decoded_smaller_goes_back_to_its_original() -> None:
    image, transform = resize_and_pad(
        np.full((120, 160, 3), 200, np.uint8), (240, 320), image_hw=(480, 639)
    )
    assert transform == ImageTransform((480, 639), fit_size((480, 639), (240, 320)), (256, 320))
    assert (image[:240, :320] == 200).all()
    np.testing.assert_allclose(
        transform.boxes_to_image(np.array([[0, 0, 320, 240]], np.float32)),
        [[0, 0, 639, 480]],
        rtol=1e-6,
    )


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1000), st.integers(0, 1000))
def test_the_image_fits_and_touches_one_limit(
    height: int, width: int, short: int, more: int
) -> None:
    fitted = fit_size((height, width), (short, short + more))
    assert min(fitted) >= 1
    assert min(fitted) <= short
    assert max(fitted) <= short + more
    assert min(fitted) == short or max(fitted) == short + more
    assert all(
        0 <= padded - side < 32 and padded % 32 == 0
        for padded, side in zip(pad_size(fitted), fitted, strict=True)
    )


def test_colours_become_rgb() -> None:
    image, _ = resize_and_pad(np.full((32, 32, 3), (10, 20, 30), np.uint8), (32, 32))
    assert image[0, 0].tolist() == [30, 20, 10]


def test_padding_to_a_fixed_shape() -> None:
    image, transform = resize_and_pad(
        np.full((50, 100, 3), 9, np.uint8), (50, 100), net_hw=(128, 256)
    )
    assert image.shape == (128, 256, 3)
    assert transform.resized_hw == (50, 100)
    with pytest.raises(InputError, match="smaller imgsz"):
        resize_and_pad(np.zeros((50, 100, 3), np.uint8), (50, 100), net_hw=(32, 128))


def test_boxes_go_back_with_a_factor_for_each_direction() -> None:
    transform = ImageTransform((20000, 20), (1333, 1), (1344, 32))
    boxes = transform.boxes_to_image(
        np.array([[0, 0, 1, 1333], [0.5, 133.3, 1, 266.6]], np.float32)
    )
    np.testing.assert_allclose(boxes, [[0, 0, 20, 20000], [10, 2000, 20, 4000]], rtol=1e-6)
    assert boxes.dtype == np.float32
    assert transform.boxes_to_image(np.zeros((0, 4), np.float32)).shape == (0, 4)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 800))
def test_the_whole_image_goes_back_to_itself(height: int, width: int, short: int) -> None:
    resized = fit_size((height, width), (short, 2 * short))
    transform = ImageTransform((height, width), resized, pad_size(resized))
    whole = transform.boxes_to_image(np.array([[0, 0, resized[1], resized[0]]], np.float32))
    np.testing.assert_allclose(whole, [[0, 0, width, height]], rtol=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint16),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(InputError, match=r"expected uint8 \(H, W, 3\)"):
        resize_and_pad(image, (32, 32))


def test_imgsz_is_put_in_order() -> None:
    assert check_imgsz([1333, 800]) == (800, 1333)


@pytest.mark.parametrize("imgsz", [(0, 10), (-1, 10), (10,), (1, 2, 3)])
def test_imgsz_must_be_two_positive_numbers(imgsz: tuple[int, ...]) -> None:
    with pytest.raises(ToodError, match="two positive numbers"):
        check_imgsz(imgsz)


@pytest.mark.parametrize(
    ("image_hw", "net_hw"),
    [
        ((480, 640), (800, 1344)),
        ((640, 480), (1344, 800)),
        ((480, 480), (800, 1344)),  # fits both, which are of one size: the first
        ((100, 4000), (800, 1344)),
    ],
)
def test_the_canvas_follows_the_image(image_hw: tuple[int, int], net_hw: tuple[int, int]) -> None:
    assert choose_canvas(image_hw, (800, 1333), [(800, 1344), (1344, 800)]) == net_hw


def test_a_canvas_that_a_image_fits_by_rounding_is_not_too_small() -> None:
    # 605 columns become 960.3, which are 960: the image needs no shrinking to 799 x 960.
    assert fit_size((504, 605), (800, 1333)) == (800, 960)
    assert fit_imgsz((504, 605), (800, 1333), (800, 960)) == (800, 1333)
    assert choose_canvas((504, 605), (800, 1333), [(800, 992), (800, 960)]) == (800, 960)


def test_the_smallest_canvas_that_holds_the_image_whole() -> None:
    assert choose_canvas((480, 640), (800, 1333), [(1344, 1344), (800, 1088), (640, 640)]) == (
        800,
        1088,
    )
    assert choose_canvas((480, 640), (800, 1333), [(320, 320), (640, 640)]) == (640, 640), (
        "none holds it: the least shrinkage"
    )


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(320, 320), (800, 1333)]))
def test_a_image_always_fits_its_canvas(height: int, width: int, imgsz: tuple[int, int]) -> None:
    canvases = [(320, 320), (800, 1344), (1344, 800)]
    net_hw = choose_canvas((height, width), imgsz, canvases)
    resized_hw = fit_size((height, width), fit_imgsz((height, width), imgsz, net_hw))
    assert resized_hw[0] <= max(net_hw[0], 1)
    assert resized_hw[1] <= max(net_hw[1], 1)


class TestSizing:
    """What a preset says beyond a size to fit."""

    @pytest.mark.parametrize(
        ("sizing", "image_hw", "resized_hw", "net_hw"),
        [
            (Sizing((320, 320), "stretch"), (480, 640), (320, 320), (320, 320)),
            (Sizing((100, 300), "stretch"), (480, 640), (100, 300), (128, 320)),
            (Sizing((100, 300), "stretch"), (1, 1), (100, 300), (128, 320)),
            (Sizing((1, 1), "stretch", (1.0, 1.0)), (45, 33), (45, 33), (64, 64)),
            (Sizing((1, 1), "stretch", (0.5, 0.25)), (45, 34), (23, 9), (32, 32)),
            (Sizing((1, 1), "stretch", (0.1, 0.1)), (1, 1), (1, 1), (32, 32)),
            (
                Sizing((1, 1), "fit", (0.5, 0.5)),
                (45, 31),
                (23, 16),
                (32, 32),
            ),  # 22.5 and 15.5 become 23 and 16, which both fit
            (Sizing((240, 320), divisor=128), (480, 640), (240, 320), (256, 384)),
            (Sizing((320, 320), canvas_hw=(320, 320)), (480, 640), (240, 320), (320, 320)),
            (Sizing((320, 320), canvas_hw=(320, 320)), (640, 480), (320, 240), (320, 320)),
            (
                Sizing((240, 320), canvas_hw=(256, 320)),
                (640, 480),
                (256, 192),
                (256, 320),
            ),  # upright: shrunk, as it has no room
            (Sizing((320, 320), "stretch", canvas_hw=(320, 384)), (10, 10), (320, 320), (320, 384)),
        ],
    )
    def test_sizes(
        self,
        sizing: Sizing,
        image_hw: tuple[int, int],
        resized_hw: tuple[int, int],
        net_hw: tuple[int, int],
    ) -> None:
        image, transform = resize_and_pad(np.full((*image_hw, 3), 200, np.uint8), sizing)
        assert transform == ImageTransform(image_hw, resized_hw, net_hw)
        assert image.shape == (*net_hw, 3)
        assert padded_size(image_hw, sizing) == net_hw
        corners = np.array([[0, 0, resized_hw[1], resized_hw[0]]], np.float32)
        np.testing.assert_allclose(
            transform.boxes_to_image(corners), [[0, 0, image_hw[1], image_hw[0]]], rtol=1e-6
        )

    @given(st.integers(1, 2000), st.integers(1, 2000), st.integers(32, 800), st.integers(32, 800))
    def test_a_plain_size_is_a_sizing_that_fits(
        self, height: int, width: int, first: int, second: int
    ) -> None:
        imgsz = (min(first, second), max(first, second))
        assert fit_size((height, width), imgsz) == fit_size((height, width), Sizing(imgsz))
        assert fit_imgsz((height, width), Sizing(imgsz), (4000, 4000)) == Sizing(imgsz)

    def test_stretching_gives_way_to_a_canvas_side_by_side(self) -> None:
        assert fit_size(
            (480, 640), fit_imgsz((480, 640), Sizing((320, 320), "stretch"), (256, 640))
        ) == (256, 320)

    def test_another_size(self) -> None:
        tiny = PRESETS["tiny"]
        assert with_imgsz(tiny, None) is tiny
        assert with_imgsz(tiny, (96, 64)).imgsz == (64, 96)
        stretched = replace(tiny, resize="stretch", imgsz=(96, 64))
        assert with_imgsz(stretched, (96, 64)) is stretched
        assert with_imgsz(stretched, (128, 64)).imgsz == (128, 64)  # rows first: not put in order
        boxed = replace(tiny, imgsz=(320, 320), canvas_hw=(320, 352))
        assert with_imgsz(boxed, (320, 320)).canvas_hw == (320, 352)
        assert with_imgsz(boxed, (160, 160)).canvas_hw == (160, 192)
        scaled = replace(tiny, scale_factor=(0.5, 0.5))
        assert with_imgsz(scaled, (240, 320)).scale_factor is None
