"""`tood-bench scenario` from file names to a report: traffic, the search for a rate, accuracy.

A `ScenarioPlan` comes in; a `ScenarioResult`, reports and a printed table go out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tood_deploy.benchmark.latency.machine import LoadWatch, describe_machine
from tood_deploy.benchmark.latency.measure import Child
from tood_deploy.benchmark.scenario.process import (
    AskAll,
    OpenedCase,
    Run,
    ScenarioCase,
    serve_scenario,
)
from tood_deploy.benchmark.scenario.report import (
    Accuracy,
    Probe,
    ScenarioResult,
    result_table,
    write_scenario_reports,
)
from tood_deploy.benchmark.scenario.traffic import PROBE_QUERIES, Outcome, Traffic
from tood_deploy.data.coco import Annotations, read_annotations
from tood_deploy.data.coco_metrics import Scoring, average_precision
from tood_deploy.data.image_set import list_image_files
from tood_deploy.data.images import image_paths
from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError
from tood_deploy.reporter import Reporter

MAX_PROBES = 12
CLOSE = 1.05  # a rate is known well enough when one so many times higher does not hold
FEWER, TRIES = 0.95, 5  # of the rate, where the long run does not confirm the search's
LOADGEN_FOLDER = "loadgen"


@dataclass(frozen=True)
class ScenarioPlan:
    """What to measure.

    Attributes:
        case: the model and how it is fed; its files are those of `images`.
        images: folder of images; parts of a photograph where not given.
        annotations: of the images, COCO JSON; for the accuracy gate.
        mapping: of classes to categories, as `map_categories` takes it.
        reference: a model in float32 that the accuracy is held against, with its options.
        reference_ap: its AP in points, where it is known.
        accuracy: the least share of that AP, in percent.
        traffic: of the run that counts; what LoadGen plans with is measured first.
        rate: of the scenario server, in images a second; searched where not given.
        search_seconds: the shortest time on which a rate is tried.
    """

    case: ScenarioCase
    images: Path | None = None
    annotations: Path | None = None
    mapping: Path | None = None
    reference: ScenarioCase | None = None
    reference_ap: float | None = None
    accuracy: float = 99.0
    traffic: Traffic = field(default_factory=lambda: Traffic(1.0))
    rate: float | None = None
    search_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Refuse numbers and combinations that make no sense."""
        for name in ("rate", "search_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                option = f"--{name.replace('_', '-')}"
                raise ToodError(f"{option} is {value:g}; expected a positive number")
        known = self.reference is not None or self.reference_ap is not None
        if self.annotations is not None and (self.images is None or not known):
            raise ToodError(
                f"{self.annotations}: annotations alone are no measure of accuracy; add --images "
                "DIR, and --reference MODEL in float32 or --reference-ap P"
            )
        if known and self.annotations is None:
            raise ToodError(
                "--reference, --reference-ap: expected annotations to measure AP with; add "
                "--annotations FILE --images DIR"
            )
        if self.reference_ap is not None and not 0 < self.reference_ap <= 100:
            raise ToodError(f"--reference-ap is {self.reference_ap:g}; expected points, 0 to 100")


def run_scenario(
    plan: ScenarioPlan, output: Path, *, command: str, reporter: Reporter
) -> ScenarioResult:
    """Measure, write the reports, and print the result.

    Args:
        plan: what to measure.
        output: folder for the reports and LoadGen's logs.
        command: the command line, for the report.
        reporter: shows what happens.

    Raises:
        ToodError: a model cannot be opened or run, or the reports cannot be written.
    """
    machine, watch = describe_machine(), LoadWatch()
    truth = None if plan.annotations is None else read_annotations(plan.annotations)
    files = _files(plan, truth)
    case = replace(plan.case, files=tuple(files.values()))
    with Child(case.model, serve_scenario, case) as child:
        reporter.info(f"{case.model}: opening and warming up")
        opened = child.receive(OpenedCase)
        client = Client(child, plan, opened, output / LOADGEN_FOLDER, reporter)
        outcome, probes = client.measure()
        detections = client.ask_all() if truth is not None else []
    accuracy = None
    if truth is not None:
        accuracy = _accuracy(plan, truth, files, opened, detections, reporter)
    result = ScenarioResult(
        case,
        opened,
        outcome,
        plan.traffic,
        probes=probes,
        accuracy=accuracy,
        command=command,
        machine=machine,
        load=watch.stop(),
    )
    write_scenario_reports(output, result)
    reporter.table(result_table(result).rich())
    for line in (*result.departures, result.load.warning):
        if line:
            reporter.warn(line)
    return result


def _files(plan: ScenarioPlan, truth: Annotations | None) -> dict[int, Path]:
    """Return the images by their ids in the annotations, else by number; none for a photograph's.

    Raises:
        InputError: no such folder, or an annotated image is missing.
    """
    if plan.images is None:
        return {}
    if truth is None:
        return dict(enumerate(image_paths(plan.images), 1))
    return list_image_files(truth, plan.images)


class Client:
    """Asks the process of a model for runs."""

    def __init__(
        self, child: Child, plan: ScenarioPlan, opened: OpenedCase, logs: Path, reporter: Reporter
    ) -> None:
        """Take what is needed.

        Args:
            child: the process.
            plan: what to measure.
            opened: what it opened.
            logs: folder for the logs of the run that counts.
            reporter: shows what happens.
        """
        self.child, self.plan, self.opened, self.logs = child, plan, opened, logs
        self.reporter = reporter
        self.rate = plan.rate or opened.rate

    def measure(self) -> tuple[Outcome, list[Probe]]:
        """Return the run that counts, and the rates that were tried before it."""
        if self.plan.case.scenario == "server":
            return self._measure_server()
        offline = self.plan.case.scenario == "offline"
        # Too low an estimate ends a run before its time; LoadGen only plans with it.
        expected = self.opened.rate * 1.1 if offline else self.opened.query_ms * 0.8
        outcome = self._run(expected)
        for _ in range(TRIES - 1):
            if not outcome.too_short:
                break
            self.reporter.info("the run ended before its time, as too few queries were planned")
            expected = outcome.figure * 1.3 if offline else expected / 2
            outcome = self._run(expected)
        return outcome, []

    def ask_all(self) -> list[Detections]:
        """Return the detections of all images."""
        self.reporter.info(f"accuracy: {self.opened.image_count} images")
        self.child.ask(AskAll(self._traffic(self.rate), self.logs / "accuracy"))
        return self.child.receive(list)

    def _measure_server(self) -> tuple[Outcome, list[Probe]]:
        probes: list[Probe] = []
        if self.plan.rate is None:
            rate = find_rate(self.opened.rate * 0.6, lambda rate: self._holds(rate, probes))
            if rate is None:
                bound = self.plan.traffic.latency_ms or self.opened.rule_latency_ms
                raise ToodError(
                    f"no rate down to {probes[-1].rate:.3g} images/s keeps 99% of the queries "
                    f"within {bound:g} ms; a query of one image takes {self.opened.query_ms:.0f} "
                    "ms or more here: raise --latency-ms"
                )
            self.rate = rate
        outcome = self._run(self.rate)
        for _ in range(TRIES - 1):
            if outcome.valid or self.plan.rate is not None:
                break
            probes.append(Probe.of(self.rate, outcome, confirmed=False))
            self.rate *= FEWER
            outcome = self._run(self.rate)
        return outcome, probes

    def _holds(self, rate: float, probes: list[Probe]) -> bool:
        """Try a rate for a short time; what is measured decides, not yet early stopping."""
        traffic = replace(
            self._traffic(rate), min_seconds=self.plan.search_seconds, min_queries=PROBE_QUERIES
        )
        self.child.ask(Run(traffic))
        outcome = self.child.receive(Outcome)
        probes.append(Probe.of(rate, outcome))
        self.reporter.info(str(probes[-1]))
        return outcome.in_time

    def _run(self, expected: float) -> Outcome:
        traffic = self._traffic(expected)
        seconds = traffic.min_seconds or self.opened.rule_seconds
        at = f" at {expected:.3g} images/s" if self.plan.case.scenario == "server" else ""
        self.reporter.info(f"{self.plan.case.scenario}: {seconds:g} s or more{at}")
        self.child.ask(Run(traffic, self.logs))
        return self.child.receive(Outcome)

    def _traffic(self, expected: float) -> Traffic:
        traffic = replace(self.plan.traffic, expected=expected)
        if self.plan.case.scenario == "server" and traffic.min_queries is None:
            # More than the rules' own number, with which early stopping never agrees.
            traffic = replace(traffic, min_queries=max(PROBE_QUERIES, self.opened.rule_queries))
        return traffic


def find_rate(start: float, holds: Callable[[float], bool]) -> float | None:
    """Return the highest rate that holds, to 5%; None where none does.

    Args:
        start: the first to try.
        holds: whether one does; where it does, all lower ones should.
    """
    low, high, rate = 0.0, math.inf, start
    for _ in range(MAX_PROBES):
        if holds(rate):
            low = rate
        else:
            high = rate
        if high / CLOSE <= low:
            break
        rate = _next_rate(low, high)
    return low or None


def _next_rate(low: float, high: float) -> float:
    """Return the rate to try next, between the highest that held and the lowest that did not."""
    if low == 0:
        return high / 2
    return low * 1.5 if high == math.inf else math.sqrt(low * high)


def _accuracy(
    plan: ScenarioPlan,
    truth: Annotations,
    files: dict[int, Path],
    opened: OpenedCase,
    detections: Sequence[Detections],
    reporter: Reporter,
) -> Accuracy:
    """Return AP beside that of float32.

    Args:
        plan: with the reference.
        truth: the annotations.
        files: the images by id.
        opened: the model.
        detections: of the model, image by image.
        reporter: shows what happens.
    """
    scoring = Scoring.of(truth, opened.preset.class_names, plan.mapping)
    expected = plan.reference_ap
    if plan.reference is not None:
        reference = replace(plan.reference, files=tuple(files.values()))
        expected = _ap(scoring, files, _detect_all(reference, reporter))
    assert expected is not None  # the plan saw to it
    return Accuracy(_ap(scoring, files, detections), expected, plan.accuracy)


def _detect_all(case: ScenarioCase, reporter: Reporter) -> list[Detections]:
    """Return the detections of the reference.

    Raises:
        ToodError: it does not compute in float32.
    """
    import tempfile

    with Child(case.model, serve_scenario, case) as child, tempfile.TemporaryDirectory() as folder:
        reporter.info(f"{case.model}: the reference, {len(case.files)} images")
        opened = child.receive(OpenedCase)
        if opened.precision != "fp32":
            raise ToodError(
                f"--reference {case.model}: computes in {opened.precision}; expected a model in "
                "fp32: give the checkpoint"
            )
        child.ask(AskAll(Traffic(opened.rate), Path(folder)))
        return child.receive(list)


def _ap(scoring: Scoring, files: dict[int, Path], detections: Sequence[Detections]) -> float:
    rows = [
        row
        for image_id, found in zip(files, detections, strict=True)
        for row in scoring.rows(found, image_id)
    ]
    return average_precision(scoring.metrics(rows))
