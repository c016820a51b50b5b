"""One cell: opens every way, lets them take turns, compares them with the reference, and closes them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.facts import GpuWatch
from benchmarks.gpu.failures import row_errors
from benchmarks.gpu.parity import Reference
from benchmarks.gpu.settings import CONF, IOU, Row, Settings
from benchmarks.gpu.torch_ways import TorchWay, forget_compiled
from benchmarks.gpu.ways import Way
from tood_deploy.benchmark.latency.worker import warm_up
from tood_deploy.engines.base import Engine
from tood_deploy.inference.detector import Detector

MOST_CALLS, MOST_WARM_UP_SECONDS = 50, 1.0
MIB = 2**20


class Budget:
    """How much time is left, and what opening a way of a kind took the last time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self._taken: dict[str, float] = {}

    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def allows(self, way: Way, measuring: float) -> bool:
        """Whether it can be opened, and all that is open be measured."""
        return self.left() > self._taken.get(way.kind, way.guessed_seconds) + measuring

    def note(self, way: Way, seconds: float) -> None:
        """What opening took."""
        self._taken[way.kind] = seconds


@dataclass
class Open:
    """A way that is open: its row, its engine, and two calls that can be timed."""

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
        watch: looks at the GPU.
        say: takes a line of progress.
    """

    settings: Settings
    budget: Budget
    watch: GpuWatch
    say: Callable[[str], None]

    @property
    def warm_up_seconds(self) -> float:
        """The most for one way."""
        return min(MOST_WARM_UP_SECONDS, 8 * self.settings.seconds)

    @property
    def measuring_seconds(self) -> float:
        """That both parts of one way take, all rounds together."""
        return 2 * (self.settings.rounds * self.settings.seconds + self.warm_up_seconds)


def measure_cell(
    session: Session,
    candidates: Sequence[Way],
    frames: Sequence[NDArray[np.uint8]],
    reference: Reference | None = None,
) -> list[Row]:
    """Fills and returns the rows of a cell.

    Args:
        session: of the run.
        candidates: the ways to try, all of one cell.
        frames: decoded images (H, W, 3) uint8 BGR, as many as a batch holds.
        reference: to compare with; None where this cell is not compared.
    """
    opened = _open_all(session, candidates, frames)
    _take_turns(opened, session)
    while opened:
        _finish(opened.pop(0), reference)
    gc.collect()
    forget_compiled()
    return [way.row for way in candidates]


def _open_all(
    session: Session, candidates: Sequence[Way], frames: Sequence[NDArray[np.uint8]]
) -> list[Open]:
    """Those that time allows and that open."""
    opened: list[Open] = []
    for way in candidates:
        if not session.budget.allows(way, (len(opened) + 1) * session.measuring_seconds):
            way.row.status, way.row.note = (
                "skipped",
                f"{max(0.0, session.budget.left()):.0f} s of the budget were left",
            )
        else:
            with row_errors(way.row):
                opened.append(_open(way, frames, session))
        session.say(
            f"{way.row.cell.name}: {way.row.name}: {way.row.status} {way.row.note}".rstrip()
        )
    return opened


def _finish(each: Open, reference: Reference | None) -> None:
    """Compares it with the reference, notes what it has to say, and closes it."""
    if reference is not None and each.row.status == "ok":
        with row_errors(each.row):
            each.row.parity = reference.compare(
                each.engine, each.row.cell.batch, each.row.precision
            )
    remarks = list(getattr(each.engine, "notes", []))
    if isinstance(each.engine, TorchWay) and each.engine.repeated:
        remarks.append(f"suppression was repeated exactly for {each.engine.repeated} batches")
    each.row.note = "; ".join(part for part in (each.row.note, *remarks) if part)
    each.engine.close()


def _open(way: Way, frames: Sequence[NDArray[np.uint8]], session: Session) -> Open:
    """Opens a way and calls it once, with time and memory in its row."""
    cuda, started = torch.cuda.is_available(), time.perf_counter()
    before = session.watch.memory_mib()
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        engine, resident = way.open()
        way.row.runtime = engine.name
        try:
            open_way = _prepare(way.row, engine, resident, frames)
            open_way.call()
        except BaseException:
            engine.close()
            raise
    finally:
        way.row.open_seconds = time.perf_counter() - started
        session.budget.note(way, way.row.open_seconds)
    if isinstance(engine, TorchWay) and cuda:
        way.row.memory_mib = (torch.cuda.max_memory_allocated() - held) / MIB
    elif before is not None and (now := session.watch.memory_mib()) is not None:
        way.row.memory_mib = now - before
    return open_way


def _prepare(row: Row, engine: Engine, resident: Any, frames: Sequence[NDArray[np.uint8]]) -> Open:
    detector = Detector(engine, conf=CONF, iou=IOU, imgsz=engine.input_shapes_hw[0])
    batch = [detector.prepare(frame) for frame in frames]
    images = np.stack([each.image for each in batch])
    valid_hw = np.array([each.transform.resized_hw for each in batch], np.int32)
    call = resident(images, valid_hw, CONF, IOU)
    return Open(
        row, engine, call, lambda: detector.infer([detector.prepare(frame) for frame in frames])
    )


def _take_turns(opened: Sequence[Open], session: Session) -> None:
    """Every way in every round, so that whatever else happens on the machine hits all alike; first the calls, then the whole."""
    for part in ("call", "whole"):
        for each in opened:
            if each.row.status == "ok":
                with row_errors(each.row):
                    warm_up(getattr(each, part), session.warm_up_seconds)
        for _ in range(session.settings.rounds):
            for each in opened:
                if each.row.status == "ok":
                    with row_errors(each.row):
                        getattr(each.row, f"{part}_ms").append(
                            time_calls(getattr(each, part), session.settings.seconds)
                        )
                    session.watch.sample()


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of single calls for about that long: at least one, at most `MOST_CALLS`. Each ends with its result in host memory."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or (len(times) < MOST_CALLS and time.perf_counter() < end):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times
