"""One NVIDIA GPU through the CUDA driver.

Whether it is there, whether the driver is new enough, its context for the calling thread.

All that talks to CUDA does so through `call`, which turns a status into an error. Knows no TensorRT
and no arrays.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tood_deploy.errors import DeviceError, InputError, naming_extras

try:
    with naming_extras():
        bindings_version: str = importlib.import_module("cuda.bindings").__version__
        driver: Any = importlib.import_module("cuda.bindings.driver")
except ImportError as error:
    raise DeviceError(
        f"cuda-bindings is installed but does not load ({error}); reinstall the package "
        "cuda-bindings"
    ) from error


class CudaError(DeviceError):
    """A call to the CUDA driver that failed."""


class OutOfDeviceMemory(CudaError):  # noqa: N818 - what is out, not that it is an error
    """An allocation that found no room, on the GPU or in pinned host memory."""


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call a function of the CUDA driver.

    Returns:
        What it gives beside its status: an empty tuple, a value, or a tuple of values.

    Raises:
        OutOfDeviceMemory: CUDA has no memory left.
        CudaError: any other status but success.
    """
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        kind = (
            OutOfDeviceMemory if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else CudaError
        )
        raise kind(
            f"{function.__name__} failed with {_describe(status)}; look at nvidia-smi, and start "
            "the program again"
        )
    return values[0] if len(values) == 1 else tuple(values)


def release(function: Callable[..., tuple[Any, ...]], handle: Any) -> None:
    """Give something back to CUDA.

    Its status is not looked at: giving back fails only where an earlier call failed, which raised,
        and broke the context for good.
    """
    function(handle)


def _describe(status: Any) -> str:
    _, text = driver.cuGetErrorString(status)
    return f"{status.name}, {text.decode() if text else 'no description'}"


def check_driver() -> None:
    """Raise DeviceError unless there is a GPU, and a driver new enough for the bindings."""
    try:
        status, *_ = driver.cuInit(0)
    except RuntimeError as error:  # libcuda was not found
        raise DeviceError(
            "no NVIDIA driver found; run this on a machine with an NVIDIA GPU, and install its "
            "driver"
        ) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(
            f"no NVIDIA GPU that CUDA can use ({status.name}); look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES"
        )
    version = call(driver.cuDriverGetVersion)
    needed = int(bindings_version.split(".")[0])
    if version // 1000 < needed:
        raise DeviceError(
            f"the NVIDIA driver runs CUDA up to {version // 1000}.{version % 1000 // 10}, "
            f"cuda-bindings {bindings_version} needs one for CUDA {needed}.0; "
            f"update the driver, or install cuda-bindings and TensorRT for CUDA {version // 1000}"
        )


def visible_gpu() -> tuple[str, str] | None:
    """Return name and compute capability of the first GPU that CUDA sees; None where it sees none.

    Holds nothing of it.
    """
    try:
        check_driver()
    except DeviceError:
        return None
    return _describe_device(call(driver.cuDeviceGet, 0))


