"""What to read: turns what a user names (pictures, folders, globs, lists, videos, cameras, addresses) into a source of frames."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import imagesize

from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.destinations import absolute_path
from tood_deploy.inference.frame import Frame, Kind, Source
from tood_deploy.inference.images import MAX_PIXELS, PICTURE_SUFFIXES, ImageSource
from tood_deploy.inference.live import LiveSource
from tood_deploy.inference.video import VIDEO_SUFFIXES, VideoSource, open_container

LIST_SUFFIX = ".txt"
STREAM_SCHEMES = ("rtsp://", "rtsps://", "http://", "https://")

Spec = str | PathLike[str]


def open_source(specs: Spec | Sequence[Spec], max_pixels: int = MAX_PIXELS) -> Source:
    """Opens what a user named.

    Args:
        specs: one or several of: a picture; a folder (its own files, not its subfolders'); a glob; a text file with one path a
            line (relative to that file's folder); a video; a camera ("0" or /dev/video0); an rtsp:// or http(s):// address.
        max_pixels: refuse pictures and frames with more.

    Raises:
        InputError: nothing there, nothing that can be read, or a camera or stream that is not alone.
    """
    if max_pixels < 1:
        raise ToodError(f"max_pixels is {max_pixels}; expected a positive number")
    listed = [specs] if isinstance(specs, str | PathLike) else list(specs)
    live = [address for address in map(_live_address, listed) if address]
    if live and len(listed) > 1:
        raise InputError(f"{live[0]}: a camera or stream beside other sources; expected it alone, as it need not end")
    if live:
        return _open_address(live[0], max_pixels)
    paths = list({absolute_path(path): path for spec in listed for path in _expand(spec)}.values())  # each file once
    if not paths:
        raise InputError("no source given; expected pictures, a folder, a video, a camera or an address")
    return _open_file(paths[0], max_pixels) if len(paths) == 1 else FileSources(paths, max_pixels)


class FileSources(Source):
    """Several pictures and videos, one after another; one that cannot be read is told, and the rest goes on."""

    def __init__(self, paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(tuple(map(str, paths)), len(paths))
        self.paths, self.max_pixels = paths, max_pixels
        self.kind: Kind = "images"
        if any(path.suffix.lower() in VIDEO_SUFFIXES for path in paths):
            self.kind, self.length = "video", None

    def __iter__(self) -> Iterator[Frame]:
        """Raises InputError where not one of them can be read."""
        given = 0
        for path in self.paths:
            try:
                for frame in self._frames_of(path):
                    given += 1
                    yield frame
            except InputError as error:
                self.skip(str(error))
        if not given:
            raise InputError(f"none of the {len(self.paths)} pictures and videos can be read; the first: {self.problems[0]}")

    def _frames_of(self, path: Path) -> Iterator[Frame]:
        source = _open_file(path, self.max_pixels)
        source.fit = self.fit
        yield from source
        self.skipped += source.skipped
        self.problems += source.problems


def _live_address(spec: Spec) -> str:
    """The device file or address of a camera or stream; "" for anything else."""
    text = str(spec)
    if text.isdecimal() and not Path(text).exists():
        return f"/dev/video{text}"
    return text if text.startswith((*STREAM_SCHEMES, "/dev/video")) else ""


def _open_address(address: str, max_pixels: int) -> Source:
    """A live source; but a recording that is only served over HTTP, with a known end, is read in full."""
    container = open_container(address)
    if address.startswith("http") and container.duration:
        container.close()
        return VideoSource(address, max_pixels)
    return LiveSource(address, max_pixels, container=container)


def _open_file(path: Path, max_pixels: int) -> Source:
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES or (suffix not in VIDEO_SUFFIXES and _looks_like_picture(path)):
        return ImageSource(path, max_pixels)
    return VideoSource(str(path), max_pixels)


def _looks_like_picture(path: Path) -> bool:
    return path.is_file() and min(imagesize.get(path)) > 0


def _expand(spec: Spec) -> list[Path]:
    """The files that one argument stands for."""
    path = Path(spec)
    try:
        if path.is_dir():
            return _files_of_folder(path)
        if path.is_file():
            return _files_of_list(path) if path.suffix.lower() == LIST_SUFFIX else [path]
    except OSError as error:
        raise InputError(f"{spec}: cannot be read ({error.strerror}); expected a picture, folder, glob, list or video") from error
    if glob.has_magic(str(spec)):
        names = sorted(glob.glob(str(spec), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise InputError(f"{spec}: no file has such a name; expected a glob that finds pictures or videos")
        return found
    raise InputError(f"{spec}: no such file or folder; expected a picture, folder, glob, list, video, camera number or address")


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    wanted = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES]
    if not wanted:
        raise InputError(
            f"{folder}: holds {len(files)} files, but no picture or video; "
            f"subfolders are searched only by a glob, such as '{folder}/**/*.jpg'"
        )
    return wanted


def _files_of_list(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as a list ({error}); expected text with one path a line") from error
    files = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not files:
        raise InputError(f"{path}: names no file; expected text with one path a line")
    return files
