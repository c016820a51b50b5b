"""One run from a source to its outputs: reading, inference and writing at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tood_deploy.data.coco import read_coco_ids
from tood_deploy.errors import InputError, ToodError
from tood_deploy.files import check_overwrites
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Source
from tood_deploy.inference.output_paths import plan_outputs
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.sinks import Annotated, Crops, Sink, SinkThread
from tood_deploy.inference.text_sinks import STDOUT, CocoResults, GeoJson, JsonLines, TextLines
from tood_deploy.inference.video_writer import USUAL_ENCODING, VideoEncoding
from tood_deploy.reporter import Reporter


class RunProgress:
    """Progress of one run, what could not be read, the engine's remarks, and a closing line."""

    def __init__(
        self, source: Source, timings: Timings, reporter: Reporter, notes: Sequence[str] = ()
    ) -> None:
        """Show nothing yet.

        Args:
            source: what is read; its problems become warnings.
            timings: of the run, for the rate and the closing line.
            reporter: prints all of it.
            notes: remarks of the engine; more may come while it runs.
        """
        self.source, self.timings, self.reporter, self.notes = source, timings, reporter, notes
        self._problems = self._notes = self._remarks = 0  # how many of each were printed
        self._lock = threading.Lock()
        source.on_news = self._print_news

    def advance(self) -> None:
        """Count one more frame."""
        dropped = f", {self.source.dropped} dropped" if self.source.kind == "live" else ""
        self._task.advance(state=f"{self.timings.fps:.1f} fps{dropped}")
        self._print_news()

    def _print_news(self) -> None:
        with self._lock:  # a live source calls from its own thread
            self._print_new_lines()

    def _print_new_lines(self) -> None:
        for problem in self.source.problems[self._problems :]:
            self.reporter.warn(problem)
            self._problems += 1
        for note in self.source.notes[self._remarks :]:
            self.reporter.note(note)
            self._remarks += 1
        for note in self.notes[self._notes :]:
            self.reporter.note(note)
            self._notes += 1

    def __enter__(self) -> Self:
        self._task = self.reporter.progress("frames", self.source.length)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.close()
        self._print_news()
        if error is None or isinstance(error, KeyboardInterrupt):
            self.reporter.info(self.timings.summary() + self._live_summary())

    def _live_summary(self) -> str:
        if self.source.kind != "live":
            return ""
        median, p95 = (self.timings.percentile_ms("end_to_end", percent) for percent in (50, 95))
        return (
            f"; results were {median:.0f} ms old (p95 {p95:.0f}), "
            f"{self.source.dropped} frames dropped"
        )


@dataclass(frozen=True)
class Outputs:
    """What a run writes.

    Attributes:
        annotated: folder, or for a single input a file, for images or videos with the detections
            drawn on them.
        coco_json: file for COCO results.
        coco_annotations: file that gives the COCO results their image and category ids.
        json_lines: file for one JSON object a frame; "-" for stdout.
        crops: folder for every object as an image.
        show: whether to show the frames in a window.
        geojson: file for the objects of georeferenced images, in degrees.
        crs: coordinate system of images whose files name none, such as "EPSG:32632".
        encoding: of annotated videos.
    """

    annotated: Path | None = None
    coco_json: Path | None = None
    coco_annotations: Path | None = None
    json_lines: str | None = None
    crops: Path | None = None
    show: bool = False
    geojson: Path | None = None
    crs: str | None = None
    encoding: VideoEncoding = USUAL_ENCODING

    def __post_init__(self) -> None:
        if self.crs is not None and self.geojson is None:
            raise ToodError("--crs is for GeoJSON, and none is asked for; add --geojson FILE")
        if self.coco_annotations is not None and self.coco_json is None:
            raise ToodError(
                "--coco-annotations gives ids to COCO results, and none are asked for; add --json "
                "FILE"
            )

    def check_files(self, source: Source, model: Iterable[str | Path] = ()) -> None:
        """Refuse outputs that would overwrite an input, or one another.

        Args:
            source: what will be read.
            model: files that the detector is made of.

        Raises:
            OutputError: see `check_overwrites`.
        """
        annotations = [] if self.coco_annotations is None else [self.coco_annotations]
        inputs = {
            "an input": [file.name for file in source.inputs],
            "a list of inputs": source.lists,
            "the file of --coco-annotations": annotations,
            "a file of the model": model,
        }
        files: dict[str, list[str | Path]] = {}
        if self.annotated is not None:
            files["--output"] = list(plan_outputs(source.inputs, self.annotated).values())
        if self.coco_json is not None:
            files["--json"] = [self.coco_json]
        if self.geojson is not None:
            files["--geojson"] = [self.geojson]
        if self.json_lines not in (None, STDOUT):
            files["--jsonl"] = [str(self.json_lines)]
        if self.geojson is not None:
            files["--geojson"] = [self.geojson]
        check_overwrites(inputs, files)

    def needing_pixels(self) -> list[str]:
        """Return the options given that draw on images or cut them, and need all pixels."""
        given = {
            "--output": self.annotated is not None,
            "--crops": self.crops is not None,
            "--show": self.show,
        }
        return [option for option, is_given in given.items() if is_given]


