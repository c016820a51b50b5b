"""One model in a process of its own, so that start-up time and peak memory are its own; does one turn of calls when told to.

Imports nothing heavy before it is told to start: what the runtime's import takes belongs to start-up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tood_deploy.benchmark.engine_call import Laps
    from tood_deploy.benchmark.warmup import WarmUp
    from tood_deploy.inference.detector import Detector

ENGINE, END_TO_END = "engine only", "end to end"
MOST_PICTURES = 8
Calls = list[dict[str, float]]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: as `open_engine` takes it.
        name: for reports.
        batch: pictures of one call.
        imgsz: (short side, long side); the model's own where None.
        images: folder of pictures; crops of a photograph where None.
        device, threads: to run on.
        conf, iou: thresholds.
        warmup_s: the longest warm-up of each kind of call.
        options: of checkpoints.
    """

    model: str
    name: str
    batch: int = 1
    imgsz: tuple[int, int] | None = None
    images: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    conf: float = 0.3
    iou: float = 0.6
    warmup_s: float = 20.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """What the worker says when it is warm.

    Attributes:
        engine, precision: of the model.
        load_s: importing the runtime and opening the model.
        first_result_s: the first call after that.
        warm_ups: of each kind of call.
        pictures: what was run on.
        net_hw: rows and columns of the network's input.
        detections: found in one batch, so that it is seen that something was.
    """

    engine: str
    precision: str
    load_s: float
    first_result_s: float
    warm_ups: dict[str, WarmUp]
    pictures: str
    net_hw: tuple[int, int]
    detections: int


@dataclass(frozen=True)
class Turn:
    """One turn: milliseconds by part and in total, of every call of each kind; and the most memory held so far."""

    calls: dict[str, Calls]
    peak_mib: float


@dataclass(frozen=True)
class Failed:
    """What went wrong: the message, and whether it is the user's to mend (a ToodError)."""

    message: str
    expected: bool


def serve(connection: Connection, case: Case) -> None:
    """The process: says `Opened`, then a `Turn` for every number of seconds it is sent, until it is sent None."""
    from tood_deploy.errors import ToodError

    try:
        with _open(case) as bench:
            connection.send(bench.opened)
            while (seconds := connection.recv()) is not None:
                connection.send(bench.turn(seconds))
    except KeyboardInterrupt:
        pass
    except ToodError as error:
        connection.send(Failed(str(error), expected=True))
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {error}", expected=False))


def _open(case: Case) -> Bench:
    started = time.perf_counter()
    from tood_deploy.inference.detector import Detector

    threads = {} if case.threads is None else {"threads": case.threads}
    detector = Detector(case.model, conf=case.conf, iou=case.iou, imgsz=case.imgsz, device=case.device, **threads, **case.options)
    return Bench(case, detector, time.perf_counter() - started)


class Bench:
    """A detector and the pictures it is timed on; a context manager that closes the detector."""

    def __init__(self, case: Case, detector: Detector, load_s: float) -> None:
        from tood_deploy.benchmark.engine_call import timed_call
        from tood_deploy.benchmark.warmup import warm_up

        self.case, self.detector = case, detector
        self.call = timed_call(detector.engine)
        self.frames, description = read_frames(detector, case)
        self.prepared = [detector.prepare(frame) for frame in self.frames]
        self._next = 0
        before = time.perf_counter()
        detections = self.end_to_end_call()
        first_result_s = time.perf_counter() - before
        engine, net_hw = detector.engine, self.prepared[0].transform.net_hw
        engine.settle(case.batch, net_hw)  # as after many calls
        self.kinds: dict[str, Callable[[Laps], Any]] = {ENGINE: self._engine_call, END_TO_END: self._end_to_end_call}
        warm_ups = {kind: warm_up(lambda run=run: self._timed(run), case.warmup_s) for kind, run in self.kinds.items()}
        self.opened = Opened(engine.name, engine.precision, load_s, first_result_s, warm_ups, description, net_hw, detections)

    def turn(self, seconds: float) -> Turn:
        """Calls of each kind for so long, at least one each."""
        from tood_deploy.benchmark.machine import peak_memory_mib

        calls: dict[str, Calls] = {}
        for kind, run in self.kinds.items():
            self._timed(run)  # others have had the caches meanwhile
            ends, calls[kind] = time.perf_counter() + seconds, []
            while not calls[kind] or time.perf_counter() < ends:
                calls[kind].append(self._timed(run))
        return Turn(calls, peak_memory_mib())

    def end_to_end_call(self) -> int:
        """One call as deployed; how many objects it found."""
        from tood_deploy.benchmark.engine_call import Laps

        return self._end_to_end_call(Laps())

    def _timed(self, run: Callable[[Laps], Any]) -> dict[str, float]:
        from tood_deploy.benchmark.engine_call import Laps

        laps = Laps()
        run(laps)
        ms = {part: seconds * 1000 for part, seconds in laps.seconds.items()}
        return ms | {"total": sum(ms.values())}

    def _batch(self) -> list[int]:
        """Positions of the next pictures, round and round."""
        positions = [(self._next + i) % len(self.frames) for i in range(self.case.batch)]
        self._next = (self._next + self.case.batch) % len(self.frames)
        return positions

    def _engine_call(self, laps: Laps) -> None:
        import numpy as np

        prepared = [self.prepared[i] for i in self._batch()]
        images = np.stack([each.image for each in prepared])
        valid_hw = np.array([each.transform.resized_hw for each in prepared], np.int32)
        laps.restart()
        self.call(images, valid_hw, self.case.conf, self.case.iou, laps)

    def _end_to_end_call(self, laps: Laps) -> int:
        import numpy as np

        frames = [self.frames[i] for i in self._batch()]
        laps.restart()
        prepared = [self.detector.prepare(frame) for frame in frames]
        images = np.stack([each.image for each in prepared])
        valid_hw = np.array([each.transform.resized_hw for each in prepared], np.int32)
        laps.lap("pre")
        found = self.call(images, valid_hw, self.case.conf, self.case.iou, laps)
        detections = self.detector.to_detections(prepared, found)
        laps.lap("post")
        return sum(len(each) for each in detections)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.detector.close()


def read_frames(detector: Detector, case: Case) -> tuple[list[Any], str]:
    """Decoded pictures (H, W, 3) uint8 BGR of one padded size, the commonest of the folder, and what they are.

    Without a folder, parts of a photograph: of zeros and other plain pictures the times would come out too good.
    """
    from collections import Counter

    from tood_deploy.benchmark.photograph import photograph_crops
    from tood_deploy.benchmark.picture_set import open_pictures
    from tood_deploy.preprocess import padded_size

    if case.images is None:
        pictures = photograph_crops(detector.imgsz, MOST_PICTURES)
    else:
        pictures = open_pictures(case.images, None, detector.imgsz, MOST_PICTURES)
    frames = [picture.read() for picture in pictures]
    sizes = [padded_size((frame.shape[0], frame.shape[1]), detector.sizing) for frame in frames]
    commonest = Counter(sizes).most_common(1)[0][0]
    chosen = [frame for frame, size in zip(frames, sizes, strict=True) if size == commonest]
    left_out = len(frames) - len(chosen)
    return chosen, f"{pictures.description}" + (f", {left_out} of another padded size left out" if left_out else "")
