"""One evaluation.

Annotations and a detector, or its results, in; metrics, thresholds and mistakes out.

Keeps a detector's results in the output folder; the report is written elsewhere. Knows no command
line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tood_deploy import __version__
from tood_deploy.benchmark.evaluation.analysis import (
    Calibration,
    MistakeFinder,
    Mistakes,
    Thresholds,
    calibrate,
    find_thresholds,
)
from tood_deploy.benchmark.evaluation.notes import (
    category_notes,
    metric_notes,
    size_notes,
    unlisted_notes,
)
from tood_deploy.benchmark.evaluation.predict import PredictionFile, predict, prediction_key
from tood_deploy.benchmark.evaluation.thresholds import ChosenThresholds, Wish, choose_thresholds
from tood_deploy.data.categories import map_categories
from tood_deploy.data.coco import Annotations, read_annotations
from tood_deploy.data.coco_metrics import STANDARD_COUNT, CocoMetrics, evaluate
from tood_deploy.data.image_set import list_image_files
from tood_deploy.data.results import Results, read_results, write_results
from tood_deploy.files import file_sha256
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.pipeline import Timings
from tood_deploy.inference.thresholds import DEFAULT_CONF
from tood_deploy.manifest import artefact_sha256
from tood_deploy.reporter import Reporter

SIZE_LIMITS = {
    "all": (0.0, np.inf),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, np.inf),
}


@dataclass(frozen=True, eq=False)
class SlicedRun:
    """What slices cost and give.

    Attributes:
        whole: metrics of the same model without slices.
        whole_ms, sliced_ms: mean time of an image; None where an earlier run had detected all.
    """

    whole: CocoMetrics
    whole_ms: float | None
    sliced_ms: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a detector is on a data set.

    Attributes:
        name: of what was evaluated.
        truth, results: what was compared.
        metrics: COCO's.
        thresholds: where F1 is highest.
        calibration: what scores mean; None where they are no probabilities.
        conf: by category id, the score above which detections count as shown, for `mistakes`.
        mistakes: of every image, at `conf`.
        files: images by image id; empty where they were not given.
        facts: what was run: name and value.
        notes: what a reader must know, a sentence each.
        chosen: thresholds to go on with.
        sliced: the same model without slices beside it, where it was run with them.
    """

    name: str
    truth: Annotations
    results: Results
    metrics: CocoMetrics
    thresholds: Thresholds
    calibration: Calibration | None
    conf: Mapping[int, float]
    mistakes: Sequence[Mistakes]
    chosen: ChosenThresholds
    files: Mapping[int, Path] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sliced: SlicedRun | None = None

    def mistake_finder(self) -> MistakeFinder:
        """Return what draws the mistakes of an image."""
        return MistakeFinder(self.truth, self.results, self.metrics.matches, self.conf)

    def size_counts(self) -> dict[str, int]:
        """Count the objects of every size; crowds are not counted."""
        areas = self.truth.boxes.areas[~self.truth.boxes.crowd]
        return {
            name: int(np.count_nonzero((areas >= low) & (areas <= high)))
            for name, (low, high) in SIZE_LIMITS.items()
        }


def evaluate_results(
    name: str,
    truth: Annotations,
    results: Results,
    *,
    conf: float = 0.0,
    iou: float | None = None,
    files: Mapping[int, Path] | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    wish: Wish | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    sliced: SlicedRun | None = None,
    count: int = STANDARD_COUNT,
) -> Evaluation:
    """Compare detections with the truth in every way that the report shows.

    Args:
        name: of what was evaluated.
        truth: the annotations.
        results: the detections.
        conf, iou: the thresholds they were made with; 0 and None where unknown.
        files: images by image id, to draw the worst of them.
        facts: what was run, for the report.
        notes: what the reader must know; what shows itself here is added.
        wish: what the thresholds to go on with shall do; best F1 where not given.
        class_names: the model's classes by category name, where they differ.
        sliced: the same model without slices, where it was run with them.
        count: detections of a class in an image that count, beside COCO's own numbers.
    """
    metrics = evaluate(truth, results, count)
    thresholds = find_thresholds(truth, results, conf, iou, count)
    common = thresholds.together.conf if thresholds.together else max(conf, DEFAULT_CONF)
    chosen = {
        key: thresholds.as_run[name].conf if name in thresholds.as_run else common
        for key, name in truth.categories.items()
    }
    mistakes = MistakeFinder(truth, results, metrics.matches, chosen).all()
    chosen_thresholds = choose_thresholds(
        truth, metrics.matches, thresholds, wish or Wish(), conf, class_names
    )
    left_out = [f"In the annotations: {line}." for line in truth.problems.lines()]
    every_note = [*left_out, *notes, *metric_notes(truth, results, metrics)]
    every_note += chosen_thresholds.remarks() if wish is not None else []
    calibration = calibrate(results, metrics.matches)
    return Evaluation(
        name,
        truth,
        results,
        metrics,
        thresholds,
        calibration,
        chosen,
        mistakes,
        chosen_thresholds,
        files or {},
        facts or {},
        every_note,
        sliced,
    )


