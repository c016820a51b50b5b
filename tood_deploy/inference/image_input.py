"""Images as users hold them in memory, made (H, W, 3) uint8 BGR.

Comes in: BGR, RGB, grey, with alpha, or Pillow's.

Knows no files. Pillow is recognised where the user has imported it, and is not needed.
"""

from __future__ import annotations

import sys
from os import PathLike
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError, ToodError

Color = Literal["bgr", "rgb"]
COLORS = ("bgr", "rgb")
PILLOW_MODES = {  # what each of Pillow's modes is converted to: grey, or red, green and blue
    **{"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGBA"},
    **{"CMYK": "RGB", "YCbCr": "RGB"},
    **{"P": "RGBA", "PA": "RGBA"},  # a palette may hold alpha, which RGBA takes without a warning
}
TO_BGR = {
    "bgr": {1: cv2.COLOR_GRAY2BGR, 4: cv2.COLOR_BGRA2BGR},
    "rgb": {1: cv2.COLOR_GRAY2BGR, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGR},
}


class PillowImage(Protocol):
    """An image of Pillow (`PIL.Image.Image`), as far as it is used here."""

    @property
    def mode(self) -> str:
        """Pillow's name of the pixel format, such as "RGB"."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        ...

    def convert(self, mode: str) -> Any:
        """Return the image in another mode."""
        ...


ImageInput = NDArray[Any] | PillowImage


def check_color(color: str) -> None:
    """Raise ToodError unless `color` is the name of an order of channels."""
    if color not in COLORS:
        raise ToodError(f"color is {color!r}; expected bgr, as cv2.imread gives it, or rgb")


def bgr_from(image: ImageInput, color: str) -> NDArray[np.uint8]:
    """Return an image as the rest of the package takes it.

    Args:
        image: (H, W, 3), grey (H, W) or (H, W, 1), or (H, W, 4) with alpha last, uint8; or an image
            of Pillow.
        color: order of the channels of an array, "bgr" or "rgb". Pillow's images say themselves
            what their channels are.

    Returns:
        (H, W, 3) uint8 BGR; grey in all three, alpha left out. The array itself where it is that
        already. A Pillow image is taken as it is, not turned by the orientation in its EXIF data:
        boxes are in its own pixels.

    Raises:
        InputError: no image, or of a kind that is not taken.
        ToodError: no such order of channels.
    """
    check_color(color)
    if _is_pillow(image):
        image, color = _array_from_pillow(image), "rgb"
    if not isinstance(image, np.ndarray):
        raise InputError(_what_else(image))
    _check_array(image)
    channels = 1 if image.ndim == 2 else image.shape[2]
    conversion = TO_BGR[color].get(channels)
    return image if conversion is None else np.asarray(cv2.cvtColor(image, conversion), np.uint8)


def _is_pillow(image: object) -> bool:
    """Tell whether this is one of Pillow's images: there is none unless the module was imported."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _array_from_pillow(image: Any) -> NDArray[np.uint8]:
    """Return grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4) uint8."""
    if image.mode not in PILLOW_MODES:
        deep = image.mode.startswith(("I", "F"))
        cure = (
            "scale its values to 0 to 255 and give them as an array of uint8"
            if deep
            else 'give image.convert("RGB")'
        )
        raise InputError(
            f"the image is one of Pillow, of mode {image.mode}; expected "
            f"{', '.join(PILLOW_MODES)}: {cure}"
        )
    mode = PILLOW_MODES[image.mode]
    try:
        return np.asarray(image if image.mode == mode else image.convert(mode))
    except OSError as error:  # Pillow reads a file only when its pixels are asked for
        raise InputError(
            f"Pillow cannot decode the image ({error}); copy the file or convert it again"
        ) from error


def _what_else(image: object) -> str:
    """Return the sentence for what is neither an array nor one of Pillow's images."""
    if image is None:
        return (
            "an image is due, None was given; cv2.imread gives None where it cannot read a file: "
            "look "
            "at its path"
        )
    if isinstance(image, str | PathLike):
        cure = f"read it with cv2.imread, or use detector.stream({str(image)!r})"
        return f"an image is due, the path {image} was given; {cure}"
    if isinstance(image, bytes | bytearray | memoryview):
        decode = "cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)"
        return f"an image is due, {len(image)} bytes were given; decode them with {decode}"
    if isinstance(image, list | tuple):
        kind = f"{type(image).__name__} of {len(image)}"
        return f"an image is due, a {kind} was given; call the detector once for each image"
    kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
    expected = "a NumPy array (H, W, 3) of uint8, or an image of Pillow"
    return f"an image is due, a value of type {kind} was given; expected {expected}"


def _check_array(image: NDArray[Any]) -> None:
    """Raise InputError unless the array is uint8, of 1, 3 or 4 channels, and not empty."""
    problem = f"the image is {image.dtype} {image.shape}"
    if image.dtype != np.uint8:
        raise InputError(f"{problem}; expected uint8: {_uint8_cure(image)}")
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
        raise InputError(f"{problem}; expected the channels last: image.transpose(1, 2, 0)")
    if image.ndim == 4:
        raise InputError(f"{problem}, a batch; expected one image: call the detector once for each")
    if (
        image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] not in (1, 3, 4))
        or not image.size
    ):
        expected = (
            "uint8 (H, W, 3), or grey (H, W), or (H, W, 4) with alpha, with at least one pixel"
        )
        raise InputError(f"{problem}; expected {expected}")


def _uint8_cure(image: NDArray[Any]) -> str:
    if image.dtype == np.bool_:
        return "image.astype(np.uint8) * 255"
    if image.dtype == np.uint16:
        return (
            "(image // 257).astype(np.uint8) where its values go up to 65535; a camera of 12 bits "
            "needs image // 16"
        )
    if np.issubdtype(image.dtype, np.floating):
        return (
            "(image * 255).round().astype(np.uint8) where its values go from 0 to 1, and not "
            "normalised"
        )
    return "image.astype(np.uint8) where its values go from 0 to 255"
