"""Sliced detection: windows of frames in batches, across frames, while the next are read and cut.

A source and a detector come in; frames with their merged detections come out, in order. The threads
are those of `pipeline`; what differs is that a frame becomes several inputs of the network.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.inference.frame import Frame, Prepared, Source
from tood_deploy.inference.pipeline import (
    MAX_BYTES_IN_FLIGHT,
    BatchDetector,
    InFlight,
    Pipeline,
    Timings,
    detect_frames,
    queue_items,
)
from tood_deploy.inference.slicing import Slicing, merge_windows, shift

ROOM_S = 0.1  # how often a thread that waits for room looks whether the run was stopped
FEWEST_WAITING = 4


class OneFrame(Source):
    """One image that is in memory already."""

    kind = "images"

    def __init__(self, frame: Frame) -> None:
        super().__init__((frame.name,), 1)
        self.frame = frame

    def __iter__(self) -> Iterator[Frame]:
        yield self.frame


def detect_sliced(
    detector: BatchDetector, image_bgr: NDArray[np.uint8], batch: int = 1
) -> Detections:
    """Return the objects of one image, searched as the detector's slicing says.

    Args:
        detector: with `slicing`.
        image_bgr: (H, W, 3) uint8 BGR.
        batch: largest number of windows in an engine call.

    Raises:
        ToodError: batch is not positive, or whatever the engine raised.
    """
    results = list(detect_frames(detector, OneFrame(Frame(image_bgr, "image")), batch))
    return results[0][1]


@dataclass(eq=False)
class _SlicedFrame:
    """A frame while its windows are searched.

    Attributes:
        frame: the image.
        parts: (N, 4) xyxy, all that is searched: the windows, and the whole image where asked for.
        results: of every part, as they come.
        left: parts without a result.
        pre_s, infer_s, post_s: seconds of work so far.
    """

    frame: Frame
    parts: NDArray[np.int64]
    results: dict[int, Detections] = field(default_factory=dict)
    pre_s: float = 0.0
    infer_s: float = 0.0
    post_s: float = 0.0

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.parts)


@dataclass(frozen=True, eq=False)
class _Part:
    """One part of a frame, ready for the network."""

    sliced: _SlicedFrame
    number: int
    prepared: Prepared
    is_last: bool


@dataclass(frozen=True)
class _RunningParts:
    """A batch that the engine works on."""

    parts: list[_Part]
    ticket: Any
    started_s: float


class SlicedPipeline(Pipeline):
    """Reads, cuts and infers in threads of their own; merges when all parts of a frame are done."""

    def __init__(
        self,
        detector: BatchDetector,
        source: Source,
        batch: int,
        timings: Timings,
        slicing: Slicing,
    ) -> None:
        """Start nothing yet.

        Args:
            detector: runs in a thread of its own.
            source: is read in a thread of its own.
            batch: largest number of windows in an engine call.
            timings: gets what every stage took.
            slicing: what windows, and how their detections are merged.
        """
        super().__init__(detector, source, batch, timings)
        self.slicing = slicing
        source.by_window = True
        self.in_flight = InFlight(1, batch + self.at_once + 2)
        self.room = threading.Semaphore(max(2 * batch, FEWEST_WAITING))  # for prepared windows
        self.pending: deque[_SlicedFrame] = deque()  # frames without a result, in order
        self.waiting: dict[tuple[int, int], list[_Part]] = {}  # by padded size
        self.running_parts: deque[_RunningParts] = deque()

    def _prepare(self) -> None:
        for frame in queue_items(self.frames):
            sliced = _SlicedFrame(frame, self._parts(frame))
            inputs = part_inputs(self.detector, frame, sliced.parts, self.slicing)
            count = len(sliced.parts)
            started = time.perf_counter()
            for done, (number, prepared) in enumerate(inputs, 1):
                sliced.pre_s += time.perf_counter() - started
                while not self.room.acquire(timeout=ROOM_S):
                    if self.in_flight.stopped:
                        return
                if self.in_flight.stopped:
                    break
                self.prepared.put(_Part(sliced, number, prepared, done == count))  # pyright: ignore[reportArgumentType] - parts in place of frames
                started = time.perf_counter()

    def _parts(self, frame: Frame) -> NDArray[np.int64]:
        """Return (N, 4) all that is searched of a frame; where that is one window, say so once."""
        parts = frame_parts(self.slicing, frame.size_hw)
        if len(parts) == 1 and not self.detector.slice_notes:
            height, width = self.slicing.size_hw
            note = (
                f"{frame.name} is no larger than a slice of {height} x {width} pixels, and is "
                "searched as it is; so are others of its size"
            )
            self.detector.slice_notes.append(note)  # once for a detector
            self.source.notes.append(note)
        return parts

    def _infer(self) -> None:
        try:
            for part in queue_items(self.prepared, self._finish_all):
                self.room.release()
                if self.in_flight.stopped:
                    continue
                self._take(part)  # pyright: ignore[reportArgumentType] - parts in place of frames
        finally:
            for running in self.running_parts:  # after an error: the engine may be used again
                with suppress(Exception):
                    self.detector.collect(running.ticket)

    def _take(self, part: _Part) -> None:
        if not self.pending or self.pending[-1] is not part.sliced:
            self.pending.append(part.sliced)
        net_hw = part.prepared.transform.net_hw
        group = self.waiting.setdefault(net_hw, [])
        group.append(part)
        if len(group) == self.batch:
            self._submit_parts(self.waiting.pop(net_hw))
        if part.is_last:
            self._make_room()

    def _make_room(self) -> None:
        """Run what waits for a batch to fill, where more frames wait than may: none of a camera.

        What may wait depends on the frames alone, so that batches are the same in every run.
        """
        most = 0 if self.source.kind == "live" else self.batch - 1
        while len(self.pending) > most or self._pending_bytes() > MAX_BYTES_IN_FLIGHT // 2:
            if self.waiting:
                self._submit_parts(self.waiting.pop(next(iter(self.waiting))))
            elif self.running_parts:
                self._collect_parts()
            else:
                return

    def _pending_bytes(self) -> int:
        return sum(sliced.frame.image_bgr.nbytes for sliced in self.pending)

    def _finish_all(self) -> None:
        for group in list(self.waiting.values()):
            self._submit_parts(group)
        self.waiting.clear()
        while self.running_parts:
            self._collect_parts()

    def _submit_parts(self, parts: list[_Part]) -> None:
        """Start a batch, and take the results of what must be done before more may be started."""
        if self.in_flight.stopped:
            return
        started = time.perf_counter()
        ticket = self.detector.submit([part.prepared for part in parts])
        self.running_parts.append(_RunningParts(parts, ticket, started))
        while len(self.running_parts) >= self.at_once:
            self._collect_parts()

    def _collect_parts(self) -> None:
        """Wait for the batch that was started first, and hand on the frames that are complete."""
        running = self.running_parts.popleft()
        prepared = [part.prepared for part in running.parts]
        collected = self.detector.collect(running.ticket)
        inferred = time.perf_counter()
        detections = self.detector.to_detections(prepared, collected)
        infer_s = (inferred - max(running.started_s, self.collected_s)) / len(prepared)
        post_s = (time.perf_counter() - inferred) / len(prepared)
        self.collected_s = inferred
        for part, objects in zip(running.parts, detections, strict=True):
            sliced = part.sliced
            sliced.results[part.number] = shift(objects, sliced.parts[part.number])
            sliced.infer_s += infer_s
            sliced.post_s += post_s
        while self.pending and self.pending[0].done:
            self._hand_on(self.pending.popleft())

    def _hand_on(self, sliced: _SlicedFrame) -> None:
        started = time.perf_counter()
        parts = [sliced.results[number] for number in range(len(sliced.parts))]
        merged = merge_windows(parts, self.slicing)
        sliced.post_s += time.perf_counter() - started
        for stage in ("pre", "infer", "post"):
            self.timings.add(stage, getattr(sliced, f"{stage}_s"))
        self.timings.finish_frame(sliced.frame.decoded_s)
        self.results.put((sliced.frame, merged))


def frame_parts(slicing: Slicing, image_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Return (N, 4) xyxy, the windows of an image, and after them the whole where it is searched.

    An image no larger than a window is one window, and not searched twice.
    """
    windows = slicing.windows(image_hw)
    if len(windows) == 1 or not slicing.whole:
        return windows
    return np.concatenate([windows, [[0, 0, image_hw[1], image_hw[0]]]])


def part_inputs(
    detector: BatchDetector, frame: Frame, parts: NDArray[np.int64], slicing: Slicing
) -> Iterator[tuple[int, Prepared]]:
    """Yield number and input of every part: the whole image first, as it may take longest.

    Args:
        detector: prepares them.
        frame: the image.
        parts: as `frame_parts` gives them.
        slicing: the same.
    """
    has_whole = slicing.whole and len(parts) > 1
    windows = parts[:-1] if has_whole else parts
    if has_whole:
        image = frame.image_bgr
        if frame.reader is not None:
            image = frame.reader.read_to_fit(detector.sizing)
        yield len(windows), detector.prepare(image, frame.original_hw, color="bgr")
    for number, crop in _crops(frame, windows):
        yield number, detector.prepare(crop, None, color="bgr")


def _crops(frame: Frame, windows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield number and pixels, (h, w, 3) uint8 BGR, of every window of a frame."""
    if frame.reader is not None:
        yield from frame.reader.read_windows(windows)
        return
    for number, (left, top, right, bottom) in enumerate(windows.tolist()):
        yield number, frame.image_bgr[top:bottom, left:right]
