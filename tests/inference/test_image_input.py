"""Images as users hold them in memory, made BGR.

What is no image, in one sentence with its cure.
"""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tood_deploy.errors import InputError
from tood_deploy.inference.image_input import PILLOW_MODES, bgr_from

RNG = np.random.default_rng(0)


def noise(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape, np.uint8)


def test_bgr_is_the_array_itself() -> None:
    image = noise(5, 7, 3)
    assert bgr_from(image, "bgr") is image


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 9), (9, 1), (5, 7)])
def test_channels_are_put_in_order(size_hw: tuple[int, int]) -> None:
    image = noise(*size_hw, 4)
    np.testing.assert_array_equal(bgr_from(image[..., :3], "rgb"), image[..., 2::-1])
    np.testing.assert_array_equal(bgr_from(image, "rgb"), image[..., 2::-1])
    np.testing.assert_array_equal(bgr_from(image, "bgr"), image[..., :3])
    for color in ("bgr", "rgb"):
        for grey in (image[..., 0], image[..., :1]):
            np.testing.assert_array_equal(
                bgr_from(grey, color), np.repeat(image[..., :1], 3, axis=2)
            )


def test_views_with_gaps_and_backwards_are_read_as_they_are() -> None:
    image = noise(8, 6, 3)
    for view in (image[::-1], image[:, ::2], image[..., ::-1], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(bgr_from(view, "rgb"), np.ascontiguousarray(view)[..., ::-1])


@pytest.mark.parametrize("mode", PILLOW_MODES)
def test_pillow_images_are_what_pillow_makes_rgb(mode: str) -> None:
    image = (
        Image.fromarray(noise(6, 9, 3))
        .convert(mode.removesuffix("A") if mode in ("LA", "PA") else mode)
        .convert(mode)
    )
    assert image.mode == mode
    expected = np.asarray(image.convert("RGBA" if mode == "PA" else "RGB"))[..., 2::-1]
    for color in ("bgr", "rgb"):
        np.testing.assert_array_equal(bgr_from(image, color), expected)


def test_a_palette_with_alpha_gives_no_warning() -> None:
    image = Image.fromarray(noise(6, 9, 3)).convert("P")
    image.info["transparency"] = bytes(range(256))
    np.testing.assert_array_equal(
        bgr_from(image, "bgr"), np.asarray(image.convert("RGBA"))[..., 2::-1]
    )


def test_exif_orientation_of_pillow_images_is_left_to_the_user(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(noise(16, 32, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert bgr_from(Image.open(tmp_path / "turned.jpg"), "bgr").shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("mode", "cure"),
    [
        ("I;16", "as an array of uint8"),
        ("I", "as an array of uint8"),
        ("F", "as an array of uint8"),
        ("HSV", "convert"),
    ],
)
def test_other_pillow_modes_are_refused_by_name(mode: str, cure: str) -> None:
    with pytest.raises(InputError, match=f"of mode {mode}; expected 1, L, .*: .*{cure}"):
        bgr_from(Image.new(mode, (4, 4)), "bgr")


def test_a_cut_file_of_pillow_is_named() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(file, "JPEG")
    with pytest.raises(InputError, match="Pillow cannot decode the image"):
        bgr_from(Image.open(io.BytesIO(file.getvalue()[:700])), "bgr")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "None was given; cv2.imread gives None"),
        (
            "street.jpg",
            r"the path street.jpg was given; .* cv2.imread, .*detector.stream\('street.jpg'\)",
        ),
        (Path("street.jpg"), r"detector.stream\('street.jpg'\)"),
        (b"\xff\xd8\xff", "3 bytes were given; decode them with cv2.imdecode"),
        ([noise(4, 4, 3)] * 2, "a list of 2 was given; call the detector once for each image"),
        ((), "a tuple of 0 was given"),
        (3.5, r"a value of type float was given; expected a NumPy array \(H, W, 3\)"),
        (noise(2, 4, 4, 3), "a batch; expected one image"),
        (noise(3, 40, 50), r"expected the channels last: image.transpose\(1, 2, 0\)"),
        (noise(40, 50, 2), r"expected uint8 \(H, W, 3\), or grey"),
        (noise(40), r"the image is uint8 \(40,\); expected"),
        (noise(0, 50, 3), "at least one pixel"),
        (noise(0, 50), "at least one pixel"),
        (
            np.zeros((4, 4, 3), np.float32),
            r"the image is float32 .*expected uint8: \(image \* 255\)",
        ),
        (np.zeros((4, 4), np.uint16), r"the image is uint16 .*expected uint8: \(image // 257\)"),
        (np.zeros((4, 4), np.bool_), r"expected uint8: image.astype\(np.uint8\) \* 255"),
        (np.zeros((4, 4, 3), np.int64), r"expected uint8: image.astype\(np.uint8\)"),
        (np.zeros((4, 4, 3), object), "the image is object"),
    ],
)
def test_what_is_no_image_is_told_with_its_cure(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        bgr_from(image, "bgr")
    assert "\n" not in str(caught.value)


def test_pillow_is_not_imported() -> None:
    code = "import sys, numpy as np; from tood_deploy.inference.image_input import bgr_from"
    code += "\nbgr_from(np.zeros((4, 4), np.uint8), 'bgr')\ntry: bgr_from(3, 'bgr')"
    code += "\nexcept Exception as error: print(type(error).__name__, 'PIL' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["InputError", "False"]
