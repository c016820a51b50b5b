"""One evaluation: truth and detections in; metrics, thresholds, calibration and mistakes out. Writes nothing."""

from __future__ import annotations

import sys
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
from tood_deploy.data.images import IMAGE_SUFFIXES
from tood_deploy.data.results import Results, read_results, write_results
from tood_deploy.files import file_sha256
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import artefact_sha256

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
        """Draws the mistakes of an image."""
        return MistakeFinder(self.truth, self.results, self.metrics.matches, self.conf)

    def size_counts(self) -> dict[str, int]:
        """Objects of every size; crowds are not counted."""
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
    """Compares detections with the truth in every way the report shows.

    Args:
        name: of what was evaluated.
        truth: the annotations.
        results: the detections.
        conf, iou: the thresholds they were made with; 0 and None where unknown.
        files: images by image id, to draw the worst of them.
        facts: what was run, for the report.
        notes: what the reader must know; what is found out here is added.
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
    """Says where images are not of the size that the annotations tell: boxes do not fit there."""
    wrong = [
        (key, size)
        for key, size in sizes_hw.items()
        if truth.images[key].size_hw not in (None, size)
    ]
    if not wrong:
        return []
    (key, (height, width)), told = wrong[0], truth.images[wrong[0][0]].size_hw or (0, 0)
    return [
        f"{len(wrong)} of {len(sizes_hw)} images are not of the size that the annotations tell, so their boxes do not fit: "
        f"{truth.images[key].file_name} is {width} x {height}, the annotations say {told[1]} x {told[0]}."
    ]


def unlisted_notes(truth: Annotations, files: Mapping[int, Path]) -> list[str]:
    """Says where the folders of the images hold others, which are not evaluated."""
    folders = {path.parent for path in files.values()}
    there = {
        path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    extra = sorted(there - set(files.values()))
    return (
        [
            f"{len(extra)} images beside the {len(files)} of {truth.path} are not in it and were left out, such as {extra[0]}."
        ]
        if extra
        else []
    )


def category_notes(
    truth: Annotations, class_names: Sequence[str], category_ids: Sequence[int | None]
) -> list[str]:
    """Says which classes and categories a mapping leaves out of the score."""
    classes = [name for name, key in zip(class_names, category_ids, strict=True) if key is None]
    categories = [name for key, name in truth.categories.items() if key not in category_ids]
    notes = [f"Left out by the mapping: the model's {', '.join(classes)}."] if classes else []
    return notes + (
        [
            f"Not scored, as no class of the model stands for them: the annotations' {', '.join(categories)}."
        ]
        if categories
        else []
    )


def _own_notes(truth: Annotations, results: Results, metrics: CocoMetrics) -> list[str]:
    notes = []
    if not len(results):
        notes.append("There are no detections at all: every AP is 0.")
    elif metrics.numbers["AP"] == 0:
        notes.append(
            "Not one detection is right: AP is 0. Are the categories, the image size and the colours those of the model?"
        )
    without = [name for name in metrics.class_names if name not in metrics.class_ap]
    if without:
        notes.append(
            f"Classes without objects in the annotations have no AP and do not count in the mean: {', '.join(without)}."
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
    """Reads the annotations and finds every image.

    Raises:
        InputError: the annotations cannot be read, or an image is missing.
    """
    truth = read_annotations(annotations)
    return DataSet(truth, {} if images is None else list_image_files(truth, images))


def evaluate_file(path: Path, data: DataSet, command: str, *, quiet: bool = False) -> Evaluation:
    """Evaluates a COCO results file; quiet: says nothing meanwhile.

    Raises:
        InputError: not such a file, or not of these annotations.
    """
    results = read_results(path, data.truth)
    _say_scoring(results, quiet)
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
    *,
    mapping: Path | None = None,
    batch: int = 1,
    quiet: bool = False,
) -> Evaluation:
    """Runs a detector over the images and evaluates what it finds.

    Args:
        model: what the detector was opened from.
        detector: with its thresholds set.
        data: with images.
        folder: where detections are kept as they come, and the COCO results in the end.
        command: for the report.
        mapping: file that maps class names to category names; equal names where not given.
        batch: the most images of one engine call.
        quiet: no progress bar.

    Raises:
        ToodError: classes and categories differ, images cannot be read, the folder cannot be written, or the model gives no numbers.
    """
    category_ids = map_categories(detector.class_names, data.truth, mapping)
    truth = data.truth.only({key for key in category_ids if key is not None})
    key = prediction_key(detector, model, truth, data.files)
    kept = PredictionFile(key.file_in(folder), key)
    earlier = len(kept)
    if earlier and not quiet:
        print(
            f"{earlier} of {len(data.files)} images were done by an earlier run, kept in {kept.path}",
            file=sys.stderr,
        )
    predict(detector, truth, data.files, kept, batch, quiet)
    results = kept.results(category_ids)
    write_results(folder / RESULTS, results)
    _say_scoring(results, quiet)
    facts = _model_facts(model, detector) | {"batch": str(batch)} | _common_facts(truth, command)
    if earlier:
        facts["resumed"] = (
            f"{earlier} of {len(data.files)} images were done by an earlier run, kept in {kept.path}"
        )
    notes = [
        *category_notes(data.truth, detector.class_names, category_ids),
        *size_notes(truth, kept.sizes_hw),
        *unlisted_notes(truth, data.files),
    ]
    thresholds = {"conf": detector.conf, "iou": detector.iou}
    return evaluate_results(
        Path(model).name, truth, results, **thresholds, files=data.files, facts=facts, notes=notes
    )


def _say_scoring(results: Results, quiet: bool) -> None:
    """Said where it takes long enough to wonder: pycocotools matches some thousand detections a second."""
    if len(results) >= MANY_DETECTIONS and not quiet:
        print(f"scoring {len(results)} detections, which may take minutes", file=sys.stderr)


def _model_facts(model: str, detector: Detector) -> dict[str, str]:
    manifest, path = detector.engine.manifest, Path(model)
    preset = manifest.preset
    network = f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes, {preset.convention} convention"
    return {
        "model": f"{model}, SHA-256 {artefact_sha256(path)}" if path.is_file() else model,
        "network": f"{network}, {detector.engine.precision}",
        "runtime": f"{detector.engine.name}, {detector.engine.device}",
        "detection": f"conf {detector.conf:g}, iou {detector.iou:g}, at most {detector.max_det} an image, "
        f"{preset.candidates_per_level} candidates a level",
        "imgsz": str(detector.sizing),
        "decoding": "JPEG images only as large as needed (--fast-decode)"
        if detector.fast_decode
        else "all pixels",
    }


def _common_facts(truth: Annotations, command: str) -> dict[str, str]:
    return {
        "annotations": f"{truth.path}, SHA-256 {file_sha256(truth.path)}: {len(truth.images)} images, {len(truth.boxes)} boxes",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": f"tood_deploy {__version__}, pycocotools {version('pycocotools')}",
    }
