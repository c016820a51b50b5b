"""A window that shows the annotated frames as they come."""

from __future__ import annotations

import os
import sys
from types import TracebackType

import cv2

from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sink import Finished, Sink

TITLE = "tood-infer: q or Esc ends"
CLOSING_KEYS = (ord("q"), 27)


class Window(Sink):
    """Shows every frame; q, Esc or closing the window ends the run as if the source had ended."""

    def __init__(self) -> None:
        """Makes sure that there is something to show on.

        Raises:
            OutputError: OpenCV has no windows, or there is no display.
        """
        if any(line.split() == ["GUI:", "NONE"] for line in cv2.getBuildInformation().splitlines()):
            raise OutputError(
                "--show: this OpenCV is built without windows; replace opencv-python-headless by opencv-python, or use --output"
            )
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise OutputError("--show: no display (neither DISPLAY nor WAYLAND_DISPLAY is set); use --output")

    def write(self, frame: Frame, found: Detections) -> None:
        """Shows a frame, and asks for keys."""
        cv2.imshow(TITLE, found.plot(frame.image_bgr))
        closed = cv2.waitKey(1) & 0xFF in CLOSING_KEYS or cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1
        if closed:
            raise Finished

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        cv2.destroyAllWindows()
