"""Runs a detector over the pictures of an annotation file; memory does not grow with the pictures, and what is done is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from tood_deploy import __version__
from tood_deploy.benchmark.prediction_file import Key, PredictionFile
from tood_deploy.benchmark.truth import Truth
from tood_deploy.errors import ArtefactError, InputError
from tood_deploy.inference.destinations import absolute_path
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.images import MAX_PIXELS
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.source import open_source
from tood_deploy.inference.talk import Talk
from tood_deploy.inference.timings import Timings
from tood_deploy.manifest import artefact_sha256, file_sha256
from tood_deploy.preprocess import padded_size


def picture_files(truth: Truth, folder: Path) -> dict[int, Path]:
    """The file of every picture of the annotations, by image id.

    Raises:
        InputError: no such folder, or a picture is not in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the {len(truth.images)} pictures of {truth.path}")
    files = {key: absolute_path(folder / image.file_name) for key, image in truth.images.items()}
    if missing := [path for path in files.values() if not path.is_file()]:
        raise InputError(
            f"{folder}: {len(missing)} of the {len(files)} pictures of {truth.path} are missing, the first is {missing[0]}; "
            "give the folder that the annotations' file names start from"
        )
    return files


def prediction_key(detector: Detector, model: str, truth: Truth, files: Mapping[int, Path]) -> Key:
    """Everything that detections depend on: model, thresholds, runtime, annotations, pictures."""
    pictures = hashlib.sha256()
    for key, path in files.items():
        status = path.stat()
        pictures.update(f"{key} {path} {status.st_size} {status.st_mtime_ns}\n".encode())
    engine = detector.engine
    return Key(
        {
            "model": artefact_sha256(Path(model)) if Path(model).is_file() else model,
            "manifest": hashlib.sha256(engine.manifest.to_json().encode()).hexdigest(),
            "runtime": f"{engine.name}, {engine.precision}, {engine.device}, tood_deploy {__version__}",
            "conf": detector.conf,
            "iou": detector.iou,
            "max_det": detector.max_det,
            "imgsz": str(detector.sizing),
            "fast_decode": detector.fast_decode,
            "annotations": file_sha256(truth.path),
            "pictures": pictures.hexdigest(),
        }
    )


def predict(
    detector: Detector,
    truth: Truth,
    files: Mapping[int, Path],
    kept: PredictionFile,
    batch: int,
    quiet: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Timings:
    """Detects in every picture that has no line yet. Interrupted, it loses at most the pictures in work.

    Args:
        detector: to run.
        truth: the annotations; tell the pictures' sizes, by which they are put in order so that batches fill.
        files: of the pictures, by image id.
        kept: where detections go.
        batch: the most pictures of one engine call.
        quiet: no progress bar.
        progress: called after every picture with how many are done and how many there are.

    Raises:
        InputError: pictures cannot be read; the others are done.
        ArtefactError: the model gave values that are not numbers.
    """
    timings = Timings()
    todo = sorted((key for key in files if key not in kept.sizes_hw), key=lambda key: (_net_hw(truth, key, detector), key))
    if not todo:
        return timings
    ids = {str(files[key]): key for key in todo}
    source = open_source([files[key] for key in todo], MAX_PIXELS)
    results = detect_frames(detector, source, batch, timings)
    done = 0
    try:
        with kept, Talk(source, timings, quiet) as talk, closing(results):
            for frame, found in results:
                kept.add(ids[frame.name], frame.size_hw, found)
                talk.advance()
                done += 1
                progress(done, len(todo))
    except ArtefactError as error:
        others = f" or one of the {batch - 1} after it" if batch > 1 else ""
        raise ArtefactError(f"{error} (picture {files[todo[min(done, len(todo) - 1)]]}{others})") from error
    if source.skipped:
        raise InputError(
            f"{source.skipped} of {len(files)} pictures cannot be read, the first: {source.problems[0]}. "
            f"Mend them, or take them out of {truth.path}; the others are done and kept"
        )
    return timings


def _net_hw(truth: Truth, key: int, detector: Detector) -> tuple[int, int]:
    size_hw = truth.images[key].size_hw
    return (0, 0) if size_hw is None or min(size_hw) < 1 else padded_size(size_hw, detector.sizing)
