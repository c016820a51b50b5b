"""Every object as a picture of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.inference.annotated import write_image
from tood_deploy.inference.destinations import check_writable, plan_names
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sink import Sink

UNSAFE = re.compile(r"[^\w-]+")  # in a class name that becomes part of a file name


class Crops(Sink):
    """JPEG files `<input>_<frame>_<number>_<class>.jpg`, the best object of a frame first; pictures have no frame number."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Takes the folder and the names of all inputs.

        Raises:
            OutputError: the folder cannot be written.
        """
        check_writable(folder)
        self.stems = {name: path.with_suffix("") for name, path in plan_names(names, folder, lambda _: ".jpg").items()}

    def write(self, frame: Frame, found: Detections) -> None:
        """Cuts out what lies inside the picture."""
        stem = self.stems[frame.name]
        number = "" if frame.pts is None else f"_{frame.index:06d}"
        for i, (box, name) in enumerate(zip(found.boxes, found.names(), strict=True)):
            crop = crop_box(frame.image_bgr, box)
            if crop.size:
                write_image(stem.with_name(f"{stem.name}{number}_{i:03d}_{UNSAFE.sub('-', name)}.jpg"), crop)


def crop_box(image_bgr: NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The part (h, w, 3) of the picture that a box, xyxy in pixels, touches; no rows or columns where it lies outside."""
    height, width = image_bgr.shape[:2]
    left, top = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(box[2:]), 0, (width, height)).astype(int)
    return image_bgr[top:bottom, left:right]
