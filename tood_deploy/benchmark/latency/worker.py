"""One model in a process of its own, so that start-up time and peak memory are its own; does one turn of calls when told to.

Imports nothing heavy before it is told to start: what the runtime's import takes belongs to start-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines import BatchDetections, Engine

if TYPE_CHECKING:
    from tood_deploy.inference.detector import Detector


ENGINE, END_TO_END = "engine only", "end to end"
MAX_IMAGES = 8
Calls = list[dict[str, float]]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: as `open_engine` takes it.
        name: for reports.
        batch: images of one call.
        imgsz: (short side, long side); the model's own where None.
        images: folder of images; crops of a photograph where None.
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
        images: what was run on.
        net_hw: rows and columns of the network's input.
        detections: found in one batch, so that it is seen that something was.
    """

    engine: str
    precision: str
    load_s: float
    first_result_s: float
    warm_ups: dict[str, WarmUp]
    images: str
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
    detector = Detector(
        case.model,
        conf=case.conf,
        iou=case.iou,
        imgsz=case.imgsz,
        device=case.device,
        **threads,
        **case.options,
    )
    return Bench(case, detector, time.perf_counter() - started)


class Bench:
    """A detector and the images it is timed on; a context manager that closes the detector."""

    def __init__(self, case: Case, detector: Detector, load_s: float) -> None:

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
        self.kinds: dict[str, Callable[[Laps], Any]] = {
            ENGINE: self._engine_call,
            END_TO_END: self._end_to_end_call,
        }
        warm_ups = {
            kind: warm_up(lambda run=run: self._timed(run), case.warmup_s)
            for kind, run in self.kinds.items()
        }
        self.opened = Opened(
            engine.name,
            engine.precision,
            load_s,
            first_result_s,
            warm_ups,
            description,
            net_hw,
            detections,
        )

    def turn(self, seconds: float) -> Turn:
        """Calls of each kind for so long, at least one each."""
        from tood_deploy.benchmark.latency.machine import peak_memory_mib

        calls: dict[str, Calls] = {}
        for kind, run in self.kinds.items():
            self._timed(run)  # others have had the caches meanwhile
            ends, calls[kind] = time.perf_counter() + seconds, []
            while not calls[kind] or time.perf_counter() < ends:
                calls[kind].append(self._timed(run))
        return Turn(calls, peak_memory_mib())

    def end_to_end_call(self) -> int:
        """One call as deployed; how many objects it found."""
        return self._end_to_end_call(Laps())

    def _timed(self, run: Callable[[Laps], Any]) -> dict[str, float]:

        laps = Laps()
        run(laps)
        ms = {part: seconds * 1000 for part, seconds in laps.seconds.items()}
        return ms | {"total": sum(ms.values())}

    def _batch(self) -> list[int]:
        """Positions of the next images, round and round."""
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
    """Decoded images (H, W, 3) uint8 BGR of one padded size, the commonest of the folder, and what they are.

    Without a folder, parts of a photograph: of zeros and other plain images the times would come out too good.
    """
    from collections import Counter

    from tood_deploy.data.image_set import open_image_set, photograph_set
    from tood_deploy.preprocess import padded_size

    if case.images is None:
        images = photograph_set(detector.imgsz, MAX_IMAGES)
    else:
        images = open_image_set(case.images, None, detector.imgsz, MAX_IMAGES)
    frames = [image.read() for image in images]
    sizes = [padded_size((frame.shape[0], frame.shape[1]), detector.sizing) for frame in frames]
    commonest = Counter(sizes).most_common(1)[0][0]
    chosen = [frame for frame, size in zip(frames, sizes, strict=True) if size == commonest]
    left_out = len(frames) - len(chosen)
    return chosen, f"{images.description}" + (
        f", {left_out} of another padded size left out" if left_out else ""
    )


PARTS = ("h2d", "infer", "d2h")


