"""Scenarios: LoadGen's traffic on a stand-in engine, the search for a rate, the report's verdicts.

No test asserts a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from inference.fakes import RedEngine, red_image, write_image

pytest.importorskip("mlperf_loadgen", reason="needs the extra scenario")

from tood_deploy.benchmark.latency.machine import Load, Machine
from tood_deploy.benchmark.scenario.process import AskAll, OpenedCase, Run, ScenarioCase, Session
from tood_deploy.benchmark.scenario.report import Accuracy, ScenarioResult, write_scenario_reports
from tood_deploy.benchmark.scenario.run import Client, ScenarioPlan, find_rate
from tood_deploy.benchmark.scenario.system import (
    DetectorSystem,
    ImageLibrary,
    Start,
    SystemSettings,
    open_system,
    warm_up,
)
from tood_deploy.benchmark.scenario.traffic import SCENARIOS, LoadGen, Outcome, Scenario, Traffic
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.presets import PRESETS
from tood_deploy.reporter import Reporter

IMGSZ = (64, 96)


class FailureError(Exception):
    """What a system failed with, in place of the end of its process."""


def fail(error: BaseException) -> None:
    raise FailureError from error


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of two padded sizes, the red square further to the right in each."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(64, 96), (64, 96), (96, 64), (64, 96)]
    return [
        write_image(folder / f"{number}.png", red_image(*size, left=10 * number))
        for number, size in enumerate(sizes)
    ]


def system_of(
    scenario: Scenario,
    images: Sequence[Path],
    start: Start = "frames",
    fail_at_call: int | None = None,
) -> DetectorSystem:
    detector = Detector(RedEngine(fail_at_call=fail_at_call), imgsz=IMGSZ)
    settings = SystemSettings(max_batch=3, workers=2, delay_s=0.001)
    return open_system(scenario, detector, ImageLibrary(images, start), settings, fail)


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    return request.param


class TestSystem:
    @pytest.mark.parametrize("start", ["frames", "bytes"])
    def test_every_image_gets_its_own_answer(
        self, scenario: Scenario, start: Start, images: list[Path]
    ) -> None:
        with system_of(scenario, images, start) as system:
            system.library.load(range(4))
            system.kept = {}
            # A second round: no answer is lost, whatever the batches were.
            warm_up(system, 11, 0)
            kept = system.kept
        assert sorted(kept) == [0, 1, 2, 3]
        for number, detections in kept.items():
            assert detections.boxes[0, 0] == pytest.approx(10 * number, abs=1)
        engine = system.detector.engine
        assert isinstance(engine, RedEngine)
        assert max(engine.batches) <= 3

    def test_a_warm_up_asks_for_what_is_in_memory_alone(self, images: list[Path]) -> None:
        with system_of("offline", images) as system:
            system.library.load([1, 3])
            system.kept = {}
            warm_up(system, 5, 0)
            assert sorted(system.kept) == [1, 3]

    def test_an_image_that_is_dropped_is_read_again(self, images: list[Path]) -> None:
        library = ImageLibrary(images, "frames")
        library.load([2])
        assert library.frame(2).shape == (96, 64, 3)
        library.unload([2])
        with pytest.raises(KeyError):
            library.frame(2)

    def test_parts_of_a_photograph_where_there_are_no_files(self) -> None:
        library = ImageLibrary((), "bytes", (240, 320))
        library.load([7])
        assert len(library) == 8
        assert library.frame(7).ndim == 3

    def test_an_image_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"no image")
        library = ImageLibrary([tmp_path / "a.jpg"], "frames")
        with pytest.raises(InputError, match=r"a\.jpg"):
            library.load([0])


class TestLoadGen:
    def test_a_run_of_every_scenario(
        self, scenario: Scenario, images: list[Path], tmp_path: Path
    ) -> None:
        with system_of(scenario, images) as system:
            load_gen = LoadGen(scenario, system, system.library, fail)
            query_ms, _ = warm_loaded(system)
            expected = {"server": 2000.0, "offline": 2000.0}.get(scenario, query_ms * 0.5)
            outcome = load_gen.run(Traffic(expected, 0.01, 70, 1000.0), tmp_path / "logs")
        assert outcome.queries >= 70
        assert outcome.figure > 0 or scenario == "multi"  # 99% needs 662 queries
        assert outcome.settings["performance_sample_count"] == 4
        assert outcome.settings["scenario"] == SCENARIOS[scenario]
        assert outcome.settings["qsl_rng_seed"] != 0
        assert outcome.settings["samples_per_query"] == {"multi": 8}.get(scenario, 1) or (
            scenario == "offline"
        )
        assert (tmp_path / "logs" / "mlperf_log_summary.txt").is_file()
        assert not system.library._loaded

    def test_the_rules_are_those_of_mlperf(self, images: list[Path]) -> None:
        with system_of("single", images) as system:
            rules = {name: LoadGen(name, system, system.library, fail) for name in SCENARIOS}
        assert {one.rule_seconds for one in rules.values()} == {600}
        assert {one.rule_samples for one in rules.values()} == {64}
        assert rules["server"].rule_latency_ms == 100
        assert rules["multi"].rule_queries == 662
        assert rules["offline"].rule_queries == 24576

    def test_all_images_are_asked_for_once(
        self, scenario: Scenario, images: list[Path], tmp_path: Path
    ) -> None:
        case = ScenarioCase("red", scenario, samples=2)
        with system_of(scenario, images) as system:
            answer = Session(case, system, fail).answer(
                AskAll(Traffic(1000.0, samples=2), tmp_path)
            )
        assert isinstance(answer, list)
        assert [round(float(one.boxes[0, 0])) for one in answer] == [0, 10, 20, 30]

    def test_too_few_queries_for_early_stopping_are_not_valid(self, images: list[Path]) -> None:
        with system_of("server", images) as system:
            session = Session(ScenarioCase("red", "server"), system, fail)
            outcome = session.answer(Run(Traffic(3000.0, 0.001, 30, 1000.0)))
        assert isinstance(outcome, Outcome)
        assert outcome.in_time
        assert not outcome.valid
        assert "more queries" in outcome.reason

    def test_what_the_engine_raises_is_given_to_fail(
        self, images: list[Path], tmp_path: Path
    ) -> None:
        failures: list[BaseException] = []
        with system_of("single", images, fail_at_call=0) as system:
            load_gen = LoadGen("single", system, system.library, failures.append)
            system.library.load([0])
            system.set_complete(lambda keys: None)
            load_gen._issue([_Sample()])  # pyright: ignore[reportArgumentType] - LoadGen makes them
        assert [str(one) for one in failures] == ["the engine broke"]


class _Sample:
    id, index = 5, 0


def warm_loaded(system: DetectorSystem) -> tuple[float, float]:
    system.library.load(range(4))
    try:
        return warm_up(system, 4, 0)
    finally:
        system.library.unload(range(4))


def outcome_of(*, valid: bool = True, in_time: bool = True, figure: float = 10.0) -> Outcome:
    percentiles = {"50": 1.0, "99": 2.0}
    return Outcome(valid, "why", False, figure, 700, 1.5, in_time, 1, 1.0, percentiles, {"a": 1})


OPENED = OpenedCase(
    "an engine",
    "int8",
    PRESETS["tiny"],
    0.05,
    0.6,
    IMGSZ,
    "some images",
    100,
    query_ms=20.0,
    rate=50.0,
    rule_seconds=600.0,
    rule_queries=100,
    rule_samples=64,
    rule_latency_ms=100.0,
)


class AnsweringChild:
    """Stands for the process: a rate holds up to `most`, a long run up to `confirmed`."""

    def __init__(self, most: float, confirmed: float, shortest: float = 0.0) -> None:
        self.most, self.confirmed, self.shortest = most, confirmed, shortest
        self.runs: list[Run] = []

    def ask(self, run: Run) -> None:
        self.runs.append(run)

    def receive(self, kind: type[Outcome]) -> Outcome:
        rate = self.runs[-1].traffic.expected
        outcome = outcome_of(valid=rate <= self.confirmed, in_time=rate <= self.most, figure=rate)
        return replace(outcome, too_short=rate < self.shortest)


def client_of(
    child: AnsweringChild, tmp_path: Path, scenario: Scenario = "server", **values: float
) -> Client:
    plan = ScenarioPlan(ScenarioCase("red", scenario), **values)  # pyright: ignore[reportArgumentType]
    return Client(child, plan, OPENED, tmp_path, Reporter(quiet=True))  # pyright: ignore[reportArgumentType]


class TestSearch:
    @pytest.mark.parametrize("most", [0.9, 7.0, 30.0, 31.0, 400.0])
    def test_the_highest_rate_to_5_percent(self, most: float) -> None:
        rate = find_rate(30.0, lambda rate: rate <= most)
        assert rate is not None
        assert most / 1.06 <= rate <= most

    def test_no_rate_holds(self, tmp_path: Path) -> None:
        assert find_rate(30.0, lambda rate: False) is None
        with pytest.raises(ToodError, match="--latency-ms"):
            client_of(AnsweringChild(0, 0), tmp_path).measure()

    def test_the_long_run_has_the_last_word(self, tmp_path: Path) -> None:
        child = AnsweringChild(most=40.0, confirmed=36.0)
        outcome, probes = client_of(child, tmp_path).measure()
        assert outcome.valid
        assert 33.0 < outcome.figure <= 36.0
        assert [one.confirmed for one in probes].count(False) >= 1
        assert child.runs[-1].folder == tmp_path
        assert child.runs[-1].traffic.min_queries == 662

    def test_an_offline_run_that_was_planned_too_short_is_made_again(self, tmp_path: Path) -> None:
        child = AnsweringChild(most=0, confirmed=100, shortest=70.0)
        outcome, _ = client_of(child, tmp_path, "offline").measure()
        assert not outcome.too_short
        assert len(child.runs) == 2

    def test_a_rate_that_is_given_is_not_searched(self, tmp_path: Path) -> None:
        child = AnsweringChild(most=40.0, confirmed=36.0)
        outcome, probes = client_of(child, tmp_path, rate=50.0).measure()
        assert not outcome.valid
        assert (len(child.runs), probes) == (1, [])

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"rate": 0.0}, "--rate is 0"),
            ({"annotations": Path("a.json")}, "--reference"),
            ({"reference_ap": 40.0}, "--annotations"),
        ],
    )
    def test_plans_that_make_no_sense(self, values: dict, words: str) -> None:
        with pytest.raises(ToodError, match=words):
            ScenarioPlan(ScenarioCase("red", "server"), **values)
        with pytest.raises(ToodError, match="--min-seconds is -1"):
            Traffic(1.0, min_seconds=-1)


def result_of(outcome: Outcome, accuracy: Accuracy | None, traffic: Traffic) -> ScenarioResult:
    machine = Machine("a CPU", 2, 2, "none", 8.0, "Linux", "3.11")
    case = ScenarioCase("red.onnx", "server")
    load = Load(0.1, 0.1, 0.0, 2)
    return ScenarioResult(case, OPENED, outcome, traffic, [], accuracy, "command", machine, load)


class TestReport:
    def test_what_passes(self) -> None:
        good, bad = Accuracy(39.7, 40.0, 99.0), Accuracy(39.7, 40.0, 99.9)
        rules = Traffic(1.0)
        assert result_of(outcome_of(), good, rules).passed
        assert result_of(outcome_of(), None, rules).passed
        assert not result_of(outcome_of(), bad, rules).passed
        assert not result_of(outcome_of(valid=False), good, rules).passed
        assert not Accuracy(math.nan, 40.0, 99.0).passed
        assert not Accuracy(0.0, 0.0, 99.0).passed

    def test_departures_from_the_rules(self) -> None:
        good = Accuracy(40.0, 40.0, 99.0)
        assert result_of(outcome_of(), good, Traffic(1.0)).departures == []
        short = result_of(outcome_of(), None, Traffic(1.0, 5.0, 10, 50.0))
        assert len(short.departures) == 4
        few = replace(short, opened=replace(OPENED, image_count=3), traffic=Traffic(1.0))
        assert any("3 images" in line for line in few.departures)

    def test_files(self, tmp_path: Path) -> None:
        result = result_of(outcome_of(), Accuracy(39.0, 40.0, 99.0), Traffic(1.0, 5.0))
        write_scenario_reports(tmp_path, result)
        values = json.loads((tmp_path / "scenario.json").read_text())
        assert values["figure"] == 10.0
        assert not values["passed"]
        assert values["accuracy"]["passed"] is False
        assert "5 s or more" in (tmp_path / "scenario.md").read_text()
        assert "a CPU" in (tmp_path / "scenario.html").read_text()
