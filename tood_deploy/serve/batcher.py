"""Joins the images of many requests into batches of one padded size, within a bound on the wait.

Comes in: padded images with thresholds of their own. Goes out: a future of each image's detections.
Knows no HTTP, no files and no image formats; an engine is all that it calls.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines import BatchDetections, Engine
from tood_deploy.errors import ToodError
from tood_deploy.matching import NetDetections

GroupKey = tuple[tuple[int, int], float]  # padded rows and columns, IoU threshold


class QueueFull(ToodError):  # noqa: N818 - a state that passes, no fault
    """No more images are taken at the moment."""


@dataclass(eq=False)
class PendingImage:
    """An image that waits for the network.

    Attributes:
        image: (rows, columns, 3) uint8 RGB, padded.
        valid_hw: rows and columns that hold real pixels.
        conf: score that a detection must exceed.
        iou: overlap above which the lower-scored of two boxes of a class goes.
        answer: of the batcher.
        queued_s, started_s, ended_s: when it came, went into the network, and came out of it, in
            seconds of `time.perf_counter`.
        batch: how many images were in its batch.
    """

    image: NDArray[np.uint8]
    valid_hw: tuple[int, int]
    conf: float
    iou: float
    answer: Future[NetDetections] = field(default_factory=Future)
    queued_s: float = 0.0
    started_s: float = 0.0
    ended_s: float = 0.0
    batch: int = 0

    @property
    def group(self) -> GroupKey:
        """What images of one batch have in common; scores are cut for each image apart."""
        return (self.image.shape[0], self.image.shape[1]), self.iou


class BatchObserver(Protocol):
    """Is given every batch that the network has answered; metrics."""

    def __call__(self, images: Sequence[PendingImage], /) -> None:
        """Count a batch."""
        ...


class Batcher:
    """Runs an engine on images from any number of threads.

    A thread of its own forms batches and starts them, another waits for them. While the engine is
    busy, images gather; while it is idle, an image waits for others no longer than `delay_s`.

    Attributes:
        capacity: the most images that may wait for the network.
        closed: whether it takes no more images.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        delay_s: float,
        capacity: int,
        observe: BatchObserver | None = None,
    ) -> None:
        """Start the threads.

        Args:
            engine: of the model; nobody else calls it while the batcher runs.
            max_batch: the most images of a batch; an engine's own bound goes before.
            delay_s: how long the first image of a batch waits for others.
            capacity: the most images that may wait.
            observe: gets every batch that was answered.
        """
        self.engine, self.max_batch, self.delay_s = engine, max_batch, delay_s
        self.capacity, self._observe = capacity, observe
        self.closed = False
        self._reserved = 0
        self._groups: dict[GroupKey, deque[PendingImage]] = {}
        self._changed = threading.Condition()
        self._slots = threading.Semaphore(engine.in_flight)
        self._started: SimpleQueue[tuple[list[PendingImage], Any] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"batcher-{target.__name__}", daemon=True)
            for target in (self._form_batches, self._collect_batches)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """How many images wait for the network, those that are still being decoded included."""
        return self._reserved

    def reserve(self, images: int) -> None:
        """Take places in the queue, before the images are decoded.

        Raises:
            QueueFull: there are not so many free.
        """
        with self._changed:
            if self.closed or self._reserved + images > self.capacity:
                raise QueueFull(
                    f"{self._reserved} images wait already, {self.capacity} may; try again later"
                )
            self._reserved += images

    def release(self, images: int) -> None:
        """Give places back that `reserve` took and no image will fill."""
        with self._changed:
            self._reserved -= images

    def submit(self, pending: PendingImage) -> Future[NetDetections]:
        """Queue an image that has a reserved place, and return the future of its detections."""
        pending.queued_s = time.perf_counter()
        with self._changed:
            self._groups.setdefault(pending.group, deque()).append(pending)
            self._changed.notify()
        return pending.answer

    def cancel(self, images: Sequence[PendingImage]) -> None:
        """Take images out of the queue that nobody waits for; those in the network stay."""
        with self._changed:
            for pending in images:
                group = self._groups.get(pending.group)
                if group and pending in group:
                    self._remove(group, [pending])
                    pending.answer.cancel()

    def close(self) -> None:
        """Answer what waits, then end the threads; may be called again."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _remove(self, group: deque[PendingImage], images: Sequence[PendingImage]) -> None:
        for pending in images:
            group.remove(pending)
        self._reserved -= len(images)
        if not group:
            self._groups = {key: images for key, images in self._groups.items() if images}

    def _largest(self, key: GroupKey) -> int:
        largest = self.engine.batches_at(key[0])[1]
        return self.max_batch if largest is None else min(self.max_batch, largest)

    def _next_batch(self) -> list[PendingImage]:
        """Wait for a batch that is due; empty where there will be none."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._groups or self.closed)
                if not self._groups:
                    return []
                keys = sorted(self._groups, key=lambda key: self._groups[key][0].queued_s)
                full = [key for key in keys if len(self._groups[key]) >= self._largest(key)]
                key = (full or keys)[0]
                group = self._groups[key]
                wait_s = group[0].queued_s + self.delay_s - time.perf_counter()
                if full or self.closed or wait_s <= 0:
                    images = [group[i] for i in range(min(len(group), self._largest(key)))]
                    self._remove(group, images)
                    # From here on nobody can cancel them, so that an answer always has a taker.
                    wanted = [one for one in images if one.answer.set_running_or_notify_cancel()]
                    if wanted:
                        return wanted
                    continue
                self._changed.wait(wait_s)

    def _form_batches(self) -> None:
        while True:
            self._slots.acquire()  # first, so that images gather for as long as the engine is busy
            images = self._next_batch()
            if not images:
                self._started.put(None)
                return
            now = time.perf_counter()
            for pending in images:
                pending.started_s, pending.batch = now, len(images)
            try:
                ticket = self.engine.submit(*self._arrays(images), *_thresholds(images))
            except Exception as error:  # of the runtime's own types; it belongs to the requests
                ticket = error
            self._started.put((images, ticket))

    def _arrays(
        self, images: Sequence[PendingImage]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return the batch; an engine that takes no so few images gets the last one again."""
        smallest = self.engine.batches_at(images[0].group[0])[0]
        filled = [*images, *[images[-1]] * (smallest - len(images))]
        valid_hw = np.array([pending.valid_hw for pending in filled], np.int32)
        return np.stack([pending.image for pending in filled]), valid_hw

    def _collect_batches(self) -> None:
        while (started := self._started.get()) is not None:
            images, ticket = started
            try:
                detections = None if isinstance(ticket, Exception) else self.engine.collect(ticket)
                failure = ticket if isinstance(ticket, Exception) else None
            except Exception as error:  # as above
                detections, failure = None, error
            self._slots.release()
            self._answer(images, detections, failure)

    def _answer(
        self,
        images: Sequence[PendingImage],
        detections: BatchDetections | None,
        failure: Exception | None,
    ) -> None:
        """Give every image its own detections; where the batch failed, run its images alone.

        One image that the network has no answer for takes no other with it.
        """
        now = time.perf_counter()
        for i, pending in enumerate(images):
            pending.ended_s = now
            if detections is not None:
                _resolve(pending, _rows(detections, i, pending.conf))
            elif len(images) == 1:
                _resolve(pending, failure or ToodError("the network gave no answer"))
            else:
                _resolve(pending, self._run_alone(pending))
        if detections is not None and self._observe is not None:
            self._observe(images)

    def _run_alone(self, pending: PendingImage) -> NetDetections | Exception:
        try:
            rows = self.engine.infer(*self._arrays([pending]), pending.conf, pending.iou)
        except Exception as error:  # as above
            return error
        return _rows(rows, 0, pending.conf)


def _thresholds(images: Sequence[PendingImage]) -> tuple[float, float]:
    """Return the lowest score and the one IoU of a batch.

    Suppression is greedy and goes by score, so a higher score threshold only cuts.
    """
    return min(pending.conf for pending in images), images[0].iou


def _rows(detections: BatchDetections, slot: int, conf: float) -> NetDetections:
    """Return copies of one image's detections above its own score threshold."""
    scores = detections.scores[slot, : int(detections.num_dets[slot])]
    count = int(np.count_nonzero(scores > np.float32(conf)))  # best first
    return NetDetections(
        detections.boxes_net[slot, :count].copy(),
        scores[:count].copy(),
        detections.labels[slot, :count].copy(),
    )


def _resolve(pending: PendingImage, outcome: NetDetections | Exception) -> None:
    if isinstance(outcome, Exception):
        pending.answer.set_exception(outcome)
    else:
        pending.answer.set_result(outcome)
