"""Kernels that TensorRT-RTX compiled on this machine, kept in a file, so that the next start of the same engine is quick.

TensorRT-RTX itself holds them against GPU, driver and version, and takes only what fits. In a block of `Gpu.current`, all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tood_deploy.errors import OutputError
from tood_deploy.manifest import atomic_path


class KernelCache:
    """An IRuntimeCache and its file.

    Attributes:
        cache: what every runtime configuration of the engine is given.
    """

    def __init__(self, cache: Any, path: Path, note: Callable[[str], None]) -> None:
        """Fills an empty cache from the file, if there is one that fits; where it does not fit, says so to `note`."""
        self.cache, self._path = cache, path
        self._kept = b""
        with suppress(OSError):
            self._kept = path.read_bytes()
        if self._kept and not cache.deserialize(self._kept):
            note(f"{path}: holds kernels of another driver, or is damaged; they are compiled again, and it is replaced")

    def save(self) -> None:
        """Writes the file if there is anything new. Where nothing can be kept, the kernels are compiled again next time."""
        serialised = self.cache.serialize()
        if serialised is None or (found := bytes(memoryview(serialised))) == self._kept:
            return
        with suppress(OutputError), atomic_path(self._path) as temporary:
            temporary.write_bytes(found)
