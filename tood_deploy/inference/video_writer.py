"""An H.264 video file, written frame by frame with the frames' own times. PyAV encodes."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from numpy.typing import NDArray

from tood_deploy.errors import OutputError
from tood_deploy.manifest import atomic_path

ENCODER = "libx264"
ENCODER_OPTIONS = {"preset": "veryfast", "crf": "20"}
SMALLEST_SIDE = 16  # of a frame that players take
BT709, LIMITED_RANGE = 1, 1  # ISO/IEC 23091-2: what players assume of a video that is not marked otherwise


class VideoWriter:
    """A video under a temporary name; leaving the context completes and renames it, leaving with an error removes it."""

    def __init__(self, path: Path, frame_wh: tuple[int, int], time_base: Fraction) -> None:
        """Opens the file.

        Args:
            path: .mp4, .mkv or .mov.
            frame_wh: width and height of the frames; padded to even numbers, as H.264 wants.
            time_base: seconds of one unit of the frames' times.

        Raises:
            OutputError: the place cannot be written, or the frames are too large for H.264.
        """
        self.path, self.frame_wh, self.time_base = path, frame_wh, time_base
        self._last_pts: int | None = None
        self._reformatter = VideoReformatter()
        self._file = atomic_path(path)
        self._temporary = self._file.__enter__()
        try:
            self._container = av.open(str(self._temporary), "w")
            self._stream = self._container.add_stream(ENCODER, options=dict(ENCODER_OPTIONS))
            self._stream.width, self._stream.height = (max(SMALLEST_SIDE, side + side % 2) for side in frame_wh)
            self._stream.pix_fmt = "yuv420p"
            context = self._stream.codec_context
            context.time_base = time_base
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
            context.open()
        except (FFmpegError, ValueError, OverflowError) as error:
            self._drop(error)
            raise OutputError(f"{path}: frames of {frame_wh[0]} x {frame_wh[1]} cannot be encoded as H.264 ({error})") from error

    def write(self, image_bgr: NDArray[np.uint8], pts: int) -> None:
        """Adds a frame; one of another size than the first is scaled to it.

        Args:
            image_bgr: (H, W, 3) uint8 BGR.
            pts: its time in units of `time_base`; moved behind the last frame's where it is not later.

        Raises:
            OutputError: writing failed, for example on a full disk.
        """
        if self._last_pts is not None and pts <= self._last_pts:
            pts = self._last_pts + 1
        self._last_pts = pts
        frame = VideoFrame.from_numpy_buffer(np.ascontiguousarray(self._fit(image_bgr)), format="bgr24")
        frame = self._reformatter.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1)
        frame.pts, frame.time_base = pts, self.time_base
        self._encode(frame)

    def _fit(self, image_bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
        width, height = self.frame_wh
        if image_bgr.shape[:2] != (height, width):
            image_bgr = np.asarray(cv2.resize(image_bgr, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        right, bottom = self._stream.width - width, self._stream.height - height
        if right or bottom:
            image_bgr = np.asarray(cv2.copyMakeBorder(image_bgr, 0, bottom, 0, right, cv2.BORDER_REPLICATE), np.uint8)
        return image_bgr

    def _encode(self, frame: VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except FFmpegError as error:
            raise OutputError(
                f"{self.path}: writing failed ({error.strerror or error}); expected a place with room that can be written"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._drop(error)
            return
        try:
            self._encode(None)
            self._container.close()
        except (FFmpegError, OutputError) as failure:
            self._drop(failure)
            raise OutputError(f"{self.path}: writing failed ({failure}); expected a place with room that can be written") from failure
        self._file.__exit__(None, None, None)

    def _drop(self, error: BaseException) -> None:
        """Closes what is open and removes the temporary file."""
        with suppress(FFmpegError):  # writing the trailer of a file that is removed anyway
            if hasattr(self, "_container"):
                self._container.close()
        with suppress(OSError, OutputError):  # the caller tells the first error
            self._file.__exit__(type(error), error, error.__traceback__)
