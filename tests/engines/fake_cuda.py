"""A CUDA driver made of Python, for tests of what no machine without a GPU can run.

Memory, streams, events and graphs.

It is as lazy as a GPU may be: work given to a stream is done when somebody waits for it, and not
before. So code that reads results too
early, or overwrites buffers that are still to be copied, finds wrong bytes here. What is not given
back is counted. Its clock stands still
but for what work is said to take.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

real: Any = importlib.import_module("cuda.bindings.driver")
Status = real.CUresult
OK = Status.CUDA_SUCCESS
Work = Callable[[], None]
TAKES_S = {
    "in": 0.002,
    "run": 0.008,
    "out": 0.001,
}  # by kind of work; what else there is takes no time


@dataclass
class Stream:
    waiting: deque[tuple[str, Work]] = field(default_factory=deque)
    recording: list[tuple[str, Work]] | None = None
    recorder: int = 0
    spoiled: bool = False


@dataclass
class Mark:
    """One recording of an event."""

    stream: Stream
    passed: bool = False
    at_s: float = 0.0


def in_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """A call that needs a current context, and may have been told to fail.

    It is refused while the thread records if it is unsafe then.
    """

    @functools.wraps(function)
    def checked(self: FakeDriver, *arguments: Any) -> Any:
        with self.lock:
            self.calls[function.__name__] += 1
            if not self.stack:
                return Status.CUDA_ERROR_INVALID_CONTEXT, None
            if failure := self._planned_failure(function.__name__):
                if function.__name__ == "cuStreamEndCapture":  # ends it however it goes
                    self.streams[arguments[0]].recording = None
                return failure, None
            if function.__name__ in UNSAFE_WHILE_RECORDING and self._spoil_recordings():
                return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
            return function(self, *arguments)

    return checked


UNSAFE_WHILE_RECORDING = {
    "cuMemAlloc",
    "cuMemFree",
    "cuMemHostAlloc",
    "cuStreamSynchronize",
    "cuEventSynchronize",
}


class FakeDriver:
    """Stands where `cuda.bindings.driver` does; types and constants are the real ones.

    Attributes:
        calls: how often each function was called.
        history: what the GPU did, in order.
        before_free: asked about every address that is freed.
        clock_s: the time of the GPU.
    """

    def __init__(
        self, capability: tuple[int, int] = (8, 9), version: int = 13050, count: int = 1
    ) -> None:
        self.capability, self.version, self.count = capability, version, count
        self.lock = threading.RLock()
        self.calls: Counter[str] = Counter()
        self.history: list[str] = []
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.free_memory: list[NDArray[np.uint8]] = []
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Mark | None] = {}
        self.timed: set[int] = set()
        self.clock_s = 0.0
        self.graphs: dict[int, list[tuple[str, Work]]] = {}
        self.retained = 0
        self.failures: dict[str, dict[int, Any]] = {}
        self.before_free: list[Callable[[int], None]] = []
        self._handles = itertools.count(0x1000, 16)
        self._local = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    # What tests ask for

    def fail(self, function: str, status: Any, call: int = 1) -> None:
        """Plans that the nth call of a function from now on fails."""
        self.failures.setdefault(function, {})[self.calls[function] + call] = status

    def held(self) -> dict[str, int]:
        """What was not given back."""
        graphs = len(self.graphs)
        found = {
            "memory": len(self.memory),
            "streams": len(self.streams),
            "events": len(self.events),
            "graphs": graphs,
            "contexts": self.retained,
        }
        return {name: number for name, number in found.items() if number}

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A view of memory; fails where not all of it is allocated."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for start, block in self.memory.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start :][:size].view(dtype).reshape(shape)
        raise AssertionError(f"{size} bytes at {address:#x} are nobody's")

    def give(self, handle: int, label: str, work: Work) -> None:
        """Gives a stream work."""
        stream = self.streams[handle]
        (stream.waiting if stream.recording is None else stream.recording).append((label, work))

    def is_recording(self, handle: int) -> bool:
        return self.streams[handle].recording is not None

    def spoil(self, handle: int) -> None:
        """Makes a recording fail, as work that cannot be recorded does."""
        self.streams[handle].spoiled = True

    @property
    def stack(self) -> list[int]:
        """The contexts of the calling thread."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _planned_failure(self, function: str) -> Any:
        return self.failures.get(function, {}).get(self.calls[function])

    def _spoil_recordings(self) -> bool:
        caller = (
            threading.get_ident()
        )  # recordings of other threads are nobody else's business: they are thread-local
        recording = [
            stream
            for stream in self.streams.values()
            if stream.recording is not None and stream.recorder == caller
        ]
        for stream in recording:
            stream.spoiled = True
        return bool(recording)

    def _drain(self, stream: Stream, until: Mark | None = None) -> None:
        while stream.waiting and not (until and until.passed):
            label, work = stream.waiting.popleft()
            work()
            if label:
                self.history.append(label)
                self.clock_s += TAKES_S.get(label.split()[-2], 0.0)

    # Devices and contexts

    def cuInit(self, _flags: int) -> Any:
        return (OK if self.count else Status.CUDA_ERROR_NO_DEVICE,)

    def cuDriverGetVersion(self) -> Any:
        return OK, self.version

    def cuDeviceGetCount(self) -> Any:
        return OK, self.count

    def cuDeviceGet(self, ordinal: int) -> Any:
        return OK, ordinal

    def cuDeviceGetName(self, length: int, _device: int) -> Any:
        return OK, b"Fake GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: Any, _device: int) -> Any:
        return OK, self.capability[
            attribute == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        ]

    def cuGetErrorString(self, status: Any) -> Any:
        return OK, f"text of {status.name}".encode()

    def cuDevicePrimaryCtxRetain(self, _device: int) -> Any:
        self.retained += 1
        return OK, 0xC0

    def cuDevicePrimaryCtxRelease(self, _device: int) -> Any:
        self.retained -= 1
        return (OK,)

    def cuCtxPushCurrent(self, context: int) -> Any:
        assert self.retained > 0, "a context that was given back"
        self.stack.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> Any:
        return OK, self.stack.pop()

    # Memory

    def _allocate(self, size: int) -> int:
        block = np.full(size + 512, 0xCD, np.uint8)
        start = -block.ctypes.data % 512
        block = block[start : start + size]
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def _free(self, address: int) -> None:
        for check in self.before_free:
            check(int(address))
        block = self.memory.pop(int(address))
        block[:] = 0xDD
        self.free_memory.append(
            block
        )  # whoever still looks at it sees that it is gone, and harms nobody

    @in_context
    def cuMemGetInfo(self) -> Any:
        return OK, 5 * 2**20, 80 * 2**20

    @in_context
    def cuMemAlloc(self, size: int) -> Any:
        return OK, real.CUdeviceptr(self._allocate(size))

    @in_context
    def cuMemHostAlloc(self, size: int, _flags: int) -> Any:
        return OK, self._allocate(size)

    @in_context
    def cuMemFree(self, pointer: Any) -> Any:
        self._free(pointer)
        return (OK,)

    @in_context
    def cuMemFreeHost(self, address: int) -> Any:
        self._free(address)
        return (OK,)

    def _copy(self, label: str, target: int, source: int, size: int, stream: int) -> Any:
        def copy() -> None:
            self.array(target, (size,), np.uint8)[:] = self.array(source, (size,), np.uint8)

        self.give(stream, f"{label} {stream:#x}", copy)
        return (OK,)

    @in_context
    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        return self._copy("in", target, source, size, stream)

    @in_context
    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        return self._copy("out", target, source, size, stream)

    @in_context
    def cuMemcpyAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        return self._copy("within", target, source, size, stream)

    # Streams and events

    @in_context
    def cuStreamCreate(self, _flags: Any) -> Any:
        handle = next(self._handles)
        self.streams[handle] = Stream()
        return OK, real.CUstream(handle)

    @in_context
    def cuStreamDestroy(self, stream: int) -> Any:
        assert not self.streams.pop(stream).waiting, "a stream with work in it"
        return (OK,)

    @in_context
    def cuStreamSynchronize(self, stream: int) -> Any:
        self._drain(self.streams[stream])
        return (OK,)

    @in_context
    def cuEventCreate(self, flags: Any) -> Any:
        handle = next(self._handles)
        self.events[handle] = None
        if not flags & real.CUevent_flags.CU_EVENT_DISABLE_TIMING:
            self.timed.add(handle)
        return OK, real.CUevent(handle)

    @in_context
    def cuEventDestroy(self, event: Any) -> Any:
        del self.events[int(event)]
        return (OK,)

    @in_context
    def cuEventRecord(self, event: Any, stream: int) -> Any:
        mark = Mark(self.streams[stream])
        self.events[int(event)] = mark

        def pass_by() -> None:
            mark.passed, mark.at_s = True, self.clock_s

        self.give(stream, "", pass_by)
        return (OK,)

    @in_context
    def cuEventElapsedTime(self, start: Any, end: Any) -> Any:
        first, last = self.events[int(start)], self.events[int(end)]
        if first is None or last is None or not {int(start), int(end)} <= self.timed:
            return Status.CUDA_ERROR_INVALID_HANDLE, None
        if not (first.passed and last.passed):
            return Status.CUDA_ERROR_NOT_READY, None
        return OK, 1000 * (last.at_s - first.at_s)

    @in_context
    def cuEventSynchronize(self, event: Any) -> Any:
        if mark := self.events[int(event)]:
            self._drain(mark.stream, until=mark)
        return (OK,)

    @in_context
    def cuStreamWaitEvent(self, stream: int, event: Any, _flags: int) -> Any:
        if mark := self.events[int(event)]:
            self.give(stream, "", lambda: self._drain(mark.stream, until=mark))
        return (OK,)

    # Graphs

    @in_context
    def cuStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        assert mode == real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.streams[stream].recording, self.streams[stream].spoiled = [], False
        self.streams[stream].recorder = threading.get_ident()
        return (OK,)

    @in_context
    def cuStreamEndCapture(self, stream: int) -> Any:
        recorded, self.streams[stream].recording = self.streams[stream].recording, None
        if self.streams[stream].spoiled:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        assert recorded is not None
        handle = next(self._handles)
        self.graphs[handle] = recorded
        return OK, real.CUgraph(handle)

    @in_context
    def cuGraphInstantiate(self, graph: Any, _flags: int) -> Any:
        handle = next(self._handles)
        self.graphs[handle] = self.graphs[int(graph)]
        return OK, real.CUgraphExec(handle)

    @in_context
    def cuGraphDestroy(self, graph: Any) -> Any:
        del self.graphs[int(graph)]
        return (OK,)

    @in_context
    def cuGraphExecDestroy(self, graph: Any) -> Any:
        del self.graphs[int(graph)]
        return (OK,)

    @in_context
    def cuGraphLaunch(self, graph: Any, stream: int) -> Any:
        for label, work in self.graphs[int(graph)]:
            self.give(stream, f"replayed {label}", work)
        return (OK,)