RESULTS, THRESHOLDS = "results.json", "thresholds.json"
MANY_DETECTIONS = 50_000


@dataclass(frozen=True, eq=False)
class DataSet:
    """Annotations with their images.

    Attributes:
        truth: the annotations.
        files: images by image id; empty where none were given.
    """

    truth: Annotations
    files: Mapping[int, Path]


def open_data_set(annotations: Path, images: Path | None) -> DataSet:
    """Read the annotations and find every image.

    Raises:
        InputError: the annotations cannot be read, or an image is missing.
    """
    truth = read_annotations(annotations)
    return DataSet(truth, {} if images is None else list_image_files(truth, images))


def evaluate_file(
    path: Path,
    data: DataSet,
    command: str,
    reporter: Reporter,
    wish: Wish | None = None,
    count: int = STANDARD_COUNT,
) -> Evaluation:
    """Evaluate a COCO results file.

    Args:
        path: of the file.
        data: what it is compared with.
        command: for the report.
        reporter: is told of what takes long.
        wish: what the thresholds to go on with shall do; best F1 where not given.
        count: detections of a class in an image that count, beside COCO's own numbers.

    Raises:
        InputError: not such a file, or not of these annotations.
    """
    results = read_results(path, data.truth)
    _announce_scoring(results, reporter)
    facts = {
        "results": f"{path}, SHA-256 {file_sha256(path)}",
        **_common_facts(data.truth, command),
    }
    return evaluate_results(
        path.name, data.truth, results, files=data.files, facts=facts, wish=wish, count=count
    )


def evaluate_model(
    model: str,
    detector: Detector,
    data: DataSet,
    folder: Path,
    command: str,
    reporter: Reporter,
    *,
    mapping: Path | None = None,
    batch: int = 1,
    wish: Wish | None = None,
    count: int = STANDARD_COUNT,
) -> Evaluation:
    """Run a detector over the images and evaluate its detections.

    Args:
        model: what the detector was opened from.
        detector: with its thresholds set.
        data: with images.
        folder: where detections are kept as they come, and the COCO results in the end.
        command: for the report.
        reporter: shows how far it is.
        mapping: file that maps class names to category names; equal names where not given.
        batch: the most images of one engine call.
        wish: what the thresholds to go on with shall do; best F1 where not given.
        count: detections of a class in an image that count, beside COCO's own numbers.

    Raises:
        ToodError: classes and categories differ, images cannot be read, the folder cannot be
            written, or the model gives no numbers.
    """
    category_ids = map_categories(detector.class_names, data.truth, mapping)
    truth = data.truth.only({key for key in category_ids if key is not None})
    whole = None
    if detector.slicing is not None:
        whole = _detect_whole(model, detector, truth, data, folder, batch, reporter)
    kept, timings, resumed = _detect(model, detector, truth, data, folder, batch, reporter)
    for note in detector.slice_notes:
        reporter.note(note)
    results = kept.results(category_ids)
    write_results(folder / RESULTS, results)
    _announce_scoring(results, reporter)
    sliced = None
    if whole is not None:
        metrics = evaluate(truth, whole[0].results(category_ids), count)
        sliced = SlicedRun(metrics, _ms(whole[1]), _ms(timings))
    facts = _model_facts(model, detector) | {"batch": str(batch)} | _common_facts(truth, command)
    if resumed:
        facts["resumed"] = resumed
    notes = [
        *category_notes(data.truth, detector.class_names, category_ids),
        *size_notes(truth, kept.sizes_hw),
        *unlisted_notes(truth, data.files),
    ]
    thresholds = {"conf": detector.conf, "iou": detector.iou}
    return evaluate_results(
        Path(model).name,
        truth,
        results,
        **thresholds,
        files=data.files,
        facts=facts,
        notes=notes,
        wish=wish,
        class_names=_classes_by_category(truth, detector.class_names, category_ids),
        sliced=sliced,
        count=count,
    )


