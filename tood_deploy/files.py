"""Where this package keeps what it can get or make again: downloads, caches, passed self-tests."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

from tood_deploy.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_NAME_BYTES = 255  # of ext4, XFS, APFS, NTFS (there letters)
TEMPORARY = ".tood-"  # begins the name of whatever will get its own name when it is complete
LEFTOVER = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{16}}(\..*)?")


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
    check_replaceable(path)
    with _output_errors(path), _temporary(path, path.suffix, _make_file) as temporary:
        yield temporary
        temporary.replace(path)


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary names, as `atomic_path`, for files of one folder that belong together.

    All become themselves if the block succeeds, none if not.

    The temporary ones carry the final names, in a folder of their own.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    for path in paths:
        check_replaceable(path)
    with temporary_folder(paths[0], paths[0].parent) as folder:
        yield tuple(folder / path.name for path in paths)
        for path in paths:
            (folder / path.name).replace(path)


@contextmanager
def temporary_folder(output: Path, parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder, and remove it with what is still in it.

    Args:
        output: that is made in it, for errors.
        parent: the folder that it comes into; made if need be.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    place = parent / output.name
    with _output_errors(output), _temporary(place, "", _make_folder) as folder:
        yield folder


def is_of_system(path: Path) -> bool:
    """Return whether a path lies in /dev or /proc, as /dev/stdout does."""
    return path.parent.resolve().parts[1:2] in (("dev",), ("proc",))


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of what is no file, such as /dev/null or a pipe.

    A symbolic link is replaced; what it points to stays. Those in /dev are the system's.

    Raises:
        OutputError: it is no file, or a link of the system's.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # not there yet, or not to be reached, which writing will say
        return
    of_system = stat.S_ISLNK(mode) and is_of_system(path)
    if of_system or not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise OutputError(
            f"{path}: is a device, pipe or link of the system, and would be replaced by a file; "
            "choose another name"
        )


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    """Make an OSError, such as a full disk, the OutputError that names the output.

    So is one of a file in a temporary folder: that name is gone when a user reads it.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error
    except OutputError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or TEMPORARY not in str(error):
            raise
        raise _unwritable(path, cause) from cause


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); nothing was left behind: make "
        "room, or choose another --output"
    )


@contextmanager
def _temporary(path: Path, suffix: str, make: Callable[[Path], int]) -> Iterator[Path]:
    """Yield a new file or folder beside `path`, held by a lock, and remove what is left of it.

    The system drops the lock when the process ends, however it ends: what is not locked is a
    leftover.

    Args:
        path: what it will become.
        suffix: of the temporary name.
        make: makes it, and returns an open descriptor of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    while True:
        # Of one length, as the name itself may be as long as names can be.
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{suffix}")
        descriptor = make(temporary)
        if take_lock(descriptor) and temporary.exists():
            break
        os.close(descriptor)  # another process took it for a leftover, before it was locked
    try:
        yield temporary
    finally:
        os.close(descriptor)
        _remove(temporary)


def _make_file(path: Path) -> int:
    # By `os.open`, so that the system gives it the permissions of any new file: `tempfile` makes
    # private ones, and what the umask would allow can only be asked by changing it for all threads.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _make_folder(path: Path) -> int:
    path.mkdir(mode=0o700)
    return os.open(path, os.O_RDONLY)


def take_lock(descriptor: int) -> bool:
    """Take the lock of an open file or folder; False where somebody else holds it.

    It is given back when the descriptor is closed, or the process ends.

    True, too, where the file system has no locks: then no leftover is ever removed.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@cache
def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left in a folder, once in this process.

    Only what carries our name and a lock that nobody holds.
    """
    if fcntl is None:
        return
    with suppress(OSError):
        for path in folder.glob(f"{TEMPORARY}*"):
            if LEFTOVER.fullmatch(path.name) and _is_abandoned(path):
                _remove(path)


def _is_abandoned(path: Path) -> bool:
    """Return whether no process holds the lock of a temporary file or folder."""
    assert fcntl is not None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or the file system has no locks
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def check_writable(folder: Path, remedy: str = "choose another place") -> Path:
    """Refuse a folder that cannot be written, or made where it is not there yet.

    Leaves nothing behind.

    Args:
        folder: that files will come into.
        remedy: what to do about it, for the message.

    Returns:
        The folder itself, or the one that it will be made in.

    Raises:
        OutputError: it cannot.
    """
    places = (folder, *folder.absolute().parents)
    present = next(place for place in places if os.path.lexists(place))
    if not present.is_dir():
        raise OutputError(f"{folder}: cannot be written, as {present} is a file; {remedy}")
    try:
        with tempfile.TemporaryFile(dir=present):
            return present
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; what is no text is escaped.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


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
    """Return what a file is known by: its real path, and its number if it is there.

    Nothing for a device, which may be read and written by several.
    """
    try:
        state = Path(path).stat()
    except OSError:
        return [os.path.realpath(path)]
    except ValueError:  # a zero byte: no file has such a name
        return [str(path)]
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


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Leave no folder behind that was made for the output, if nothing came into it."""
    new = not folder.exists()
    try:
        yield
    finally:
        if new:
            with suppress(OSError):  # it was never made, or there is something in it
                folder.rmdir()
