"""One run from a source to its outputs: reading, inference and writing at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.annotated import Annotated
from tood_deploy.inference.coco_ids import read_coco_ids
from tood_deploy.inference.crops import Crops
from tood_deploy.inference.destinations import plan_outputs
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Source
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.records import STDOUT, CocoResults, JsonLines, TextLines
from tood_deploy.inference.sink import Sink, SinkThread
from tood_deploy.inference.talk import Talk
from tood_deploy.inference.timings import Timings


@dataclass(frozen=True)
class Outputs:
    """What a run writes.

    Attributes:
        annotated: folder, or for a single input a file, for pictures or videos with the detections drawn on them.
        coco_json: file for COCO results.
        coco_annotations: file that gives the COCO results their image and category ids.
        json_lines: file for one JSON object a frame; "-" for stdout.
        crops: folder for every object as a picture.
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
            raise ToodError("--coco-annotations gives ids to COCO results, and none are asked for; add --json FILE")

    def needing_pixels(self) -> list[str]:
        """Options given that show or cut out pictures, and so need all of their pixels."""
        given = {"--output": self.annotated is not None, "--crops": self.crops is not None, "--show": self.show}
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
        sinks.append(_coco_results(outputs.coco_json, outputs.coco_annotations, source, class_names))
    if outputs.annotated is not None:
        sinks.append(Annotated(plan_outputs(source.names, outputs.annotated)))
    if outputs.crops is not None:
        sinks.append(Crops(outputs.crops, source.names))
    if outputs.show:
        from tood_deploy.inference.window import Window

        sinks.append(Window())
    return sinks


def _coco_results(path: Path, annotations: Path | None, source: Source, class_names: Sequence[str]) -> CocoResults:
    if annotations is None:
        numbers = {name: i for i, name in enumerate(source.names, 1)} if source.kind == "images" else None
        return CocoResults(path, numbers, None)
    if source.kind != "images":
        raise InputError(f"{annotations}: --coco-annotations gives ids to pictures, the source is a video; leave the option out")
    return CocoResults(path, *read_coco_ids(annotations, source.names, class_names))


def run_inference(detector: Detector, source: Source, outputs: Outputs, batch: int = 1) -> Timings:
    """Runs the detector over a source and writes what was asked for. Ctrl-C completes the outputs so far.

    Raises:
        ToodError: the source cannot be read at all, an output cannot be written, or the engine failed; or pictures shall be decoded
            smaller than they are, and drawn on.
    """
    if detector.fast_decode and (shown := outputs.needing_pixels()):
        raise ToodError(
            f"--fast-decode reads pictures smaller than they are, whole ones are needed for {' and '.join(shown)}; leave one out"
        )
    sinks = open_sinks(outputs, source, detector.class_names)
    timings = Timings()
    results = detect_frames(detector, source, batch, timings)
    with Talk(source, timings, outputs.quiet, detector.engine.notes) as talk, SinkThread(sinks) as writer, closing(results):
        for frame, found in results:
            writer.put(frame, found)
            talk.advance()
    return timings