def _detect(
    model: str,
    detector: Detector,
    truth: Annotations,
    data: DataSet,
    folder: Path,
    batch: int,
    reporter: Reporter,
    description: str = "detecting",
) -> tuple[PredictionFile, Timings, str]:
    """Detect in all images that no earlier run has done.

    Args:
        model: what the detector was opened from.
        detector: to run.
        truth: the annotations.
        data: with images.
        folder: where detections are kept.
        batch: the most images, or slices of them, of one engine call.
        reporter: shows how far it is.
        description: of the work.

    Returns:
        The detections, the times, and a sentence on what an earlier run had done.
    """
    key = prediction_key(detector, model, truth, data.files)
    kept, resumed = PredictionFile(key.file_in(folder), key), ""
    if len(kept):
        counts = f"{len(kept)} of {len(data.files)} images"
        resumed = f"{counts} were done by an earlier run, kept in {kept.path}"
        reporter.info(resumed)
    timings = predict(detector, truth, data.files, kept, batch, reporter, description)
    if timings.frames:
        reporter.info(timings.summary())
    return kept, timings, resumed


def _detect_whole(
    model: str,
    detector: Detector,
    truth: Annotations,
    data: DataSet,
    folder: Path,
    batch: int,
    reporter: Reporter,
) -> tuple[PredictionFile, Timings]:
    """Detect without slices, to compare with; arguments as `_detect`."""
    slicing, detector.slicing = detector.slicing, None
    try:
        kept, timings, _ = _detect(
            model, detector, truth, data, folder, batch, reporter, "detecting in whole images"
        )
    finally:
        detector.slicing = slicing
    return kept, timings


def _ms(timings: Timings) -> float | None:
    """Return the mean time of an image in all stages; None where none was run."""
    if not timings.frames:
        return None
    return sum(timings.mean_ms(stage) for stage in ("pre", "infer", "post"))


def _classes_by_category(
    truth: Annotations, class_names: Sequence[str], category_ids: Sequence[int | None]
) -> dict[str, list[str]]:
    """Return the model's classes that stand for each category, by its name."""
    classes: dict[str, list[str]] = {}
    for name, key in zip(class_names, category_ids, strict=True):
        if key is not None:
            classes.setdefault(truth.categories[key], []).append(name)
    return classes


def _announce_scoring(results: Results, reporter: Reporter) -> None:
    """Announce what takes minutes: pycocotools matches some thousand detections a second."""
    if len(results) >= MANY_DETECTIONS:
        reporter.info(f"scoring {len(results)} detections, which may take minutes")


def _model_facts(model: str, detector: Detector) -> dict[str, str]:
    manifest, path = detector.engine.manifest, Path(model)
    preset = manifest.preset
    network = f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes"
    limit = f"at most {detector.max_det} an image{' or slice' if detector.slicing else ''}"
    detection = f"conf {_shown_conf(detector)}, iou {detector.iou:g}, {limit}"
    decoding = "JPEG images only as large as needed (--fast-decode)"
    return {
        "model": f"{model}, SHA-256 {artefact_sha256(path)}" if path.is_file() else model,
        "network": f"{network}, {preset.convention} convention, {detector.engine.precision}",
        "runtime": f"{detector.engine.name}, {detector.engine.device}",
        "detection": f"{detection}, {preset.candidates_per_level} candidates a level",
        "imgsz": str(detector.sizing),
        "decoding": decoding if detector.fast_decode else "all pixels",
        **({} if detector.slicing is None else {"slices": str(detector.slicing)}),
    }


def _shown_conf(detector: Detector) -> str:
    classes = "".join(
        f", {word} {', '.join(names)}"
        for word, names in (("only", detector.only), ("except", detector.exclude))
        if names is not None
    )
    return f"{detector.thresholds}{classes}"


def _common_facts(truth: Annotations, command: str) -> dict[str, str]:
    counts = f"{len(truth.images)} images, {len(truth.boxes)} boxes"
    return {
        "annotations": f"{truth.path}, SHA-256 {file_sha256(truth.path)}: {counts}",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": f"tood_deploy {__version__}, pycocotools {version('pycocotools')}",
    }
