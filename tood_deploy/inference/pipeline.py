"""Overlaps reading, scaling and inference: three threads, with a bound on what lies between them.

A source of frames and a detector come in; frames with their detections come out, in order. It knows
no files and draws nothing.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.engines import BatchDetections, Engine
from tood_deploy.errors import ToodError
from tood_deploy.inference.frame import Frame, Prepared, Source
from tood_deploy.inference.slicing import Slicing
from tood_deploy.preprocess import ImageSize

STAGES = {"pre": "pre", "infer": "infer", "post": "post", "end_to_end": "end-to-end"}
KEPT_FRAMES = 100_000


class Timings:
    """Milliseconds per frame of every stage.

    Scaling, engine, boxes back, and from the decoded frame to its result.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.started_s = self.ended_s = time.perf_counter()
        self._ms: dict[str, deque[float]] = {stage: deque(maxlen=KEPT_FRAMES) for stage in STAGES}

    def add(self, stage: str, seconds: float, frames: int = 1) -> None:
        """Add what a stage took for some frames together.

        Args:
            stage: a key of `STAGES`.
            seconds: for all of the frames.
            frames: how many there were.
        """
        self._ms[stage].extend([seconds * 1000 / frames] * frames)

    def finish_frame(self, decoded_s: float) -> None:
        """Count a frame that was decoded at that moment and has its result now."""
        self.ended_s = time.perf_counter()
        self.frames += 1
        self.add("end_to_end", self.ended_s - decoded_s)

    def percentile_ms(self, stage: str, percent: float) -> float:
        """Return a percentile of a stage's time per frame; 0 where nothing ran."""
        return float(np.percentile(list(self._ms[stage]), percent)) if self._ms[stage] else 0.0

    def mean_ms(self, stage: str) -> float:
        """Return the mean of a stage's time per frame; 0 where nothing ran."""
        return float(np.mean(list(self._ms[stage]))) if self._ms[stage] else 0.0

    @property
    def fps(self) -> float:
        """Frames a second from the start to the last result."""
        return self.frames / max(self.ended_s - self.started_s, 1e-9)

    def summary(self) -> str:
        """Return all of it in one line: medians, 95th percentiles, frames a second."""
        stages = (
            f"{name} {self.percentile_ms(stage, 50):.1f} (p95 {self.percentile_ms(stage, 95):.1f})"
            for stage, name in STAGES.items()
        )
        return (
            f"{self.frames} frames in {self.ended_s - self.started_s:.1f} s, {self.fps:.1f} fps; "
            f"ms per frame: {', '.join(stages)}"
        )


MAX_BYTES_IN_FLIGHT = 256 * 2**20

Item = TypeVar("Item")


class BatchDetector(Protocol):
    """What the pipeline needs of a detector; `Detector` is one."""

    @property
    def engine(self) -> Engine:
        """The model."""
        ...

    @property
    def sizing(self) -> ImageSize:
        """The size that images are scaled to fit."""
        ...

    @property
    def fast_decode(self) -> bool:
        """Whether JPEG images may be decoded smaller than they are."""
        ...

    @property
    def slicing(self) -> Slicing | None:
        """The windows that images are searched in; None: as they are."""
        ...

    @property
    def slice_notes(self) -> list[str]:
        """Remarks on slicing, for the user; grows."""
        ...

    def prepare(
        self, image: NDArray[np.uint8], image_hw: tuple[int, int] | None, *, color: Literal["bgr"]
    ) -> Prepared:
        """Scale and pad an image.

        Args:
            image: (H, W, 3) uint8 BGR.
            image_hw: rows and columns of the original, where it was decoded smaller.
            color: order of the channels.
        """
        ...

    def submit(self, batch: Sequence[Prepared]) -> Any:
        """Start the network on images of one padded size."""
        ...

    def collect(self, ticket: Any) -> BatchDetections:
        """Wait for what was submitted."""
        ...

    def to_detections(
        self, batch: Sequence[Prepared], detections: BatchDetections
    ) -> list[Detections]:
        """Return the detections of each image, in its own pixels."""
        ...


