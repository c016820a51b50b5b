"""Which file each input's output goes to: no input is overwritten, no two outputs have one name.

Writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from tood_deploy.data.image_header import IMAGE_SUFFIXES
from tood_deploy.errors import OutputError
from tood_deploy.files import MAX_NAME_BYTES, absent_or, absolute_path, check_overwrites
from tood_deploy.inference.address import STDIN
from tood_deploy.inference.frame import Input, Part
from tood_deploy.inference.video import VIDEO_SUFFIXES

IMAGE_OUTPUTS = frozenset(
    ".bmp .dib .jpe .jpeg .jpg .png .ppm .tif .tiff .webp".split()
)  # OpenCV writes them in full colour
VIDEO_OUTPUTS = frozenset((".mkv", ".mov", ".mp4"))
DEFAULT_IMAGE, DEFAULT_VIDEO, PAGE_SUFFIX = ".png", ".mp4", ".jpg"


def plan_outputs(inputs: Sequence[Input], output: Path) -> dict[Part, Path]:
    """Return the annotated image's or video's file for each input, or each page of it.

    Args:
        inputs: what will be read.
        output: a folder, there or not yet; for a single input also a file.

    Raises:
        OutputError: one file for several inputs, a kind of file that cannot be written, or an input
            would be overwritten.
    """
    suffix = output.suffix.lower()
    if suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not absent_or(output.is_dir):
        planned = {inputs[0].parts[0]: _single_file(inputs, output)}
    else:
        planned = plan_names(inputs, output, _output_suffix)
    check_overwrites(
        {"an input": [file.name for file in inputs]},
        {"--output": [str(path) for path in planned.values()]},
    )
    return planned


def plan_names(
    inputs: Sequence[Input], folder: Path, suffix_of: Callable[[Input], str]
) -> dict[Part, Path]:
    """Return a file for each input: its own file name, with its folders where two share one.

    A page has its number behind the name. Names that differ in case alone, which some file systems
    take for one, get numbers; a name that has become too long is cut.

    Args:
        inputs: what will be read.
        folder: that the files will lie in.
        suffix_of: gives the ending of the file for an input.
    """
    shared = _shared_folder(inputs)
    parts = {file.name: _relative_parts(file.name, shared) for file in inputs}
    for name_of in (_bare_name, _nested_name, _numbered_suffix_name):
        names = {file.name: name_of(parts[file.name], suffix_of(file)) for file in inputs}
        planned = _with_pages(inputs, names)
        if _are_different(planned.values()):
            return {part: folder / shorten(path) for part, path in planned.items()}
    nested = {file.name: _nested_name(parts[file.name], suffix_of(file)) for file in inputs}
    different = _numbered(_with_pages(inputs, nested))
    return {part: folder / shorten(path) for part, path in different.items()}


def shorten(path: PurePath, room: int = 0) -> PurePath:
    """Return the path with a name that file systems take: its end is cut, and made different.

    Args:
        path: whose name may have more than 255 bytes.
        room: bytes that something to be added needs.
    """
    limit = MAX_NAME_BYTES - room
    if len(os.fsencode(path.name)) <= limit:
        return path
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    ending = f"~{digest}{path.suffix}"
    stem = path.stem
    while stem and len(os.fsencode(stem + ending)) > limit:
        stem = stem[:-1]
    return path.with_name(stem + ending)


def _with_pages(inputs: Sequence[Input], names: Mapping[str, PurePath]) -> dict[Part, PurePath]:
    planned: dict[Part, PurePath] = {}
    for file in inputs:
        path, width = names[file.name], len(str(file.pages))
        for name, page in file.parts:
            number = "" if page is None else f"-{page:0{width}d}"
            planned[name, page] = path.with_name(f"{path.stem}{number}{path.suffix}")
    return planned


def _folded(path: PurePath) -> str:
    """Return the name by which a file system without case, or with composed letters, knows it."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _are_different(paths: Iterable[PurePath]) -> bool:
    return max(Counter(map(_folded, paths)).values(), default=1) == 1


def _numbered(planned: Mapping[Part, PurePath]) -> dict[Part, PurePath]:
    """Return the same with numbers behind all names but the first of those that are alike."""
    taken: set[str] = set()
    different: dict[Part, PurePath] = {}
    for part, path in planned.items():
        number, free = 1, path
        while _folded(free) in taken:
            number += 1
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        taken.add(_folded(free))
        different[part] = free
    return different


def _bare_name(parts: tuple[str, ...], suffix: str) -> PurePath:
    return PurePath(parts[-1]).with_suffix(suffix)


def _nested_name(parts: tuple[str, ...], suffix: str) -> PurePath:
    return PurePath(*parts).with_suffix(suffix)


def _numbered_suffix_name(parts: tuple[str, ...], suffix: str) -> PurePath:
    """Keep the old suffix before the new one: a.avi and a.mov become a.avi.mp4 and a.mov.mp4."""
    return PurePath(*parts[:-1], parts[-1] + suffix)


def _shared_folder(inputs: Sequence[Input]) -> str:
    """Return the folder that all files share."""
    folders = [absolute_path(file.name).parent for file in inputs if "://" not in file.name]
    return os.path.commonpath(folders) if folders else os.sep


def _relative_parts(name: str, shared: str) -> tuple[str, ...]:
    """Return the path below the folder that all inputs share; for an address, a name made of it."""
    if name == STDIN:
        return ("stdin",)
    if "://" in name:
        address = urlsplit(name)
        return (
            re.sub(
                r"\W+", "_", f"{address.hostname}{PurePath(address.path).with_suffix('')}"
            ).strip("_"),
        )
    return absolute_path(name).relative_to(shared).parts


def _output_suffix(file: Input) -> str:
    suffix = PurePath(file.name).suffix
    if file.kind != "images":
        return suffix if suffix.lower() in VIDEO_OUTPUTS else DEFAULT_VIDEO
    if file.pages > 1:
        return PAGE_SUFFIX
    return suffix if suffix.lower() in IMAGE_OUTPUTS else DEFAULT_IMAGE


def _single_file(inputs: Sequence[Input], output: Path) -> Path:
    if len(inputs) > 1:
        raise OutputError(f"{output}: one file for {len(inputs)} inputs; expected a folder")
    if inputs[0].pages > 1:
        raise OutputError(
            f"{output}: one file for {inputs[0].pages} pages; expected a folder, or --first-page"
        )
    allowed = IMAGE_OUTPUTS if inputs[0].kind == "images" else VIDEO_OUTPUTS
    if output.suffix.lower() not in allowed:
        raise OutputError(
            f"{output}: cannot hold this input; expected a folder, or a file ending in "
            f"{', '.join(sorted(allowed))}"
        )
    return output
