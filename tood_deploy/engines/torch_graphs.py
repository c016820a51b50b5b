"""Run a detector on a GPU: CUDA graphs, two sets of pinned buffers, copies beside the computing.

Comes in: a function on tensors of the GPU. Goes out: tickets, and for each its result in host
memory. Knows neither networks nor files.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tood_deploy.model.postprocess import Candidates

WARM_UPS = 3
PADDED_AT_FIRST = 2  # times that a batch runs in a larger recording before it gets its own
MAX_GRAPHS = 8  # sizes and batches that stay recorded; each holds its inputs and results
BUFFERS = 2  # one computes, one is filled

Inputs = tuple[Tensor, ...]


class Packed(NamedTuple):
    """The result of one call on the GPU.

    Attributes:
        packed: (B, 2 + 6 D) float32, as `pack` gives it.
        candidates: the input of suppression, should it have to be done again.
    """

    packed: Tensor
    candidates: Candidates


Function = Callable[..., Packed]


class Recorded:
    """A function on tensors of fixed shapes, recorded once as a CUDA graph and replayed."""

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], pool: Any = None
    ) -> None:
        """Warm the function up on copies of the inputs, and record it.

        Args:
            function: without a loop on the data.
            inputs: of the shapes and types to record.
            pool: memory shared with other graphs that never replay at the same time.
        """
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads copy meanwhile, which the default mode takes for a fault of this one.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay on these inputs; the result is overwritten by the next call.

        Of a smaller batch than was recorded, the images that are missing are all padding.
        """
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is given:
                continue
            if mine.dim() and len(given) < len(mine):
                mine[: len(given)].copy_(given, non_blocking=True)
                mine[len(given) :].zero_()
            else:
                mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs


def pad_batch(inputs: Inputs, rows: int) -> Inputs:
    """Return inputs of so many images, those that are missing all padding: no pixel is valid."""
    missing = rows - len(inputs[0])
    if not missing:
        return inputs
    return tuple(
        torch.cat([one, one.new_zeros(missing, *one.shape[1:])]) if one.dim() else one
        for one in inputs
    )


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return host memory that the GPU copies from and to without waiting."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


class Buffers:
    """The memory of one batch on its way, on both sides."""

    def __init__(self) -> None:
        self.host: list[Tensor] = []
        self.on_device: list[Tensor] = []
        self.inputs: Sequence[Tensor] = ()
        self.result: Tensor | None = None
        self.candidates: Candidates | None = None
        self.uploaded, self.done = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, arrays: Sequence[NDArray[Any]], place: torch.device) -> list[Tensor]:
        """Copy arrays into pinned memory, start their copy to the GPU, and return what is there.

        The memory is that of the batch before, where shapes are the same.

        Args:
            arrays: of the batch.
            place: the GPU.
        """
        values = [torch.from_numpy(np.asarray(array, order="C")) for array in arrays]
        if [value.shape for value in values] != [value.shape for value in self.host]:
            self.host = [pinned(value.shape, dtype=value.dtype) for value in values]
            self.on_device = [torch.empty_like(value, device=place) for value in values]
        for value, host, device in zip(values, self.host, self.on_device, strict=True):
            host.copy_(value)
            device.copy_(host, non_blocking=True)
        return self.on_device

    def keep(self, result: Packed) -> None:
        """Start the copy of a result to the host; keep its candidates from the next replay."""
        if self.result is None or self.result.shape != result.packed.shape:
            self.result = pinned(result.packed.shape, dtype=result.packed.dtype)
        self.result.copy_(result.packed, non_blocking=True)
        self.candidates = Candidates(*(part.clone() for part in result.candidates))


