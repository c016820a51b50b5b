"""From an image as OpenCV reads it to what the network takes, and boxes back again.

NumPy and OpenCV alone.

Equal to the test pipeline of both public implementations (reference/SPEC.md section 4): resize
bilinearly, with the aspect kept unless the `Sizing` says otherwise, then pad at the right and
bottom. Normalising is part of the network's graph.

Wherever a size to fit is asked for, plain (short side, long side) stands for `Sizing((short side,
long side))`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError, ToodError
from tood_deploy.presets import MAX_IMGSZ, SIZE_DIVISOR, Preset, Sizing

ImageSize = Sizing | tuple[int, int]


@dataclass(frozen=True)
class ImageTransform:
    """How an image became the network's input.

    Attributes:
        image_hw: rows and columns of the original image.
        resized_hw: rows and columns after resizing: the part of the input that holds real pixels.
        net_hw: rows and columns of the padded input.
    """

    image_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    net_hw: tuple[int, int]

    def boxes_to_image(self, boxes_net: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return boxes (D, 4) xyxy in pixels of the original image, not clipped.

        Args:
            boxes_net: (D, 4) xyxy in pixels of the network input.

        The two directions have their own factor, as rounding made them.
        """
        scale_y, scale_x = (
            resized / original
            for resized, original in zip(self.resized_hw, self.image_hw, strict=True)
        )
        return (boxes_net / np.array([scale_x, scale_y, scale_x, scale_y], np.float32)).astype(
            np.float32, copy=False
        )


def check_imgsz(imgsz: Sequence[int]) -> tuple[int, int]:
    """Return (short side, long side), in that order.

    Raises:
        ToodError: not two positive whole numbers up to `MAX_IMGSZ`.
    """
    values = tuple(int(side) for side in imgsz)
    if len(values) != 2 or not 1 <= min(values) <= max(values) <= MAX_IMGSZ:
        raise ToodError(
            f"imgsz is {' '.join(map(str, imgsz))}; expected two positive numbers up to "
            f"{MAX_IMGSZ}, for example 800 1333"
        )
    return min(values), max(values)


def with_imgsz(preset: Preset, imgsz: Sequence[int] | None) -> Preset:
    """Return the preset with another image size, which a fixed canvas follows.

    The preset itself where None is given.

    Args:
        preset: says what a size means.
        imgsz: (short side, long side) to fit, in any order; (rows, columns) where the preset
            stretches images.

    Raises:
        ToodError: not two positive whole numbers.
    """
    if imgsz is None:
        return preset
    ordered = check_imgsz(imgsz)
    if preset.resize == "stretch":
        ordered = int(imgsz[0]), int(imgsz[1])
    if ordered == preset.imgsz and preset.scale_factor is None:
        return preset
    return replace(
        preset, imgsz=ordered, scale_factor=None, canvas_hw=_scaled_canvas(preset, ordered)
    )


def _scaled_canvas(preset: Preset, imgsz: tuple[int, int]) -> tuple[int, int] | None:
    if preset.canvas_hw is None or preset.scale_factor is not None:
        return None
    factor = max(new / old for new, old in zip(imgsz, preset.imgsz, strict=True))
    rows, columns = (
        math.ceil(round(side * factor, 6) / preset.pad_divisor) * preset.pad_divisor
        for side in preset.canvas_hw
    )
    return rows, columns


def fit_size(image_hw: tuple[int, int], imgsz: ImageSize) -> tuple[int, int]:
    """Return the rows and columns that an image is resized to, at least one pixel each."""
    sizing = _sizing(imgsz)
    target = sizing.imgsz
    if sizing.scale_factor is not None:
        rows, columns = (
            int(side * factor + 0.5)
            for side, factor in zip(image_hw, sizing.scale_factor, strict=True)
        )
        target = (
            (rows, columns)
            if sizing.resize == "stretch"
            else (min(rows, columns), max(rows, columns))
        )
    if sizing.resize == "stretch":
        return max(1, target[0]), max(1, target[1])
    scale = min(target[0] / min(image_hw), target[1] / max(image_hw))
    height, width = (max(1, int(side * scale + 0.5)) for side in image_hw)
    return height, width


def padded_size(image_hw: tuple[int, int], imgsz: ImageSize) -> tuple[int, int]:
    """Return the rows and columns of the network's input for an image.

    The fixed canvas, or the next multiples of the divisor.
    """
    sizing = _sizing(imgsz)
    return sizing.canvas_hw or pad_size(fit_size(image_hw, sizing), sizing.divisor)


def _sizing(imgsz: ImageSize) -> Sizing:
    return imgsz if isinstance(imgsz, Sizing) else Sizing(imgsz)


