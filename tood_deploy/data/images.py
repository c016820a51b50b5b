"""Folders of images: which of their files are images, and whether they can be read.

Paths in; 8-bit BGR images out, upright. Knows no annotations, no videos and no models.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data import MIN_CALIBRATION_IMAGES
from tood_deploy.data.image_file import as_stored, decode_image
from tood_deploy.data.image_header import (
    IMAGE_SUFFIXES,
    KNOWN_KINDS,
    MAX_PIXELS,
    ImageHeader,
    check_header,
    read_header,
)
from tood_deploy.errors import InputError, InputWarning
from tood_deploy.files import absent_or

CHECK_SECONDS = 1.0  # of looking at images before a long run
NAMED_IMAGES = 3  # at most so many unreadable ones are named in one message

_paged_folders: set[Path] = set()  # that were told to hold images with several pages


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read one image, (H, W, 3) uint8 BGR, upright.

    Raises:
        InputError: it cannot be read.
    """
    data = read_file(path)
    _tell_pages(path, check_header(data, str(path), MAX_PIXELS))
    return decode_image(data, str(path))


def _tell_pages(path: Path, header: ImageHeader) -> None:
    """Warn of an image with several pages or frames, once for each folder."""
    if len(header.positions) > 1 and path.parent not in _paged_folders:
        _paged_folders.add(path.parent)
        warnings.warn(
            f"{path}: has {len(header.positions)} pages or frames, of which the first is taken, as "
            "of all such images in its folder",
            InputWarning,
            stacklevel=3,
        )


