"""The process that holds the model of a scenario, and LoadGen; the caller stays free of both.

A `ScenarioCase` comes in; `OpenedCase`, and an answer to every question, go out through a
connection. Knows no reports.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tood_deploy.benchmark.latency.worker import Failed
from tood_deploy.benchmark.scenario.system import (
    DetectorSystem,
    ImageLibrary,
    Start,
    SystemSettings,
    open_system,
    warm_up,
)
from tood_deploy.benchmark.scenario.traffic import Fail, LoadGen, Outcome, Scenario, Traffic
from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.preset import Preset
from tood_deploy.reporter import show_own_warnings

MULTI_IMAGES = 8  # of a query in MLPerf's scenario of several streams


@dataclass(frozen=True)
class ScenarioCase:
    """What is opened.

    Attributes:
        model: as `open_engine` takes it.
        scenario: what is asked of it.
        start: whether a query begins with a decoded frame or with encoded bytes.
        files: of the images; parts of a photograph where there are none.
        settings: how the detector is fed.
        warm_up_s: how long queries are asked before.
        samples: images in memory at a time; those of the rules where not given.
        conf: score that detections must exceed, 0 to 1; the model's own where not given.
        options: that the detector is made with.
    """

    model: str
    scenario: Scenario
    start: Start = "frames"
    files: tuple[Path, ...] = ()
    settings: SystemSettings = field(default_factory=SystemSettings)
    warm_up_s: float = 5.0
    samples: int | None = None
    conf: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedCase:
    """What the process reports when it is warm.

    Attributes:
        engine: that runs the model, and its version.
        precision: of its arithmetic.
        preset: of the network.
        conf, iou: thresholds that it runs with.
        imgsz: (short side, long side).
        images: what is asked for.
        image_count: how many of these there are.
        query_ms: the fastest query of the warm-up.
        rate: its images a second.
        rule_seconds, rule_queries, rule_samples, rule_latency_ms: as the rules of MLPerf have them.
    """

    engine: str
    precision: str
    preset: Preset
    conf: float
    iou: float
    imgsz: tuple[int, int]
    images: str
    image_count: int
    query_ms: float
    rate: float
    rule_seconds: float
    rule_queries: int
    rule_samples: int
    rule_latency_ms: float


@dataclass(frozen=True)
class Run:
    """A question: traffic, and where LoadGen's logs stay; nowhere where not given."""

    traffic: Traffic
    folder: Path | None = None


@dataclass(frozen=True)
class AskAll:
    """A question: the detections of all images, in order."""

    traffic: Traffic
    folder: Path


def serve_scenario(connection: Connection, case: ScenarioCase) -> None:
    """Send `OpenedCase`, then an answer to every question, until None is received.

    Args:
        connection: to the process that asks.
        case: what is opened.
    """
    # Within LoadGen no signal is seen: the process that asks ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_own_warnings()
    ending = threading.Lock()

    def fail(error: BaseException) -> None:
        # LoadGen waits for every answer and knows no errors, so the process ends here.
        if ending.acquire(blocking=False):
            expected = isinstance(error, ToodError)
            message = str(error) if expected else f"{type(error).__name__}: {error}"
            connection.send(Failed(message, expected))
            os._exit(1)

    try:
        _serve(connection, case, fail)
    except BaseException as error:
        fail(error)


def _serve(connection: Connection, case: ScenarioCase, fail: Fail) -> None:
    with Detector(case.model, **case.options) as detector:
        own_conf = detector.engine.manifest.preset.score_threshold
        detector.set_conf(own_conf if case.conf is None else case.conf)
        library = ImageLibrary(case.files, case.start, detector.imgsz)
        with open_system(case.scenario, detector, library, case.settings, fail) as system:
            session = Session(case, system, fail)
            connection.send(session.open())
            while (question := connection.recv()) is not None:
                connection.send(session.answer(question))


class Session:
    """A system, the library it takes images from, and the traffic that asks it."""

    def __init__(self, case: ScenarioCase, system: DetectorSystem, fail: Fail) -> None:
        """Take the parts.

        Args:
            case: what was opened.
            system: the detector with its threads.
            fail: is given what goes wrong in LoadGen's threads.
        """
        self.case, self.system = case, system
        self.load_gen = LoadGen(case.scenario, system, system.library, fail)

    def open(self) -> OpenedCase:
        """Warm up, and say what was opened."""
        case, detector, library = self.case, self.system.detector, self.system.library
        count = min(case.samples or self.load_gen.rule_samples, len(library))
        most = case.settings.max_batch
        library.load(range(count))
        net_hw = detector.prepare(library.frame(0)).transform.net_hw
        batches = {"single": 1, "multi": min(MULTI_IMAGES, most)}
        detector.engine.settle(batches.get(case.scenario, most), net_hw)
        # The batches of a few queries, so that the rate is that of a system with enough to do.
        images = {"single": 1, "multi": MULTI_IMAGES}.get(case.scenario, 4 * most)
        query_ms, rate = warm_up(self.system, images, case.warm_up_s)
        library.unload(range(count))
        return OpenedCase(
            detector.engine.name,
            detector.engine.precision,
            detector.engine.manifest.preset,
            detector.conf,
            detector.iou,
            detector.imgsz,
            library.description,
            len(library),
            query_ms,
            rate,
            self.load_gen.rule_seconds,
            self.load_gen.rule_queries,
            self.load_gen.rule_samples,
            self.load_gen.rule_latency_ms,
        )

    def answer(self, question: Run | AskAll) -> Outcome | list[Detections]:
        """Make traffic, or detect in every image."""
        if isinstance(question, AskAll):
            self.system.kept = kept = {}
            self.load_gen.ask_all(question.traffic, question.folder)
            self.system.kept = None
            return [kept[position] for position in range(len(self.system.library))]
        if question.folder is not None:
            return self.load_gen.run(question.traffic, question.folder)
        with tempfile.TemporaryDirectory() as folder:
            return self.load_gen.run(question.traffic, Path(folder))
