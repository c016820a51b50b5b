"""Reports of a scenario: JSON, Markdown, one HTML page.

A `ScenarioResult` comes in, tables and files go out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tood_deploy import __version__
from tood_deploy.benchmark.html_report import (
    Section,
    Table,
    Tile,
    render_page,
    write_json,
    write_markdown,
)
from tood_deploy.benchmark.latency.machine import Load, Machine
from tood_deploy.benchmark.scenario.process import MULTI_IMAGES, OpenedCase, ScenarioCase
from tood_deploy.benchmark.scenario.traffic import RULES_OF, SCENARIOS, Outcome, Traffic

FIGURES = {  # what a scenario's figure is, and its unit
    "single": ("90th percentile of latency", "ms"),
    "multi": (f"99th percentile of latency, {MULTI_IMAGES} images a query", "ms"),
    "server": ("images a second", "images/s"),
    "offline": ("images a second", "images/s"),
}
NOTE = (
    "Measured with MLCommons' LoadGen by the rules of MLPerf Inference for its object detector "
    f"({RULES_OF}); the network is another one, and MLCommons has not verified the result."
)


@dataclass(frozen=True)
class Probe:
    """A rate that was tried.

    Attributes:
        rate: images a second.
        in_time: whether 99% of the queries were within the bound.
        p99_ms: measured.
        queries: how many.
        confirmed: False for a long run that early stopping did not accept.
    """

    rate: float
    in_time: bool
    p99_ms: float
    queries: int
    confirmed: bool = True

    @classmethod
    def of(cls, rate: float, outcome: Outcome, *, confirmed: bool = True) -> Probe:
        """Return what a run at this rate gave.

        Args:
            rate: images a second.
            outcome: of the run.
            confirmed: False for a long run that early stopping did not accept.
        """
        p99_ms = outcome.percentiles_ms["99"]
        return cls(rate, outcome.in_time, p99_ms, outcome.queries, confirmed)

    def __str__(self) -> str:
        verdict = "holds" if self.in_time and self.confirmed else "does not hold"
        return f"{self.rate:.3g} images/s {verdict}: p99 {self.p99_ms:.1f} ms"


@dataclass(frozen=True)
class Accuracy:
    """The accuracy gate.

    Attributes:
        ap: of the model, in points.
        reference_ap: of float32, in points.
        percent: the least share of the latter.
    """

    ap: float
    reference_ap: float
    percent: float

    @property
    def passed(self) -> bool:
        """Return whether the model has that share; False where the reference has no AP above 0."""
        return self.reference_ap > 0 and self.ap >= self.reference_ap * self.percent / 100

    def __str__(self) -> str:
        share = 100 * self.ap / self.reference_ap if self.reference_ap else math.nan
        return (
            f"AP {self.ap:.2f}, {share:.2f}% of float32's {self.reference_ap:.2f}; "
            f"at least {self.percent:g}% is wanted"
        )


@dataclass(frozen=True)
class ScenarioResult:
    """What a report is made of.

    Attributes:
        case: the model and how it was fed.
        opened: what it is.
        outcome: the run that counts.
        traffic: what was asked for.
        probes: rates that were tried before.
        accuracy: the gate; None where it was not asked for.
        command: the command line.
        machine: it ran on.
        load: of the machine by others.
        date: of the run, UTC.
    """

    case: ScenarioCase
    opened: OpenedCase
    outcome: Outcome
    traffic: Traffic
    probes: Sequence[Probe]
    accuracy: Accuracy | None
    command: str
    machine: Machine
    load: Load
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def passed(self) -> bool:
        """Return whether LoadGen calls the run valid, and the accuracy is what is wanted."""
        return self.outcome.valid and (self.accuracy is None or self.accuracy.passed)

    @property
    def failure_line(self) -> str:
        """Return why it did not pass."""
        reasons = [] if self.outcome.valid else [f"LoadGen: invalid: {self.outcome.reason}"]
        if self.accuracy is not None and not self.accuracy.passed:
            reasons.append(str(self.accuracy))
        return f"{self.case.model}, {self.case.scenario}: {'; '.join(reasons)}"

    @property
    def departures(self) -> list[str]:
        """Return in what the run departs from MLPerf's rules, a sentence each."""
        opened, traffic, lines = self.opened, self.traffic, []
        seconds = traffic.min_seconds
        if seconds is not None and seconds < opened.rule_seconds:
            lines.append(f"{seconds:g} s or more; MLPerf's rules demand {opened.rule_seconds:g} s")
        if (traffic.min_queries or opened.rule_queries) < opened.rule_queries:
            lines.append(
                f"{traffic.min_queries} queries or more; the rules demand {opened.rule_queries}"
            )
        samples = min(self.case.samples or opened.rule_samples, opened.image_count)
        if samples < opened.rule_samples:
            lines.append(f"{samples} images in memory; the rules demand {opened.rule_samples}")
        if self.case.scenario == "server" and self.latency_ms != opened.rule_latency_ms:
            lines.append(
                f"the bound is {self.latency_ms:g} ms; the rules' for object detection is "
                f"{opened.rule_latency_ms:g} ms"
            )
        if self.accuracy is None:
            lines.append("the accuracy was not checked; give --annotations and --reference")
        return lines

    @property
    def latency_ms(self) -> float:
        """Return the bound of the scenario server."""
        return self.traffic.latency_ms or self.opened.rule_latency_ms

    @property
    def figure(self) -> str:
        """Return the figure of the scenario, with its unit."""
        return f"{self.outcome.figure:.4g} {FIGURES[self.case.scenario][1]}"

    def settings(self) -> dict[str, str]:
        """Return all settings of the run, but LoadGen's own."""
        case, opened, feed = self.case, self.opened, self.case.settings
        values = {
            "date": self.date,
            "command": self.command,
            "scenario": f"{case.scenario} ({SCENARIOS[case.scenario]})",
            "model": f"{case.model}, {opened.engine}, {opened.precision}",
            "options": ", ".join(
                f"{name} {value}" for name, value in case.options.items() if value is not None
            ),
            "a query begins with": "encoded bytes" if case.start == "bytes" else "decoded frames",
            "images": opened.images,
            "fitted to": f"{opened.imgsz[0]} {opened.imgsz[1]} (short side, long side)",
            "thresholds": f"score {opened.conf:g}, IoU {opened.iou:g}",
            "largest batch": str(feed.max_batch),
            "threads that decode and scale": str(feed.workers),
            "machine": f"{self.machine.cpu}, {self.machine.usable_cores} usable cores, "
            f"{self.machine.memory_gib} GiB, governor {self.machine.governor}",
            "load": str(self.load),
            "software": f"tood_deploy {__version__}, Python {self.machine.python}, "
            f"{self.machine.system}",
        }
        if case.scenario in ("server", "offline"):
            values["a batch waits for images"] = f"{1000 * feed.delay_s:g} ms at most, while idle"
        return values


