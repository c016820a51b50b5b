"""Latency of several models on one machine, in interleaved rounds so that drift hits all alike.

A `LatencyPlan` comes in, a `Measurement` for each of its cases goes out; each model runs in a
process of its own. `summarise` and `speedup` say what the times amount to. Knows no reports.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.latency.machine import GpuMeter
from tood_deploy.benchmark.latency.worker import (
    END_TO_END,
    Calls,
    Case,
    Failed,
    Opened,
    Turn,
    serve,
)
from tood_deploy.errors import ToodError
from tood_deploy.manifest import artefact_files
from tood_deploy.reporter import Reporter

SAMPLE_EVERY_S = 0.1
RESAMPLES = 4000
CONFIDENCE_PERCENT = 95
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LatencyPlan:
    """What to measure.

    Attributes:
        cases: models, at batch 1 and no size; the first is what the others are compared with.
        batches: images of one call.
        sizes: (short side, long side); None for each model's own.
        rounds: how often every model has its turn.
        turn_s: seconds of each kind of call in a turn.
    """

    cases: tuple[Case, ...]
    batches: tuple[int, ...] = (1,)
    sizes: tuple[tuple[int, int] | None, ...] = (None,)
    rounds: int = 10
    turn_s: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (
            ("--batch", min(self.batches)),
            ("--rounds", self.rounds),
            ("--turn-seconds", self.turn_s),
        ):
            if not value > 0:
                raise ToodError(f"{name} is {value:g}; expected a positive number")

    def groups(self) -> Iterator[list[Case]]:
        """Yield the cases that are measured together: all models at one size and batch."""
        for imgsz in self.sizes:
            for batch in sorted(set(self.batches)):
                yield [replace(case, batch=batch, imgsz=imgsz) for case in self.cases]


@dataclass
class Measurement:
    """One case and its times.

    Attributes:
        case: what was measured.
        opened: start-up and warm-up.
        rounds: the turns, in order.
        joules: energy of all turns; 0 without a GPU's meter.
        images: of all turns.
        device_mib: memory that opening took on the GPU; None on the CPU.
    """

    case: Case
    opened: Opened
    rounds: list[Turn] = field(default_factory=list)
    joules: float = 0.0
    images: int = 0
    device_mib: float | None = None

    def times_ms(self, kind: str, part: str = "total") -> list[list[float]]:
        """Return milliseconds of every call, round by round.

        Args:
            kind: of calls.
            part: of a call; where it does not exist, nothing is returned.
        """
        return [[call[part] for call in turn.calls[kind] if part in call] for turn in self.rounds]

    def calls(self, kind: str) -> Calls:
        """Return all calls of a kind."""
        return [call for turn in self.rounds for call in turn.calls[kind]]

    @property
    def peak_mib(self) -> float:
        """Return the most memory that the process held, in MiB."""
        return max(turn.peak_mib for turn in self.rounds)

    @property
    def artefact_mib(self) -> float | None:
        """Return the size of the artefact's files in MiB; None for a preset's name."""
        path = Path(self.case.model)
        if not path.is_file():
            return None
        return sum(file.stat().st_size for file in artefact_files(path)) / 2**20


class Child:
    """A process of its own that answers questions; a context manager that ends it."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        """Start the process.

        Args:
            name: of what it measures, for errors.
            target: takes its end of a connection, and the arguments; see `serve`.
            *arguments: of the target.
        """
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=target, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()

    def ask(self, question: object) -> None:
        """Send something that it takes."""
        self._connection.send(question)

    def receive(self, kind: type[Answer]) -> Answer:
        """Return the next answer.

        Raises:
            ToodError: the process said so, or died.
        """
        try:
            while not self._connection.poll(SAMPLE_EVERY_S):
                self._wait()
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            code = self._process.exitcode
            raise ToodError(
                f"{self.name}: its process ended with code {code}; "
                "-9 means that memory ran out: try a smaller batch"
            ) from error
        if isinstance(answer, Failed):
            if answer.expected:
                raise ToodError(answer.message)
            raise RuntimeError(f"{self.name}: {answer.message}")
        assert isinstance(answer, kind)
        return answer

    def _wait(self) -> None:
        """Do what is to be done while an answer is waited for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


class Worker(Child):
    """A process that serves one case."""

    def __init__(self, case: Case, meter: GpuMeter | None) -> None:
        """Start the process; `meter` looks at the GPU while its answers are waited for."""
        self.case, self.meter = case, meter
        super().__init__(case.name, serve, case)

    def _wait(self) -> None:
        if self.meter is not None:
            self.meter.sample()

    def turn(self, seconds: float) -> Turn:
        """Let it have its turn, of so many seconds for each kind of call."""
        self.ask(seconds)
        return self.receive(Turn)


def measure(
    plan: LatencyPlan, reporter: Reporter, meter: GpuMeter | None = None
) -> list[Measurement]:
    """Measure all cases, group by group.

    Args:
        plan: what to measure.
        reporter: shows what happens.
        meter: of the GPU, where it takes part.

    Raises:
        ToodError: a model cannot be opened or run.
    """
    return [
        measurement
        for group in plan.groups()
        for measurement in _measure_group(group, plan, meter, reporter)
    ]


def _measure_group(
    cases: Sequence[Case], plan: LatencyPlan, meter: GpuMeter | None, reporter: Reporter
) -> list[Measurement]:
    with ExitStack() as running:
        pairs = [_open_worker(case, running, meter, reporter) for case in cases]
        order = random.Random(0)
        for number in range(plan.rounds):
            reporter.info(f"batch {cases[0].batch}: round {number + 1} of {plan.rounds}")
            for worker, measurement in order.sample(pairs, len(pairs)):
                _take_turn(worker, measurement, plan.turn_s, meter)
        return [measurement for _, measurement in pairs]


