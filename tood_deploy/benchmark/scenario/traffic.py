"""Traffic as MLPerf Inference defines it, made and timed by MLCommons' own LoadGen.

A system that answers queries comes in, an `Outcome` goes out. LoadGen brings the rules: seeds,
durations, numbers of queries, percentiles and early stopping. Knows no detector.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import mlperf_loadgen as loadgen

from tood_deploy.errors import OutputError, ToodError

Scenario = Literal["single", "multi", "server", "offline"]
SCENARIOS: Mapping[Scenario, str] = {
    "single": "SingleStream",
    "multi": "MultiStream",
    "server": "Server",
    "offline": "Offline",
}
# MLPerf's object detector, at 800x800: its rules are those of this detector's scenarios.
RULES_OF = "retinanet"
# Of a query: a rate is tried on as many as early stopping needs where one of them is late.
PROBE_QUERIES = 662
DETAIL = "mlperf_log_detail.txt"
MARK = ":::MLLOG "
NS_PER_MS = 1e6
PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")
Setting = str | int | float | bool
Fail = Callable[[BaseException], None]
Complete = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Query:
    """One image that is asked for.

    Attributes:
        key: of the answer; LoadGen's.
        position: of the image in the library.
    """

    key: int
    position: int


class Library(Protocol):
    """The images that queries ask for."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def load(self, positions: Sequence[int]) -> None:
        """Read images into memory, untimed."""
        ...

    def unload(self, positions: Sequence[int]) -> None:
        """Drop them."""
        ...


class System(Protocol):
    """What answers the queries."""

    def set_complete(self, complete: Complete) -> None:
        """Take what is called with the keys of images that were answered."""
        ...

    def issue(self, queries: Sequence[Query]) -> None:
        """Take the images of one query; they are answered now or later."""
        ...


