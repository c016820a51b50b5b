"""One model in a process of its own, so that start-up time and peak memory are its own.

A `Case` and numbers of seconds come in through a pipe; what opening it took, and the times of a
turn of calls, go out. Imports nothing heavy before it opens the model: what the runtime's import
takes belongs to start-up.
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
from tood_deploy.presets import Preset
from tood_deploy.reporter import show_own_warnings

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
        device: "cpu" or "cuda".
        threads: of the CPU; the runtime's own choice where None.
        conf: score that detections must exceed, 0 to 1.
        iou: overlap above which the weaker of two boxes goes, 0 to 1; the model's own where None.
        warmup_s: the longest warm-up of each kind of call.
        options: that the model is opened with; with `slicing` an image is all of its windows, and
            a call runs `batch` of them at a time.
    """

    model: str
    name: str
    batch: int = 1
    imgsz: tuple[int, int] | None = None
    images: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    conf: float = 0.3
    iou: float | None = None
    warmup_s: float = 20.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """What the worker reports when it is warm.

    Attributes:
        engine: that runs the model.
        precision: of its arithmetic.
        load_s: importing the runtime and opening the model.
        first_result_s: the first call after that.
        warm_ups: of each kind of call.
        images: what was run on.
        net_hw: rows and columns of the network's input.
        detections: in one batch, so that it is seen that there are any.
        preset: of the network.
    """

    engine: str
    precision: str
    load_s: float
    first_result_s: float
    warm_ups: dict[str, WarmUp]
    images: str
    net_hw: tuple[int, int]
    detections: int
    preset: Preset


@dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
        calls: milliseconds by part and in total, of every call of each kind.
        peak_mib: the most memory held so far.
    """

    calls: dict[str, Calls]
    peak_mib: float


@dataclass(frozen=True)
class Failed:
    """What went wrong.

    Attributes:
        message: for the user.
        expected: whether it is the user's to mend (a ToodError).
    """

    message: str
    expected: bool


def serve(connection: Connection, case: Case) -> None:
    """Send `Opened`, then a `Turn` for every number of seconds received, until None is received.

    Args:
        connection: to the process that measures.
        case: what is measured.
    """
    from tood_deploy.errors import ToodError

    show_own_warnings()
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
    load_s = time.perf_counter() - started
    if detector.slicing is not None:
        from tood_deploy.benchmark.latency.sliced import SlicedBench

        return SlicedBench(case, detector, load_s)
    return Bench(case, detector, load_s)


class Bench:
    """A detector and the images it is timed on; a context manager that closes the detector."""

    def __init__(self, case: Case, detector: Detector, load_s: float) -> None:
        """Read the images, make the first call, and warm up.

        Args:
            case: what is measured.
            detector: opened for it.
            load_s: seconds that took.
        """
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
            engine.manifest.preset,
        )

    def turn(self, seconds: float) -> Turn:
        """Make calls of each kind for so many seconds, at least one each."""
        from tood_deploy.benchmark.latency.machine import peak_memory_mib

        calls: dict[str, Calls] = {}
        for kind, run in self.kinds.items():
            self._timed(run)  # others have had the caches meanwhile
            ends, calls[kind] = time.perf_counter() + seconds, []
            while not calls[kind] or time.perf_counter() < ends:
                calls[kind].append(self._timed(run))
        return Turn(calls, peak_memory_mib())

    def end_to_end_call(self) -> int:
        """Make one call as deployed, and return the number of detections."""
        return self._end_to_end_call(Laps())

    def _timed(self, run: Callable[[Laps], Any]) -> dict[str, float]:
        laps = Laps()
        run(laps)
        ms = {part: seconds * 1000 for part, seconds in laps.seconds.items()}
        return ms | {"total": sum(ms.values())}

    def _batch(self) -> list[int]:
        """Return the positions of the next images, round and round."""
        positions = [(self._next + i) % len(self.frames) for i in range(self.case.batch)]
        self._next = (self._next + self.case.batch) % len(self.frames)
        return positions

    def _engine_call(self, laps: Laps) -> None:
        prepared = [self.prepared[i] for i in self._batch()]
        images = np.stack([item.image for item in prepared])
        valid_hw = np.array([item.transform.resized_hw for item in prepared], np.int32)
        laps.restart()
        self.call(images, valid_hw, self.case.conf, self.detector.iou, laps)

    def _end_to_end_call(self, laps: Laps) -> int:
        frames = [self.frames[i] for i in self._batch()]
        laps.restart()
        prepared = [self.detector.prepare(frame) for frame in frames]
        images = np.stack([item.image for item in prepared])
        valid_hw = np.array([item.transform.resized_hw for item in prepared], np.int32)
        laps.lap("pre")
        batch = self.call(images, valid_hw, self.case.conf, self.detector.iou, laps)
        detections = self.detector.to_detections(prepared, batch)
        laps.lap("post")
        return sum(map(len, detections))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.detector.close()


def read_frames(detector: Detector, case: Case) -> tuple[list[Any], str]:
    """Read the images of one padded size, the commonest of the folder.

    Without a folder they are parts of a photograph: of zeros and other plain images the times would
    come out too good.

    Returns:
        Images (H, W, 3) uint8 BGR, and what they are.
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
        """Leave out what was before."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap for this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count seconds that the engine measured itself in place of the time since the last lap."""
        for part, spent in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self.restart()


