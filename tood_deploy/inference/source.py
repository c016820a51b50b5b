"""What to read: turns what a user names into a source of frames.

Comes in: images, folders, globs, lists, videos, cameras, addresses. Knows no detector.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from os import PathLike
from pathlib import Path

from av.container import InputContainer
from av.video.frame import VideoFrame

from tood_deploy.data.image_file import ReadOptions
from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.errors import InputError
from tood_deploy.files import absent_or
from tood_deploy.inference.file_list import Spec, list_files
from tood_deploy.inference.frame import Frame, Input, Kind, Source
from tood_deploy.inference.image_source import (
    AnimationSource,
    ImageSource,
    fetch_image,
    image_source,
)
from tood_deploy.inference.video import (
    Decoder,
    VideoSource,
    find_video_stream,
    open_container,
    upright_bgr,
)

MICROSECOND = Fraction(1, 1_000_000)


class LiveSource(Source):
    """A camera or stream. Its frames are timed by when they came.

    The age of a result is that of its frame.
    """

    kind = "live"

    def __init__(
        self, address: str, max_pixels: int = MAX_PIXELS, container: InputContainer | None = None
    ) -> None:
        """Connect.

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
        stream.codec_context.thread_type = (
            "SLICE"  # threads over frames would hold some of them back
        )
        self._decoder = Decoder(self._container, stream)
        self._arrived = threading.Condition()
        self._latest: tuple[VideoFrame, int, float] | None = None
        self._ended = False
        self._closing = False

    def __iter__(self) -> Iterator[Frame]:
        """Yield the latest frame whenever asked, until the connection ends or `close`.

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
            raise InputError(
                f"{self.address}: not one frame came ({self._decoder.end}); check the camera or "
                "the stream"
            )
        broken = f", {self._decoder.broken} more were broken" if self._decoder.broken else ""
        self.skip(
            f"{self.address}: the connection ended after {next_index} frames "
            f"({self._decoder.end}){broken}"
        )

    def close(self) -> None:
        """End the stream: the reading thread closes the connection."""
        with self._arrived:
            self._closing = self._ended = True
            self._arrived.notify_all()

    def _take(self) -> tuple[VideoFrame, int, float] | None:
        """Wait for a frame newer than the last one taken; None at the end."""
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


STREAM_SCHEMES = ("rtsp://", "rtsps://", "http://", "https://")


def open_source(
    specs: Spec | Sequence[Spec],
    max_pixels: int = MAX_PIXELS,
    *,
    first_page: bool = False,
    bit_depth: int | None = None,
) -> Source:
    """Open what a user named.

    Args:
        specs: one or several of: an image; a folder (its own files, not its subfolders'); a glob; a
            text file with one path a line (relative to that file's folder); a video; a camera ("0"
            or /dev/video0); an rtsp:// or http(s):// address.
        max_pixels: refuse images and frames with more.
        first_page: of image files with several pages or frames, take the first alone.
        bit_depth: how many bits of 16-bit images hold data, where their files do not say.

    Raises:
        InputError: nothing there, nothing that can be read, or a camera or stream that is not
            alone.
        ToodError: a value out of range.
    """
    options = ReadOptions(max_pixels, bit_depth, first_page)
    listed = [specs] if isinstance(specs, str | PathLike) else list(specs)
    live = [address for address in map(_live_address, listed) if address]
    if live and len(listed) > 1:
        raise InputError(
            f"{live[0]}: a camera or stream beside other sources; expected it alone, as it need "
            "not end"
        )
    if live:
        return _open_address(live[0], options)
    files = list_files(listed, first_page)
    if not files.inputs:
        raise InputError(
            "no source given; expected images, a folder, a video, a camera or an address"
        )
    single = len(files.inputs) == 1
    source = _open_file(files.inputs[0], options) if single else FileSources(files.inputs, options)
    source.lists = files.lists
    source.notes[:0] = files.notes
    return source


class FileSources(Source):
    """Several images and videos, one after another.

    One that cannot be read is told, and the rest goes on.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
    ) -> None:
        super().__init__(tuple(file.name for file in inputs), sum(file.pages for file in inputs))
        self._inputs, self.options = tuple(inputs), options
        self.kind: Kind = "images"
        if any(file.kind == "video" for file in inputs):
            self.kind, self.length = "video", None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What each of the names stands for."""
        return self._inputs

    def __iter__(self) -> Iterator[Frame]:
        """Raise InputError where not one of them can be read."""
        given = 0
        for file in self._inputs:
            try:
                for frame in self._frames_of(file):
                    given += 1
                    yield frame
            except InputError as error:
                self.skip(str(error))
            except Exception as error:  # whatever a library meets in one file, the rest goes on
                self.skip(
                    f"{file.name}: cannot be read ({type(error).__name__}: {error}); expected an "
                    "image or video: copy or convert it again"
                )
        if not given:
            raise InputError(
                f"none of the {len(self._inputs)} images and videos can be read; the first: "
                f"{self.problems[0]}"
            )

    def _frames_of(self, file: Input) -> Iterator[Frame]:
        source = _open_file(file, self.options)
        source.fit, source.by_window = self.fit, self.by_window
        try:
            yield from source
        finally:
            self.skipped += source.skipped
            self.problems += source.problems
            self.notes += source.notes


def _live_address(spec: Spec) -> str:
    """Return the device file or address of a camera or stream; "" for anything else."""
    text = str(spec)
    if text.isdecimal() and not absent_or(Path(text).exists):
        return f"/dev/video{text}"
    return text if text.startswith((*STREAM_SCHEMES, "/dev/video")) else ""


def _open_address(address: str, options: ReadOptions) -> Source:
    """Return a live source.

    But a recording that is only served over HTTP, with a known end, is read in full, and an image
    is an image.
    """
    if address.startswith("http") and (data := fetch_image(address)) is not None:
        return image_source(address, options, data)
    container = open_container(address)
    if address.startswith("http") and container.duration:
        container.close()
        return VideoSource(address, options.max_pixels)
    return LiveSource(address, options.max_pixels, container=container)


def _open_file(file: Input, options: ReadOptions) -> Source:
    if file.animated:
        return AnimationSource(file.name, options)
    if file.kind == "images":
        return ImageSource(file.name, options, file.pages)
    return VideoSource(file.name, options.max_pixels)
