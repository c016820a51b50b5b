"""Whether the place of an export can take it: writable, free, and nobody else's. Writes nothing that stays; imports nothing heavy."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.manifest import manifest_path, neighbour

MIB = 2**20
SPARE_BYTES = 64 * MIB  # beside the artefacts themselves


def check_artefact(output: Path, suffixes: Collection[str], alternative: str) -> None:
    """Refuse a name of another kind, and a place that holds something else.

    Args:
        output: the artefact's file.
        suffixes: that its name may end in.
        alternative: word to tell it from a neighbour by, for the message.

    Raises:
        ToodError: another ending, or a neighbour of the same manifest.
        OutputError: a folder, or files beside it that are not of tood-export.
    """
    if output.suffix.lower() not in suffixes:
        raise ToodError(f"output is {output}; expected a name ending in {' or '.join(suffixes)}")
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; expected a file that may be written: give another --output")
    manifest = manifest_path(output)
    if other := neighbour(output):
        raise ToodError(
            f"{output}: its manifest {manifest.name} would replace that of {other.name}; "
            f"give another --output, such as {output.with_stem(f'{output.stem}-{alternative}')}"
        )
    if manifest.exists() and not _is_manifest(manifest):
        raise OutputError(f"{manifest}: is no manifest of tood-export, and would be replaced by one; give another --output")
    if output.suffix.lower() == ".xml" and output.with_suffix(".bin").exists() and not output.exists():
        raise OutputError(f"{output.with_suffix('.bin')}: belongs to no .xml, and would be replaced; give another --output")


def _is_manifest(path: Path) -> bool:
    """Tell by its keys; one of another version may be replaced too."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "preset"} <= content.keys()


def check_inputs_stay(written: Collection[Path], inputs: Collection[Path]) -> None:
    """Refuse to write over what is read, and two results into one file.

    Raises:
        OutputError: a file stands on both sides, or twice among those that are written.
    """
    read = {path.resolve() for path in inputs}
    places: set[Path] = set()
    for path in written:
        place = path.resolve()
        if place in read:
            raise OutputError(f"{path}: is an input of this export, and would be replaced by its result; give another name")
        if place in places:
            raise OutputError(f"{path}: two results of this export would be written there; give each a name of its own")
        places.add(place)


def check_writable(folder: Path, remedy: str) -> Path:
    """Refuse a folder that cannot be written, or made where it is not there yet.

    Args:
        folder: that files will come into.
        remedy: what to do about it, for the message.

    Returns:
        The folder itself, or the one that it will be made in.

    Raises:
        OutputError: it cannot.
    """
    present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not present.is_dir():
        raise OutputError(f"{folder}: cannot be written, as {present} is a file; {remedy}")
    try:
        with tempfile.TemporaryFile(dir=present):
            return present
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a disk that is too full.

    Args:
        folder: exists.
        needed_bytes: of all files of the export that are there at a time; an estimate.

    Raises:
        OutputError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + SPARE_BYTES:
        raise OutputError(
            f"{folder}: {free // MIB} MiB are free, and this export needs about {(needed_bytes + SPARE_BYTES) // MIB}; "
            "make room, or give an --output on another disk"
        )
