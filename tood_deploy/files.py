"""Where this package keeps what it can get or make again: downloads, caches, passed self-tests."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
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


def absolute_path(name: str | Path) -> Path:
    """Return the path from the root, without `.` and `..`, symbolic links left as they are."""
    return Path(os.path.normpath(Path(name).absolute()))
