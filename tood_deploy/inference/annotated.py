"""Pictures and videos with the detections drawn on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.inference.destinations import check_writable
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sink import Sink, output_errors
from tood_deploy.inference.video_writer import VideoWriter
from tood_deploy.manifest import atomic_path

JPEG_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]


def write_image(path: Path, image_bgr: NDArray[np.uint8]) -> None:
    """Writes a picture (H, W, 3) uint8 BGR, whole or not at all, in the format its suffix names.

    Raises:
        OutputError: the format cannot hold it, the folder cannot be written, or the disk is full.
    """
    options = JPEG_QUALITY if path.suffix.lower() in (".jpg", ".jpeg", ".jpe") else []
    try:
        written, data = cv2.imencode(path.suffix, image_bgr, options)
    except cv2.error:
        written, data = False, np.zeros(0, np.uint8)
    if not written:
        size = f"{image_bgr.shape[1]} x {image_bgr.shape[0]}"
        raise OutputError(f"{path}: {size} pixels cannot be written as {path.suffix}; choose another --output, ending in .png")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


class Annotated(Sink):
    """One annotated file per input: a picture for a picture, an H.264 video with the same frame times for a video."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Takes the file of each input's name.

        Raises:
            OutputError: a folder cannot be written.
        """
        self.files = files
        self._writer: VideoWriter | None = None
        for folder in {path.parent for path in files.values()}:
            check_writable(folder)

    def write(self, frame: Frame, found: Detections) -> None:
        """Draws a frame and adds it to its file."""
        path, drawn = self.files[frame.name], found.plot(frame.image_bgr)
        if frame.pts is None or frame.time_base is None:
            self._close(None)
            write_image(path, drawn)
            return
        if self._writer is None or self._writer.path != path:
            self._close(None)
            self._writer = VideoWriter(path, (drawn.shape[1], drawn.shape[0]), frame.time_base)
        self._writer.write(drawn, frame.pts)

    def _close(self, error: BaseException | None) -> None:
        """Completes the video being written, or removes it where there was an error."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(type(error) if error else None, error, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with output_errors(", ".join(map(str, self.files.values()))):
            self._close(error)
