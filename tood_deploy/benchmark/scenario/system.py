"""A detector that answers the queries of a scenario, from decoded frames or from encoded bytes.

Positions of images come in; every answer is a call back. Knows no LoadGen and no traffic.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.scenario.traffic import Complete, Fail, Query, Scenario
from tood_deploy.data.image_file import decode_image
from tood_deploy.data.image_set import photograph_set
from tood_deploy.data.images import read_file
from tood_deploy.detections import Detections
from tood_deploy.engines import BatchDetections
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Prepared
from tood_deploy.matching import NetDetections
from tood_deploy.serve.batcher import Batcher, PendingImage

Start = Literal["frames", "bytes"]
PHOTOGRAPH_PARTS = 8
JPEG_QUALITY = 90
ROOM_BATCHES = 3  # prepared images that wait: enough that no batch waits for decoding


class ImageLibrary:
    """Images by position; those that are loaded are in memory, decoded or as their bytes.

    Attributes:
        description: what they are, for reports.
    """

    def __init__(
        self, files: Sequence[Path], start: Start, imgsz: tuple[int, int] | None = None
    ) -> None:
        """Take files; none of them is read yet.

        Args:
            files: of images; parts of a photograph that fill `imgsz` where there are none.
            start: whether a query begins with a decoded frame or with encoded bytes.
            imgsz: (short side, long side).
        """
        self.start, self._loaded = start, dict[int, NDArray[np.uint8] | bytes]()
        self._parts = [] if files or imgsz is None else _photograph_parts(imgsz)
        self.names = [path.name for path in files] or [name for name, _ in self._parts]
        self._files = files
        self.description = (
            f"{len(files)} images of {files[0].parent}"
            if files
            else f"{PHOTOGRAPH_PARTS} parts of a photograph, JPEG of quality {JPEG_QUALITY}"
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def loaded(self) -> tuple[int, ...]:
        """Return the positions of the images in memory."""
        return tuple(self._loaded)

    def load(self, positions: Sequence[int]) -> None:
        """Read images into memory.

        Raises:
            InputError: one cannot be read.
        """
        for position in positions:
            data = self._bytes_of(position)
            self._loaded[position] = (
                data if self.start == "bytes" else decode_image(data, self.names[position])
            )

    def unload(self, positions: Sequence[int]) -> None:
        """Drop images."""
        for position in positions:
            self._loaded.pop(position, None)

    def frame(self, position: int) -> NDArray[np.uint8]:
        """Return an image that is loaded, (H, W, 3) uint8 BGR; its bytes are decoded here."""
        held = self._loaded[position]
        return decode_image(held, self.names[position]) if isinstance(held, bytes) else held

    def _bytes_of(self, position: int) -> bytes:
        return read_file(self._files[position]) if self._files else self._parts[position][1]


def _photograph_parts(imgsz: tuple[int, int]) -> list[tuple[str, bytes]]:
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return [
        (entry.name, cv2.imencode(".jpg", entry.read(), quality)[1].tobytes())
        for entry in photograph_set(imgsz, PHOTOGRAPH_PARTS)
    ]


@dataclass(frozen=True)
class SystemSettings:
    """How a detector is fed.

    Attributes:
        max_batch: the most images of one engine call.
        workers: threads that decode and scale.
        delay_s: in the scenarios server and offline, how long the first image of a batch waits for
            others while the engine is idle.
    """

    max_batch: int = 8
    workers: int = 2
    delay_s: float = 0.002


class DetectorSystem(ABC):
    """A detector that answers queries; a context manager that ends its threads.

    Attributes:
        kept: detections by position, while they are kept.
        fail: is given what went wrong in a thread of the system.
    """

    def __init__(
        self, detector: Detector, library: ImageLibrary, settings: SystemSettings, fail: Fail
    ) -> None:
        self.detector, self.library, self.settings, self.fail = detector, library, settings, fail
        self._complete: Complete = lambda keys: None
        self.kept: dict[int, Detections] | None = None

    def set_complete(self, complete: Complete) -> None:
        """Take what is called with the keys of images that were answered."""
        self._complete = complete

    @abstractmethod
    def issue(self, queries: Sequence[Query]) -> None:
        """Take the images of one query."""

    def _prepare(self, position: int) -> Prepared:
        return self.detector.prepare(self.library.frame(position))

    def _answer(self, queries: Sequence[Query], results: Sequence[Detections]) -> None:
        if self.kept is not None:
            for query, detections in zip(queries, results, strict=True):
                self.kept[query.position] = detections
        self._complete([query.key for query in queries])

    def close(self) -> None:  # noqa: B027 - not every system has threads
        """End what runs."""

    def __enter__(self) -> DetectorSystem:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamSystem(DetectorSystem):
    """Answers a query before it takes the next: the scenarios single and multi."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool = ThreadPoolExecutor(self.settings.workers)

    def issue(self, queries: Sequence[Query]) -> None:
        """Detect in the images, and answer."""
        positions = [query.position for query in queries]
        if len(positions) == 1:
            prepared = [self._prepare(positions[0])]
        else:
            prepared = list(self._pool.map(self._prepare, positions))
        self._answer(queries, self._detect(prepared))

    def _detect(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """Run the images in batches of one padded size, as many at a time as the engine likes."""
        detector = self.detector
        results: list[Detections | None] = [None] * len(prepared)
        running: deque[tuple[list[int], list[Prepared], Any]] = deque()

        def collect() -> None:
            places, batch, ticket = running.popleft()
            # A batch may be filled up with repeats, which have no place.
            answers = detector.to_detections(batch, detector.collect(ticket))
            for place, detections in zip(places, answers, strict=False):
                results[place] = detections

        for places in self._batches(prepared):
            smallest = detector.engine.batches_at(prepared[places[0]].transform.net_hw)[0]
            batch = [prepared[place] for place in places]
            batch += batch[-1:] * (smallest - len(batch))
            running.append((places, batch, detector.submit(batch)))
            if len(running) >= detector.engine.in_flight:
                collect()
        while running:
            collect()
        return [detections for detections in results if detections is not None]

    def _batches(self, prepared: Sequence[Prepared]) -> Iterator[list[int]]:
        """Yield the places of the images of every batch."""
        groups: dict[tuple[int, int], list[int]] = {}
        for place, one in enumerate(prepared):
            groups.setdefault(one.transform.net_hw, []).append(place)
        for net_hw, places in groups.items():
            bound = self.detector.engine.batches_at(net_hw)[1]
            size = min(self.settings.max_batch, bound or self.settings.max_batch)
            for start in range(0, len(places), size):
                yield places[start : start + size]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class QueueSystem(DetectorSystem):
    """Queues images and forms batches of those that are there: the scenarios server and offline."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        settings, engine = self.settings, self.detector.engine
        room = ROOM_BATCHES * settings.max_batch * engine.in_flight + settings.workers
        self._room = threading.Semaphore(room)
        self._batcher = Batcher(
            engine, max_batch=settings.max_batch, delay_s=settings.delay_s, capacity=room
        )
        self._waiting: SimpleQueue[Query | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"prepare-{number}", daemon=True)
            for number in range(settings.workers)
        ]
        for thread in self._threads:
            thread.start()

    def issue(self, queries: Sequence[Query]) -> None:
        """Queue the images."""
        for query in queries:
            self._waiting.put(query)

    def _work(self) -> None:
        try:
            while (query := self._waiting.get()) is not None:
                # First, so that no more images than these are ever decoded and wait.
                self._room.acquire()
                self._queue(query, self._prepare(query.position))
        except BaseException as error:
            self.fail(error)

    def _queue(self, query: Query, prepared: Prepared) -> None:
        detector = self.detector
        pending = PendingImage(
            prepared.image, prepared.transform.resized_hw, detector.conf, detector.iou
        )

        def answered(future: Future[NetDetections]) -> None:
            self._room.release()
            try:
                self._answer([query], self._detections(prepared, future.result()))
            except BaseException as error:
                self.fail(error)

        self._batcher.reserve(1)
        self._batcher.submit(pending).add_done_callback(answered)

    def _detections(self, prepared: Prepared, net: NetDetections) -> list[Detections]:
        batch = BatchDetections(
            np.array([len(net.scores)], np.int32),
            net.boxes[None],
            net.scores[None],
            net.labels[None],
        )
        return self.detector.to_detections([prepared], batch)

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._batcher.close()


def open_system(
    scenario: Scenario,
    detector: Detector,
    library: ImageLibrary,
    settings: SystemSettings,
    fail: Fail,
) -> DetectorSystem:
    """Return the system of a scenario.

    Args:
        scenario: what is asked.
        detector: answers it.
        library: of the images.
        settings: how the detector is fed.
        fail: is given what goes wrong.
    """
    kind = StreamSystem if scenario in ("single", "multi") else QueueSystem
    return kind(detector, library, settings, fail)


def warm_up(system: DetectorSystem, query_images: int, seconds: float) -> tuple[float, float]:
    """Ask again and again, and return how fast the answers came at the end.

    Args:
        system: with some images loaded, which are asked for in turn.
        query_images: of one query.
        seconds: how long, at least two queries.

    Returns:
        Milliseconds of the fastest query, and its images a second.
    """
    answered = threading.Semaphore(0)

    def complete(keys: Sequence[int]) -> None:
        for _ in keys:
            answered.release()

    system.set_complete(complete)
    loaded = system.library.loaded
    ends, fastest_s, calls = time.perf_counter() + seconds, float("inf"), 0
    while calls < 2 or time.perf_counter() < ends:
        before = time.perf_counter()
        keys = range(query_images)
        system.issue([Query(number, loaded[number % len(loaded)]) for number in keys])
        for _ in range(query_images):
            answered.acquire()
        fastest_s, calls = min(fastest_s, time.perf_counter() - before), calls + 1
    return fastest_s * 1000, query_images / fastest_s
