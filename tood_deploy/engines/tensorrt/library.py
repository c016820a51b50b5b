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
from collections.abc import Iterator, Mapping
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
KERNEL_LIST = "Layers:\n"  # so begins the builder's list in its log
OLDEST = {"tensorrt": (10, 13), "tensorrt_rtx": (1, 2)}
OLDEST_GPU = "7.5"  # TensorRT's support matrix, 10.13 to 11.4: Turing and later
# What does run on a GPU that TensorRT-RTX has no kernels for, such as Hopper.
RUNS_THERE = (
    "there the checkpoint runs in PyTorch and the .onnx in ONNX Runtime, both with --device cuda, "
    "and an engine of TensorRT, built on that GPU with --flavour tensorrt"
)


@dataclass
class Messages:
    """What the library said during one stretch of work, in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: str = ""  # the list that a builder prints of what it made, as it stands

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

    @property
    def compute_capabilities(self) -> Mapping[str, Any]:
        """The GPUs that TensorRT-RTX has kernels for, such as "8.9", with its own value for each.

        Empty for TensorRT, which builds on the GPU that it builds for.
        """
        listed = getattr(self.module, "ComputeCapability", None)
        if self.name != "tensorrt_rtx" or listed is None:
            return {}
        numbered = {
            name.removeprefix("SM"): value
            for name, value in listed.__members__.items()
            if name.startswith("SM")
        }
        return {f"{name[:-1]}.{name[-1]}": value for name, value in numbered.items()}

    def check_gpu(self, compute_capability: str, gpu_name: str, cure: str = "") -> None:
        """Refuse a GPU that this library has no kernels for.

        Args:
            compute_capability: such as "9.0".
            gpu_name: for the message.
            cure: what else can be done, before what runs there.

        Raises:
            DeviceError: it has none, whatever an engine was built for.
        """
        known = self.compute_capabilities
        if self.name == "tensorrt":
            if as_numbers(compute_capability) >= as_numbers(OLDEST_GPU):
                return
            expected = f"{OLDEST_GPU} and later"
        elif not known or compute_capability in known:
            return
        else:
            expected = f"{', '.join(known)} and none between"
        runs = RUNS_THERE.partition(", and an engine")[0] if self.name == "tensorrt" else RUNS_THERE
        raise DeviceError(
            f"{gpu_name} has compute capability {compute_capability}, {self.title} runs on "
            f"{expected}; {cure}{runs}"
        )


def as_numbers(capability: str) -> tuple[int, ...]:
    """Return a compute capability such as "8.9" as numbers, to compare."""
    return tuple(int(part) for part in capability.split("."))


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
                if message.startswith(KERNEL_LIST):
                    with self._lock:
                        for messages in self._listening:
                            messages.kernels = message
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
