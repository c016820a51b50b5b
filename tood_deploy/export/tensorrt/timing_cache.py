"""TensorRT's timing cache as a file: what earlier builds measured on this GPU, so that the next one measures less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tood_deploy.errors import ArtefactError
from tood_deploy.manifest import atomic_path
from tood_deploy.tensorrt_flavour import Flavour


@contextmanager
def kept_timings(flavour: Flavour, config: Any, path: Path | None) -> Iterator[None]:
    """Gives the timings in the file to the builder for the block; writes them back, with what it measured, if the block succeeds.

    Args:
        flavour: the library.
        config: of the builder.
        path: the file; need not be there yet. None: nothing is kept.

    Raises:
        ArtefactError: it is no file, or holds no timings, or those of another GPU or version.
        OutputError: it cannot be written.
    """
    if path is None:
        yield
        return
    with flavour.logger.collecting() as messages:
        cache = config.create_timing_cache(_content(path))
        if cache is None or messages.errors:
            raise ArtefactError(f"{path}: not a timing cache ({messages.reason()}); delete it, or give another --timing-cache")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise ArtefactError(
                f"{path}: measured on another GPU, or with another version than {flavour.title} ({messages.reason()}); "
                "delete it, or give another --timing-cache"
            )
    yield
    with atomic_path(path) as temporary:
        temporary.write_bytes(cache.serialize())


def _content(path: Path) -> bytes:
    """What was kept before; nothing where there is no file yet."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read as a file ({error.strerror}); give another --timing-cache") from error