@dataclass
class Laps:
    """Seconds of each part, taken one after another."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """What was before does not count."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap went into this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """The time since the last lap went into these parts, which somebody else measured."""
        for part, spent in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self.restart()


@runtime_checkable
class TimesItself(Protocol):
    """An engine that knows how many seconds of a call went to the device, into inference, and back."""

    def infer_in_parts(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> tuple[BatchDetections, tuple[float, float, float]]:
        """As `infer`, and those three."""
        ...


Call = Callable[[NDArray[np.uint8], NDArray[np.int32], float, float, Laps], BatchDetections]


def timed_call(engine: Engine) -> Call:
    """A function that runs the engine and notes its parts.

    On the CPU there are no transfers, only "infer". On a GPU ONNX Runtime and PyTorch are called in steps; TensorRT times itself, by the
    GPU's clock, so that nothing waits between the steps.
    """
    if engine.device == "cpu":
        return _whole_call(engine)
    if isinstance(engine, TimesItself):
        return _self_timed_call(engine)
    return _bound_call(engine) if hasattr(engine, "session") else _torch_call(engine)


def _whole_call(engine: Engine) -> Call:
    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        found = engine.infer(images, valid_hw, conf, iou)
        laps.lap("infer")
        return found

    return call


def _self_timed_call(engine: TimesItself) -> Call:
    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        found, seconds = engine.infer_in_parts(images, valid_hw, conf, iou)
        laps.add(dict(zip(PARTS, seconds, strict=True)))
        return found

    return call


def _bound_call(engine: Engine) -> Call:
    """ONNX Runtime with its inputs and outputs bound to the device."""
    import onnxruntime as ort

    from tood_deploy.engines.onnx_engine import INPUTS, OUTPUTS, OnnxEngine

    assert isinstance(engine, OnnxEngine)
    session, device = engine.session, engine.device

    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        binding = session.io_binding()
        values = (images, valid_hw, np.array(conf, np.float32), np.array(iou, np.float32))
        for name, value in zip(INPUTS, values, strict=True):
            binding.bind_ortvalue_input(
                name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), device, 0)
            )
        for name in OUTPUTS:
            binding.bind_output(name, device)
        binding.synchronize_inputs()
        laps.lap("h2d")
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        laps.lap("infer")
        found = BatchDetections(*binding.copy_outputs_to_cpu())
        laps.lap("d2h")
        return found

    return call


def _torch_call(engine: Engine) -> Call:
    """PyTorch, waiting for the device after each step."""
    import torch

    from tood_deploy.engines.torch_engine import TorchEngine

    assert isinstance(engine, TorchEngine)

    def wait() -> None:
        if engine.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        inputs = [torch.from_numpy(array).to(engine.device) for array in (images, valid_hw)]
        wait()
        laps.lap("h2d")
        found = engine.detector(*inputs, conf, iou).detections
        wait()
        laps.lap("infer")
        arrays = BatchDetections(*(tensor.cpu().numpy() for tensor in found))
        laps.lap("d2h")
        return arrays

    return call


WINDOW = 5
STABLE_WITHIN = 0.03


@dataclass(frozen=True)
class WarmUp:
    """How a warm-up went.

    Attributes:
        calls: how many it took.
        seconds: how long.
        stable: whether the medians of the last two windows of 5 calls agree within 3%; otherwise time ran out.
        times_ms: of every call, in order.
    """

    calls: int
    seconds: float
    stable: bool
    times_ms: tuple[float, ...]


def warm_up(
    call: Callable[[], object], most_seconds: float, clock: Callable[[], float] = time.perf_counter
) -> WarmUp:
    """Calls until stable, at least twice, at most for about `most_seconds`."""
    started = clock()
    times_ms: list[float] = []
    stable = False
    while not stable and (len(times_ms) < 2 or clock() - started < most_seconds):
        before = clock()
        call()
        times_ms.append((clock() - before) * 1000)
        stable = is_stable(times_ms)
    return WarmUp(len(times_ms), clock() - started, stable, tuple(times_ms))


def is_stable(times_ms: list[float]) -> bool:
    """Whether the medians of the last two windows agree."""
    if len(times_ms) < 2 * WINDOW:
        return False
    before, last = (
        statistics.median(times_ms[-2 * WINDOW : -WINDOW]),
        statistics.median(times_ms[-WINDOW:]),
    )
    return abs(last - before) <= STABLE_WITHIN * before
