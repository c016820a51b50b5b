"""A picture and its boxes, scaled, mirrored and coloured at random. NumPy and OpenCV alone; all chance comes in as a generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tood_deploy.preprocess import resize


@dataclass(frozen=True)
class Augment:
    """What is done to a training picture.

    Attributes:
        imgsz: (short side, long side) in pixels to fit.
        short_sides: smallest and largest short side, drawn per picture in place of `imgsz`'s.
        flip, flip_vertical: share of pictures mirrored left to right, and top to bottom.
        colour: strength of brightness, contrast and saturation, 0 for none.
    """

    imgsz: tuple[int, int]
    short_sides: tuple[int, int] | None = None
    flip: float = 0.5
    flip_vertical: float = 0.0
    colour: float = 0.0

    def __call__(
        self, image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The changed picture (H', W', 3) uint8 BGR and its boxes (G, 4) xyxy in pixels of it."""
        short = self.imgsz[0] if self.short_sides is None else int(rng.integers(self.short_sides[0], self.short_sides[1] + 1))
        image_bgr, boxes = scale(image_bgr, boxes, (short, self.imgsz[1]))
        if rng.random() < self.flip:
            image_bgr, boxes = mirror(image_bgr, boxes)
        if rng.random() < self.flip_vertical:
            image_bgr, boxes = mirror_vertically(image_bgr, boxes)
        if self.colour:
            image_bgr = recolour(image_bgr, *(1 + self.colour * rng.uniform(-1, 1, 3)))
        return np.ascontiguousarray(image_bgr), boxes


def scale(
    image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32], imgsz: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Scaled to fit (short side, long side), aspect kept; each direction with its own factor, as rounding made it."""
    resized = resize(image_bgr, imgsz)
    factors = [new / old for new, old in zip(resized.shape[1::-1], image_bgr.shape[1::-1], strict=True)]
    return resized, (boxes * np.array(factors * 2, np.float32)).astype(np.float32, copy=False)


def mirror(image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Left to right."""
    width = np.float32(image_bgr.shape[1])
    return image_bgr[:, ::-1], np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1)


def mirror_vertically(image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Top to bottom."""
    height = np.float32(image_bgr.shape[0])
    return image_bgr[::-1], np.stack((boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]), axis=1)


def recolour(image_bgr: NDArray[np.uint8], brightness: float, contrast: float, saturation: float) -> NDArray[np.uint8]:
    """Factors around 1: of all values, of their distance from the mean, of their distance from grey."""
    values = image_bgr.astype(np.float32) * np.float32(brightness)
    values = (values - values.mean()) * np.float32(contrast) + values.mean()
    grey = values.mean(axis=2, keepdims=True)
    return np.clip((values - grey) * np.float32(saturation) + grey, 0, 255).astype(np.uint8)
