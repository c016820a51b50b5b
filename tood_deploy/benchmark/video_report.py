"""Reports of a video run: JSON, Markdown, HTML; and `tood-bench video` from file names to them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tood_deploy import __version__
from tood_deploy.benchmark.latency_run import print_table
from tood_deploy.benchmark.machine import LoadWatch, describe_machine
from tood_deploy.benchmark.report import Section, Table, Tile, render_page, write_json, write_markdown
from tood_deploy.benchmark.video import VideoRun, run_video
from tood_deploy.inference.detector import Detector


def bench_video(
    detector: Detector, model: str, clip: str, output: Path, *, batch: int, limit: int | None, encode: bool, command: str, quiet: bool
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
        print(f"{run.fps:.2f} fps, {100 * run.share_of_engine:.0f}% of the engine alone; {run.limit}")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return run


def stage_table(run: VideoRun) -> Table:
    """How busy each thread was."""
    rows = [[stage, f"{1000 * seconds / run.frames:.2f}", f"{100 * seconds / run.seconds:.0f}%"] for stage, seconds in run.busy_s.items()]
    note = "The threads run at the same time. Infer includes taking boxes back to the frame's pixels."
    return Table(("thread", "ms a frame", "at work"), rows, note)


def _write(output: Path, run: VideoRun, facts: Mapping[str, str], warnings: list[str], machine: Mapping[str, object]) -> None:
    values = asdict(run) | {"fps": run.fps, "share_of_engine": run.share_of_engine, "limit": run.limit}
    write_json(output / "video.json", {"facts": facts, "machine": machine, "warnings": warnings, "run": values})
    closing = f"{run.frames} frames in {run.seconds:.1f} s, {run.fps:.2f} fps, {run.detections} objects; {run.limit}."
    engine = f"The engine alone: {run.engine_fps[0]:.2f} fps before and {run.engine_fps[1]:.2f} after."
    notes = "\n".join([*(f"- {name}: {value}" for name, value in facts.items()), *(f"- warning: {warning}" for warning in warnings)])
    write_markdown(output / "video.md", ["# Video", notes, f"{closing} {engine}", stage_table(run).markdown()])
    tiles = [
        Tile("frames a second", f"{run.fps:.2f}", f"{run.frames} frames"),
        Tile("of the engine alone", f"{100 * run.share_of_engine:.0f}%", engine),
    ]
    sections = [Section("Pipeline", stage_table(run).html(), f"{closing} {engine}")]
    render_page("Video", sections, output / "video.html", tiles=tiles, facts=facts, warnings=warnings)
