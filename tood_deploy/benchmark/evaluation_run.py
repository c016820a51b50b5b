"""A whole evaluation of a model or of a results file: from the names of files to an `Evaluation`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tood_deploy import __version__
from tood_deploy.benchmark.categories import map_categories
from tood_deploy.benchmark.evaluation import Evaluation, category_notes, evaluate_results, size_notes, unlisted_notes
from tood_deploy.benchmark.prediction import picture_files, predict, prediction_key
from tood_deploy.benchmark.prediction_file import PredictionFile
from tood_deploy.benchmark.results import Results, read_results, write_results
from tood_deploy.benchmark.truth import Truth, read_truth
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import artefact_sha256, file_sha256

RESULTS = "results.json"
MANY_DETECTIONS = 50_000


@dataclass(frozen=True, eq=False)
class DataSet:
    """Annotations with their pictures.

    Attributes:
        truth: the annotations.
        files: pictures by image id; empty where none were given.
    """

    truth: Truth
    files: Mapping[int, Path]


def open_data_set(annotations: Path, images: Path | None) -> DataSet:
    """Reads the annotations and finds every picture.

    Raises:
        InputError: the annotations cannot be read, or a picture is missing.
    """
    truth = read_truth(annotations)
    return DataSet(truth, {} if images is None else picture_files(truth, images))


def evaluate_file(path: Path, data: DataSet, command: str, *, quiet: bool = False) -> Evaluation:
    """Evaluates a COCO results file; quiet: says nothing meanwhile.

    Raises:
        InputError: not such a file, or not of these annotations.
    """
    results = read_results(path, data.truth)
    _say_scoring(results, quiet)
    facts = {"results": f"{path}, SHA-256 {file_sha256(path)}", **_common_facts(data.truth, command)}
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
    """Runs a detector over the pictures and evaluates what it finds.

    Args:
        model: what the detector was opened from.
        detector: with its thresholds set.
        data: with pictures.
        folder: where detections are kept as they come, and the COCO results in the end.
        command: for the report.
        mapping: file that maps class names to category names; equal names where not given.
        batch: the most pictures of one engine call.
        quiet: no progress bar.

    Raises:
        ToodError: classes and categories differ, pictures cannot be read, the folder cannot be written, or the model gives no numbers.
    """
    category_ids = map_categories(detector.class_names, data.truth, mapping)
    truth = data.truth.only({key for key in category_ids if key is not None})
    key = prediction_key(detector, model, truth, data.files)
    kept = PredictionFile(key.file_in(folder), key)
    earlier = len(kept)
    if earlier and not quiet:
        print(f"{earlier} of {len(data.files)} pictures were done by an earlier run, kept in {kept.path}", file=sys.stderr)
    predict(detector, truth, data.files, kept, batch, quiet)
    results = kept.results(category_ids)
    write_results(folder / RESULTS, results)
    _say_scoring(results, quiet)
    facts = _model_facts(model, detector) | {"batch": str(batch)} | _common_facts(truth, command)
    if earlier:
        facts["resumed"] = f"{earlier} of {len(data.files)} pictures were done by an earlier run, kept in {kept.path}"
    notes = [
        *category_notes(data.truth, detector.class_names, category_ids),
        *size_notes(truth, kept.sizes_hw),
        *unlisted_notes(truth, data.files),
    ]
    thresholds = {"conf": detector.conf, "iou": detector.iou}
    return evaluate_results(Path(model).name, truth, results, **thresholds, files=data.files, facts=facts, notes=notes)


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
        "detection": f"conf {detector.conf:g}, iou {detector.iou:g}, at most {detector.max_det} a picture, "
        f"{preset.candidates_per_level} candidates a level",
        "imgsz": str(detector.sizing),
        "decoding": "JPEG pictures only as large as needed (--fast-decode)" if detector.fast_decode else "all pixels",
    }


def _common_facts(truth: Truth, command: str) -> dict[str, str]:
    return {
        "annotations": f"{truth.path}, SHA-256 {file_sha256(truth.path)}: {len(truth.images)} pictures, {len(truth.boxes)} boxes",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": f"tood_deploy {__version__}, pycocotools {version('pycocotools')}",
    }