class CudaRunner:
    """Runs batches on one stream, while the next one is copied on another.

    Attributes:
        notes: remarks for the user; grows.
    """

    def __init__(
        self, function: Function, place: torch.device, *, graphs: bool, notes: list[str]
    ) -> None:
        """Make the streams and buffers.

        Args:
            function: of images, rows and columns, and both thresholds; gives what is brought back.
            place: the GPU.
            graphs: record the function for every shape, and replay it.
            notes: to add remarks to.
        """
        self._function, self._place, self._graphs = function, place, graphs
        self.notes = notes
        self._copying, self._computing = torch.cuda.Stream(), torch.cuda.Stream()
        self._recorded: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()
        self._padded: Counter[tuple[int, ...]] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._launching = threading.Lock()
        self._free: SimpleQueue[Buffers] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(Buffers())

    def submit(self, arrays: Sequence[NDArray[Any]]) -> Buffers:
        """Start a batch; waits while two are under way.

        Args:
            arrays: of the function's arguments.
        """
        return self._submit(lambda buffers: buffers.fill(arrays, self._place))

    def submit_made(self, make: Callable[[], Sequence[Tensor]]) -> Buffers:
        """Start a batch whose inputs are made on the GPU, beside the batch before.

        Args:
            make: returns the function's arguments.
        """
        return self._submit(lambda _: make())

    def _submit(self, make: Callable[[Buffers], Sequence[Tensor]]) -> Buffers:
        buffers = self._free.get()
        try:
            with torch.cuda.stream(self._copying):
                # Kept until the batch is collected: the other stream reads them.
                buffers.inputs = make(buffers)
                buffers.uploaded.record(self._copying)
            self._launch(buffers, buffers.inputs)
        except BaseException:
            self._free.put(buffers)
            raise
        return buffers

    def start(self, inputs: Sequence[Tensor]) -> Buffers:
        """Start a batch whose tensors are on the GPU already, and stay as they are."""
        buffers = self._free.get()
        try:
            buffers.uploaded.record(torch.cuda.current_stream())
            self._launch(buffers, inputs)
        except BaseException:
            self._free.put(buffers)
            raise
        return buffers

    def _launch(self, buffers: Buffers, inputs: Sequence[Tensor]) -> None:
        with self._launching, torch.cuda.stream(self._computing), honest_float32():
            self._computing.wait_event(buffers.uploaded)
            buffers.keep(self._call(tuple(inputs)))
            buffers.done.record(self._computing)

    @contextmanager
    def finished(self, buffers: Buffers) -> Iterator[tuple[Tensor, Candidates]]:
        """Wait for a batch; give its packed result in host memory, and its candidates on the GPU.

        Both are overwritten by later batches, once the block is left.
        """
        try:
            buffers.done.synchronize()
            assert buffers.result is not None
            assert buffers.candidates is not None
            with torch.cuda.stream(self._computing):
                yield buffers.result, buffers.candidates
        finally:
            buffers.candidates, buffers.inputs = None, ()
            self._free.put(buffers)

    def _call(self, inputs: Inputs) -> Packed:
        """Run the function, by a graph for each size of the images and a few batches.

        A batch that comes for the first time runs in the recording of a larger one, where there is
        one, so that the last batch of a video does not wait for a recording of its own.
        """
        if not self._graphs:
            return self._function(*inputs)
        batch, *size = inputs[0].shape
        shape = (self._batch_to_run(batch, tuple(size)), *size)
        if shape not in self._recorded:
            self._make_room()
            self._recorded[shape] = Recorded(
                self._function, pad_batch(inputs, shape[0]), self._pool
            )
        self._recorded.move_to_end(shape)
        packed, candidates = self._recorded[shape](*inputs)
        return Packed(packed[:batch], Candidates(*(part[:batch] for part in candidates)))

    def _batch_to_run(self, batch: int, size: tuple[int, ...]) -> int:
        """Return the batch that one is padded to.

        Its own where that is recorded, or nothing larger is. Else a power of two, or, at first, a
        larger one that is recorded.

        Args:
            batch: B.
            size: of the images, behind the batch.
        """
        larger = [kept[0] for kept in self._recorded if kept[1:] == size and kept[0] >= batch]
        if not larger or batch in larger:
            return batch
        own = min(1 << (batch - 1).bit_length(), *larger)
        if own not in larger:
            self._padded[own, *size] += 1
            if self._padded[own, *size] <= PADDED_AT_FIRST:
                return min(larger)
        return own

    def _make_room(self) -> None:
        """Drop the recording that was not used for longest, where there are enough of them."""
        if len(self._recorded) < MAX_GRAPHS:
            return
        self._computing.synchronize()
        self._recorded.popitem(last=False)
        note = (
            f"more than {MAX_GRAPHS} sizes and batches: CUDA graphs are recorded again as they "
            "come; fewer sizes (--imgsz, images of one shape) save that time"
        )
        if note not in self.notes:
            self.notes.append(note)

    def close(self) -> None:
        """Wait for what runs, and free the recordings."""
        self._computing.synchronize()
        self._recorded.clear()


@contextmanager
def honest_float32() -> Iterator[None]:
    """Let float32 convolutions be float32, not TF32, and the fastest algorithm be searched."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic
    with cudnn.flags(
        enabled=True, benchmark=not deterministic, deterministic=deterministic, allow_tf32=False
    ):
        yield
