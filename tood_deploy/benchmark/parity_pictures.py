"""The pictures on which two runs differ, side by side: what both found in blue, what one alone found with its name."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.differences import Difference
from tood_deploy.detections import Detections
from tood_deploy.draw import draw_boxes, line_width

SMALLEST_PX = 480
SHOWN_ABOVE = 0.3  # score of boxes that both found
BOTH_BGR = (200, 140, 40)


def draw_difference(difference: Difference) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The picture with what the reference found and with what the artefact found, (H, W, 3) uint8 BGR; small ones are enlarged."""
    image_bgr = difference.picture.read()
    scale = max(1, -(-SMALLEST_PX // max(image_bgr.shape[:2])))
    image_bgr = image_bgr.repeat(scale, axis=0).repeat(scale, axis=1)
    left = _draw_side(image_bgr, difference.reference, difference.pairs[:, 0], scale)
    return left, _draw_side(image_bgr, difference.found, difference.pairs[:, 1], scale)


def _draw_side(image_bgr: NDArray[np.uint8], found: Detections, paired: NDArray[np.intp], scale: int) -> NDArray[np.uint8]:
    drawn = image_bgr.copy()
    for x1, y1, x2, y2 in np.rint(found[paired].filter(SHOWN_ABOVE).boxes * scale).astype(int).tolist():
        cv2.rectangle(drawn, (x1, y1), (x2, y2), BOTH_BGR, line_width((drawn.shape[0], drawn.shape[1])))
    single = found[np.delete(np.arange(len(found)), paired)]
    labels = [f"{name} {score:.2f}" for name, score in zip(single.names(), single.scores.tolist(), strict=True)]
    return draw_boxes(drawn, single.boxes * np.float32(scale), single.class_ids, labels)
