"""One of the sets of buffers that a TensorRT engine works in.

Its stream, its memory on both sides, and the plan bound to them.

Two of them let the copies of one batch overlap with the computing of another. In a block of
`Gpu.current`, all of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections
from tood_deploy.engines.tensorrt.cuda import (
    CudaError,
    DeviceArray,
    DeviceBuffer,
    Event,
    PinnedBuffer,
    Stream,
)
from tood_deploy.engines.tensorrt.execution import ALIGNMENT, CudaGraph, Execution
from tood_deploy.engines.tensorrt.plan import AddNote, Plan
from tood_deploy.engines.tensorrt.repair import BatchCandidates
from tood_deploy.errors import ToodError
from tood_deploy.graph_io import CANDIDATES

Array = NDArray[Any] | DeviceArray


class Tensors:
    """Places of the largest batch's tensors in one block of memory, so that one copy moves all."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]) -> None:
        """Lay out tensors, given by name as (shape, type), one after the other."""
        self.tensors = dict(tensors)
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, (shape, dtype) in tensors.items():
            self.offsets[name] = self.size
            self.size += -(-prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT

    def addresses(self, base: int) -> dict[str, int]:
        """Return the addresses by name, in a block that begins at `base`."""
        return {name: base + offset for name, offset in self.offsets.items()}

    def view(self, buffer: PinnedBuffer, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a tensor of a smaller batch, or of another size, in its place.

        Args:
            buffer: of at least `size` bytes.
            name: of the tensor.
            shape: that it has in this batch.
        """
        return buffer.view(self.offsets[name], shape, self.tensors[name][1])


class Slot:
    """Buffers for one batch at a time."""

    def __init__(
        self, plan: Plan, scratch: DeviceBuffer, *, cuda_graph: CudaGraph, add_note: AddNote
    ) -> None:
        """Allocate for the largest batch and size that the plan takes.

        Args:
            plan: what will run here.
            scratch: memory that all slots share, taking turns.
            cuda_graph, add_note: as `Execution` takes them.

        Raises:
            OutOfDeviceMemory: no room.
        """
        self._plan, self._scratch, self._add_note = plan, scratch, add_note
        self._cuda_graph: CudaGraph = cuda_graph
        largest = max(profile.max_batch for profile in plan.profiles)
        pixels = max(profile.max_batch * prod(profile.size_hw) for profile in plan.profiles) * 3
        # The images come last: what precedes them is copied even where they are on the GPU already.
        self._inputs = Tensors(
            {
                "valid_hw": ((largest, 2), np.int32),
                "score_threshold": ((), np.float32),
                "iou_threshold": ((), np.float32),
                "images": ((pixels,), np.uint8),
            }
        )
        rows = (largest, plan.max_det)
        self._outputs = Tensors(
            {
                "num_dets": ((largest,), np.int32),
                "boxes": ((*rows, 4), np.float32),
                "scores": (rows, np.float32),
                "labels": (rows, np.int32),
            }
        )
        count = plan.candidates
        types = (np.float32, np.float32, np.int64)
        shapes = ((largest, count, 4), (largest, count), (largest, count))
        # Of the size zero where the plan gives none.
        self._candidates = Tensors(
            dict(zip(CANDIDATES, zip(shapes, types, strict=True), strict=True)) if count else {}
        )
        self._executions: dict[tuple[int, int], Execution] = {}
        self._on_device: dict[str, DeviceArray] = {}
        self._pixels, self._is_padded = 0, False
        self._resources = ExitStack()
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        def own(resource: Any) -> Any:
            self._resources.callback(resource.close)
            return resource

        self.stream: Stream = own(Stream())
        self.computed: Event = own(Event())
        self.done: Event = own(Event())
        self._marks: list[Event] = [
            own(Event(timed=True)) for _ in range(3)
        ]  # begun, inputs on the GPU, computed
        self._host_in: PinnedBuffer = own(PinnedBuffer(self._inputs.size, "images"))
        self._host_out: PinnedBuffer = own(PinnedBuffer(self._outputs.size, "detections"))
        self._device_in: DeviceBuffer = own(DeviceBuffer(self._inputs.size, "images"))
        self._device_out: DeviceBuffer = own(DeviceBuffer(self._outputs.size, "detections"))
        self._host_candidates: PinnedBuffer = own(PinnedBuffer(self._candidates.size, "candidates"))
        self._device_candidates: DeviceBuffer = own(
            DeviceBuffer(self._candidates.size, "candidates")
        )
        self._resources.callback(self._close_executions)
        self._resources.callback(self.stream.drain)

    def fill(
        self,
        images: Array,
        valid_hw: Array,
        score_threshold: float,
        iou_threshold: float,
        rows: int,
    ) -> None:
        """Take a batch, once the GPU is through with what lay here before.

        Args:
            images: (B, H, W, 3) uint8 RGB, in host memory or on the GPU.
            valid_hw: (B, 2) int32.
            score_threshold, iou_threshold: 0 to 1.
            rows: B or more, the batch that will run. Images beyond B are all padding, as none of
                their pixels is valid.
        """
        self.done.wait()
        self._on_device.clear()
        self.iou_threshold = iou_threshold
        self._pixels, self._is_padded = images.size, rows > len(images)
        self._inputs.view(self._host_in, "valid_hw", (rows, 2))[...] = 0
        values = {
            "images": images,
            "valid_hw": valid_hw,
            "score_threshold": np.float32(score_threshold),
            "iou_threshold": np.float32(iou_threshold),
        }
        for name, value in values.items():
            if isinstance(value, DeviceArray):
                self._on_device[name] = value
            else:
                self._inputs.view(self._host_in, name, np.shape(value))[...] = value

    def start(
        self, profile: int, shape: tuple[int, ...], others: list[Event], *, timed: bool = False
    ) -> None:
        """Give the GPU the copies and the computing of the batch, and does not wait for them.

        Args:
            profile: the number of the optimisation profile.
            shape: of the images, (B, H, W, 3), with those that are all padding.
            others: marks of other slots; computing begins after them, since all use the same
                scratch memory.
            timed: whether `seconds` will be asked for.

        Raises:
            DeviceError: CUDA or TensorRT refuses.
        """
        try:
            execution = self._executions.get((profile, shape[0])) or self._new_execution(
                profile, shape, others
            )
            self._begun = time.perf_counter()
            self._mark(0, timed)
            images = self._copy_in(execution)
            self._mark(1, timed)
            self._take_turn(others)
            execution.run(images)
            self._mark(2, timed)
            self.computed.record(self.stream)
            self.stream.to_host(
                self._host_out.address, self._device_out.address, self._outputs.size
            )
            self.done.record(self.stream)
        except BaseException:
            self.stream.drain()  # the buffers are the next batch's
            self._on_device.clear()
            raise

    def _mark(self, number: int, timed: bool) -> None:
        if timed:
            self._marks[number].record(self.stream)

    def seconds(self, since: float) -> tuple[float, float]:
        """Return how long a timed batch took to the GPU, and to compute there.

        How long to bring it to the GPU, and to compute.

        Args:
            since: the moment of `time.perf_counter` from which on bringing it counts: what the CPU
                did before the GPU began.
        """
        begun, brought, computed = self._marks
        return self._begun - since + brought.seconds_since(begun), computed.seconds_since(brought)

    def _take_turn(self, others: list[Event]) -> None:
        for event in others:
            event.hold_back(self.stream)

    def _new_execution(
        self, profile: int, shape: tuple[int, ...], others: list[Event]
    ) -> Execution:
        self._take_turn(others)  # choosing a profile may be work for the GPU, too
        addresses = (
            self._inputs.addresses(self._device_in.address)
            | self._outputs.addresses(self._device_out.address)
            | self._candidates.addresses(self._device_candidates.address)
        )
        shapes = {"images": shape, "valid_hw": (shape[0], 2)}
        execution = Execution(
            self._plan,
            profile,
            shapes,
            addresses,
            self._scratch,
            self.stream,
            cuda_graph=self._cuda_graph,
            add_note=self._add_note,
        )
        self._executions[profile, shape[0]] = execution
        return execution

    def _copy_in(self, execution: Execution) -> int | None:
        """Bring the inputs to the GPU.

        The address of the images where they can be read where they lie.
        """
        addresses = self._inputs.addresses(self._device_in.address)
        images = self._on_device.get("images")
        in_place = (
            images is not None
            and not self._is_padded
            and not execution.replays
            and images.address % ALIGNMENT == 0
        )
        on_host = self._pixels if images is None else 0
        self.stream.to_device(
            self._device_in.address, self._host_in.address, self._inputs.offsets["images"] + on_host
        )
        for name, array in self._on_device.items():
            if not (in_place and array is images):
                self.stream.within_device(addresses[name], array.address, array.nbytes)
        if execution.replays:
            return None
        return images.address if images is not None and in_place else addresses["images"]

    def detections(self, batch: int) -> BatchDetections:
        """Return what was found in the batch, waiting for it if need be.

        Raises:
            CudaError: the GPU failed.
        """
        try:
            self.done.wait()
        except CudaError as error:
            raise CudaError(f"{self._plan.path}: the GPU failed at this batch: {error}") from error
        self._on_device.clear()
        shapes = {name: (batch, *shape[1:]) for name, (shape, _) in self._outputs.tensors.items()}
        return BatchDetections(
            *(
                self._outputs.view(self._host_out, name, shape).copy()
                for name, shape in shapes.items()
            )
        )

    def candidates(self, batch: int) -> BatchCandidates:
        """Return the input of suppression of the batch whose detections were asked for last.

        Raises:
            CudaError: the GPU failed.
        """
        self.stream.to_host(
            self._host_candidates.address, self._device_candidates.address, self._candidates.size
        )
        self.stream.synchronise()
        boxes, scores, labels = (
            self._candidates.view(self._host_candidates, name, (batch, *shape[1:]))
            for name, (shape, _) in self._candidates.tensors.items()
        )
        return BatchCandidates(boxes, scores, labels)

    def _close_executions(self) -> None:
        while self._executions:
            self._executions.popitem()[1].close()

    def close(self) -> None:
        """Wait for the GPU, then frees everything. May be called again."""
        self._on_device.clear()
        self._resources.close()


Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Ticket:
    """A batch that was submitted and can be collected once.

    Attributes:
        index: the slot it lies in.
        batch: how many images it holds.
        thread: the thread that submitted it.
    """

    index: int
    batch: int
    thread: int = field(default_factory=threading.get_ident)


class Slots(Generic[Item]):
    """Hands out slots. A call waits where another thread is going to give one back."""

    def __init__(self, items: Sequence[Item], name: str) -> None:
        """Take the sets of buffers; `name` is the engine's, for errors."""
        self._items = tuple(items)
        self._name = name
        self._free = set(range(len(items)))
        self._held: dict[int, Ticket] = {}
        self._busy = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def take(self) -> Iterator[tuple[Item, Callable[[int], Ticket]]]:
        """Yield a free slot for the block, and a function that keeps it beyond the block.

        The function takes the number of images of the batch that stays in it.

        Raises:
            ToodError: all slots hold batches that this thread submitted and did not collect; or the
                engine was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or self._blocked_by_caller())
            self._check_open()
            if not self._free:
                raise ToodError(
                    f"{self._name}: {len(self._items)} batches are submitted already; collect the "
                    "oldest one first"
                )
            index = min(
                self._free
            )  # one caller at a time stays with one slot, whose buffers are warm
            self._free.remove(index)
            self._busy += 1
        try:
            yield (
                self._items[index],
                lambda batch: self._held.setdefault(index, Ticket(index, batch)),
            )
        finally:
            self._give_back(index)

    @contextmanager
    def resume(self, ticket: Ticket) -> Iterator[Item]:
        """Yield the slot of a submitted batch for the block; free after it.

        Raises:
            ToodError: the ticket was collected before or is of another engine; or the engine was
                closed.
        """
        with self._changed:
            self._check_open()
            if self._held.get(ticket.index) is not ticket:
                raise ToodError(
                    f"{self._name}: this ticket was collected already, or is another engine's; "
                    "collect each ticket once"
                )
            del self._held[ticket.index]
            self._busy += 1
        try:
            yield self._items[ticket.index]
        finally:
            self._give_back(ticket.index)

    def close(self) -> None:
        """Let nobody in any more, and waits for the calls at work.

        Batches that were not collected are lost.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy)

    def _give_back(self, index: int) -> None:
        with self._changed:
            self._busy -= 1
            if index not in self._held:
                self._free.add(index)
            self._changed.notify_all()

    def _blocked_by_caller(self) -> bool:
        caller = threading.get_ident()
        return len(self._held) == len(self._items) and all(
            ticket.thread == caller for ticket in self._held.values()
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ToodError(f"{self._name}: the engine was closed; open the model again")