def _describe_device(device: Any) -> tuple[str, str]:
    """Return the name of a device, and its compute capability such as "8.9"."""
    attributes = driver.CUdevice_attribute
    major, minor = (
        call(driver.cuDeviceGetAttribute, attribute, device)
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = call(driver.cuDeviceGetName, 256, device).decode().strip("\0 ")
    return name, f"{major}.{minor}"


class Gpu:
    """A GPU and its primary context, which every CUDA library in the process shares.

    Attributes:
        ordinal: which of the visible GPUs.
        name: what the driver calls it.
        compute_capability: such as "8.9".
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Retain the primary context; `close` gives it back.

        Raises:
            DeviceError: no such GPU, or no driver that can use it.
        """
        check_driver()
        count = call(driver.cuDeviceGetCount)
        if not 0 <= ordinal < count:
            raise DeviceError(
                f"gpu is {ordinal}, this machine has {count} that CUDA can see; expected 0 to "
                f"{count - 1}"
            )
        device = call(driver.cuDeviceGet, ordinal)
        self.ordinal = ordinal
        self.name, self.compute_capability = _describe_device(device)
        self._device = device
        self._context = call(driver.cuDevicePrimaryCtxRetain, device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in the calling thread for the block."""
        call(driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            call(driver.cuCtxPopCurrent)

    def free_bytes(self) -> tuple[int, int]:
        """Return free and total bytes of the GPU's memory; in a block of `current`."""
        free, total = call(driver.cuMemGetInfo)
        return free, total

    def close(self) -> None:
        """Give the context back; once."""
        release(driver.cuDevicePrimaryCtxRelease, self._device)


class DeviceBuffer:
    """Bytes in the GPU's memory, aligned to 256 at least."""

    def __init__(self, size: int, purpose: str) -> None:
        """Allocate.

        Raises:
            OutOfDeviceMemory: no room; the message names `purpose`.
        """
        self.size = size
        self._pointer = _allocate(
            driver.cuMemAlloc, max(size, 1), purpose=purpose, where="on the GPU"
        )
        self.address = int(self._pointer)

    def close(self) -> None:
        """Free the memory; once."""
        release(driver.cuMemFree, self._pointer)


class PinnedBuffer:
    """Bytes of the host's memory that the GPU reads and writes directly, while the CPU goes on."""

    def __init__(self, size: int, purpose: str) -> None:
        """Allocate.

        Raises:
            OutOfDeviceMemory: no room; the message names `purpose`.
        """
        self.size = size
        portable = driver.CU_MEMHOSTALLOC_PORTABLE
        self.address = int(
            _allocate(
                driver.cuMemHostAlloc,
                max(size, 1),
                portable,
                purpose=purpose,
                where="in pinned host memory",
            )
        )
        self._bytes = memoryview((ctypes.c_uint8 * max(size, 1)).from_address(self.address))

    def view(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a part of the buffer as an array; not to be used after `close`.

        Args:
            offset: where it begins, in bytes.
            shape, dtype: of the array.
        """
        return np.ndarray(shape, dtype, buffer=self._bytes, offset=offset)

    def close(self) -> None:
        """Free the memory; once."""
        release(driver.cuMemFreeHost, self.address)


def _allocate(
    function: Callable[..., tuple[Any, ...]], size: int, *arguments: Any, purpose: str, where: str
) -> Any:
    try:
        return call(function, size, *arguments)
    except OutOfDeviceMemory as error:
        free, total = (value / 2**20 for value in call(driver.cuMemGetInfo))
        raise OutOfDeviceMemory(
            f"no room {where} for {size / 2**20:.0f} MiB of {purpose} ({free:.0f} of the GPU's "
            f"{total:.0f} MiB are free); "
            "build the engine with a smaller largest --batch, or stop what else uses the GPU"
        ) from error


class Event:
    """A mark in a stream that others wait for, or whose time is asked for."""

    def __init__(self, *, timed: bool = False) -> None:
        """Make an event; one that is timed takes the GPU a little longer."""
        flags = driver.CUevent_flags
        self._event = call(
            driver.cuEventCreate, flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING
        )

    def record(self, stream: Stream) -> None:
        """Put the mark after all work that the stream has been given so far."""
        call(driver.cuEventRecord, self._event, stream.handle)

    def wait(self) -> None:
        """Wait until the GPU has come past the mark, if it was ever put.

        Other Python threads run meanwhile.

        Raises:
            CudaError: work before the mark failed.
        """
        call(driver.cuEventSynchronize, self._event)

    def seconds_since(self, earlier: Event) -> float:
        """Return how long the GPU took from another mark to this one.

        Both are timed, and the GPU has come past both.

        Raises:
            CudaError: it has not, or one of them is not timed.
        """
        return call(driver.cuEventElapsedTime, earlier._event, self._event) / 1000

    def hold_back(self, stream: Stream) -> None:
        """Hold later work of a stream back until the GPU has come past the mark, if it was put."""
        call(driver.cuStreamWaitEvent, stream.handle, self._event, 0)

    def close(self) -> None:
        """Destroy the event; once."""
        release(driver.cuEventDestroy, self._event)


class Stream:
    """Work of the GPU, done in order.

    Independent of the default stream, so that nobody else's work holds it up.
    """

    def __init__(self) -> None:
        self._stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.handle = int(self._stream)

    def to_device(self, target: int, source: int, size: int) -> None:
        """Copy bytes from pinned host memory to the GPU.

        Args:
            target, source: addresses.
            size: in bytes.
        """
        call(driver.cuMemcpyHtoDAsync, target, source, size, self.handle)

    def to_host(self, target: int, source: int, size: int) -> None:
        """Copy bytes from the GPU to pinned host memory.

        Args:
            target, source: addresses.
            size: in bytes.
        """
        call(driver.cuMemcpyDtoHAsync, target, source, size, self.handle)

    def within_device(self, target: int, source: int, size: int) -> None:
        """Copy bytes between addresses that the GPU reaches.

        Args:
            target, source: addresses.
            size: in bytes.
        """
        call(driver.cuMemcpyAsync, target, source, size, self.handle)

    def synchronise(self) -> None:
        """Wait until all work is done.

        Raises:
            CudaError: some of it failed.
        """
        call(driver.cuStreamSynchronize, self.handle)

    def drain(self) -> None:
        """Wait until all work is over, however it ended."""
        release(driver.cuStreamSynchronize, self.handle)

    def close(self) -> None:
        """Destroy the stream; once."""
        release(driver.cuStreamDestroy, self.handle)


class Graph:
    """Work that was recorded once and is launched as a whole."""

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        """Record what `work` gives the stream, without doing it.

        Raises:
            CudaError: some of it cannot be recorded. The stream can be used on.
            Exception: whatever `work` raised, likewise.
        """
        # Thread-local: allocations of other threads, of another engine for example, do not spoil
        # the recording.
        call(
            driver.cuStreamBeginCapture,
            stream.handle,
            driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        )
        try:
            work()
        except BaseException:
            self._abandon(stream)
            raise
        graph = call(driver.cuStreamEndCapture, stream.handle)
        try:
            self._executable = call(driver.cuGraphInstantiate, graph, 0)
        finally:
            release(driver.cuGraphDestroy, graph)

    @staticmethod
    def _abandon(stream: Stream) -> None:
        """End a recording that failed; CUDA gives no graph, or one that nobody needs."""
        status, graph = driver.cuStreamEndCapture(stream.handle)
        if status == driver.CUresult.CUDA_SUCCESS and int(graph):
            release(driver.cuGraphDestroy, graph)

    def launch(self, stream: Stream) -> None:
        """Give the recorded work to the stream."""
        call(driver.cuGraphLaunch, self._executable, stream.handle)

    def close(self) -> None:
        """Destroy the graph; once."""
        release(driver.cuGraphExecDestroy, self._executable)


_DLPACK_CPU = 1  # kDLCPU of DLPack's device types
_UNREADABLE = (
    BufferError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what exporters raise when they refuse


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array in a GPU's memory.

    Answers to the same names as a NumPy array where shape and type are checked.

    Attributes:
        address: of its first byte.
        shape: as in NumPy.
        dtype: as in NumPy.
        owner: keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]


def view_array(value: Any, name: str, *, gpu: int, stream: int) -> NDArray[Any] | DeviceArray:
    """Return a view of an array, without a copy.

    Args:
        value: a NumPy array, or anything with DLPack or `__cuda_array_interface__`.
        name: of the input, for errors.
        gpu: the GPU that the engine runs on, in whose context this is called.
        stream: the stream that will read it; waits for what its producer has still to write.

    Raises:
        InputError: it is no such array, lies on another GPU, or on the GPU with gaps.
    """
    if isinstance(value, np.ndarray):
        return value
    on_cpu = hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == _DLPACK_CPU
    try:
        if on_cpu:
            return np.from_dlpack(value)
        view = _memory_view().from_any_interface(value, stream)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: a {type(value).__name__} cannot be read ({reason}); "
            "expected a NumPy array, or one with DLPack or __cuda_array_interface__"
        ) from error
    if view.device_id != gpu:
        raise InputError(
            f"{name}: lies on GPU {view.device_id}, the engine runs on GPU {gpu}; copy it there "
            "first"
        )
    shape = tuple(view.shape)
    if view.strides is not None and not _is_contiguous(shape, tuple(view.strides)):
        raise InputError(
            f"{name}: strides {tuple(view.strides)} for shape {shape} on the GPU; expected rows "
            "without gaps, as contiguous() makes them"
        )
    return DeviceArray(view.ptr, shape, np.dtype(view.dtype), view)


def _memory_view() -> Any:
    """Return the class of cuda-core that reads both protocols.

    Most users give NumPy arrays and need not have it.
    """
    try:
        with naming_extras():
            from cuda.core.utils import StridedMemoryView  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DeviceError(
            f"cuda-core is installed but does not load ({error}); reinstall the package cuda-core"
        ) from error
    return StridedMemoryView


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether strides, in values, are those of C order; axes of length 1 may have any."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
