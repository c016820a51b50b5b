"""Boxes of many pictures as flat NumPy arrays in order of the picture ids: some 50 bytes a box, whatever the data set's size."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes; those of one picture stand together, in the order they came in.

    Attributes:
        image_ids: (N,) int64, ascending.
        category_ids: (N,) int64.
        boxes_xywh: (N, 4) float64, left, top, width, height in pixels of the picture.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.image_ids)

    def pick(self, chosen: NDArray[Any] | slice) -> Self:
        """Those at these positions, or where a mask is true."""
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def by_image(self) -> Self:
        """The same in ascending order of the picture ids."""
        return self.pick(np.argsort(self.image_ids, kind="stable"))

    def span(self, first_id: int, last_id: int) -> slice:
        """Where the boxes of the pictures from `first_id` to `last_id`, both included, stand."""
        start, stop = np.searchsorted(self.image_ids, [first_id, last_id + 1])
        return slice(int(start), int(stop))
