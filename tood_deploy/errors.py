"""The errors a user can meet.

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tood_deploy import __version__


class ToodError(Exception):
    """Wrong use or bad input: the commands print it as one line and exit with code 2."""


class CheckpointError(ToodError):
    """A checkpoint that cannot be read, is refused, or does not fit the network."""


class ArtefactError(ToodError):
    """An exported artefact that is not ours, is damaged, or is of another version."""


class ArtefactWarning(UserWarning):
    """An artefact that opens, but is not the file that its manifest describes."""


class InputWarning(UserWarning):
    """An image or frames that could not be read, where the rest goes on."""


class InputError(ToodError):
    """An image, video, folder or stream that cannot be read."""


class OutputError(ToodError):
    """A place that results cannot be written to."""


class DeviceError(ToodError):
    """A device or runtime that was asked for and is not there."""


class DownloadError(ToodError):
    """Published weights that could not be fetched, or did not arrive intact."""


REPEATS_S = 2.0  # in which a signal that comes again is the same one, sent by two senders


class Stopped(KeyboardInterrupt):
    """A signal that ends the process in good order: outputs are completed, or removed.

    Attributes:
        number: of the signal: SIGINT (Ctrl-C), SIGTERM or SIGHUP.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class CheckFailed(Exception):  # noqa: N818 - the outcome of a check, not wrong use
    """A check that was run and failed (parity, AP): the commands exit with code 1."""


NO_MEMORY = "there is not enough memory"
NO_HANDLES = "the system opens no more files or threads for this process"
# What libraries say whose errors are of types that say nothing.
OUT_OF_MEMORY = (
    "bad_alloc",
    "cannot allocate memory",
    "can't allocate memory",
    "failed to allocate",
    "out of memory",
    "insufficient memory",
    "could not create a primitive",  # oneDNN's, in PyTorch
    "failed to map segment",  # of a library that is loaded
    "failed to serialize proto",
)
OUT_OF_HANDLES = ("too many open files", "can't start new thread")


def shortage_of(error: BaseException | None) -> str:
    """Return what the system was short of, by an error and its causes: memory, or handles.

    Returns:
        `NO_MEMORY`, `NO_HANDLES`, or "" where the error has another reason: a damaged file, say.
    """
    while error is not None:
        text, number = str(error).lower(), getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number == errno.ENOMEM:
            return NO_MEMORY
        if number in (errno.EMFILE, errno.ENFILE) or any(said in text for said in OUT_OF_HANDLES):
            return NO_HANDLES
        if any(said in text for said in OUT_OF_MEMORY):
            return NO_MEMORY
        error = error.__cause__
    return ""


def raise_shortage(error: Exception) -> None:
    """Raise an error again that comes of no memory or no handles: no input is to blame for it."""
    if shortage_of(error):
        raise error


@dataclass(frozen=True)
class Package:
    """A package that this one imports.

    Attributes:
        distribution: its name for pip.
        extras: those that bring it, the usual one first; none where it belongs to every
            installation.
    """

    distribution: str
    extras: tuple[str, ...] = ()


PACKAGES = {  # by the name that is imported
    "argcomplete": Package("argcomplete"),
    "av": Package("av"),
    "PIL": Package("pillow"),
    "cv2": Package("opencv-python-headless"),
    "imagesize": Package("imagesize"),
    "msgspec": Package("msgspec"),
    "numpy": Package("numpy"),
    "onnxruntime": Package("onnxruntime"),
    "pi_heif": Package("pi-heif", ("heif",)),
    "rich": Package("rich"),
    "filelock": Package("filelock", ("export", "train")),
    "google.protobuf": Package("protobuf", ("export",)),
    "ml_dtypes": Package("ml_dtypes", ("export",)),
    "onnx": Package("onnx", ("export",)),
    "onnx_ir": Package("onnx-ir", ("export",)),
    "onnxscript": Package("onnxscript", ("export",)),
    "safetensors": Package("safetensors", ("export", "train")),
    "torch": Package("torch", ("export", "train")),
    "openvino": Package("openvino", ("openvino",)),
    "cuda.bindings": Package("cuda-bindings", ("tensorrt",)),
    "cuda.core": Package("cuda-core", ("tensorrt",)),
    "rasterio": Package("rasterio", ("large",)),
    "jinja2": Package("jinja2", ("eval",)),
    "markupsafe": Package("markupsafe", ("eval",)),
    "matplotlib": Package("matplotlib", ("eval", "export", "train")),
    "psutil": Package("psutil", ("eval",)),
    "pycocotools": Package("pycocotools", ("eval", "train")),
    "scipy": Package("scipy", ("eval",)),
    "mlperf_loadgen": Package("mlcommons-loadgen", ("scenario",)),
    "httptools": Package("httptools", ("serve",)),
    "prometheus_client": Package("prometheus-client", ("serve",)),
    "python_multipart": Package("python-multipart", ("serve",)),
    "starlette": Package("starlette", ("serve",)),
    "uvicorn": Package("uvicorn", ("serve",)),
    "uvloop": Package("uvloop", ("serve",)),
    "tensorboard": Package("tensorboard", ("train",)),
    "pyarrow": Package("pyarrow", ("cluster",)),
    "ray": Package("ray[data]", ("cluster",)),
    "pynvml": Package("nvidia-ml-py", ("gpu",)),
}
ONNXRUNTIME_CURE = (
    "run pip uninstall --yes onnxruntime onnxruntime-gpu, then pip install --no-deps onnxruntime "
    "(onnxruntime-gpu for an NVIDIA GPU)"
)


def not_installed(module: str, *extras: str) -> str:
    """Return the sentence for a missing package.

    What is missing, and how to install what brings it.

    Args:
        module: the imported name, a key of `PACKAGES`.
        extras: all that the command at hand needs; named together if one of them brings the
            package, else the package's usual extra is named.
    """
    package = PACKAGES[module]
    if module == "onnxruntime":
        return (
            f"onnxruntime is not installed, or another package has damaged it; {ONNXRUNTIME_CURE}"
        )
    named = extras if set(extras) & set(package.extras) else package.extras[:1]
    brackets = f"[{','.join(named)}]" if named else ""
    plural = "s" if len(named) > 1 else ""
    extra = f"it comes with the extra{plural} {' and '.join(named)}"
    brought_by = extra if named else "every installation of tood_deploy has it"
    wheel = f"tood_deploy-{__version__}-py3-none-any.whl{brackets}"
    return (
        f"the package {package.distribution} is not installed; {brought_by}: "
        f'run pip install ".{brackets}" in a checkout, or pip install "{wheel}" in the folder of '
        "the wheel"
    )


@contextmanager
def naming_extras(*extras: str) -> Iterator[None]:
    """Turn a missing package, imported inside the block, into the error of `not_installed`.

    Any other module that is not found passes through: that is a bug, not a matter of installing.

    Args:
        extras: all that the command at hand needs, as `not_installed` takes them.

    Raises:
        DeviceError: a package of `PACKAGES` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = _missing_module(error.name or "")
        if module is None:
            raise
        raise DeviceError(not_installed(module, *extras)) from error


def _missing_module(name: str) -> str | None:
    """Return the key of `PACKAGES` whose absence is why the module `name` was not found.

    A part of a package that is installed (`torch.something`) is none: another version is there, not
    nothing. A name space that several packages share (`cuda`, `google`) is not found where none of
    them is installed, and stands for the first.
    """
    for module in PACKAGES:
        if name == module or module.startswith(f"{name}."):
            return module
        if name.startswith(f"{module}.") and importlib.util.find_spec(module) is None:
            return module
    return None