def _open_worker(
    case: Case, running: ExitStack, meter: GpuMeter | None, reporter: Reporter
) -> tuple[Worker, Measurement]:
    reporter.info(f"{case.name}, batch {case.batch}: opening and warming up")
    memory = meter.memory_mib() if meter else 0.0
    worker = running.enter_context(Worker(case, meter))
    measurement = Measurement(case, worker.receive(Opened))
    if meter is not None:
        measurement.device_mib = meter.memory_mib() - memory
    return worker, measurement


def _take_turn(
    worker: Worker, measurement: Measurement, seconds: float, meter: GpuMeter | None
) -> None:
    joules = meter.joules() if meter else 0.0
    turn = worker.turn(seconds)
    measurement.rounds.append(turn)
    measurement.joules += (meter.joules() if meter else 0.0) - joules
    # One call of each kind was made before the clock started.
    measurement.images += measurement.case.batch * sum(
        len(calls) + 1 for calls in turn.calls.values()
    )


def describe(measurement: Measurement) -> dict[str, Any]:
    """Return plain values of a measurement but its times."""
    case, opened = measurement.case, measurement.opened
    return {
        "model": case.name,
        "engine": opened.engine,
        "precision": opened.precision,
        "device": case.device,
        "threads": case.threads,
        "batch": case.batch,
        "net_hw": opened.net_hw,
        "images": opened.images,
        "detections_in_first_batch": opened.detections,
        "load_s": opened.load_s,
        "first_result_s": opened.first_result_s,
        "artefact_mib": measurement.artefact_mib,
        "peak_host_mib": measurement.peak_mib,
        "peak_device_mib": measurement.device_mib,
        "joules_per_image": measurement.joules / measurement.images
        if measurement.device_mib is not None
        else None,
        "warm_up": {
            kind: {
                "calls": warm.calls,
                "seconds": warm.seconds,
                "stable": warm.stable,
                "times_ms": warm.times_ms,
            }
            for kind, warm in opened.warm_ups.items()
        },
    }


@dataclass(frozen=True)
class Summary:
    """Of times in milliseconds.

    Attributes:
        count: measurements.
        median: in milliseconds, as all that follow.
        mean: of all.
        p90: 90th percentile.
        p95: 95th percentile.
        p99: 99th percentile; of few measurements that is their largest.
        spread: distance between the first and third quartile.
    """

    count: int
    median: float
    mean: float
    p90: float
    p95: float
    p99: float
    spread: float


def summarise(times_ms: Sequence[float] | NDArray[np.float64]) -> Summary:
    """Summarise at least one measurement."""
    values = np.asarray(times_ms, np.float64)
    first, median, third, p90, p95, p99 = np.percentile(values, [25, 50, 75, 90, 95, 99]).tolist()
    return Summary(len(values), median, float(values.mean()), p90, p95, p99, third - first)


@dataclass(frozen=True)
class Ratio:
    """A ratio and the interval that holds it with `CONFIDENCE_PERCENT` percent confidence."""

    value: float
    low: float
    high: float


def speedup(
    baseline_ms: Sequence[Sequence[float]], times_ms: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """Return how many times faster than a baseline it is: ratio of medians, bootstrap interval.

    Rounds are drawn with replacement, both sides of a round together, so that drift, which hits
    both, cancels out.

    Args:
        baseline_ms: times of every round; rounds in order.
        times_ms: the same rounds of what is compared.
        seed: of the resampling.
    """
    both = np.array(
        [
            [np.median(first), np.median(second)]
            for first, second in zip(baseline_ms, times_ms, strict=True)
        ]
    )
    drawn = np.random.default_rng(seed).integers(0, len(both), (RESAMPLES, len(both)))
    medians = np.median(both[drawn], axis=1)
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(medians[:, 0] / medians[:, 1], [tail, 100 - tail]).tolist()
    middle = np.median(both, axis=0)
    return Ratio(float(middle[0] / middle[1]), low, high)


def summary_of(measurement: Measurement, kind: str, part: str = "total") -> Summary | None:
    """Summarise all rounds; None where the part does not exist on this device.

    Args:
        measurement: of one case.
        kind: of calls.
        part: of a call.
    """
    times = [ms for turn in measurement.times_ms(kind, part) for ms in turn]
    return summarise(times) if times else None


def total_of(measurement: Measurement, kind: str) -> Summary:
    """Summarise whole calls of one kind over all rounds."""
    summary = summary_of(measurement, kind)
    assert summary is not None  # every turn makes a call of each kind
    return summary


def fps(measurement: Measurement) -> float:
    """Return images a second, end to end, one call after another."""
    return 1000 * measurement.case.batch / total_of(measurement, END_TO_END).mean


def groups(measurements: Sequence[Measurement]) -> Iterator[list[Measurement]]:
    """Yield those that were measured together: the same size asked for, and batch."""
    for _, group in itertools.groupby(
        measurements, key=lambda measurement: (measurement.case.imgsz, measurement.case.batch)
    ):
        yield list(group)


def speedups(measurements: Sequence[Measurement], kind: str = END_TO_END) -> dict[int, Ratio]:
    """Return the speed-up over the first of the same group, by position; the first has none."""
    ratios, position = {}, 0
    for group in groups(measurements):
        for measurement in group:
            if measurement is not group[0]:
                ratios[position] = speedup(group[0].times_ms(kind), measurement.times_ms(kind))
            position += 1
    return ratios
