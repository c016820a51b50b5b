"""Measure one cell: open all variants, let them take turns, compare them, and close them.

Variants and decoded frames in, filled rows out. Knows no runtime but PyTorch's memory counters.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.facts import GpuWatch
from benchmarks.gpu.failures import note_of, row_errors
from benchmarks.gpu.kernel_profile import profile_call
from benchmarks.gpu.parity import Reference
from benchmarks.gpu.settings import CONF, IOU, Row, Settings
from benchmarks.gpu.torch_variants import TorchVariant, forget_compiled
from benchmarks.gpu.variants import Resident, Variant
from tood_deploy.benchmark.latency.worker import warm_up
from tood_deploy.engines.base import Engine
from tood_deploy.engines.torch_fast import FastTorchEngine
from tood_deploy.inference.detector import Detector

MAX_CALLS, MAX_WARM_UP_SECONDS = 50, 1.0
MIB = 2**20


class Budget:
    """The time that is left, and how long it took to open the last variant of every kind."""

    def __init__(self, seconds: float) -> None:
        """Begin to count the time."""
        self._end = time.perf_counter() + seconds
        self._taken: dict[str, float] = {}

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.perf_counter()

    def allows(self, variant: Variant, measuring: float) -> bool:
        """Return whether there is time to open a variant and to measure for `measuring` s."""
        return self.left() > self._taken.get(variant.kind, variant.guessed_seconds) + measuring

    def note(self, variant: Variant, seconds: float) -> None:
        """Keep how long it took to open a variant."""
        self._taken[variant.kind] = seconds


@dataclass
class OpenVariant:
    """A variant that is open.

    Attributes:
        row: to be filled.
        engine: to be closed.
        call: runs inputs that are on the device, to detections in host memory.
        whole: runs decoded frames, to detections in their own pixels.
    """

    row: Row
    engine: Engine
    call: Callable[[], object]
    whole: Callable[[], object]


@dataclass(frozen=True)
class Session:
    """What all cells of a run share.

    Attributes:
        settings: of the run.
        budget: of time.
        watch: measures the GPU.
        log: takes a line of progress.
    """

    settings: Settings
    budget: Budget
    watch: GpuWatch
    log: Callable[[str], None]

    @property
    def warm_up_seconds(self) -> float:
        """Return how long one variant is warmed up at most."""
        return min(MAX_WARM_UP_SECONDS, 8 * self.settings.seconds)

    @property
    def measuring_seconds(self) -> float:
        """Return how long both parts of one variant take, all rounds together."""
        return 2 * (self.settings.rounds * self.settings.seconds + self.warm_up_seconds)


def measure_cell(
    session: Session,
    candidates: Sequence[Variant],
    frames: Sequence[NDArray[np.uint8]],
    reference: Reference | None = None,
) -> list[Row]:
    """Fill and return the rows of a cell.

    Args:
        session: of the run.
        candidates: the variants to try, all of one cell.
        frames: decoded images (H, W, 3) uint8 BGR, as many as a batch holds.
        reference: to compare with; None where this cell is not compared.
    """
    opened = _open_all(session, candidates, frames)
    _take_turns(opened, session)
    if reference is not None:
        _profile(opened, session)
    while opened:
        _finish(opened.pop(0), reference)
    gc.collect()
    forget_compiled()
    return [variant.row for variant in candidates]


def _open_all(
    session: Session, candidates: Sequence[Variant], frames: Sequence[NDArray[np.uint8]]
) -> list[OpenVariant]:
    """Return the variants that the time allows and that open; arguments as of `measure_cell`."""
    opened: list[OpenVariant] = []
    for variant in candidates:
        if not session.budget.allows(variant, (len(opened) + 1) * session.measuring_seconds):
            left = max(0.0, session.budget.left())
            variant.row.status = "skipped"
            variant.row.note = f"{left:.0f} s of the budget were left"
        else:
            with row_errors(variant.row):
                opened.append(_open(variant, frames, session))
        row = variant.row
        session.log(f"{row.cell.name}: {row.name}: {row.status} {row.note}".rstrip())
    return opened


def _profile(opened: Sequence[OpenVariant], session: Session) -> None:
    """List the kernels of PyTorch's fast rows, after all times: listing slows calls down."""
    for variant in opened:
        if isinstance(variant.engine, FastTorchEngine) and variant.row.status == "ok":
            try:
                variant.row.kernels = profile_call(variant.call, session.settings.device)
            except RuntimeError as error:  # of the profiler: the row's times are good
                variant.row.note = f"no kernels were counted ({note_of(error)})"