def result_table(result: ScenarioResult) -> Table:
    """Return the result in few rows, for a terminal, too."""
    outcome, server = result.outcome, result.case.scenario == "server"
    name, _ = FIGURES[result.case.scenario]
    rows = [
        [name, result.figure],
        ["LoadGen's verdict", "valid" if outcome.valid else f"INVALID: {outcome.reason}"],
        ["images" if result.case.scenario == "offline" else "queries", f"{outcome.queries}"],
        ["seconds", f"{outcome.seconds:.1f}"],
    ]
    if server:
        rows.append([f"queries over {result.latency_ms:g} ms", f"{outcome.late}"])
    if result.accuracy is not None:
        verdict = "passed" if result.accuracy.passed else "FAILED"
        rows.append(["accuracy", f"{verdict}: {result.accuracy}"])
    return Table(("scenario", result.case.scenario), rows, NOTE)


def tables(result: ScenarioResult) -> dict[str, Table]:
    """Return all tables by their titles."""
    by_title = {"Result": result_table(result)}
    if result.case.scenario != "offline":  # which is a single query
        rows = [["mean", f"{result.outcome.mean_ms:.2f}"]]
        rows += [[name, f"{ms:.2f}"] for name, ms in result.outcome.percentiles_ms.items()]
        note = "Milliseconds of a query, as measured; early stopping gives the figure above."
        by_title["Latency"] = Table(("percentile", "ms"), rows, note)
    if result.probes:
        by_title["Rates tried"] = _probe_table(result)
    by_title["LoadGen's settings"] = Table(
        ("setting", "value"),
        [[name, str(value)] for name, value in sorted(result.outcome.settings.items())],
    )
    return by_title


def _probe_table(result: ScenarioResult) -> Table:
    rows = [
        [
            f"{probe.rate:.4g}",
            probe.queries,
            f"{probe.p99_ms:.1f}",
            "yes" if probe.in_time else "no",
            "" if probe.confirmed else "not certain enough for early stopping",
        ]
        for probe in result.probes
    ]
    return Table(("images a second", "queries", "p99 ms", "in time", "remark"), rows)


def write_scenario_reports(folder: Path, result: ScenarioResult) -> None:
    """Write scenario.json, scenario.md and scenario.html into a folder.

    Args:
        folder: is made where it does not exist.
        result: what was measured.

    Raises:
        OutputError: it cannot be written.
    """
    name, _ = FIGURES[result.case.scenario]
    settings, by_title = result.settings(), tables(result)
    title = f"Scenario {result.case.scenario}: {Path(result.case.model).name}"
    write_json(folder / "scenario.json", _values(result))
    facts = [f"- {key}: {value}" for key, value in settings.items()]
    facts += [f"- departs from the rules: {line}" for line in result.departures]
    parts = [f"## {heading}\n\n{table.markdown()}" for heading, table in by_title.items()]
    write_markdown(folder / "scenario.md", [f"# {title}", "\n".join(facts), *parts])
    render_page(
        title,
        [Section(heading, table.html()) for heading, table in by_title.items()],
        folder / "scenario.html",
        tiles=[Tile(name, result.figure, "valid" if result.outcome.valid else "INVALID")],
        facts=settings,
        warnings=[*result.departures, *([result.load.warning] if result.load.warning else [])],
    )


def _values(result: ScenarioResult) -> dict[str, object]:
    accuracy = result.accuracy
    return {
        "scenario": result.case.scenario,
        "figure": result.outcome.figure,
        "unit": FIGURES[result.case.scenario][1],
        "passed": result.passed,
        "departures": result.departures,
        "outcome": asdict(result.outcome),
        "traffic": asdict(result.traffic),
        "probes": [asdict(probe) for probe in result.probes],
        "accuracy": accuracy and {**asdict(accuracy), "passed": accuracy.passed},
        "model": {
            "path": result.case.model,
            "engine": result.opened.engine,
            "precision": result.opened.precision,
            "preset": result.opened.preset.name,
        },
        "settings": result.settings(),
        "machine": asdict(result.machine),
        "load": asdict(result.load),
    }