def read_image_of_size(path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Read one image as stored, or turned upright by EXIF, whichever has the annotated size.

    Some annotation tools draw boxes on the image as stored, others on the upright one; the
    annotated size tells which.

    Args:
        path: of the file.
        size_hw: rows and columns that the annotations give.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        InputError: it cannot be read, or has that size in neither way.
    """
    data, name = read_file(path), str(path)
    header = check_header(data, name, MAX_PIXELS)
    _tell_pages(path, header)
    upright = decode_image(data, name)
    stored = as_stored(upright, header.orientation)
    for image in (stored, upright):
        if image.shape[:2] == size_hw:
            return image
    raise InputError(
        f"{name}: is {stored.shape[1]} x {stored.shape[0]} pixels, "
        f"the annotations say {size_hw[1]} x {size_hw[0]}; "
        "correct their width and height, or leave these out"
    )


def read_images(folder: Path, limit: int) -> list[NDArray[np.uint8]]:
    """Read the first images of a folder in order of their names, (H, W, 3) uint8 BGR.

    Raises:
        InputError: no such folder, no image in it, or one that cannot be read.
    """
    return [read_image(path) for path in image_paths(folder, limit)]


def read_image_size(path: Path) -> tuple[int, int]:
    """Read an image's rows and columns from its header, turned as its EXIF orientation says.

    Raises:
        InputError: not an image.
    """
    header = header_of(path)
    if header is not None and header.size_hw is not None:
        return header.size_hw
    try:
        data = read_file(path)
        return decode_image(data, str(path)).shape[:2]
    except InputError as error:
        raise InputError(
            f"{path}: its size cannot be read; expected an image: remove or replace it"
        ) from error


def header_of(path: Path) -> ImageHeader | None:
    """Read what kind of image a file is, by its content; None where it is none or unreadable."""
    try:
        with path.open("rb") as file:
            return read_header(file, path.name)
    except (OSError, ValueError):  # reading it whole says why
        return None


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); expected an image") from error


def image_paths(folder: Path, limit: int | None = None) -> list[Path]:
    """List the first images of a folder in order of their names; all where no limit is given.

    A file is one by the ending of its name, else by its content.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not absent_or(folder.is_dir):
        raise InputError(f"{folder}: no such folder; expected a folder of images")
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    paths = [path for path in files if is_image(path)]
    if not paths:
        raise InputError(f"{folder}: no images in it; expected {KNOWN_KINDS}")
    return paths[:limit]


def is_image(path: Path) -> bool:
    """Return whether a file is an image by the ending of its name, else by its content."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    return path.is_file() and header_of(path) is not None


def choose_images(folder: Path, limit: int) -> list[Path]:
    """List at most so many images of a folder, evenly spread over it.

    Raises:
        InputError: fewer than two.
    """
    paths = image_paths(folder)
    count = min(len(paths), limit)
    if count < 2:
        raise InputError(
            f"{folder}: {count} image to calibrate on; expected {MIN_CALIBRATION_IMAGES} or more, "
            "like those to come"
        )
    return [paths[i] for i in np.linspace(0, len(paths) - 1, count).round().astype(int)]


def find_image(folder: Path, file_name: str) -> Path | None:
    """Return the file that annotations name, or None where it is not there.

    Annotations written on Windows separate folders by backslashes; elsewhere a file's name may hold
    one, so the name as it stands goes first.
    """
    for name in dict.fromkeys((file_name, file_name.replace("\\", "/"))):
        if (folder / name).is_file():
            return folder / name
    return None


def missing_image_cure(folder: Path, file_name: str) -> str:
    """Return what to do about an image that `find_image` does not find, for an error."""
    parts = Path(file_name.replace("\\", "/")).parts
    for start in range(1, len(parts)):
        if folder.joinpath(*parts[start:]).is_file():
            leading = file_name[: len("/".join(parts[:start])) + 1]
            there = Path(*parts[start:])
            return f"{there} is there: take {leading} out of the annotations' file names"
    return "give the folder that the annotations' file names start from"


@dataclass(frozen=True, eq=False)
class ImagesToCheck:
    """Images that one option has named.

    Attributes:
        option: as it is written on the command line.
        paths: all that will be read, at least one.
        decode: reads one whole, as it will be read; raises InputError where it cannot.
    """

    option: str
    paths: Sequence[Path]
    decode: Callable[[Path], object] | None = read_image


def check_images(sets: Sequence[ImagesToCheck], seconds: float = CHECK_SECONDS) -> None:
    """Look at headers first and then at whole images, spread evenly over each set.

    Args:
        sets: whose `decode` is None has its headers looked at alone.
        seconds: for all sets together; of every set at least one image is decoded, however long it
            takes.

    Raises:
        InputError: some cannot be read; the message names the first of them.
    """
    for images in sets:
        started = time.perf_counter()
        share = seconds / len(sets)
        unread = list(_without_header(images.paths, started + share / 2))
        if not unread and images.decode is not None:
            unread = list(_undecoded(images, started + share))
        if unread:
            raise InputError(_unread_message(images, unread))


def spread_evenly(count: int) -> list[int]:
    """Return the numbers below `count`, in an order whose every beginning is spread evenly."""
    return sorted(range(count), key=lambda number: f"{number:032b}"[::-1])


def _without_header(paths: Sequence[Path], deadline: float) -> Iterator[Path]:
    """Yield those that have no image's header, while there is time."""
    for number in spread_evenly(len(paths)):
        header = header_of(paths[number])
        try:
            if header is None or header.size_hw is None:
                read_image_size(paths[number])
        except InputError:
            yield paths[number]
        if time.perf_counter() > deadline:
            return


def _undecoded(images: ImagesToCheck, deadline: float) -> Iterator[Path]:
    """Yield those that cannot be decoded, while there is time."""
    assert images.decode is not None
    for number in spread_evenly(len(images.paths)):
        try:
            images.decode(images.paths[number])
        except InputError:
            yield images.paths[number]
        if time.perf_counter() > deadline:
            return


def _named(paths: Sequence[Path]) -> str:
    """Return the first of them, and how many more there are."""
    named = ", ".join(map(str, sorted(paths)[:NAMED_IMAGES]))
    return named + (f" and {len(paths) - NAMED_IMAGES} more" if len(paths) > NAMED_IMAGES else "")


def left_out_note(folder: Path) -> str:
    """Return a sentence on the files of a folder that are no images; "" where there are none."""
    others = [path for path in folder.iterdir() if path.is_file() and not is_image(path)]
    shown = [path for path in others if not path.name.startswith(".")]
    return f"{folder}: {len(shown)} files are no images: {_named(shown)}" if shown else ""


def _unread_message(images: ImagesToCheck, unread: Sequence[Path]) -> str:
    return (
        f"{images.option}: {len(unread)} of {len(images.paths)} images cannot be read: "
        f"{_named(unread)}; "
        "expected whole image files: remove or replace them"
    )