@dataclass(frozen=True)
class Traffic:
    """One run.

    Attributes:
        expected: what LoadGen plans with: milliseconds of a query in the scenarios single and
            multi, images a second of offline, the rate of server.
        min_seconds: the shortest duration; that of the rules where not given.
        min_queries: the fewest queries, images in the scenario offline; as above.
        latency_ms: the bound of 99% of the queries in the scenario server; as above.
        samples: images in memory; as above.
    """

    expected: float
    min_seconds: float | None = None
    min_queries: int | None = None
    latency_ms: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_seconds", "min_queries", "latency_ms", "samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                option = f"--{name.replace('_', '-')}"
                raise ToodError(f"{option} is {value:g}; expected a positive number")


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        valid: whether LoadGen calls it so: long enough, in time, and certain enough.
        reason: what it says of that.
        too_short: whether it ended before its time because too few queries were planned.
        figure: the scenario's own: milliseconds of the 90th percentile (single) or the 99th
            (multi), as early stopping estimates them; images a second (server, offline).
        queries: how many; images in the scenario offline.
        seconds: from the first query to the last answer, about.
        in_time: whether the measured percentile is within the bound, in the scenario server.
        late: queries over the bound, in the scenario server.
        mean_ms: latency of a query.
        percentiles_ms: the same by percentile, as measured.
        settings: as LoadGen had them.
    """

    valid: bool
    reason: str
    too_short: bool
    figure: float
    queries: int
    seconds: float
    in_time: bool
    late: int
    mean_ms: float
    percentiles_ms: Mapping[str, float]
    settings: Mapping[str, Setting]


class LoadGen:
    """The traffic of one scenario.

    Attributes:
        scenario: of all runs.
        rule_seconds, rule_queries, rule_samples, rule_latency_ms: what the rules demand.
        version: of LoadGen.
    """

    def __init__(self, scenario: Scenario, system: System, library: Library, fail: Fail) -> None:
        """Read the rules.

        Args:
            scenario: of all runs.
            system: answers the queries.
            library: of the images.
            fail: is given what they raise: LoadGen, which calls them, knows no errors.
        """
        self.scenario, self.system, self.library, self.fail = scenario, system, library, fail
        self._settings = loadgen.TestSettings()
        # No file of the submitter's: what may be changed is set here, the rest is the rules'.
        self._settings.FromConfig(os.devnull, RULES_OF, SCENARIOS[scenario], 0)
        self._settings.scenario = getattr(loadgen.TestScenario, SCENARIOS[scenario])
        self.rule_seconds = self._settings.min_duration_ms / 1000
        self.rule_queries = int(self._settings.min_query_count)
        self.rule_samples = int(self._settings.performance_sample_count_override)
        self.rule_latency_ms = self._settings.server_target_latency_ns / NS_PER_MS

    def run(self, traffic: Traffic, folder: Path) -> Outcome:
        """Make traffic and time the answers.

        Args:
            traffic: how much.
            folder: for LoadGen's own logs; made where it does not exist.

        Raises:
            OutputError: the folder cannot be written.
        """
        self._settings.mode = loadgen.TestMode.PerformanceOnly
        self._expect(traffic)
        started = time.perf_counter()
        values = self._start(traffic, folder)
        return self._outcome(values, time.perf_counter() - started)

    def ask_all(self, traffic: Traffic, folder: Path) -> None:
        """Ask for every image of the library once, as in MLPerf's accuracy mode.

        Args:
            traffic: its rate.
            folder: as `run` takes it.

        Raises:
            OutputError: the folder cannot be written.
        """
        self._settings.mode = loadgen.TestMode.AccuracyOnly
        self._expect(traffic)
        self._start(traffic, folder)

    def _expect(self, traffic: Traffic) -> None:
        """Set what this run changes of the rules, and what LoadGen plans with."""
        settings = self._settings
        seconds = self.rule_seconds if traffic.min_seconds is None else traffic.min_seconds
        settings.min_duration_ms = round(seconds * 1000)
        settings.min_query_count = traffic.min_queries or self.rule_queries
        latency_ms = traffic.latency_ms or self.rule_latency_ms
        settings.server_target_latency_ns = round(latency_ms * NS_PER_MS)
        if self.scenario == "server":
            settings.server_target_qps = traffic.expected
        elif self.scenario == "offline":
            settings.offline_expected_qps = traffic.expected
        else:
            name = f"{self.scenario}_stream_expected_latency_ns"
            setattr(settings, name, traffic.expected * NS_PER_MS)

    def _start(self, traffic: Traffic, folder: Path) -> Mapping[str, Setting]:
        """Run LoadGen, and return what its log says last of every key."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made ({error.strerror}); choose another --output"
            ) from error
        log = loadgen.LogSettings()
        # Not in place: what these properties give is a copy.
        output = loadgen.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = str(folder), False
        log.log_output, log.enable_trace = output, False
        count = min(traffic.samples or self.rule_samples, len(self.library))
        self._settings.performance_sample_count_override = count
        self.system.set_complete(_complete)
        sut = loadgen.ConstructSUT(self._issue, lambda: None)
        qsl = loadgen.ConstructQSL(len(self.library), count, self._load, self.library.unload)
        try:
            loadgen.StartTestWithLogSettings(sut, qsl, self._settings, log)
        finally:
            loadgen.DestroyQSL(qsl)
            loadgen.DestroySUT(sut)
        return read_log(folder / DETAIL)

    def _issue(self, samples: Sequence[loadgen.QuerySample]) -> None:
        try:
            self.system.issue([Query(sample.id, sample.index) for sample in samples])
        except BaseException as error:
            self.fail(error)

    def _load(self, positions: Sequence[int]) -> None:
        try:
            self.library.load(positions)
        except BaseException as error:
            self.fail(error)

    def _outcome(self, values: Mapping[str, Setting], seconds: float) -> Outcome:
        number = NumberReader(values)
        stopped = str(values.get("early_stopping_result", ""))
        reason = f"{values.get('result_invalid_reason', '')} {stopped}"
        queries = int(number("result_query_count"))
        if self.scenario == "offline":
            queries = int(number("effective_min_sample_count"))
        return Outcome(
            values.get("result_validity") == "VALID",
            " ".join(reason.replace("*", "").split()),
            not values.get("result_min_duration_met", False),
            self._figure(number),
            queries,
            seconds,
            bool(values.get("result_perf_constraints_met", True)),
            int(number("result_overlatency_query_count")),
            number("result_mean_latency_ns") / NS_PER_MS,
            {
                f"{float(percentile):g}": number(f"result_{percentile}_percentile_latency_ns")
                / NS_PER_MS
                for percentile in PERCENTILES
            },
            {
                key.removeprefix("effective_"): value
                for key, value in values.items()
                if key.startswith("effective_") or key == "loadgen_version"
            },
        )

    def _figure(self, number: NumberReader) -> float:
        if self.scenario == "server":
            return number("result_completed_samples_per_sec")
        if self.scenario == "offline":
            return number("result_samples_per_second")
        return number(f"early_stopping_latency_{'ss' if self.scenario == 'single' else 'ms'}") / (
            NS_PER_MS
        )


@dataclass(frozen=True)
class NumberReader:
    """The numbers of a log, by key; 0 where it has none."""

    values: Mapping[str, Setting]

    def __call__(self, key: str) -> float:
        """Return one of them."""
        return float(self.values.get(key, 0))


def _complete(keys: Sequence[int]) -> None:
    """Report answers; their contents are kept by the system, not by LoadGen."""
    loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(key, 0, 0) for key in keys])


def read_log(path: Path) -> dict[str, Setting]:
    """Read LoadGen's detailed log: the last value of every key.

    Args:
        path: of the file, with a JSON object after a mark on every line.
    """
    entries = (
        json.loads(line.removeprefix(MARK))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith(MARK)
    )
    return {
        entry["key"]: entry["value"] for entry in entries if isinstance(entry["value"], Setting)
    }
