"""The pictures on which two runs differ, side by side: what both found in thin lines, what one alone found in thick ones."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.differences import Difference
from tood_deploy.detections import Detections
from tood_deploy.draw import draw_boxes

SMALLEST_PX, GAP_PX = 480, 8
SHOWN_ABOVE = 0.3  # score of boxes that both found
BOTH_BGR = (200, 140, 40)


def draw_difference(difference: Difference) -> NDArray[np.uint8]:
    """Reference at the left, the artefact at the right, (H, W, 3) uint8 BGR; small pictures are enlarged."""
    image_bgr = difference.picture.read()
    scale = max(1, -(-SMALLEST_PX // max(image_bgr.shape[:2])))
    image_bgr = image_bgr.repeat(scale, axis=0).repeat(scale, axis=1)
    sides = [
        _draw_side(image_bgr, found, difference.pairs[:, column], scale)
        for column, found in enumerate((difference.reference, difference.found))
    ]
    gap = np.full((image_bgr.shape[0], GAP_PX, 3), 255, np.uint8)
    return np.hstack([sides[0], gap, sides[1]])


def _draw_side(image_bgr: NDArray[np.uint8], found: Detections, paired: NDArray[np.intp], scale: int) -> NDArray[np.uint8]:
    drawn = image_bgr.copy()
    for x1, y1, x2, y2 in np.rint(found[paired].filter(SHOWN_ABOVE).boxes * scale).astype(int).tolist():
        cv2.rectangle(drawn, (x1, y1), (x2, y2), BOTH_BGR, 1)
    single = found[np.delete(np.arange(len(found)), paired)]
    labels = [f"{name} {score:.2f}" for name, score in zip(single.names(), single.scores.tolist(), strict=True)]
    return draw_boxes(drawn, single.boxes * np.float32(scale), single.class_ids, labels)
