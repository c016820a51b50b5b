"""One run from a source to its outputs: reading, inference and writing at the same time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from tood_deploy.data.coco import read_coco_ids
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Source
from tood_deploy.inference.output_paths import plan_outputs
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.sinks import (
    STDOUT,
    Annotated,
    CocoResults,
    Crops,
    JsonLines,
    Sink,
    SinkThread,
    TextLines,
)


class Talk:
    """Follows one run. Quiet: only problems are told."""

    def __init__(
        self, source: Source, timings: Timings, quiet: bool, notes: Sequence[str] = ()
    ) -> None:
        self.source, self.timings, self.quiet, self.notes = source, timings, quiet, notes
        self.console = Console(
            stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        columns = (
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(
            *columns,
            console=self.console,
            disable=quiet or not sys.stderr.isatty(),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # results that go into a pipe or file must stay there
        )
        self.task = self.bar.add_task("frames", total=source.length, rate="")
        self._told = self._noted = 0

    def advance(self) -> None:
        """One more frame is done."""
        dropped = f", {self.source.dropped} dropped" if self.source.kind == "live" else ""
        self.bar.update(self.task, advance=1, rate=f"{self.timings.fps:.1f} fps{dropped}")
        self._tell_problems()

    def _tell_problems(self) -> None:
        for problem in self.source.problems[self._told :]:
            self.console.print(f"warning: {problem}")
            self._told += 1
        for note in () if self.quiet else self.notes[self._noted :]:
            self.console.print(f"note: {note}")
            self._noted += 1

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        self._tell_problems()
        if not self.quiet and (error is None or isinstance(error, KeyboardInterrupt)):
            self.console.print(self.timings.summary() + self._live_summary())

    def _live_summary(self) -> str:
        if self.source.kind != "live":
            return ""
        median, p95 = (self.timings.percentile_ms("end_to_end", percent) for percent in (50, 95))
        return f"; results were {median:.0f} ms old (p95 {p95:.0f}), {self.source.dropped} frames dropped"


@dataclass(frozen=True)
class Outputs:
    """What a run writes.

    Attributes:
        annotated: folder, or for a single input a file, for images or videos with the detections drawn on them.
        coco_json: file for COCO results.
        coco_annotations: file that gives the COCO results their image and category ids.
        json_lines: file for one JSON object a frame; "-" for stdout.
        crops: folder for every object as a image.
        show: whether to show the frames in a window.
        quiet: print no line a frame, no progress and no closing line.
    """

    annotated: Path | None = None
    coco_json: Path | None = None
    coco_annotations: Path | None = None
    json_lines: str | None = None
    crops: Path | None = None
    show: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.coco_annotations is not None and self.coco_json is None:
            raise ToodError(
                "--coco-annotations gives ids to COCO results, and none are asked for; add --json FILE"
            )

    def needing_pixels(self) -> list[str]:
        """Options given that show or cut out images, and so need all of their pixels."""
        given = {
            "--output": self.annotated is not None,
            "--crops": self.crops is not None,
            "--show": self.show,
        }
        return [name for name, wanted in given.items() if wanted]


def open_sinks(outputs: Outputs, source: Source, class_names: Sequence[str]) -> list[Sink]:
    """A sink for everything that was asked for; nothing is written before the first result.

    Raises:
        ToodError: a place cannot be written, an input would be overwritten, ids are missing, or there is no display.
    """
    sinks: list[Sink] = []
    if outputs.json_lines is not None:
        sinks.append(JsonLines(outputs.json_lines, source.kind == "live"))
    if not outputs.quiet and outputs.json_lines != STDOUT:
        sinks.append(TextLines())
    if outputs.coco_json is not None:
        sinks.append(
            _coco_results(outputs.coco_json, outputs.coco_annotations, source, class_names)
        )
    if outputs.annotated is not None:
        sinks.append(Annotated(plan_outputs(source.names, outputs.annotated)))
    if outputs.crops is not None:
        sinks.append(Crops(outputs.crops, source.names))
    if outputs.show:
        from tood_deploy.inference.sinks import Window

        sinks.append(Window())
    return sinks


def _coco_results(
    path: Path, annotations: Path | None, source: Source, class_names: Sequence[str]
) -> CocoResults:
    if annotations is None:
        numbers = (
            {name: i for i, name in enumerate(source.names, 1)} if source.kind == "images" else None
        )
        return CocoResults(path, numbers, None)
    if source.kind != "images":
        raise InputError(
            f"{annotations}: --coco-annotations gives ids to images, the source is a video; leave the option out"
        )
    return CocoResults(path, *read_coco_ids(annotations, source.names, class_names))


def run_inference(detector: Detector, source: Source, outputs: Outputs, batch: int = 1) -> Timings:
    """Runs the detector over a source and writes what was asked for. Ctrl-C completes the outputs so far.

    Raises:
        ToodError: the source cannot be read at all, an output cannot be written, or the engine failed; or images shall be decoded
            smaller than they are, and drawn on.
    """
    if detector.fast_decode and (shown := outputs.needing_pixels()):
        raise ToodError(
            f"--fast-decode reads images smaller than they are, whole ones are needed for {' and '.join(shown)}; leave one out"
        )
    sinks = open_sinks(outputs, source, detector.class_names)
    timings = Timings()
    results = detect_frames(detector, source, batch, timings)
    with (
        Talk(source, timings, outputs.quiet, detector.engine.notes) as talk,
        SinkThread(sinks) as writer,
        closing(results),
    ):
        for frame, found in results:
            writer.put(frame, found)
            talk.advance()
    return timings
