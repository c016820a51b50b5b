"""Cameras and network streams: a thread reads all the time, and whoever asks gets the latest frame. PyAV decodes.

Frames that nobody asked for in time are dropped and counted, so that a slow detector never falls behind the world.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction

from av.container import InputContainer
from av.video.frame import VideoFrame

from tood_deploy.errors import InputError
from tood_deploy.inference.frame import Frame, Source
from tood_deploy.inference.images import MAX_PIXELS
from tood_deploy.inference.video import Decoder, find_video_stream, open_container, upright_bgr

MICROSECOND = Fraction(1, 1_000_000)


class LiveSource(Source):
    """A camera or stream. Its frames are timed by when they came; the age of a result is that of its frame."""

    kind = "live"

    def __init__(self, address: str, max_pixels: int = MAX_PIXELS, container: InputContainer | None = None) -> None:
        """Connects.

        Args:
            address: /dev/videoN, rtsp:// or http(s)://.
            max_pixels: refuse larger frames.
            container: the connection, where it is open already.

        Raises:
            InputError: nothing there, or it gives no video.
        """
        super().__init__((address,), None)
        self.address = address
        self._container = container or open_container(address)
        stream = find_video_stream(self._container, address, max_pixels)
        stream.codec_context.thread_type = "SLICE"  # threads over frames would hold some of them back
        self._decoder = Decoder(self._container, stream)
        self._arrived = threading.Condition()
        self._latest: tuple[VideoFrame, int, float] | None = None
        self._ended = False
        self._closing = False

    def __iter__(self) -> Iterator[Frame]:
        """The latest frame whenever asked, until the connection ends or `close`.

        Raises:
            InputError: the connection ended before the first frame.
        """
        threading.Thread(target=self._read, name="live", daemon=True).start()
        first_s, next_index = None, 0
        while (taken := self._take()) is not None:
            frame, index, arrived_s = taken
            first_s = arrived_s if first_s is None else first_s
            self.dropped += index - next_index
            next_index = index + 1
            pts = round((arrived_s - first_s) / MICROSECOND)
            yield Frame(upright_bgr(frame), self.address, index, pts, MICROSECOND, arrived_s)
        if self._closing:
            return
        if first_s is None:
            raise InputError(f"{self.address}: not one frame came ({self._decoder.end}); check the camera or the stream")
        broken = f", {self._decoder.broken} more were broken" if self._decoder.broken else ""
        self.skip(f"{self.address}: the connection ended after {next_index} frames ({self._decoder.end}){broken}")

    def close(self) -> None:
        """Ends the stream: the reading thread closes the connection."""
        with self._arrived:
            self._closing = self._ended = True
            self._arrived.notify_all()

    def _take(self) -> tuple[VideoFrame, int, float] | None:
        """Waits for a frame newer than the last one taken; None at the end."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._latest is not None or self._ended)
            taken, self._latest = self._latest, None
            return None if self._closing else taken

    def _read(self) -> None:
        try:
            for index, (frame, _) in enumerate(self._decoder.frames()):
                with self._arrived:
                    self._latest = frame, index, time.perf_counter()
                    self._arrived.notify_all()
                if self._closing:
                    break
        finally:
            self._container.close()
            with self._arrived:
                self._ended = True
                self._arrived.notify_all()
