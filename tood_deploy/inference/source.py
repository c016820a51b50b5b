"""What to read: turns what a user names into a source of frames.

Comes in: images, folders, globs, lists, videos, cameras, addresses. Knows no detector.
"""

from __future__ import annotations

import glob
import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from os import PathLike
from pathlib import Path

import imagesize
from av.container import InputContainer
from av.video.frame import VideoFrame

from tood_deploy.data.images import IMAGE_SUFFIXES, MAX_PIXELS, decode_to_fit
from tood_deploy.errors import InputError, ToodError
from tood_deploy.files import absolute_path
from tood_deploy.inference.frame import Frame, Kind, Source
from tood_deploy.inference.video import (
    VIDEO_SUFFIXES,
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


LIST_SUFFIX = ".txt"
STREAM_SCHEMES = ("rtsp://", "rtsps://", "http://", "https://")

Spec = str | PathLike[str]


def open_source(specs: Spec | Sequence[Spec], max_pixels: int = MAX_PIXELS) -> Source:
    """Open what a user named.

    Args:
        specs: one or several of: an image; a folder (its own files, not its subfolders'); a glob; a
            text file with one path a line (relative to that file's folder); a video; a camera ("0"
            or /dev/video0); an rtsp:// or http(s):// address.
        max_pixels: refuse images and frames with more.

    Raises:
        InputError: nothing there, nothing that can be read, or a camera or stream that is not
            alone.
    """
    if max_pixels < 1:
        raise ToodError(f"max_pixels is {max_pixels}; expected a positive number")
    listed = [specs] if isinstance(specs, str | PathLike) else list(specs)
    live = [address for address in map(_live_address, listed) if address]
    if live and len(listed) > 1:
        raise InputError(
            f"{live[0]}: a camera or stream beside other sources; expected it alone, as it need "
            "not end"
        )
    if live:
        return _open_address(live[0], max_pixels)
    paths = list(
        {absolute_path(path): path for spec in listed for path in _expand(spec)}.values()
    )  # each file once
    if not paths:
        raise InputError(
            "no source given; expected images, a folder, a video, a camera or an address"
        )
    return _open_file(paths[0], max_pixels) if len(paths) == 1 else FileSources(paths, max_pixels)


class FileSources(Source):
    """Several images and videos, one after another.

    One that cannot be read is told, and the rest goes on.
    """

    def __init__(self, paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(tuple(map(str, paths)), len(paths))
        self.paths, self.max_pixels = paths, max_pixels
        self.kind: Kind = "images"
        if any(path.suffix.lower() in VIDEO_SUFFIXES for path in paths):
            self.kind, self.length = "video", None

    def __iter__(self) -> Iterator[Frame]:
        """Raise InputError where not one of them can be read."""
        given = 0
        for path in self.paths:
            try:
                for frame in self._frames_of(path):
                    given += 1
                    yield frame
            except InputError as error:
                self.skip(str(error))
        if not given:
            raise InputError(
                f"none of the {len(self.paths)} images and videos can be read; the first: "
                f"{self.problems[0]}"
            )

    def _frames_of(self, path: Path) -> Iterator[Frame]:
        source = _open_file(path, self.max_pixels)
        source.fit = self.fit
        yield from source
        self.skipped += source.skipped
        self.problems += source.problems


def _live_address(spec: Spec) -> str:
    """Return the device file or address of a camera or stream; "" for anything else."""
    text = str(spec)
    if text.isdecimal() and not Path(text).exists():
        return f"/dev/video{text}"
    return text if text.startswith((*STREAM_SCHEMES, "/dev/video")) else ""


def _open_address(address: str, max_pixels: int) -> Source:
    """Return a live source.

    But a recording that is only served over HTTP, with a known end, is read in full.
    """
    container = open_container(address)
    if address.startswith("http") and container.duration:
        container.close()
        return VideoSource(address, max_pixels)
    return LiveSource(address, max_pixels, container=container)


def _open_file(path: Path, max_pixels: int) -> Source:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or (suffix not in VIDEO_SUFFIXES and _looks_like_image(path)):
        return ImageSource(path, max_pixels)
    return VideoSource(str(path), max_pixels)


def _looks_like_image(path: Path) -> bool:
    return path.is_file() and min(imagesize.get(path)) > 0


def _expand(spec: Spec) -> list[Path]:
    """Return the files that one argument stands for."""
    path = Path(spec)
    try:
        if path.is_dir():
            return _files_of_folder(path)
        if path.is_file():
            return _files_of_list(path) if path.suffix.lower() == LIST_SUFFIX else [path]
    except OSError as error:
        raise InputError(
            f"{spec}: cannot be read ({error.strerror}); expected an image, folder, glob, list or "
            "video"
        ) from error
    if glob.has_magic(str(spec)):
        names = sorted(glob.glob(str(spec), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise InputError(
                f"{spec}: no file has such a name; expected a glob that finds images or videos"
            )
        return files
    raise InputError(
        f"{spec}: no such file or folder; expected an image, folder, glob, list, video, camera "
        "number or address"
    )


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    readable = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if not readable:
        raise InputError(
            f"{folder}: holds {len(files)} files, but no image or video; "
            f"subfolders are searched only by a glob, such as '{folder}/**/*.jpg'"
        )
    return readable


def _files_of_list(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: cannot be read as a list ({error}); expected text with one path a line"
        ) from error
    files = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not files:
        raise InputError(f"{path}: names no file; expected text with one path a line")
    return files


class ImageSource(Source):
    """One image file."""

    kind = "images"

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__((str(path),), 1)
        self.path, self.max_pixels = path, max_pixels

    def __iter__(self) -> Iterator[Frame]:
        """Raise InputError where the image cannot be read."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror}); expected an image"
            ) from error
        image, original_hw = decode_to_fit(data, str(self.path), self.fit, self.max_pixels)
        yield Frame(image, str(self.path), original_hw=original_hw)
