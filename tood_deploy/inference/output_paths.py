"""Which file each input's output goes to: no input is overwritten, no two outputs have one name.

Writes nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from tood_deploy.data.images import IMAGE_SUFFIXES
from tood_deploy.errors import OutputError
from tood_deploy.files import absolute_path
from tood_deploy.inference.video import VIDEO_SUFFIXES

IMAGE_OUTPUTS = frozenset(
    ".bmp .dib .jpe .jpeg .jpg .png .ppm .tif .tiff .webp".split()
)  # OpenCV writes them in full colour
VIDEO_OUTPUTS = frozenset((".mkv", ".mov", ".mp4"))
DEFAULT_IMAGE, DEFAULT_VIDEO = ".png", ".mp4"


def check_writable(path: Path) -> None:
    """Raise OutputError unless files can be made in this folder.

    Or in the one that it would be made in. Leaves nothing behind.
    """
    existing = next(
        folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder)
    )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error


def plan_outputs(names: Sequence[str], output: Path) -> dict[str, Path]:
    """Return the annotated image's or video's file for each input.

    Args:
        names: paths and addresses of the inputs.
        output: a folder, there or not yet; for a single input also a file.

    Raises:
        OutputError: one file for several inputs, a kind of file that cannot be written, or an input
            would be overwritten.
    """
    suffix = output.suffix.lower()
    if suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not output.is_dir():
        planned = {names[0]: _single_file(names, output)}
    else:
        planned = plan_names(names, output, lambda name: _output_suffix(PurePath(name)))
    inputs = {os.path.realpath(name): name for name in names}
    for path in planned.values():
        if os.path.realpath(path) in inputs:
            raise OutputError(
                f"{path}: is an input and would be overwritten; choose another --output"
            )
    return planned


def plan_names(
    names: Sequence[str], folder: Path, suffix_of: Callable[[str], str]
) -> dict[str, Path]:
    """Return a file for each input: its own file name, with its folders where two share one.

    Args:
        names: paths and addresses of the inputs.
        folder: that the files will lie in.
        suffix_of: gives the ending of the file for an input.

    Raises:
        OutputError: the inputs cannot have different files.
    """
    parts = {name: _relative_parts(name, names) for name in names}
    for name_of in (_bare_name, _nested_name, _numbered_suffix_name):
        planned = {name: folder / name_of(parts[name], suffix_of(name)) for name in names}
        if max(Counter(str(path).casefold() for path in planned.values()).values()) == 1:
            return planned
    raise OutputError(
        f"{folder}: cannot give each of {len(names)} inputs a file name of its own; name fewer "
        "inputs at once"
    )


def _bare_name(parts: tuple[str, ...], suffix: str) -> PurePath:
    return PurePath(parts[-1]).with_suffix(suffix)


def _nested_name(parts: tuple[str, ...], suffix: str) -> PurePath:
    return PurePath(*parts).with_suffix(suffix)


def _numbered_suffix_name(parts: tuple[str, ...], suffix: str) -> PurePath:
    """Keep the old suffix before the new one: a.avi and a.mov become a.avi.mp4 and a.mov.mp4."""
    return PurePath(*parts[:-1], parts[-1] + suffix)


def _relative_parts(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the path below the folder that all inputs share; for an address, a name made of it."""
    if "://" in name:
        address = urlsplit(name)
        return (
            re.sub(
                r"\W+", "_", f"{address.hostname}{PurePath(address.path).with_suffix('')}"
            ).strip("_"),
        )
    if len(names) == 1:
        return (PurePath(name).name,)
    shared = os.path.commonpath([absolute_path(other).parent for other in names])
    return absolute_path(name).relative_to(shared).parts


def _output_suffix(name: PurePath) -> str:
    suffix = name.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return name.suffix if suffix in IMAGE_OUTPUTS else DEFAULT_IMAGE
    return name.suffix if suffix in VIDEO_OUTPUTS else DEFAULT_VIDEO


def _single_file(names: Sequence[str], output: Path) -> Path:
    if len(names) > 1:
        raise OutputError(f"{output}: one file for {len(names)} inputs; expected a folder")
    is_image = PurePath(names[0]).suffix.lower() in IMAGE_SUFFIXES
    allowed = IMAGE_OUTPUTS if is_image else VIDEO_OUTPUTS
    if output.suffix.lower() not in allowed:
        raise OutputError(
            f"{output}: cannot hold this input; expected a folder, or a file ending in "
            f"{', '.join(sorted(allowed))}"
        )
    return output
