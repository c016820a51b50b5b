"""The whole pipeline on a clip: how busy each of its threads is, and so what limits it.

A detector and a `VideoPlan` come in; a `VideoRun` and its reports go out.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tood_deploy import __version__
from tood_deploy.benchmark.html_report import (
    Section,
    Table,
    Tile,
    render_page,
    write_json,
    write_markdown,
)
from tood_deploy.benchmark.latency.machine import LoadWatch, describe_machine
from tood_deploy.detections import Detections
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Frame, Part, Prepared, Source
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.sinks import Annotated, Sink, SinkThread
from tood_deploy.inference.sliced_pipeline import frame_parts, part_inputs
from tood_deploy.inference.slicing import Slicing
from tood_deploy.inference.source import open_source
from tood_deploy.reporter import Reporter

SATURATED = 0.9
ENGINE_FRAMES = 16
ENGINE_S = 3.0  # how long the engine alone is timed, before and after


class TimedSource(Source):
    """The first frames of a source, and the seconds that decoding them took."""

    def __init__(self, source: Source, limit: int | None) -> None:
        """Take a source, and how many of its frames to give; None for all."""
        super().__init__(source.names, source.length)
        self.kind, self.inner, self.limit = source.kind, source, limit
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Frame]:
        frames = iter(self.inner)
        given = 0
        while self.limit is None or given < self.limit:
            started = time.perf_counter()
            frame = next(frames, None)
            self.seconds += time.perf_counter() - started
            if frame is None:
                break
            given += 1
            yield frame
        self.skipped, self.problems = self.inner.skipped, self.inner.problems

    def close(self) -> None:
        """End a wait for the next frame."""
        self.inner.close()


class TimedSink(Sink):
    """A sink, and the seconds that it worked."""

    def __init__(self, sink: Sink) -> None:
        """Take the sink that does the work."""
        self.inner = sink
        self.seconds = 0.0

    def write(self, frame: Frame, detections: Detections) -> None:
        """Hand a frame and its detections on."""
        started = time.perf_counter()
        self.inner.write(frame, detections)
        self.seconds += time.perf_counter() - started

    def __enter__(self) -> TimedSink:
        self.inner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        started = time.perf_counter()
        self.inner.__exit__(kind, error, trace)
        self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class VideoRun:
    """One clip.

    Attributes:
        frames: that came through.
        seconds: from the first frame's decoding to the last output.
        busy_s: seconds at work of every thread of the pipeline: "decode", "scale", "infer", "draw
            and encode".
        engine_fps: frames a second of the engine alone, before and after the run.
        detections: of all frames.
        problems: what was lost, one line each.
    """

    frames: int
    seconds: float
    busy_s: dict[str, float]
    engine_fps: tuple[float, float]
    detections: int
    problems: tuple[str, ...]

    @property
    def fps(self) -> float:
        """Return frames a second of the whole pipeline."""
        return self.frames / self.seconds

    @property
    def share_of_engine(self) -> float:
        """Return the share of what the engine alone reaches."""
        return self.fps / (sum(self.engine_fps) / 2)

    @property
    def limit(self) -> str:
        """Return what limits it, in a sentence."""
        shares = {stage: seconds / self.seconds for stage, seconds in self.busy_s.items()}
        busiest = max(shares, key=lambda stage: shares[stage])
        percent = f"{100 * shares[busiest]:.0f}%"
        if shares[busiest] >= SATURATED:
            return f"{busiest} limits: its thread works {percent} of the time"
        return (
            f"no thread works all the time ({busiest} most, {percent}): "
            "they wait for one another or for free cores"
        )


@dataclass(frozen=True)
class VideoPlan:
    """What to run.

    Attributes:
        clip: a video.
        batch: images of one engine call; the last call may have fewer.
        limit: take the first so many frames only.
        encode: whether to draw and encode; otherwise results are thrown away.
    """

    clip: str
    batch: int = 1
    limit: int | None = None
    encode: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ToodError(f"--limit is {self.limit}; expected a positive number of frames")
        if self.batch < 1:
            raise ToodError(f"--batch is {self.batch}; expected a positive number")


def run_video(detector: Detector, plan: VideoPlan) -> VideoRun:
    """Run the pipeline on a clip, as tood-infer does.

    The annotated video goes into a folder that is then removed.

    Args:
        detector: to run.
        plan: what to run.

    Raises:
        ToodError: not a video, or it cannot be read.
    """
    source = open_source(plan.clip)
    if source.kind != "video":
        raise InputError(f"{plan.clip}: not a video; expected a clip, such as .mp4")
    before = engine_rate(detector, plan, ENGINE_S)
    timed, timings, detections = TimedSource(source, plan.limit), Timings(), 0
    with tempfile.TemporaryDirectory() as folder:
        outputs: dict[Part, Path] = {(name, None): Path(folder, "out.mp4") for name in source.names}
        sinks = [TimedSink(Annotated(outputs))] if plan.encode else []
        started = time.perf_counter()
        results = detect_frames(detector, timed, plan.batch, timings)
        with SinkThread(sinks) as writer, closing(results):
            for frame, in_frame in results:
                writer.put(frame, in_frame)
                detections += len(in_frame)
        seconds = time.perf_counter() - started
    if not timings.frames:
        raise _no_frame(plan)
    busy_s = {
        "decode": timed.seconds,
        "scale": timings.frames * timings.mean_ms("pre") / 1000,
        "infer": timings.frames * (timings.mean_ms("infer") + timings.mean_ms("post")) / 1000,
    }
    busy_s |= {"draw and encode": sinks[0].seconds} if sinks else {}
    rates = before, engine_rate(detector, plan, ENGINE_S)
    return VideoRun(timings.frames, seconds, busy_s, rates, detections, tuple(timed.problems))


def _no_frame(plan: VideoPlan) -> InputError:
    return InputError(f"{plan.clip}: gave no frame; expected a video that can be decoded")


def engine_rate(detector: Detector, plan: VideoPlan, seconds: float) -> float:
    """Return frames a second of the engine alone.

    It runs on the clip's first frames, scaled beforehand.

    Args:
        detector: whose engine is timed.
        plan: clip and batch.
        seconds: how long to run.
    """
    batch = plan.batch
    source = TimedSource(open_source(plan.clip), max(batch, ENGINE_FRAMES))
    frames = [frame.image_bgr for frame in source]
    if not frames:
        raise _no_frame(plan)
    parts = 1
    if detector.slicing is None:
        every = range(max(batch, len(frames)))
        prepared = [detector.prepare(frames[i % len(frames)]) for i in every]
    else:
        windows, prepared = _windows(detector, detector.slicing, frames[0], batch)
        parts = windows  # the whole frame, one more of many, is left out
    batches = [prepared[i : i + batch] for i in range(0, len(prepared) - batch + 1, batch)]
    detector.run_engine(batches[0])
    detector.engine.settle(batch, prepared[0].transform.net_hw)
    at_once, times = detector.engine.in_flight, list[float]()
    tickets = deque(detector.submit(batches[i % len(batches)]) for i in range(at_once - 1))
    while sum(times) < seconds or len(times) < 2:
        started = time.perf_counter()
        tickets.append(detector.submit(batches[len(times) % len(batches)]))
        detector.collect(tickets.popleft())
        times.append(time.perf_counter() - started)
    for ticket in tickets:
        detector.collect(ticket)
    # Batches that run side by side may end in pairs, which a median would not see.
    typical = np.mean if at_once > 1 else np.median
    return batch / float(typical(times)) / parts


def _windows(
    detector: Detector, slicing: Slicing, frame: NDArray[np.uint8], batch: int
) -> tuple[int, list[Prepared]]:
    """Return how many windows a frame has, and at least a batch of them, ready for the network.

    Args:
        detector: prepares them.
        slicing: says which.
        frame: (H, W, 3) uint8 BGR.
        batch: of an engine call.
    """
    inputs = replace(slicing, whole=False)
    parts = frame_parts(inputs, (frame.shape[0], frame.shape[1]))
    prepared = [item for _, item in part_inputs(detector, Frame(frame, "clip"), parts, inputs)]
    return len(parts), (prepared * -(-batch // len(prepared)))[: max(batch, ENGINE_FRAMES)]


def bench_video(
    detector: Detector,
    model: str,
    plan: VideoPlan,
    output: Path,
    *,
    command: str,
    reporter: Reporter,
) -> VideoRun:
    """Run the clip, write video.json, video.md and video.html, and print the table.

    Args:
        detector: to run.
        model: its name, for the report.
        plan: what to run.
        output: folder for the reports.
        command: the command line, for the report.
        reporter: shows the result and warnings.

    Raises:
        ToodError: the clip cannot be read, or the reports cannot be written.
    """
    machine, watch = describe_machine(), LoadWatch()
    run = run_video(detector, plan)
    load = watch.stop()
    engine, imgsz = detector.engine, f"{detector.imgsz[0]} x {detector.imgsz[1]}"
    slices = {} if detector.slicing is None else {"slices": str(detector.slicing)}
    facts = slices | {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"{model}, {engine.name}, {engine.precision}, {engine.device}",
        "clip": f"{plan.clip}, scaled to fit {imgsz}, batch {plan.batch}",
        "CPU": f"{machine.cpu}, {machine.cores} logical cores, governor {machine.governor}",
        "load": str(load),
        "software": f"tood_deploy {__version__}, Python {machine.python}, {machine.system}",
    }
    warnings = [*run.problems, *([load.warning] if load.warning else [])]
    _write(output, run, facts, warnings, machine.to_dict() | {"load": vars(load)})
    reporter.table(stage_table(run).rich())
    share = f"{100 * run.share_of_engine:.0f}% of the engine alone"
    reporter.result(f"{run.fps:.2f} fps, {share}; {run.limit}")
    for warning in warnings:
        reporter.warn(warning)
    return run


def stage_table(run: VideoRun) -> Table:
    """Return how busy each thread was."""
    rows = [
        [stage, f"{1000 * seconds / run.frames:.2f}", f"{100 * seconds / run.seconds:.0f}%"]
        for stage, seconds in run.busy_s.items()
    ]
    note = (
        "The threads run at the same time. Infer includes taking boxes back to the frame's pixels."
    )
    return Table(("thread", "ms a frame", "at work"), rows, note)


def _write(
    output: Path,
    run: VideoRun,
    facts: Mapping[str, str],
    warnings: list[str],
    machine: Mapping[str, object],
) -> None:
    values = asdict(run) | {
        "fps": run.fps,
        "share_of_engine": run.share_of_engine,
        "limit": run.limit,
    }
    write_json(
        output / "video.json",
        {"facts": facts, "machine": machine, "warnings": warnings, "run": values},
    )
    summary = (
        f"{run.frames} frames in {run.seconds:.1f} s, {run.fps:.2f} fps, "
        f"{run.detections} objects; {run.limit}."
    )
    engine = (
        f"The engine alone: {run.engine_fps[0]:.2f} fps before and {run.engine_fps[1]:.2f} after."
    )
    notes = "\n".join(
        [
            *(f"- {name}: {value}" for name, value in facts.items()),
            *(f"- warning: {warning}" for warning in warnings),
        ]
    )
    write_markdown(
        output / "video.md", ["# Video", notes, f"{summary} {engine}", stage_table(run).markdown()]
    )
    tiles = [
        Tile("frames a second", f"{run.fps:.2f}", f"{run.frames} frames"),
        Tile("of the engine alone", f"{100 * run.share_of_engine:.0f}%", engine),
    ]
    sections = [Section("Pipeline", stage_table(run).html(), f"{summary} {engine}")]
    render_page(
        "Video", sections, output / "video.html", tiles=tiles, facts=facts, warnings=warnings
    )