def detect_frames(
    detector: BatchDetector, source: Source, batch: int = 1, timings: Timings | None = None
) -> Generator[tuple[Frame, Detections], None, None]:
    """Yield every frame of a source with what the detector found in it, in order.

    Frames of one padded size are batched; results do not depend on the batch. Closing the iterator
    early stops all threads.

    Args:
        detector: runs in a thread of its own.
        source: is read in a thread of its own; its errors come out here, after the frames before
            them.
        batch: largest number of frames, or of their windows where they are sliced, in an engine
            call.
        timings: gets what every stage took.

    Raises:
        ToodError: batch is not positive, fast decoding of what is no images, or whatever the source
            or the engine raised.
    """
    if batch < 1:
        raise ToodError(f"batch is {batch}; expected a positive number")
    if detector.fast_decode:
        source.decode_to_fit(detector.sizing)
    if detector.slicing is not None:
        from tood_deploy.inference.sliced_pipeline import SlicedPipeline

        return SlicedPipeline(detector, source, batch, timings or Timings(), detector.slicing).run()
    return Pipeline(detector, source, batch, timings or Timings()).run()


class InFlight:
    """The frames between reading and the consumer, bounded by number and bytes.

    One batch is always let through.
    """

    def __init__(
        self, min_frames: int, max_frames: int, max_bytes: int = MAX_BYTES_IN_FLIGHT
    ) -> None:
        self.min_frames, self.max_frames, self.max_bytes = min_frames, max_frames, max_bytes
        self.frames = self.bytes = 0
        self.stopped = False
        self._changed = threading.Condition()

    def wait_for_room(self) -> bool:
        """Wait until another frame may be read; False once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self._has_room())
            return not self.stopped

    def _has_room(self) -> bool:
        return self.frames < self.min_frames or (
            self.frames < self.max_frames and self.bytes < self.max_bytes
        )

    def enter(self, frame: Frame) -> None:
        """Count a frame in."""
        self._change(1, frame.image_bgr.nbytes)

    def leave(self, frame: Frame) -> None:
        """Count a frame out."""
        self._change(-1, -frame.image_bgr.nbytes)

    def stop(self) -> None:
        """Let nothing more in."""
        self.stopped = True
        self._change(0, 0)

    def _change(self, frames: int, nbytes: int) -> None:
        with self._changed:
            self.frames += frames
            self.bytes += nbytes
            self._changed.notify_all()


@dataclass(frozen=True)
class _End:
    """The last thing in a queue; with the error that ended the stage before it, if one did."""

    error: BaseException | None = None


_Decoded = tuple[Frame, Prepared]
_Result = tuple[Frame, Detections]


@dataclass(frozen=True)
class _Running:
    """A batch that the engine works on."""

    decoded: list[_Decoded]
    ticket: Any
    started_s: float


class Pipeline:
    """Reads, scales and infers in threads of their own, one frame after another."""

    def __init__(
        self, detector: BatchDetector, source: Source, batch: int, timings: Timings
    ) -> None:
        self.detector, self.source, self.batch, self.timings = detector, source, batch, timings
        # Live: one batch in the engine, one waiting, so that no result is older than it must be.
        self.at_once = 1 if source.kind == "live" else detector.engine.in_flight
        self.in_flight = InFlight(
            self.at_once * batch,
            2 * batch if source.kind == "live" else (self.at_once + 1) * batch + 2,
        )
        self.running: deque[_Running] = deque()
        self.collected_s = 0.0
        self.frames: SimpleQueue[Frame | _End] = SimpleQueue()
        self.prepared: SimpleQueue[_Decoded | _End] = SimpleQueue()
        self.results: SimpleQueue[_Result | _End] = SimpleQueue()
        self.threads: list[threading.Thread] = []

    def run(self) -> Generator[_Result, None, None]:
        """Start the threads, and yield results until all have ended."""
        stages = (
            (self._read, self.frames),
            (self._prepare, self.prepared),
            (self._infer, self.results),
        )
        self.threads = [
            threading.Thread(target=_run_stage, args=stage, name=stage[0].__name__, daemon=True)
            for stage in stages
        ]
        _RUNNING.add(self)
        for thread in self.threads:
            thread.start()
        try:
            for frame, detections in queue_items(self.results):
                self.in_flight.leave(frame)
                yield frame, detections
        finally:
            self.stop()

    def stop(self, limit_s: float | None = None) -> None:
        """End all threads, and wait for them, each no longer than `limit_s`."""
        self.in_flight.stop()
        self.source.close()
        for thread in self.threads:
            thread.join(limit_s)
        _RUNNING.discard(self)

    def _read(self) -> None:
        frames = iter(self.source)
        while self.in_flight.wait_for_room() and (frame := next(frames, None)) is not None:
            self.in_flight.enter(frame)
            self.frames.put(frame)

    def _prepare(self) -> None:
        for frame in queue_items(self.frames):
            if self.in_flight.stopped:
                continue
            started = time.perf_counter()
            prepared = self.detector.prepare(frame.image_bgr, frame.original_hw, color="bgr")
            self.timings.add("pre", time.perf_counter() - started)
            self.prepared.put((frame, prepared))

    def _infer(self) -> None:
        waiting: list[_Decoded] = []
        try:
            for frame, prepared in queue_items(self.prepared, lambda: self._finish(waiting)):
                if waiting and waiting[0][1].transform.net_hw != prepared.transform.net_hw:
                    self._submit(waiting)
                waiting.append((frame, prepared))
                if len(waiting) == self.batch:
                    self._submit(waiting)
        finally:
            for running in self.running:  # after an error: the engine may be used again
                with suppress(Exception):
                    self.detector.collect(running.ticket)

    def _finish(self, waiting: list[_Decoded]) -> None:
        """Run what still waits, and hands all results on."""
        self._submit(waiting)
        while self.running:
            self._collect()

    def _submit(self, waiting: list[_Decoded]) -> None:
        """Start all that waits, and hand on what must be done before more may be started."""
        decoded = list(waiting)
        waiting.clear()
        if not decoded or self.in_flight.stopped:
            return
        started = time.perf_counter()
        self.running.append(
            _Running(decoded, self.detector.submit([prepared for _, prepared in decoded]), started)
        )
        while len(self.running) >= self.at_once:
            self._collect()

    def _collect(self) -> None:
        """Wait for the batch that was started first, and hands its results on."""
        running = self.running.popleft()
        batch = [prepared for _, prepared in running.decoded]
        collected = self.detector.collect(running.ticket)
        inferred = time.perf_counter()
        detections = self.detector.to_detections(batch, collected)
        self.timings.add(
            "infer", inferred - max(running.started_s, self.collected_s), len(batch)
        )  # while the one before ran, it waited
        self.timings.add("post", time.perf_counter() - inferred, len(batch))
        self.collected_s = inferred
        for (frame, _), objects in zip(running.decoded, detections, strict=True):
            self.timings.finish_frame(frame.decoded_s)
            self.results.put((frame, objects))


# Streams that were begun and not closed. Threads that still run while Python takes itself down end
# the process by an abort, from within the runtimes' libraries.
_RUNNING: WeakSet[Pipeline] = WeakSet()
EXIT_LIMIT_S = 10.0


@atexit.register
def _stop_streams() -> None:
    for pipeline in list(_RUNNING):
        with suppress(Exception):
            pipeline.stop(EXIT_LIMIT_S)


def _run_stage(work: Callable[[], None], results: SimpleQueue) -> None:
    """Return a thread's work; however it ends, the next stage is told."""
    try:
        work()
    except BaseException as error:  # raised again in the consumer's thread
        results.put(_End(error))
    else:
        results.put(_End())


def queue_items(
    queue: SimpleQueue[Item | _End], at_end: Callable[[], None] = lambda: None
) -> Iterator[Item]:
    """Yield what a queue holds, to its end; raises the error it ended with, after `at_end`."""
    while not isinstance(item := queue.get(), _End):
        yield item
    at_end()
    if item.error is not None:
        raise item.error