@runtime_checkable
class TimesItself(Protocol):
    """An engine that measures the parts of a call itself."""

    def infer_in_parts(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> tuple[BatchDetections, tuple[float, float, float]]:
        """Return what `infer` does, and the seconds of transfer, inference and transfer back."""
        ...


Call = Callable[[NDArray[np.uint8], NDArray[np.int32], float, float, Laps], BatchDetections]


def timed_call(engine: Engine) -> Call:
    """Return a function that runs the engine and times its parts.

    On the CPU there are no transfers, only "infer". On a GPU ONNX Runtime and PyTorch are called in
    steps; TensorRT times itself, by the GPU's clock, so that nothing waits between the steps.
    """
    if engine.device == "cpu":
        return _whole_call(engine)
    if isinstance(engine, TimesItself):
        return _self_timed_call(engine)
    if hasattr(engine, "session"):
        return _bound_call(engine)
    # PyTorch's fast form is one CUDA graph, which has no steps.
    return _torch_call(engine) if hasattr(engine, "detector") else _whole_call(engine)


def _whole_call(engine: Engine) -> Call:
    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        batch = engine.infer(images, valid_hw, conf, iou)
        laps.lap("infer")
        return batch

    return call


def _self_timed_call(engine: TimesItself) -> Call:
    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        batch, seconds = engine.infer_in_parts(images, valid_hw, conf, iou)
        laps.add(dict(zip(PARTS, seconds, strict=True)))
        return batch

    return call


def _bound_call(engine: Engine) -> Call:
    """Return a call of ONNX Runtime with its inputs and outputs bound to the device."""
    import onnxruntime as ort

    from tood_deploy.engines.onnx_engine import OnnxEngine
    from tood_deploy.graph_io import OUTPUTS, graph_feeds

    assert isinstance(engine, OnnxEngine)
    session, device = engine.session, engine.device

    def call(
        images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps
    ) -> BatchDetections:
        binding = session.io_binding()
        for name, value in graph_feeds(images, valid_hw, conf, iou).items():
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
        batch = BatchDetections(*binding.copy_outputs_to_cpu())
        laps.lap("d2h")
        return batch

    return call


def _torch_call(engine: Engine) -> Call:
    """Return a call of PyTorch that waits for the device after each step."""
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
        detections = engine.detector(*inputs, conf, iou).detections
        wait()
        laps.lap("infer")
        arrays = BatchDetections(*(tensor.cpu().numpy() for tensor in detections))
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
        stable: whether the medians of the last two windows of 5 calls agree within 3%; otherwise
            time ran out.
        times_ms: of every call, in order.
    """

    calls: int
    seconds: float
    stable: bool
    times_ms: tuple[float, ...]


def warm_up(
    call: Callable[[], object], max_seconds: float, clock: Callable[[], float] = time.perf_counter
) -> WarmUp:
    """Call until stable, at least twice.

    Args:
        call: what is warmed up.
        max_seconds: about the longest time that it may take.
        clock: in seconds.
    """
    started = clock()
    times_ms: list[float] = []
    stable = False
    while not stable and (len(times_ms) < 2 or clock() - started < max_seconds):
        before = clock()
        call()
        times_ms.append((clock() - before) * 1000)
        stable = is_stable(times_ms)
    return WarmUp(len(times_ms), clock() - started, stable, tuple(times_ms))


def is_stable(times_ms: list[float]) -> bool:
    """Return whether the medians of the last two windows agree."""
    if len(times_ms) < 2 * WINDOW:
        return False
    before, last = (
        statistics.median(times_ms[-2 * WINDOW : -WINDOW]),
        statistics.median(times_ms[-WINDOW:]),
    )
    return abs(last - before) <= STABLE_WITHIN * before
