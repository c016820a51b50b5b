"""Boxes and labels drawn on a copy of an image.

NumPy and OpenCV alone; knows nothing of models or files.
"""

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.reporter import printable

GOLDEN_RATIO = 0.6180339887498949
SHADES = ((0.85, 0.95), (0.60, 1.0), (0.95, 0.65))  # saturation and value, in turn
FONT, FONT_WEIGHT = "sans", 500
SMALLEST_TEXT, LARGEST_TEXT = 11, 90  # pixels
DARK_TEXT_ABOVE = 140  # luminance, 0 to 255
MAX_PATCHES = 256  # labels kept, of some kilobytes each: in a video they come again


def class_colour(class_id: int) -> tuple[int, int, int]:
    """Return the colour of a class, BGR, 0 to 255.

    Always the same, neighbouring numbers far apart.
    """
    saturation, value = SHADES[class_id % len(SHADES)]
    red, green, blue = colorsys.hsv_to_rgb((class_id * GOLDEN_RATIO) % 1.0, saturation, value)
    return round(blue * 255), round(green * 255), round(red * 255)


def text_colour(background_bgr: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is easier to read on this colour.

    By the luminance of ITU-R BT.601.
    """
    blue, green, red = background_bgr
    luminance = 0.114 * blue + 0.587 * green + 0.299 * red
    return (0, 0, 0) if luminance > DARK_TEXT_ABOVE else (255, 255, 255)


def line_width(image_hw: tuple[int, int]) -> int:
    """Return the width of a box's line in pixels, by the image's size."""
    return max(1, round(0.0025 * sum(image_hw) / 2 + 0.5))


def text_size(image_hw: tuple[int, int]) -> int:
    """Return the height of the text in pixels, by the image's size."""
    return min(LARGEST_TEXT, max(SMALLEST_TEXT, round(0.015 * sum(image_hw) / 2 + 5)))


def draw_boxes(
    image_bgr: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    class_ids: NDArray[np.int32],
    labels: Sequence[str],
) -> NDArray[np.uint8]:
    """Return a copy of the image with a box and a filled label for every object.

    Args:
        image_bgr: (H, W, 3) uint8 BGR.
        boxes: (D, 4) xyxy in the image's pixels, best first; what lies outside the image is cut
            off.
        class_ids: (D,) class numbers: they choose the colour.
        labels: D texts; letters of any script.
    """
    drawn = image_bgr.copy()
    height, width = drawn.shape[:2]
    thickness, size = line_width((height, width)), text_size((height, width))
    visible = [
        i
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist())
        if x2 >= 0 and y2 >= 0 and x1 < width and y1 < height
    ]
    corners = (
        np.clip(np.rint(boxes), 0, [width - 1, height - 1, width - 1, height - 1])
        .astype(int)
        .tolist()
    )
    for i in reversed(visible):  # the best come last, on top
        x1, y1, x2, y2 = corners[i]
        cv2.rectangle(drawn, (x1, y1), (x2, y2), class_colour(int(class_ids[i])), thickness)
    patches = {
        i: _label_patch(labels[i], class_colour(int(class_ids[i])), size, width) for i in visible
    }
    places = _label_places(
        [corners[i] for i in visible], [patches[i].shape[:2] for i in visible], (height, width)
    )
    for i, (left, top) in reversed(list(zip(visible, places, strict=True))):
        shown = drawn[top : top + patches[i].shape[0], left : left + patches[i].shape[1]]
        shown[:] = patches[i][: shown.shape[0], : shown.shape[1]]
    return drawn


@lru_cache(maxsize=MAX_PATCHES)
def _label_patch(
    label: str, background_bgr: tuple[int, int, int], size: int, room: int
) -> NDArray[np.uint8]:
    """Return the filled label as a small image.

    The text shrinks, down to half the smallest size, to fit into `room` pixels.
    """
    label, font = printable(label), cv2.FontFace(FONT)
    margin = max(2, size // 6)
    while size > SMALLEST_TEXT // 2 and _text_width(label, font, size) + 2 * margin > room:
        size -= 1
    width = max(1, _text_width(label, font, size) + 2 * margin)
    patch = np.full((size + size // 2, width, 3), background_bgr, np.uint8)
    cv2.putText(
        patch,
        label,
        (margin, round(1.1 * size)),
        text_colour(background_bgr),
        font,
        size,
        FONT_WEIGHT,
    )
    return patch


def _text_width(label: str, font: cv2.FontFace, size: int) -> int:
    return cv2.getTextSize((0, 0), label, (0, 0), font, size, FONT_WEIGHT)[2]


def _label_places(
    boxes: list[list[int]], labels_hw: list[tuple[int, int]], image_hw: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the left and top of every label, inside the image.

    The first place at its box that hides no better object's label.
    """
    taken = np.zeros((len(boxes), 4), np.int64)
    for i, ((x1, y1, x2, y2), (height, width)) in enumerate(zip(boxes, labels_hw, strict=True)):
        wished = [
            (x1, y1 - height),
            (x1, y2),
            (x1, y1),
            (x2 - width, y1 - height),
            (x2 - width, y2),
            (x1, y2 - height),
        ]
        inside: NDArray[np.int64] = np.maximum(
            np.minimum(wished, (image_hw[1] - width, image_hw[0] - height)), 0
        )
        places = np.hstack([inside, np.add(inside, (width, height))])
        taken[i] = places[_overlaps(places, taken[:i]).argmin()]
    return [(left, top) for left, top, _, _ in taken.tolist()]


def _overlaps(places: NDArray[np.int64], taken: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pixels (P,) that places (P, 4) xyxy share with those (n, 4) that are taken."""
    sides = np.minimum(places[:, None, 2:], taken[:, 2:]) - np.maximum(
        places[:, None, :2], taken[:, :2]
    )
    return sides.clip(0).prod(axis=2).sum(axis=1)
