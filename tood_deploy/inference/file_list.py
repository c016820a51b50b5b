"""Which files a user means by folders, globs, lists and names, and what each of them holds.

What a file holds decides, not its name. Knows no decoding and no detector.
"""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import SimpleNamespace

import av
from av.stream import Disposition

from tood_deploy.data.image_header import IMAGE_SUFFIXES
from tood_deploy.data.images import header_of
from tood_deploy.errors import InputError
from tood_deploy.files import absent_or, absolute_path
from tood_deploy.inference.address import STDIN
from tood_deploy.inference.frame import Input
from tood_deploy.inference.video import VIDEO_SUFFIXES

Spec = str | PathLike[str]
LIST_SUFFIX = ".txt"
NAMED_FILES = 3  # of those that are not run, in one note
JPEG_START = b"\xff\xd8\xff"
ENCODINGS = {  # of a list, by the byte-order mark that it starts with
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# FFmpeg's readers of videos; the others take texts, sounds, still images and playlists, too.
VIDEO_FORMATS = frozenset(
    (
        "asf av1 avi cavsvideo dv flv gxf h261 h263 h264 hevc ivf m4v matroska,webm mjpeg "
        "mov,mp4,m4a,3gp,3g2,mj2 mpeg mpegts mpegvideo mxf nsv nut obu ogg rm vc1 vvc wtv "
        "yuv4mpegpipe"
    ).split()
)


@dataclass
class FileList:
    """The files to run.

    Attributes:
        inputs: each file once, in order.
        lists: text files that names were read from.
        notes: what is not run, and why.
    """

    inputs: tuple[Input, ...] = ()
    lists: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def list_files(specs: Sequence[Spec], first_page: bool = False) -> FileList:
    """List the files that a user named.

    Args:
        specs: images, videos, folders, globs and lists.
        first_page: whether the first page or frame of an image file is all that is taken.

    Raises:
        InputError: nothing there, or nothing that can be run.
    """
    files = FileList()
    named = [path for spec in specs for path in _expand(spec, files)]
    once = {os.fspath(absolute_path(path)): path for path in reversed(named)}
    if repeated := len(named) - len(once):
        files.notes.append(
            f"{repeated} of {len(named)} names stand for files that are named before; each is run "
            "once"
        )
    kept = {path: None for path in named if once[os.fspath(absolute_path(path))] is path}
    files.inputs = tuple(input_of(path, first_page) for path in kept)
    return files


def input_of(path: Path, first_page: bool = False) -> Input:
    """Return what a file is by its content; where that does not tell, by the ending of its name.

    Args:
        path: of the file; whether it can be read is found out later.
        first_page: whether its first page or frame is all that is taken.
    """
    name, suffix = str(path), path.suffix.lower()
    if name == STDIN or absent_or(path.is_fifo):  # what is looked at would be missing later
        return Input(name, "video")
    if _starts_as_jpeg(path):
        return Input(name)
    header = header_of(path)
    if header is not None:
        moving = header.moving and not first_page
        pages = 1 if first_page or header.moving else len(header.positions)
        return Input(name, "video" if moving else "images", pages, moving)
    looks_like_image = suffix in IMAGE_SUFFIXES and not is_video(path)
    return Input(name, "images" if looks_like_image else "video")


def is_video(path: Path) -> bool:
    """Return whether a file holds a video, by its content alone."""
    try:
        with path.open("rb") as file:
            # Without its name, whose ending FFmpeg would believe.
            content = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            with av.open(content) as container:
                return container.format.name in VIDEO_FORMATS and any(
                    Disposition.attached_pic not in stream.disposition
                    for stream in container.streams.video
                )
    except Exception:  # FFmpeg's errors are of many types
        return False


def _starts_as_jpeg(path: Path) -> bool:
    """Tell a JPEG, most of what large folders hold, without reading its header."""
    try:
        with path.open("rb") as file:
            return file.read(len(JPEG_START)) == JPEG_START
    except (OSError, ValueError):
        return False


def _expand(spec: Spec, files: FileList) -> list[Path]:
    """Return the files that one argument stands for; lists and notes go into `files`."""
    path, text = Path(spec), str(spec)
    if text == STDIN:
        return [path]
    if absent_or(path.is_dir):
        return _files_of_folder(path, files)
    if absent_or(path.is_file):
        is_list = path.suffix.lower() == LIST_SUFFIX and header_of(path) is None
        return _files_of_list(path, files) if is_list else [path]
    if absent_or(path.exists):  # a device or a pipe: what opens videos says whether it takes it
        return [path]
    if glob.has_magic(text) and "\0" not in text:
        names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise InputError(
                f"{spec}: no file has such a name; expected a glob that finds images or videos"
            )
        return found
    raise InputError(
        f"{spec}: no such file or folder; expected an image, folder, glob, list, video, camera "
        "number or address"
    )


def _files_of_folder(folder: Path, files: FileList) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read ({error.strerror}); expected a folder of images and videos"
        ) from error
    left_out: dict[str, list[str]] = {"no image or video": [], "hidden": [], "a folder": []}
    chosen: list[Path] = []
    for path in entries:
        if path.name.startswith("."):
            left_out["hidden"].append(path.name)
        elif absent_or(path.is_dir):
            left_out["a folder"].append(path.name)
        elif _is_media(path):
            chosen.append(path)
        else:
            left_out["no image or video"].append(path.name)
    others = "; ".join(_kinds_left_out(left_out))
    if not chosen:
        raise InputError(
            f"{folder}: holds no image or video{': ' if others else ''}{others}; "
            f"subfolders are searched only by a glob, such as '{folder}/**/*.jpg'"
        )
    if others:
        files.notes.append(f"{folder}: not run: {others}")
    return chosen


def _is_media(path: Path) -> bool:
    if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return True
    return absent_or(path.is_file) and (header_of(path) is not None or is_video(path))


def _kinds_left_out(left_out: dict[str, list[str]]) -> Iterator[str]:
    """Yield how many files are left out for each reason, and the first of them."""
    for reason, names in left_out.items():
        if names:
            more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
            yield f"{len(names)} {reason} ({', '.join(names[:NAMED_FILES])}{more})"


def _files_of_list(path: Path, files: FileList) -> list[Path]:
    """Return the files that a list names, relative to its folder."""
    files.lists = (*files.lists, str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected text with one path a line"
        ) from error
    named = [name for line in _list_text(data, path).split("\n") if (name := _name(line, path))]
    if not named:
        raise InputError(f"{path}: names no file; expected text with one path a line")
    return [path.parent / name for name in named]


def _list_text(data: bytes, path: Path) -> str:
    """Return the text of a list; bytes that are no UTF-8 stand for themselves, as in any name."""
    for mark, encoding in ENCODINGS.items():
        if data.startswith(mark):
            errors = "surrogateescape" if encoding == "utf-8" else "strict"
            try:
                return data[len(mark) :].decode(encoding, errors)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: cannot be read as a list ({error}); expected text with one path a "
                    "line"
                ) from error
    return os.fsdecode(data)


def _name(line: str, path: Path) -> str:
    """Return the file that a line names: as it stands if there is such a file; "" for a comment."""
    line = line.removesuffix("\r")
    stripped = line.strip()
    if not stripped:
        return ""
    if line != stripped or stripped.startswith("#"):
        if absent_or((path.parent / line).is_file):
            return line
        return "" if stripped.startswith("#") else stripped
    return line
