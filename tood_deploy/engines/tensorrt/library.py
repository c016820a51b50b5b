"""TensorRT or TensorRT-RTX, whichever is installed: one Python API under two package names.

Knows neither building nor running.

Both are heard through one logger for the whole process, as the library itself keeps the first
logger it is given: what it says while a block of `collecting` runs ends up in that block's
`Messages`, and nothing on the terminal.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from tood_deploy.errors import DeviceError, ToodError

Name = Literal["tensorrt", "tensorrt_rtx"]
NAMES: tuple[Name, ...] = ("tensorrt", "tensorrt_rtx")
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
SOURCE_NOTE = re.compile(
    r"\[\w+\.cpp:+\S+?\d+\] ?| ?In \S+ at /\S+\.cpp:\d+ ?|\bI[A-Z]\w+::\w+: "
)  # the place in the library's own source
OLDEST = {"tensorrt": (10, 13), "tensorrt_rtx": (1, 2)}


@dataclass
class Messages:
    """What the library said during one stretch of work, in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def reason(self) -> str:
        """Return the errors in one line; the warnings where there are none."""
        return (
            "; ".join(dict.fromkeys(self.errors or self.warnings)) or "the library gave no reason"
        )


class CollectingLogger(Protocol):
    """The library's `ILogger`, to hand to its builder, parser and runtime."""

    def collecting(self) -> AbstractContextManager[Messages]:
        """Return a block whose `Messages` gather what any thread makes the library say."""
        ...


@dataclass(frozen=True, eq=False)
class Flavour:
    """One of the two libraries, loaded.

    Attributes:
        name: of its Python package.
        module: the package itself.
        version: such as "10.13.3.9".
        logger: the one logger of this process; pass it wherever the library asks for one.
    """

    name: Name
    module: Any
    version: str
    logger: CollectingLogger

    @property
    def title(self) -> str:
        """Name and version, for people."""
        return f"{TITLES[self.name]} {self.version}"


def load_flavour(name: str | None = None) -> Flavour:
    """Return the library that is installed.

    Args:
        name: "tensorrt" or "tensorrt_rtx", where it has to be that one; whichever is there where
            not given.

    Raises:
        ToodError: an unknown name, or both are installed and no name was given.
        DeviceError: it is not installed, broken, or too old.
    """
    if name is not None and name not in NAMES:
        raise ToodError(f"TensorRT flavour is {name!r}; expected one of {', '.join(NAMES)}")
    installed = [known for known in NAMES if _is_installed(known)]
    if name is None and len(installed) == 2:
        raise ToodError(
            f"both {' and '.join(installed)} are installed; say which of the two to use with "
            f"--flavour {' or --flavour '.join(NAMES)}"
        )
    if not installed:
        raise DeviceError(
            "neither TensorRT nor TensorRT-RTX is installed; install the Python package "
            f"{(name or NAMES[1]).replace('_', '-')}"
        )
    if name is not None and name not in installed:
        raise DeviceError(
            f"{TITLES[name]} is not installed, {TITLES[installed[0]]} is; install the Python "
            f"package {name.replace('_', '-')}"
        )
    return _load(cast(Name, name or installed[0]))


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@functools.cache
def _load(name: Name) -> Flavour:
    try:
        module = importlib.import_module(name)
    except (
        ImportError,
        OSError,
    ) as error:  # OSError: the shared libraries that the package opens itself
        raise DeviceError(
            f"{TITLES[name]} is installed but does not load ({_tidy(str(error))}); reinstall "
            f"{name} and its libraries"
        ) from error
    version = str(module.__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < OLDEST[name]:
        expected = ".".join(map(str, OLDEST[name]))
        raise DeviceError(
            f"{TITLES[name]} {version} is installed; expected {expected} or newer: update the "
            f"package {name}"
        )
    logger = _new_logger(module)
    module.init_libnvinfer_plugins(
        logger, ""
    )  # TensorRT's own DeformConv is one: parsers and plans look for it in its registry
    return Flavour(name, module, version, logger)


def _tidy(message: str) -> str:
    """Return a message as one line, without the places in the library's source."""
    return " ".join(SOURCE_NOTE.sub("", message).split())


def _new_logger(module: Any) -> CollectingLogger:
    """Return a subclass of that library's own ILogger.

    The base class is known only once the library is loaded.
    """

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._listening: list[Messages] = []
            self._lock = threading.Lock()

        def log(self, severity: Any, message: str) -> None:
            if severity > module.ILogger.WARNING:  # the lower, the worse
                return
            with self._lock:
                for messages in self._listening:
                    (
                        messages.warnings if severity == module.ILogger.WARNING else messages.errors
                    ).append(_tidy(message))

        @contextmanager
        def collecting(self) -> Iterator[Messages]:
            messages = Messages()
            with self._lock:
                self._listening.append(messages)
            try:
                yield messages
            finally:
                with self._lock:
                    self._listening = [other for other in self._listening if other is not messages]

    return cast(CollectingLogger, Logger())
