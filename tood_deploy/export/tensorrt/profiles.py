"""What an engine takes: padded picture sizes, each with a range of batches. One optimisation profile a size, its height and width fixed.

Knows no TensorRT. Imports nothing heavy, so that the command line can read its arguments with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tood_deploy.errors import ToodError
from tood_deploy.presets import SIZE_DIVISOR

MOST_SHAPES = 6
DEFAULT_BATCH = (1, 1, 8)

Batch = tuple[int, int, int]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Profiles:
    """The optimisation profiles of one engine.

    Attributes:
        shapes_hw: rows and columns of every padded picture size, one profile each, in this order; multiples of 32.
        batch: the smallest batch, the one to be fast at, and the largest; of every profile.
    """

    shapes_hw: tuple[Shape, ...]
    batch: Batch = DEFAULT_BATCH

    def __post_init__(self) -> None:
        if not 1 <= len(self.shapes_hw) <= MOST_SHAPES:
            raise ToodError(f"shapes are {len(self.shapes_hw)}; expected 1 to {MOST_SHAPES}, each of them is optimised for by itself")
        for height, width in self.shapes_hw:
            if min(height, width) < SIZE_DIVISOR or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
                fitting = "x".join(str(max(1, -(-side // SIZE_DIVISOR)) * SIZE_DIVISOR) for side in (height, width))
                raise ToodError(f"shape {height}x{width}: expected height and width as multiples of {SIZE_DIVISOR}; give {fitting}")
        if len(set(self.shapes_hw)) < len(self.shapes_hw):
            raise ToodError(f"shapes {self.text()}: one stands there twice; give each once")
        smallest, best, largest = self.batch
        if not 1 <= smallest <= best <= largest:
            raise ToodError(f"batch is {smallest},{best},{largest}; expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX")

    def text(self) -> str:
        """The shapes as the command line takes them."""
        return ",".join(f"{height}x{width}" for height, width in self.shapes_hw)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values for the manifest, one dictionary a profile."""
        return [{"size_hw": list(shape), "batch": list(self.batch)} for shape in self.shapes_hw]


def default_shapes(imgsz: Sequence[int]) -> tuple[Shape, ...]:
    """Landscape and portrait for pictures that are scaled to fit (short side, long side): 800, 1333 gives 800x1344 and 1344x800."""
    short, long = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in sorted(imgsz))
    return ((short, long),) if short == long else ((short, long), (long, short))


def shapes_from_text(text: str) -> tuple[Shape, ...]:
    """Reads "800x1344,1344x800".

    Raises:
        ToodError: not of that form.
    """
    parts = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise ToodError(f"shapes are {text!r}; expected HxW, or several with commas between them, for example 800x1344,1344x800")
    return tuple((int(part[1]), int(part[2])) for part in parts if part)


def batch_from_text(text: str) -> Batch:
    """Reads "1,8,32" (smallest, best, largest), or "8": every batch up to it, fastest at it.

    Raises:
        ToodError: not of that form.
    """
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise ToodError(f"batch is {text!r}; expected MIN,OPT,MAX, for example 1,8,32, or one number, the largest")
    numbers = [int(part) for part in parts]
    smallest, best, largest = numbers if len(numbers) == 3 else (1, numbers[0], numbers[0])
    return smallest, best, largest
