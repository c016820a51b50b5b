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
from tood_deploy.benchmark.evaluation.predict import PredictionFile, predict, prediction_key
from tood_deploy.data.categories import map_categories
from tood_deploy.data.coco import Annotations, read_annotations
from tood_deploy.data.coco_metrics import CocoMetrics, evaluate
from tood_deploy.data.image_set import list_image_files
from tood_deploy.data.images import image_paths
from tood_deploy.data.results import Results, read_results, write_results
from tood_deploy.files import file_sha256
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import artefact_sha256
from tood_deploy.reporter import Reporter

DEFAULT_CONF = 0.3
SIZE_LIMITS = {
    "all": (0.0, np.inf),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, np.inf),
}


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
    """

    name: str
    truth: Annotations
    results: Results
    metrics: CocoMetrics
    thresholds: Thresholds
    calibration: Calibration | None
    conf: Mapping[int, float]
    mistakes: Sequence[Mistakes]
    files: Mapping[int, Path] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

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
    """
    metrics = evaluate(truth, results)
    thresholds = find_thresholds(truth, results, conf, iou)
    common = thresholds.together.conf if thresholds.together else max(conf, DEFAULT_CONF)
    chosen = {
        key: thresholds.as_run[name].conf if name in thresholds.as_run else common
        for key, name in truth.categories.items()
    }
    mistakes = MistakeFinder(truth, results, metrics.matches, chosen).all()
    left_out = [f"In the annotations: {line}." for line in truth.problems.lines()]
    every_note = [*left_out, *notes, *_own_notes(truth, results, metrics)]
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
        files or {},
        facts or {},
        every_note,
    )


def size_notes(truth: Annotations, sizes_hw: Mapping[int, tuple[int, int]]) -> list[str]:
    """Return a note where images are not of the annotated size: boxes do not fit there."""
    wrong = [
        (key, size)
        for key, size in sizes_hw.items()
        if truth.images[key].size_hw not in (None, size)
    ]
    if not wrong:
        return []
    (key, (height, width)) = wrong[0]
    image = truth.images[key]
    annotated_hw = image.size_hw or (0, 0)
    return [
        f"{len(wrong)} of {len(sizes_hw)} images are not of the size that the annotations give, "
        f"so their boxes do not fit: {image.file_name} is {width} x {height}, "
        f"the annotations say {annotated_hw[1]} x {annotated_hw[0]}."
    ]


def unlisted_notes(truth: Annotations, files: Mapping[int, Path]) -> list[str]:
    """Return a note where the folders of the images hold others, which are not evaluated."""
    folders = {path.parent for path in files.values()}
    there = {path for folder in folders for path in image_paths(folder)}
    extra = sorted(there - set(files.values()))
    if not extra:
        return []
    return [
        f"{len(extra)} images beside the {len(files)} of {truth.path} are not in it "
        f"and were left out, such as {extra[0]}."
    ]


def category_notes(
    truth: Annotations, class_names: Sequence[str], category_ids: Sequence[int | None]
) -> list[str]:
    """Return notes on the classes and categories that a mapping leaves out of the score.

    Args:
        truth: the annotations.
        class_names: of the model.
        category_ids: of every class; None for one that is left out.
    """
    classes = [name for name, key in zip(class_names, category_ids, strict=True) if key is None]
    categories = [name for key, name in truth.categories.items() if key not in category_ids]
    notes = [f"Left out by the mapping: the model's {', '.join(classes)}."] if classes else []
    if categories:
        notes.append(
            "Not scored, as no class of the model stands for them: "
            f"the annotations' {', '.join(categories)}."
        )
    return notes


def _own_notes(truth: Annotations, results: Results, metrics: CocoMetrics) -> list[str]:
    notes = []
    if not len(results):
        notes.append("There are no detections at all: every AP is 0.")
    elif metrics.numbers["AP"] == 0:
        notes.append(
            "Not one detection is right: AP is 0. Are the categories, "
            "the image size and the colours those of the model?"
        )
    without = [name for name in metrics.class_names if name not in metrics.class_ap]
    if without:
        notes.append(
            "Classes without objects in the annotations have no AP and do not count in the mean: "
            f"{', '.join(without)}."
        )
    return notes


RESULTS = "results.json"
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


def evaluate_file(path: Path, data: DataSet, command: str, reporter: Reporter) -> Evaluation:
    """Evaluate a COCO results file.

    Args:
        path: of the file.
        data: what it is compared with.
        command: for the report.
        reporter: is told of what takes long.

    Raises:
        InputError: not such a file, or not of these annotations.
    """
    results = read_results(path, data.truth)
    _announce_scoring(results, reporter)
    facts = {
        "results": f"{path}, SHA-256 {file_sha256(path)}",
        **_common_facts(data.truth, command),
    }
    return evaluate_results(path.name, data.truth, results, files=data.files, facts=facts)


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

    Raises:
        ToodError: classes and categories differ, images cannot be read, the folder cannot be
            written, or the model gives no numbers.
    """
    category_ids = map_categories(detector.class_names, data.truth, mapping)
    truth = data.truth.only({key for key in category_ids if key is not None})
    key = prediction_key(detector, model, truth, data.files)
    kept = PredictionFile(key.file_in(folder), key)
    resumed = ""
    if len(kept):
        counts = f"{len(kept)} of {len(data.files)} images"
        resumed = f"{counts} were done by an earlier run, kept in {kept.path}"
        reporter.info(resumed)
    timings = predict(detector, truth, data.files, kept, batch, reporter)
    if timings.frames:
        reporter.info(timings.summary())
    results = kept.results(category_ids)
    write_results(folder / RESULTS, results)
    _announce_scoring(results, reporter)
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
        Path(model).name, truth, results, **thresholds, files=data.files, facts=facts, notes=notes
    )


def _announce_scoring(results: Results, reporter: Reporter) -> None:
    """Announce what takes minutes: pycocotools matches some thousand detections a second."""
    if len(results) >= MANY_DETECTIONS:
        reporter.info(f"scoring {len(results)} detections, which may take minutes")


def _model_facts(model: str, detector: Detector) -> dict[str, str]:
    manifest, path = detector.engine.manifest, Path(model)
    preset = manifest.preset
    network = f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes"
    detection = f"conf {detector.conf:g}, iou {detector.iou:g}, at most {detector.max_det} an image"
    decoding = "JPEG images only as large as needed (--fast-decode)"
    return {
        "model": f"{model}, SHA-256 {artefact_sha256(path)}" if path.is_file() else model,
        "network": f"{network}, {preset.convention} convention, {detector.engine.precision}",
        "runtime": f"{detector.engine.name}, {detector.engine.device}",
        "detection": f"{detection}, {preset.candidates_per_level} candidates a level",
        "imgsz": str(detector.sizing),
        "decoding": decoding if detector.fast_decode else "all pixels",
    }


def _common_facts(truth: Annotations, command: str) -> dict[str, str]:
    counts = f"{len(truth.images)} images, {len(truth.boxes)} boxes"
    return {
        "annotations": f"{truth.path}, SHA-256 {file_sha256(truth.path)}: {counts}",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": f"tood_deploy {__version__}, pycocotools {version('pycocotools')}",
    }
