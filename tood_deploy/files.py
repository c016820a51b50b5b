"""Where this package keeps what it can get or make again: downloads, caches, passed self-tests."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tood_deploy.errors import OutputError


def home_folder(name: str) -> Path:
    """Return `$TOOD_HOME/<name>`, else `tood_deploy/<name>` in `$XDG_CACHE_HOME` or `~/.cache`.

    May not exist yet.
    """
    if home := os.environ.get("TOOD_HOME"):
        return Path(home).expanduser() / name
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tood_deploy" / name


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name that becomes `path` if the block succeeds, and vanishes if not.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_file(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: writing failed ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary names, as `atomic_path`, for files of one folder that belong together.

    All become themselves if the block succeeds, none if not.

    The temporary ones carry the final names, in a folder of their own.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{paths[0].stem}-", dir=paths[0].parent))
    except OSError as error:
        raise OutputError(
            f"{paths[0]}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    try:
        yield tuple(folder / path.name for path in paths)
        for path in paths:
            (folder / path.name).replace(path)
    except OSError as error:
        raise OutputError(
            f"{paths[0]}: writing failed ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(*paths: Path) -> str:
    """Return SHA-256, hexadecimal, of a file's bytes, or of several files one after the other.

    Remembered until a file changes.
    """
    status = [(path, path.stat()) for path in paths]
    return _sha256(
        tuple(
            (str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns)
            for path, state in status
        )
    )


@lru_cache(maxsize=64)
def _sha256(states: tuple[tuple[str, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, *_ in states:
        with Path(name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _new_file(path: Path) -> Path:
    """Make an empty file beside `path`, under a name that no other process has.

    Made by `open`, so that the system gives it the permissions of any new file: `tempfile` makes
    private ones, and what the umask would allow can only be asked by changing it for all threads.
    """
    name = path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")
    name.open("xb").close()
    return name


def check_overwrites(
    inputs: Mapping[str, Iterable[str | Path]], outputs: Mapping[str, Iterable[str | Path]]
) -> None:
    """Refuse outputs that would overwrite an input, or one another.

    Two names of one file count as one: links, and names that a file system does not tell apart.

    Args:
        inputs: files that are read, by what they are: an option's name or some words.
        outputs: files and folders that are written, by the option that names them.

    Raises:
        OutputError: an output is an input, is another output, or lies below one that is a file.
    """
    read = {
        key: (what, path)
        for what, paths in inputs.items()
        for path in paths
        for key in _identities(path)
    }
    written: dict[object, tuple[str, str | Path]] = {}
    for option, paths in outputs.items():
        for path in paths:
            keys = _identities(path)
            if hit := next((read[key] for key in keys if key in read), None):
                raise OutputError(
                    f"{option} {path}: is {hit[0]} and would be overwritten; choose another "
                    f"{option}"
                )
            if hit := next((written[key] for key in keys if key in written), None):
                raise OutputError(
                    f"{option} {path}: is written by {hit[0]}, too; choose another {option}"
                )
            written |= dict.fromkeys(keys, (option, path))
    for option, path in written.values():
        for folder in Path(os.path.realpath(path)).parents:
            if hit := written.get(str(folder)):
                raise OutputError(
                    f"{option} {path}: lies in {hit[1]}, which {hit[0]} writes as a file; choose "
                    f"another {option}"
                )


def _identities(path: str | Path) -> list[object]:
    """Return by what a file is known: its real path, and its number if it is there.

    None for a device, which may be read and written by several.
    """
    try:
        state = Path(path).stat()
    except (OSError, ValueError):
        return [os.path.realpath(path)]
    if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
        return []
    return [os.path.realpath(path), (state.st_dev, state.st_ino)]


def absent_or(ask: Callable[[], bool]) -> bool:
    """Return what `Path.is_file` or the like says; False where the text can be no path at all.

    A text may be too long for a name, or hold what no name may (a zero byte).
    """
    try:
        return ask()
    except (OSError, ValueError):
        return False


def absolute_path(name: str | Path) -> Path:
    """Return the path from the root, without `.` and `..`, symbolic links left as they are."""
    return Path(os.path.normpath(Path(name).absolute()))
