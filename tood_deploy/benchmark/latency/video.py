"""The whole pipeline on a clip: how busy each of its threads is, and so what limits it."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np

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
from tood_deploy.benchmark.latency.run import print_table
from tood_deploy.detections import Detections
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Frame, Source
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.sinks import Annotated, Sink, SinkThread
from tood_deploy.inference.source import open_source

SATURATED = 0.9
ENGINE_FRAMES = 16
ENGINE_S = 3.0  # how long the engine alone is timed, before and after


class TimedSource(Source):
    """The first frames of a source, and the seconds that decoding them took."""

    def __init__(self, source: Source, most: int | None) -> None:
        super().__init__(source.names, source.length)
        self.kind, self.inner, self.most = source.kind, source, most
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Frame]:
        frames = iter(self.inner)
        given = 0
        while self.most is None or given < self.most:
            started = time.perf_counter()
            frame = next(frames, None)
            self.seconds += time.perf_counter() - started
            if frame is None:
                break
            given += 1
            yield frame
        self.skipped, self.problems = self.inner.skipped, self.inner.problems

    def close(self) -> None:
        """Ends a wait for the next frame."""
        self.inner.close()


class TimedSink(Sink):
    """A sink, and the seconds that it worked."""

    def __init__(self, sink: Sink) -> None:
        self.inner = sink
        self.seconds = 0.0

    def write(self, frame: Frame, detections: Detections) -> None:
        """Hands it on."""
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
        busy_s: of every thread of the pipeline: "decode", "scale", "infer", "draw and encode"; seconds at work.
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
        """Frames a second of the whole pipeline."""
        return self.frames / self.seconds

    @property
    def share_of_engine(self) -> float:
        """Of what the engine alone reaches."""
        return self.fps / (sum(self.engine_fps) / 2)

    @property
    def limit(self) -> str:
        """What limits it, in a sentence."""
        shares = {stage: seconds / self.seconds for stage, seconds in self.busy_s.items()}
        busiest = max(shares, key=lambda stage: shares[stage])
        if shares[busiest] >= SATURATED:
            return f"{busiest} limits: its thread works {100 * shares[busiest]:.0f}% of the time"
        return f"no thread works all the time ({busiest} most, {100 * shares[busiest]:.0f}%): they wait for one another or for free cores"


def run_video(
    detector: Detector, clip: str, batch: int, most_frames: int | None, encode: bool
) -> VideoRun:
    """Runs the pipeline on a clip, as tood-infer does; the annotated video goes into a folder that is then removed.

    Args:
        detector: to run.
        clip: a video.
        batch: the most frames of one engine call.
        most_frames: take the first of them only.
        encode: whether to draw and encode; otherwise results are thrown away.

    Raises:
        ToodError: not a video, or it cannot be read.
    """
    if most_frames is not None and most_frames < 1:
        raise ToodError(f"--limit is {most_frames}; expected a positive number of frames")
    if batch < 1:
        raise ToodError(f"--batch is {batch}; expected a positive number")
    source = open_source(clip)
    if source.kind != "video":
        raise InputError(f"{clip}: not a video; expected a clip, such as .mp4")
    before = engine_rate(detector, clip, batch, ENGINE_S)
    timed, timings, detections = TimedSource(source, most_frames), Timings(), 0
    with tempfile.TemporaryDirectory() as folder:
        sinks = (
            [TimedSink(Annotated({name: Path(folder) / "out.mp4" for name in source.names}))]
            if encode
            else []
        )
        started = time.perf_counter()
        results = detect_frames(detector, timed, batch, timings)
        with SinkThread(sinks) as writer, closing(results):
            for frame, found in results:
                writer.put(frame, found)
                detections += len(found)
        seconds = time.perf_counter() - started
    if not timings.frames:
        raise InputError(f"{clip}: gave no frame; expected a video that can be decoded")
    busy_s = {
        "decode": timed.seconds,
        "scale": timings.frames * timings.mean_ms("pre") / 1000,
        "infer": timings.frames * (timings.mean_ms("infer") + timings.mean_ms("post")) / 1000,
    }
    busy_s |= {"draw and encode": sinks[0].seconds} if sinks else {}
    rates = before, engine_rate(detector, clip, batch, ENGINE_S)
    return VideoRun(timings.frames, seconds, busy_s, rates, detections, tuple(timed.problems))


def engine_rate(detector: Detector, clip: str, batch: int, seconds: float) -> float:
    """Frames a second of the engine alone, on the clip's first frames, scaled beforehand."""
    frames = [
        frame.image_bgr for frame in TimedSource(open_source(clip), max(batch, ENGINE_FRAMES))
    ]
    if not frames:
        raise InputError(f"{clip}: gave no frame; expected a video that can be decoded")
    prepared = [detector.prepare(frames[i % len(frames)]) for i in range(max(batch, len(frames)))]
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
    typical = (
        np.mean if at_once > 1 else np.median
    )  # batches that run side by side may end in pairs
    return batch / float(typical(times))


def bench_video(
    detector: Detector,
    model: str,
    clip: str,
    output: Path,
    *,
    batch: int,
    limit: int | None,
    encode: bool,
    command: str,
    quiet: bool,
) -> VideoRun:
    """Runs the clip, writes video.json, video.md and video.html into `output`, prints the table.

    Raises:
        ToodError: the clip cannot be read, or the reports cannot be written.
    """
    machine, watch = describe_machine(), LoadWatch()
    run = run_video(detector, clip, batch, limit, encode)
    load = watch.stop()
    facts = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"{model}, {detector.engine.name}, {detector.engine.precision}, {detector.engine.device}",
        "clip": f"{clip}, scaled to fit {detector.imgsz[0]} x {detector.imgsz[1]}, batch {batch}",
        "CPU": f"{machine.cpu}, {machine.cores} logical cores, governor {machine.governor}",
        "load": f"average {load.before} before, {load.after} after; others kept {load.others:.2f} cores busy",
        "software": f"tood_deploy {__version__}, Python {machine.python}, {machine.system}",
    }
    warnings = [*run.problems, *([load.noticed] if load.noticed else [])]
    _write(output, run, facts, warnings, machine.to_dict() | {"load": vars(load)})
    if not quiet:
        print_table(stage_table(run))
        print(
            f"{run.fps:.2f} fps, {100 * run.share_of_engine:.0f}% of the engine alone; {run.limit}"
        )
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return run


def stage_table(run: VideoRun) -> Table:
    """How busy each thread was."""
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
    closing = f"{run.frames} frames in {run.seconds:.1f} s, {run.fps:.2f} fps, {run.detections} objects; {run.limit}."
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
        output / "video.md", ["# Video", notes, f"{closing} {engine}", stage_table(run).markdown()]
    )
    tiles = [
        Tile("frames a second", f"{run.fps:.2f}", f"{run.frames} frames"),
        Tile("of the engine alone", f"{100 * run.share_of_engine:.0f}%", engine),
    ]
    sections = [Section("Pipeline", stage_table(run).html(), f"{closing} {engine}")]
    render_page(
        "Video", sections, output / "video.html", tiles=tiles, facts=facts, warnings=warnings
    )
