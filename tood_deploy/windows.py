"""Windows of a large image, and which boxes lie in them.

Sizes in, pixel positions out; NumPy alone. Used where images are searched in parts and where a
network is trained on parts. Knows no images and no detector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import ToodError

DEFAULT_OVERLAP, MAX_OVERLAP = 0.2, 0.9
MIN_VISIBLE = 0.1  # share of a box that a window must show; that of sliced fine-tuning (SAHI)


def check_window_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a window; one number stands for both.

    Raises:
        ToodError: not one or two positive whole numbers.
    """
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(sides) not in (1, 2) or min(sides) < 1:
        shown = " ".join(map(str, sides)) or "nothing"
        raise ToodError(
            f"the size of slices is {shown}; expected one or two positive numbers, rows and "
            "columns, such as 640 or 640 800"
        )
    return int(sides[0]), int(sides[-1])


def check_overlap(overlap: float) -> float:
    """Return the overlap of neighbouring windows.

    Raises:
        ToodError: outside 0 to 0.9.
    """
    if not 0 <= overlap <= MAX_OVERLAP:
        raise ToodError(
            f"the overlap of slices is {overlap}; expected a share of their side from 0 to "
            f"{MAX_OVERLAP}"
        )
    return float(overlap)


def slice_windows(
    image_hw: tuple[int, int], size_hw: tuple[int, int], overlap: float = DEFAULT_OVERLAP
) -> NDArray[np.int64]:
    """Return the windows that cover an image, exactly as SAHI's `get_slice_bboxes` gives them.

    The last window of a row or column is shifted back to the border, so that all are of one size;
    a side that is shorter than the window's has one, of its own length.

    Args:
        image_hw: rows and columns of the image.
        size_hw: rows and columns of a window.
        overlap: of neighbours, as a share of the window's side.

    Returns:
        (N, 4) xyxy in pixels of the image, row by row from the upper left.
    """
    rows, columns = (
        _spans(length, size, int(overlap * size))
        for length, size in zip(image_hw, size_hw, strict=True)
    )
    return np.array(
        [(left, top, right, bottom) for top, bottom in rows for left, right in columns], np.int64
    )


def _spans(length: int, size: int, shared: int) -> list[tuple[int, int]]:
    """Return the first and the last position (exclusive) of every window along one side."""
    spans, start = [], 0
    while not spans or spans[-1][1] < length:
        end = min(start + size, length)
        spans.append((max(0, end - size), end))
        start = end - shared
    return spans


def boxes_in_window(
    boxes: NDArray[np.float32], window: NDArray[np.int64], min_visible: float = MIN_VISIBLE
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cut boxes at a window's border, and leave out those of which too little is left.

    Args:
        boxes: (G, 4) xyxy in pixels of the image.
        window: (4,) xyxy in pixels of the image.
        min_visible: smallest share of a box's area that lies in the window, 0 to 1.

    Returns:
        (V, 4) float32 xyxy in pixels of the window, and (V,) their positions in `boxes`.
    """
    corner, far = window[:2], window[2:]
    low = np.clip(boxes[:, :2], corner, far)
    high = np.clip(boxes[:, 2:], corner, far)
    visible = np.prod(high - low, axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kept = np.flatnonzero((visible > 0) & (visible >= min_visible * areas))
    cut = np.concatenate([low - corner, high - corner], axis=1).astype(np.float32)
    return cut[kept], kept