def _finish(opened: OpenVariant, reference: Reference | None) -> None:
    """Compare a variant with the reference, keep its engine's notes, and close it."""
    row, engine = opened.row, opened.engine
    if reference is not None and row.status == "ok":
        with row_errors(row):
            row.parity = reference.compare(engine, row.cell.batch, row.precision)
    remarks = list(getattr(engine, "notes", []))
    if repeated := getattr(engine, "repeated", 0):
        remarks.append(f"suppression was repeated exactly for {repeated} batches")
    row.note = "; ".join(part for part in (row.note, *remarks) if part)
    engine.close()


def _open(variant: Variant, frames: Sequence[NDArray[np.uint8]], session: Session) -> OpenVariant:
    """Open a variant and call it once; time and memory go into its row.

    Args:
        variant: to open.
        frames: of one batch.
        session: of the run.
    """
    cuda, started = torch.cuda.is_available(), time.perf_counter()
    before = session.watch.memory_mib()
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        engine, resident = variant.open()
        variant.row.runtime = engine.name
        try:
            opened = _prepare(variant.row, engine, resident, frames)
            opened.call()
        except BaseException:
            engine.close()
            raise
    finally:
        variant.row.open_seconds = time.perf_counter() - started
        session.budget.note(variant, variant.row.open_seconds)
    if isinstance(engine, TorchVariant) and cuda:
        variant.row.memory_mib = (torch.cuda.max_memory_allocated() - held) / MIB
    elif before is not None and (now := session.watch.memory_mib()) is not None:
        variant.row.memory_mib = now - before
    return opened


def _prepare(
    row: Row, engine: Engine, resident: Resident, frames: Sequence[NDArray[np.uint8]]
) -> OpenVariant:
    """Put the inputs on the device, and return the calls that are timed.

    Args:
        row: to be filled.
        engine: open.
        resident: puts inputs on the device and returns a call on them.
        frames: of one batch.
    """
    detector = Detector(engine, conf=CONF, iou=IOU, imgsz=engine.input_shapes_hw[0])
    batch = [detector.prepare(frame) for frame in frames]
    images = np.stack([prepared.image for prepared in batch])
    valid_hw = np.array([prepared.transform.resized_hw for prepared in batch], np.int32)
    call = resident(images, valid_hw, CONF, IOU)

    def whole() -> object:
        return detector.infer([detector.prepare(frame) for frame in frames])

    return OpenVariant(row, engine, call, whole)


def _take_turns(opened: Sequence[OpenVariant], session: Session) -> None:
    """Time all variants in every round, first their calls, then the whole.

    They take turns, so that other load on the machine hits all alike.
    """
    for part in ("call", "whole"):
        for variant in opened:
            if variant.row.status == "ok":
                with row_errors(variant.row):
                    warm_up(getattr(variant, part), session.warm_up_seconds)
        for _ in range(session.settings.rounds):
            for variant in opened:
                if variant.row.status == "ok":
                    with row_errors(variant.row):
                        times = time_calls(getattr(variant, part), session.settings.seconds)
                        getattr(variant.row, f"{part}_ms").append(times)
                    session.watch.sample()


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Return the milliseconds of single calls, at least one, at most `MAX_CALLS`.

    Args:
        call: ends with its result in host memory.
        seconds: to call it for, about.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or (len(times) < MAX_CALLS and time.perf_counter() < end):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times
