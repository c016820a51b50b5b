"""Buffers, streams, events and graphs of CUDA, as small objects that are closed. In a block of `Gpu.current`, all of them.

Comes in: sizes and addresses. Goes out: memory that NumPy sees, and work that the GPU does in order. Knows no TensorRT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tood_deploy.cuda_device import OutOfDeviceMemory, call, driver, release


class DeviceBuffer:
    """Bytes in the GPU's memory, aligned to 256 at least."""

    def __init__(self, size: int, purpose: str) -> None:
        """Allocates.

        Raises:
            OutOfDeviceMemory: no room; the message names `purpose`.
        """
        self.size = size
        self._pointer = _allocate(driver.cuMemAlloc, max(size, 1), purpose=purpose, where="on the GPU")
        self.address = int(self._pointer)

    def close(self) -> None:
        """Frees the memory; once."""
        release(driver.cuMemFree, self._pointer)


class PinnedBuffer:
    """Bytes of the host's memory that the GPU reads and writes directly, while the CPU goes on."""

    def __init__(self, size: int, purpose: str) -> None:
        """Allocates.

        Raises:
            OutOfDeviceMemory: no room; the message names `purpose`.
        """
        self.size = size
        portable = driver.CU_MEMHOSTALLOC_PORTABLE
        self.address = int(_allocate(driver.cuMemHostAlloc, max(size, 1), portable, purpose=purpose, where="in pinned host memory"))
        self._bytes = memoryview((ctypes.c_uint8 * max(size, 1)).from_address(self.address))

    def view(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A part of the buffer as an array; not to be used after `close`."""
        return np.ndarray(shape, dtype, buffer=self._bytes, offset=offset)

    def close(self) -> None:
        """Frees the memory; once."""
        release(driver.cuMemFreeHost, self.address)


def _allocate(function: Callable[..., tuple[Any, ...]], size: int, *arguments: Any, purpose: str, where: str) -> Any:
    try:
        return call(function, size, *arguments)
    except OutOfDeviceMemory as error:
        free, total = (value / 2**20 for value in call(driver.cuMemGetInfo))
        raise OutOfDeviceMemory(
            f"no room {where} for {size / 2**20:.0f} MiB of {purpose} ({free:.0f} of the GPU's {total:.0f} MiB are free); "
            "build the engine with a smaller largest --batch, or stop what else uses the GPU"
        ) from error


class Event:
    """A mark in a stream that others wait for, or whose time is asked for."""

    def __init__(self, *, timed: bool = False) -> None:
        """Makes an event; one that is timed takes the GPU a little longer."""
        flags = driver.CUevent_flags
        self._event = call(driver.cuEventCreate, flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING)

    def record(self, stream: Stream) -> None:
        """Puts the mark after all work that the stream has been given so far."""
        call(driver.cuEventRecord, self._event, stream.handle)

    def wait(self) -> None:
        """Waits until the GPU has come past the mark, if it was ever put; other Python threads run meanwhile.

        Raises:
            CudaError: work before the mark failed.
        """
        call(driver.cuEventSynchronize, self._event)

    def seconds_since(self, earlier: Event) -> float:
        """How long the GPU took from another mark to this one; both are timed, and the GPU has come past both.

        Raises:
            CudaError: it has not, or one of them is not timed.
        """
        return call(driver.cuEventElapsedTime, earlier._event, self._event) / 1000

    def hold_back(self, stream: Stream) -> None:
        """Lets later work of a stream begin only once the GPU has come past the mark, if it was ever put."""
        call(driver.cuStreamWaitEvent, stream.handle, self._event, 0)

    def close(self) -> None:
        """Destroys the event; once."""
        release(driver.cuEventDestroy, self._event)


class Stream:
    """Work of the GPU, done in order; independent of the default stream, so that nobody else's work holds it up."""

    def __init__(self) -> None:
        self._stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.handle = int(self._stream)

    def to_device(self, target: int, source: int, size: int) -> None:
        """Copies bytes from pinned host memory to the GPU."""
        call(driver.cuMemcpyHtoDAsync, target, source, size, self.handle)

    def to_host(self, target: int, source: int, size: int) -> None:
        """Copies bytes from the GPU to pinned host memory."""
        call(driver.cuMemcpyDtoHAsync, target, source, size, self.handle)

    def within_device(self, target: int, source: int, size: int) -> None:
        """Copies bytes between addresses that the GPU reaches."""
        call(driver.cuMemcpyAsync, target, source, size, self.handle)

    def synchronise(self) -> None:
        """Waits until all work is done.

        Raises:
            CudaError: some of it failed.
        """
        call(driver.cuStreamSynchronize, self.handle)

    def drain(self) -> None:
        """Waits until all work is over, however it ended."""
        release(driver.cuStreamSynchronize, self.handle)

    def close(self) -> None:
        """Destroys the stream; once."""
        release(driver.cuStreamDestroy, self.handle)


class Graph:
    """Work that was recorded once and is launched as a whole."""

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        """Records what `work` gives the stream, without doing it.

        Raises:
            CudaError: some of it cannot be recorded. The stream can be used on.
            Exception: whatever `work` raised, likewise.
        """
        # Thread-local: allocations of other threads, of another engine for example, do not spoil the recording.
        call(driver.cuStreamBeginCapture, stream.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
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
        """Ends a recording that failed; CUDA gives no graph, or one that nobody needs."""
        status, graph = driver.cuStreamEndCapture(stream.handle)
        if status == driver.CUresult.CUDA_SUCCESS and int(graph):
            release(driver.cuGraphDestroy, graph)

    def launch(self, stream: Stream) -> None:
        """Gives the recorded work to the stream."""
        call(driver.cuGraphLaunch, self._executable, stream.handle)

    def close(self) -> None:
        """Destroys the graph; once."""
        release(driver.cuGraphExecDestroy, self._executable)