def open_sinks(
    outputs: Outputs, source: Source, class_names: Sequence[str], reporter: Reporter
) -> list[Sink]:
    """Return a sink for everything that was asked for; nothing is written before the first result.

    Args:
        outputs: what was asked for.
        source: what will be read.
        class_names: of the detector.
        reporter: prints the lines of the frames, unless JSON takes stdout.

    Raises:
        ToodError: a place cannot be written, an input would be overwritten, ids are missing, or
            there is no display.
    """
    outputs.check_files(source)
    sinks: list[Sink] = []
    if outputs.json_lines is not None:
        sinks.append(JsonLines(outputs.json_lines, source.kind == "live"))
    if outputs.json_lines != STDOUT:
        sinks.append(TextLines(reporter))
    if outputs.coco_json is not None:
        sinks.append(
            _coco_results(outputs.coco_json, outputs.coco_annotations, source, class_names)
        )
    if outputs.annotated is not None:
        files = plan_outputs(source.inputs, outputs.annotated)
        live = source.kind == "live"
        sinks.append(Annotated(files, live, outputs.encoding, reporter.note))
    if outputs.crops is not None:
        sinks.append(Crops(outputs.crops, source.inputs))
    if outputs.geojson is not None:
        sinks.append(_geojson(outputs.geojson, source, outputs.crs))
    if outputs.show:
        from tood_deploy.inference.sinks import Window

        sinks.append(Window())
    return sinks


def _geojson(path: Path, source: Source, crs: str | None) -> Sink:
    if source.kind != "images":
        raise InputError(
            f"{source.names[0]}: --geojson is for georeferenced images, the source is a video; "
            "leave the option out"
        )
    return GeoJson(path, [file.name for file in source.inputs], crs)


def _coco_results(
    path: Path, annotations: Path | None, source: Source, class_names: Sequence[str]
) -> CocoResults:
    if annotations is None:
        parts = [part for file in source.inputs for part in file.parts]
        numbers = {part: i for i, part in enumerate(parts, 1)} if source.kind == "images" else None
        return CocoResults(path, numbers, None)
    if source.kind != "images":
        raise InputError(
            f"{annotations}: --coco-annotations gives ids to images, the source is a video; leave "
            "the option out"
        )
    if paged := [file for file in source.inputs if file.pages > 1]:
        raise InputError(
            f"{paged[0].name}: has {paged[0].pages} pages, and {annotations} gives one id to it; "
            "add --first-page, or leave --coco-annotations out"
        )
    ids, category_ids = read_coco_ids(annotations, source.names, class_names)
    return CocoResults(path, {(name, None): key for name, key in ids.items()}, category_ids)


def run_inference(
    detector: Detector, source: Source, outputs: Outputs, reporter: Reporter, batch: int = 1
) -> Timings:
    """Run the detector over a source and write what was asked for.

    Ctrl-C completes the outputs so far.

    Args:
        detector: to run.
        source: to read.
        outputs: what to write.
        reporter: prints progress and a line for every frame.
        batch: largest number of frames, or of slices of them, in an engine call.

    Raises:
        ToodError: the source cannot be read at all, an output cannot be written, or the engine
            failed; or images shall be decoded smaller than they are, or by window, and drawn on.
        BrokenPipeError: nobody read stdout to its end; all other outputs are complete.
    """
    if detector.fast_decode and (shown := outputs.needing_pixels()):
        raise ToodError(
            "--fast-decode reads images smaller than they are, whole ones are needed for "
            f"{' and '.join(shown)}; leave one out"
        )
    sinks = open_sinks(outputs, source, detector.class_names, reporter)
    timings = Timings()
    results = detect_frames(detector, source, batch, timings)
    with (
        RunProgress(source, timings, reporter, detector.engine.notes) as progress,
        SinkThread(sinks, endless=source.kind == "live") as writer,
        closing(results),
    ):
        for frame, detections in results:
            if frame.reader is not None and (shown := outputs.needing_pixels()):
                raise ToodError(
                    f"{frame.name}: is read by window, its {frame.size_hw[1]} x "
                    f"{frame.size_hw[0]} pixels are never in memory at once as "
                    f"{' and '.join(shown)} would need; leave that out, or raise --max-pixels"
                )
            writer.put(frame, detections)
            progress.advance()
    for problem in writer.problems:
        source.skip(problem)
        reporter.warn(problem)
    if writer.broken_pipe:
        raise BrokenPipeError
    return timings
