"""A detector run over annotated images, of which an interrupted run loses little.

A detector, annotations and image files in; detections in a file out. Knows no metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, TextIO

import numpy as np
from msgspec import Meta, Struct
from msgspec.json import Decoder
from msgspec.json import encode as json_text

from tood_deploy import __version__
from tood_deploy.data.coco import Annotations
from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.data.results import Results, empty_results
from tood_deploy.detections import Detections
from tood_deploy.errors import ArtefactError, InputError, OutputError
from tood_deploy.files import check_writable, file_sha256, take_lock
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.sinks import output_errors
from tood_deploy.inference.source import Source, open_source
from tood_deploy.manifest import artefact_sha256
from tood_deploy.preprocess import padded_size
from tood_deploy.reporter import Reporter

FORMAT = "tood-eval predictions 1"


@dataclass(frozen=True)
class Key:
    """What detections depend on.

    Attributes:
        values: names and values; any difference makes another key.
    """

    values: Mapping[str, Any]

    def header(self) -> str:
        """Return the first line of the file."""
        return json.dumps({"format": FORMAT, "key": self.values}, sort_keys=True, default=str)

    def file_in(self, folder: Path) -> Path:
        """Return where detections of this key go."""
        digest = hashlib.sha256(self.header().encode()).hexdigest()
        return folder / f"predictions-{digest[:16]}.jsonl"


class PredictionLine(Struct):
    """The detections of one image, as a line of the file holds them.

    Attributes:
        image_id: of the annotations.
        size_hw: rows and columns of the image.
        boxes: xyxy in pixels of the image.
        scores, class_ids: of the boxes.
    """

    image_id: int
    size_hw: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    scores: list[float]
    class_ids: list[Annotated[int, Meta(ge=0, lt=2**31)]]

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.class_ids):
            raise ValueError("boxes, scores and class_ids of different lengths")


PREDICTION_LINE = Decoder(PredictionLine)


class PredictionFile:
    """The lines of one key; a context manager while they are added to.

    Attributes:
        path: of the file.
        sizes_hw: rows and columns of every image that has its line, by image id.
    """

    def __init__(self, path: Path, key: Key) -> None:
        """Read what an earlier run has left, but for a line that was cut by its end.

        Raises:
            InputError: the file is damaged, or of another key.
            OutputError: the folder cannot be written.
        """
        check_writable(path.parent)
        self.path, self.key = path, key
        self.sizes_hw: dict[int, tuple[int, int]] = {}
        self._parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._file: TextIO | None = None
        if path.exists():
            self._load()

    def __len__(self) -> int:
        return len(self.sizes_hw)

    def add(self, image_id: int, size_hw: tuple[int, int], detections: Detections) -> None:
        """Write an image's line, at once.

        Args:
            image_id: of the image.
            size_hw: its rows and columns.
            detections: in it, in its pixels.

        Raises:
            OutputError: it cannot be written.
        """
        line = PredictionLine(
            image_id,
            size_hw,
            detections.boxes.tolist(),
            detections.scores.tolist(),
            detections.class_ids.tolist(),
        )
        with output_errors(self.path):
            assert self._file is not None, "used as a context manager"
            self._file.write(json_text(line).decode() + "\n")
            self._file.flush()
        self._keep(line)

    def results(self, category_ids: Sequence[int | None]) -> Results:
        """Return all detections, with category ids for class numbers; None leaves a class out.

        Raises:
            InputError: the file is damaged.
        """
        ids = np.array(
            [-1 if category is None else category for category in category_ids], np.int64
        )
        largest = max((part[2].max(initial=0) for part in self._parts.values()), default=0)
        if largest >= len(ids):
            raise InputError(
                f"{self.path}: damaged (an object of class {largest}, of {len(ids)} classes); "
                "delete it and run again"
            )
        parts = [_as_results(image, ids, *self._parts[image]) for image in sorted(self._parts)]
        columns = zip(
            *(
                (part.image_ids, part.category_ids, part.boxes_xywh, part.scores)
                for part in (empty_results(), *parts)
            ),
            strict=True,
        )
        return Results(*(np.concatenate(column) for column in columns))

    def _load(self) -> None:
        with output_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")
        if len(lines) > 1 and lines[0] != self.key.header().encode():
            raise InputError(f"{self.path}: is not what its name says; delete it and run again")
        try:
            for line in lines[1:-1]:
                self._keep(PREDICTION_LINE.decode(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: damaged ({error}); delete it and run again") from error

    def _keep(self, line: PredictionLine) -> None:
        self._parts[line.image_id] = (
            np.array(line.boxes, np.float32).reshape(-1, 4),
            np.array(line.scores, np.float32),
            np.array(line.class_ids, np.int32),
        )
        self.sizes_hw[line.image_id] = line.size_hw

    def __enter__(self) -> Self:
        """Take the file for this run alone, and take away a line that was cut.

        Raises:
            OutputError: it cannot be written, or another run writes into it.
        """
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if not take_lock(self._file.fileno()):
                self._file.close()
                raise OutputError(
                    f"{self.path}: another tood-eval of the same model and images is writing into "
                    "it; wait for its end, or choose another --output"
                )
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            self._file.truncate(whole)
            if not whole:
                self._file.write(self.key.header() + "\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError as failure:  # a full disk: what was not written is lost
            if error is None:
                raise OutputError(
                    f"{self.path}: cannot be written ({failure.strerror}); make room, and run again"
                ) from failure


def _as_results(
    image_id: int,
    category_ids: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    class_ids: np.ndarray,
) -> Results:
    categories = category_ids[class_ids] if len(class_ids) else np.zeros(0, np.int64)
    xyxy = boxes.astype(np.float64)
    xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
    rows = Results(
        np.full(len(scores), image_id, np.int64), categories, xywh, scores.astype(np.float64)
    )
    return rows.pick(categories >= 0)


def prediction_key(
    detector: Detector, model: str, truth: Annotations, files: Mapping[int, Path]
) -> Key:
    """Return everything that detections depend on.

    Args:
        detector: with its thresholds set.
        model: what it was opened from.
        truth: the annotations.
        files: of the images, by image id.
    """
    images = hashlib.sha256()
    for key, path in files.items():
        status = path.stat()
        images.update(f"{key} {path} {status.st_size} {status.st_mtime_ns}\n".encode())
    engine = detector.engine
    runtime = f"{engine.name}, {engine.precision}, {engine.device}, tood_deploy {__version__}"
    own = {} if detector.slicing is None else {"slicing": str(detector.slicing)}
    if detector.class_scores is not None:
        own["class_scores"] = str(detector.class_scores.tolist())
    return Key(
        own
        | {
            "model": artefact_sha256(Path(model)) if Path(model).is_file() else model,
            "manifest": hashlib.sha256(engine.manifest.to_json().encode()).hexdigest(),
            "runtime": runtime,
            "conf": detector.conf,
            "iou": detector.iou,
            "max_det": detector.max_det,
            "imgsz": str(detector.sizing),
            "fast_decode": detector.fast_decode,
            "annotations": file_sha256(truth.path),
            "images": images.hexdigest(),
        }
    )


def predict(
    detector: Detector,
    truth: Annotations,
    files: Mapping[int, Path],
    kept: PredictionFile,
    batch: int,
    reporter: Reporter,
    description: str = "detecting",
) -> Timings:
    """Detect in every image that has no line yet. Interrupted, it loses at most the images in work.

    Args:
        detector: to run.
        truth: the annotations; the images are put in order of the sizes that they give, so that
            batches fill.
        files: of the images, by image id.
        kept: where detections go.
        batch: the most images of one engine call.
        reporter: shows how far it is, and warns of images that cannot be read.
        description: of the work.

    Raises:
        InputError: images cannot be read; the others are done.
        ArtefactError: the model gave values that are not numbers.
    """
    timings = Timings()
    todo = sorted(
        (key for key in files if key not in kept.sizes_hw),
        key=lambda key: (_net_hw(truth, key, detector), key),
    )
    if not todo:
        return timings
    ids = {str(files[key]): key for key in todo}
    source = open_source([files[key] for key in todo], MAX_PIXELS, first_page=True)
    results = detect_frames(detector, source, batch, timings)
    warned = 0
    with reporter.progress(description, len(todo)) as task, kept, closing(results):
        try:
            for frame, detections in results:
                kept.add(ids[frame.name], frame.size_hw, detections)
                task.advance(state=f"{timings.fps:.1f} images/s")
                warned = _warn_of_problems(source, warned, reporter)
        except ArtefactError as error:
            image = files[todo[min(task.done, len(todo) - 1)]]
            others = f" or one of the {batch - 1} after it" if batch > 1 else ""
            raise ArtefactError(f"{error} (image {image}{others})") from error
        _warn_of_problems(source, warned, reporter)
    if source.notes:
        others = len(source.notes) - 1
        reporter.note(source.notes[0] + (f"; {others} other images have a note" if others else ""))
    if source.skipped:
        raise InputError(
            f"{source.skipped} of {len(files)} images cannot be read, the first: "
            f"{source.problems[0]}. Mend them, or take them out of {truth.path}; "
            "the others are done and kept"
        )
    return timings


def _warn_of_problems(source: Source, warned: int, reporter: Reporter) -> int:
    """Warn of unreadable images beyond the first `warned`; return how many there are now."""
    for problem in source.problems[warned:]:
        reporter.warn(problem)
    return len(source.problems)


def _net_hw(truth: Annotations, key: int, detector: Detector) -> tuple[int, int]:
    size_hw = truth.images[key].size_hw
    return (0, 0) if size_hw is None or min(size_hw) < 1 else padded_size(size_hw, detector.sizing)