def pad_size(resized_hw: tuple[int, int], divisor: int = SIZE_DIVISOR) -> tuple[int, int]:
    """Return rows and columns rounded up to a multiple of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in resized_hw)
    return height, width


def fit_imgsz(image_hw: tuple[int, ...], imgsz: ImageSize, net_hw: tuple[int, int]) -> ImageSize:
    """Return the size to fit: `imgsz`, or less where the canvas has no room for that.

    Args:
        image_hw: rows and columns of the image.
        imgsz: the size to fit where there is room.
        net_hw: rows and columns of the canvas.
    """
    height, width = image_hw[:2]
    resized = fit_size((height, width), imgsz)
    if resized[0] <= net_hw[0] and resized[1] <= net_hw[1]:
        return imgsz
    if _sizing(imgsz).resize == "stretch":
        return Sizing((min(resized[0], net_hw[0]), min(resized[1], net_hw[1])), "stretch")
    room = min(net_hw[0] / height, net_hw[1] / width)
    sides = (int(height * room), int(width * room))
    return max(1, min(sides)), max(1, max(sides))


def choose_canvas(
    image_hw: tuple[int, ...], imgsz: ImageSize, input_shapes_hw: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Return the padded size that shrinks an image least; of several, the one with fewest pixels.

    Args:
        image_hw: rows and columns of the image.
        imgsz: the size to fit where there is room.
        input_shapes_hw: rows and columns of every padded size, at least one.
    """

    def shrinkage_and_area(canvas_hw: tuple[int, int]) -> tuple[float, int]:
        resized_hw = fit_size((image_hw[0], image_hw[1]), fit_imgsz(image_hw, imgsz, canvas_hw))
        return -float(resized_hw[0] * resized_hw[1]), canvas_hw[0] * canvas_hw[1]

    return min(input_shapes_hw, key=shrinkage_and_area)


def resize(
    image_bgr: NDArray[np.uint8], imgsz: ImageSize, image_hw: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Resize an image with OpenCV's bilinear interpolation.

    Args:
        image_bgr: (H, W, 3) uint8.
        imgsz: the size to fit.
        image_hw: as `resize_and_pad` takes it.
    """
    height, width = fit_size(image_hw or (image_bgr.shape[0], image_bgr.shape[1]), imgsz)
    return np.asarray(
        cv2.resize(image_bgr, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8
    )


def plan_resize(
    image_bgr: NDArray[np.uint8],
    imgsz: ImageSize,
    net_hw: tuple[int, int] | None = None,
    image_hw: tuple[int, int] | None = None,
) -> ImageTransform:
    """Return what `resize_and_pad` makes of an image, without making it.

    Args:
        image_bgr, imgsz, net_hw, image_hw: as `resize_and_pad` takes them.

    Raises:
        InputError: as `resize_and_pad` does.
    """
    if (
        image_bgr.ndim != 3
        or image_bgr.shape[2] != 3
        or image_bgr.dtype != np.uint8
        or not image_bgr.size
    ):
        raise InputError(
            f"image is {image_bgr.dtype} {image_bgr.shape}; expected uint8 (H, W, 3) in BGR order, "
            "as cv2.imread gives it"
        )
    image_hw = image_hw or (image_bgr.shape[0], image_bgr.shape[1])
    if net_hw is None:
        net_hw = padded_size(image_hw, imgsz)
        imgsz = fit_imgsz(image_hw, imgsz, net_hw)
    resized_hw = fit_size(image_hw, imgsz)
    if net_hw[0] < resized_hw[0] or net_hw[1] < resized_hw[1]:
        raise InputError(
            f"image is {resized_hw} after resizing, the network takes {net_hw}; give a smaller "
            "imgsz"
        )
    return ImageTransform(image_hw, resized_hw, net_hw)


def resize_and_pad(
    image_bgr: NDArray[np.uint8],
    imgsz: ImageSize,
    net_hw: tuple[int, int] | None = None,
    image_hw: tuple[int, int] | None = None,
) -> tuple[NDArray[np.uint8], ImageTransform]:
    """Return the network's input for one image.

    Args:
        image_bgr: (H, W, 3) uint8, as OpenCV reads it.
        imgsz: the size to fit, with (short side, long side) in pixels, or a preset's `sizing`.
        net_hw: rows and columns to pad to; where not given those of `padded_size`. An image that a
            preset's fixed canvas has no room for is shrunk to fit; the training code stops there.
        image_hw: rows and columns of the original image, where `image_bgr` is all of it but
            smaller; boxes go back to the original.

    Returns:
        (rows, columns, 3) uint8 RGB, zeros where padded, and the transform that leads back.

    Raises:
        InputError: not a (H, W, 3) uint8 image, or `net_hw` is too small for it.
    """
    transform = plan_resize(image_bgr, imgsz, net_hw, image_hw)
    rows, columns = transform.resized_hw
    resized = cv2.resize(image_bgr, (columns, rows), interpolation=cv2.INTER_LINEAR)
    padded = np.zeros((*transform.net_hw, 3), np.uint8)
    cv2.cvtColor(resized, cv2.COLOR_BGR2RGB, dst=padded[:rows, :columns])
    return padded, transform
