"""Task alignment: whether the boxes that a network is surest of are those that fit best.

A detector in PyTorch, with its evaluation, in; rank correlations of score and overlap, and the maps
of chosen images, out. Scores are those that suppression ranks by. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from tood_deploy.benchmark.evaluation.evaluate import Evaluation
from tood_deploy.data.categories import map_categories
from tood_deploy.data.coco import Annotations, Boxes
from tood_deploy.data.images import read_image
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.errors import InputError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Prepared
from tood_deploy.model.boxes import box_iou
from tood_deploy.model.detector import FusedDetector
from tood_deploy.model.head import HeadOutput
from tood_deploy.presets import STRIDES
from tood_deploy.reporter import Reporter

SUREST, TIGHT = 50, 10  # predictions of an object: the paper's PCC (Top-50) and IoU (Top-10)
FEWEST = 3  # pairs that have a rank correlation
DRAWN_IMAGES = 4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ClassAlignment:
    """How far score and overlap agree, of one class or of all.

    Attributes:
        true_positives: detections that match an object at an overlap (IoU) of 0.5.
        correlation: Spearman's, of their scores and overlaps; NaN where it is not defined.
        objects: annotated, without crowds.
        surest_correlation: the mean over objects of Spearman's correlation of the 50 predictions,
            before suppression, that are surest of the object.
        tight_iou: the mean over objects of the overlap of the 10 surest.
    """

    true_positives: int
    correlation: float
    objects: int
    surest_correlation: float
    tight_iou: float


class Places(NamedTuple):
    """A location of the network for each of G objects, in pixels of the image.

    Attributes:
        centres: (G, 2) x, y of the cells; NaN where no box overlaps the object.
        boxes: (G, 4) xyxy that are predicted there.
    """

    centres: Floats
    boxes: Floats


@dataclass(frozen=True, eq=False)
class AlignmentMaps:
    """The maps of an image, of all levels: at every pixel the level with the highest product.

    Attributes:
        image_id: of the annotations.
        scores: (H, W) of the class of the location's object, in pixels of the network's input.
        overlaps: (H, W) IoU of the location's box with its object, the one that it overlaps most.
        objects: (G, 4) xyxy in pixels of the image.
        surest, tightest: of every object the locations with the highest score and overlap.
    """

    image_id: int
    scores: Floats
    overlaps: Floats
    objects: Floats
    surest: Places
    tightest: Places


@dataclass(frozen=True, eq=False)
class Alignment:
    """The alignment of a network on a data set.

    Attributes:
        classes: by category name.
        together: of all classes.
        drawn: of the chosen images.
    """

    classes: Mapping[str, ClassAlignment]
    together: ClassAlignment
    drawn: Sequence[AlignmentMaps]


def choose_images(truth: Annotations, names: Sequence[str]) -> list[int]:
    """Return the ids of the images to draw: those named, else some with objects, spread evenly.

    Raises:
        InputError: no such image, or several of the name.
    """
    if names:
        return [_image_id(truth, name) for name in names]
    with_objects = np.unique(truth.boxes.image_ids[~truth.boxes.crowd])
    count = min(DRAWN_IMAGES, len(with_objects))
    return with_objects[np.linspace(0, len(with_objects) - 1, count).astype(int)].tolist()


def _image_id(truth: Annotations, name: str) -> int:
    whole = [key for key, image in truth.images.items() if image.file_name == name]
    last = [key for key, image in truth.images.items() if PurePath(image.file_name).name == name]
    if len(keys := whole or last) == 1:
        return keys[0]
    first = next(iter(truth.images.values())).file_name
    raise InputError(
        f"{truth.path}: has {len(keys) or 'no'} images of the name {name} (--alignment); "
        f"expected the file name of one, such as {first}"
    )


class _Predictions(NamedTuple):
    """The boxes of all A locations and anchors of an image, in pixels of the network's input.

    Attributes:
        boxes: (A, 4) xyxy.
        scores: (A, C) of every category of the annotations.
        centres: (A, 2) x, y of the cells.
        shapes: rows, columns and anchors a cell of every level.
    """

    boxes: Floats
    scores: Floats
    centres: Floats
    shapes: list[tuple[int, int, int]]


class _Assigned(NamedTuple):
    """What every prediction is of.

    Attributes:
        objects: (A,) the object that the box overlaps most.
        overlaps: (A,) by how much (IoU).
        scores: (A,) of the object's class; the highest of all where no object is overlapped.
    """

    objects: NDArray[np.int64]
    overlaps: Floats
    scores: Floats


def measure_alignment(
    detector: Detector,
    evaluation: Evaluation,
    names: Sequence[str],
    reporter: Reporter,
    mapping: Path | None = None,
) -> Alignment:
    """Run the network over all images once more, and compare its scores with its overlaps.

    Args:
        detector: in PyTorch.
        evaluation: of the detector, with images.
        names: of the images to draw; some where there are none.
        reporter: shows how far it is.
        mapping: file that maps class names to category names, as for the evaluation.

    Raises:
        InputError: no such image, or one that cannot be read.
    """
    truth, drawn = evaluation.truth, choose_images(evaluation.truth, names)
    columns = category_columns(detector, truth, mapping)
    sums, maps = _ObjectSums(truth), dict[int, AlignmentMaps]()
    with reporter.progress("comparing scores and overlaps", len(evaluation.files)) as task:
        for image_id, path in evaluation.files.items():
            prepared = detector.prepare(read_image(path))
            boxes = truth.boxes.pick(truth.boxes.span(image_id, image_id))
            boxes = boxes.pick(~boxes.crowd)
            objects = xyxy(boxes) * _factors(prepared)
            categories = np.searchsorted(list(truth.categories), boxes.category_ids)
            if len(boxes) or image_id in drawn:
                predictions = predict_densely(detector, prepared, columns)
                assigned = assign(predictions, objects, categories)
                sums.add(assigned, categories)
                if image_id in drawn:
                    maps[image_id] = maps_of(image_id, prepared, predictions, assigned, objects)
            task.advance()
    pairs = true_positives(evaluation)
    keys = enumerate(truth.categories.items())
    classes = {name: sums.of_class(k, *pairs.of(category)) for k, (category, name) in keys}
    together = sums.of_class(None, pairs.scores, pairs.overlaps)
    return Alignment(classes, together, [maps[image_id] for image_id in drawn])


def category_columns(
    detector: Detector, truth: Annotations, mapping: Path | None
) -> list[NDArray[np.int64]]:
    """Return the numbers of the classes that stand for each category of the annotations.

    Args:
        detector: with its class names.
        truth: the annotations, of the categories that are evaluated.
        mapping: file that maps class names to category names.
    """
    ids = map_categories(detector.class_names, truth, mapping)
    own = np.array([-1 if key is None else key for key in ids])
    return [np.flatnonzero(own == key) for key in truth.categories]


def predict_densely(
    detector: Detector, prepared: Prepared, columns: Sequence[NDArray[np.int64]]
) -> _Predictions:
    """Return the boxes and scores of all locations, before any selection.

    Args:
        detector: in PyTorch.
        prepared: one image.
        columns: numbers of the classes that stand for each category.
    """
    engine = detector.engine
    assert isinstance(engine, TorchEngine), "artefacts are refused before"
    head = _head_output(engine.detector, prepared, engine.device)
    boxes = [maps[0].flatten(1).T * s for maps, s in zip(head.boxes_strides, STRIDES, strict=True)]
    scores = torch.cat([maps[0].flatten(1).T for maps in head.scores]).cpu().numpy()
    shapes = []
    for maps, stride in zip(head.scores, STRIDES, strict=True):
        cells = -(-prepared.transform.net_hw[1] // stride)
        shapes.append((maps.shape[2], cells, maps.shape[3] // cells))
    centres = [_cell_centres(shape, stride) for shape, stride in zip(shapes, STRIDES, strict=True)]
    by_category = np.stack([scores[:, numbers].max(1) for numbers in columns], axis=1)
    return _Predictions(
        torch.cat(boxes).cpu().numpy(), by_category, np.concatenate(centres), shapes
    )


@torch.inference_mode()
def _head_output(network: FusedDetector, prepared: Prepared, device: str) -> HeadOutput:
    images = torch.from_numpy(prepared.image[None]).to(device)
    valid_hw = torch.tensor([prepared.transform.resized_hw], device=device)
    return network.model(network.normalise(images, valid_hw))


def _cell_centres(shape: tuple[int, int, int], stride: int) -> Floats:
    """Return (A, 2) x, y of the cells of a level, once for each of their anchors."""
    y, x, _ = np.indices(shape)
    return ((np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride).astype(np.float32)


def assign(predictions: _Predictions, objects: Floats, categories: NDArray[np.int64]) -> _Assigned:
    """Give every prediction the object that its box overlaps most.

    Args:
        predictions: of an image.
        objects: (G, 4) xyxy in pixels of the network's input.
        categories: (G,) their columns of the scores.
    """
    count = len(predictions.boxes)
    best_scores = predictions.scores.max(1)
    if not len(objects):
        return _Assigned(np.zeros(count, np.int64), np.zeros(count, np.float32), best_scores)
    overlaps = box_iou(torch.from_numpy(predictions.boxes), torch.from_numpy(objects)).nan_to_num()
    highest, owners = (values.numpy() for values in overlaps.max(1))
    own = predictions.scores[np.arange(count), categories[owners]]
    return _Assigned(owners, highest, np.where(highest > 0, own, best_scores))


class _ObjectSums:
    """Collects what the surest predictions of every object are worth."""

    def __init__(self, truth: Annotations) -> None:
        self.categories: list[int] = []
        self.correlations: list[float] = []
        self.tight: list[float] = []
        self.truth = truth

    def add(self, assigned: _Assigned, categories: NDArray[np.int64]) -> None:
        """Add the objects of an image, of these categories."""
        for i, category in enumerate(categories.tolist()):
            own = np.flatnonzero((assigned.objects == i) & (assigned.overlaps > 0))
            surest = own[np.argsort(-assigned.scores[own], kind="stable")[:SUREST]]
            overlaps = assigned.overlaps[surest]
            self.categories.append(category)
            self.correlations.append(rank_correlation(assigned.scores[surest], overlaps))
            self.tight.append(float(overlaps[:TIGHT].mean()) if len(surest) else 0.0)

    def of_class(
        self, category: int | None, scores: NDArray[np.float64], overlaps: NDArray[np.float64]
    ) -> ClassAlignment:
        """Return the alignment of a class.

        Args:
            category: its position; None for all together.
            scores, overlaps: of its true positives.
        """
        own = np.array([category is None or key == category for key in self.categories], bool)
        means = [_mean(np.array(values)[own]) for values in (self.correlations, self.tight)]
        correlation = rank_correlation(scores, overlaps)
        return ClassAlignment(len(scores), correlation, int(own.sum()), *means)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return Spearman's correlation; NaN of fewer than three pairs, or of equal values."""
    if len(first) < FEWEST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    result: Any = spearmanr(first, second)  # its type stubs know no `statistic`
    return float(result.statistic)


class TruePositives(NamedTuple):
    """Detections that match an object at 0.5.

    Attributes:
        category_ids: (N,).
        scores: (N,).
        overlaps: (N,) IoU with the object of the class that the detection overlaps most.
    """

    category_ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    overlaps: NDArray[np.float64]

    def of(self, category: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return scores and overlaps of one category."""
        own = self.category_ids == category
        return self.scores[own], self.overlaps[own]


def true_positives(evaluation: Evaluation) -> TruePositives:
    """Return the right detections of an evaluation, by pycocotools's matching."""
    matches = evaluation.metrics.matches
    rows = matches.rows[matches.matched[:, 0] & ~matches.ignored[:, 0]]
    right = evaluation.results.pick(np.sort(rows))
    parts = [np.zeros(0)]
    for image_id in np.unique(right.image_ids).tolist():
        own = right.pick(right.span(image_id, image_id))
        objects = evaluation.truth.boxes.pick(evaluation.truth.boxes.span(image_id, image_id))
        objects = objects.pick(~objects.crowd)
        overlaps = box_iou(*(torch.from_numpy(xyxy(boxes)) for boxes in (own, objects))).numpy()
        same = own.category_ids[:, None] == objects.category_ids
        parts.append(np.where(same, overlaps, 0.0).max(1))
    return TruePositives(right.category_ids, right.scores, np.concatenate(parts))


def xyxy(boxes: Boxes) -> Floats:
    """Return (N, 4) xyxy in pixels of the image."""
    corner, size = boxes.boxes_xywh[:, :2], boxes.boxes_xywh[:, 2:]
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def _factors(prepared: Prepared) -> Floats:
    """Return by what xyxy in pixels of the image are multiplied, for the network's input."""
    resized, image = prepared.transform.resized_hw, prepared.transform.image_hw
    factors = [resized[1] / image[1], resized[0] / image[0]]
    return np.array([*factors, *factors], np.float32)


def maps_of(
    image_id: int,
    prepared: Prepared,
    predictions: _Predictions,
    assigned: _Assigned,
    objects: Floats,
) -> AlignmentMaps:
    """Return what is drawn of an image.

    Args:
        image_id: of the image.
        prepared: the image.
        predictions: in it.
        assigned: of the predictions.
        objects: (G, 4) xyxy in pixels of the network's input.
    """
    height, width = prepared.transform.resized_hw
    scores = np.zeros((height, width), np.float32)
    overlaps, highest = np.zeros_like(scores), np.full((height, width), -1.0, np.float32)
    start = 0
    for shape, stride in zip(predictions.shapes, STRIDES, strict=True):
        part = slice(start, start := start + int(np.prod(shape)))
        level = _best_of_cells(assigned.scores[part], assigned.overlaps[part], shape)
        level_scores, level_overlaps = (
            values.repeat(stride, 0).repeat(stride, 1)[:height, :width] for values in level
        )
        worth = _worth(level_scores, level_overlaps)
        better = worth > highest
        scores[better], overlaps[better] = level_scores[better], level_overlaps[better]
        highest = np.maximum(worth, highest)
    factors = _factors(prepared)
    surest, tightest = (
        _best_places(values, predictions, assigned, len(objects), factors)
        for values in (assigned.scores, assigned.overlaps)
    )
    boxes = np.asarray(objects / factors, np.float32)
    return AlignmentMaps(image_id, scores, overlaps, boxes, surest, tightest)


def _worth(scores: Floats, overlaps: Floats) -> Floats:
    """Return what decides which of several predictions of a place is shown."""
    # The score alone decides where nothing is overlapped.
    return np.asarray(scores * overlaps + 1e-4 * scores, np.float32)


def _best_of_cells(
    scores: Floats, overlaps: Floats, shape: tuple[int, int, int]
) -> tuple[Floats, Floats]:
    """Return maps (rows, columns) of scores and overlaps: of several anchors the best.

    Args:
        scores, overlaps: of a level's predictions.
        shape: of the level: rows, columns and anchors.
    """
    scores, overlaps = scores.reshape(shape), overlaps.reshape(shape)
    best = _worth(scores, overlaps).argmax(2)[..., None]
    first, second = (np.take_along_axis(values, best, 2)[..., 0] for values in (scores, overlaps))
    return first, second


def _best_places(
    values: Floats, predictions: _Predictions, assigned: _Assigned, count: int, factors: Floats
) -> Places:
    """Return for every object the place of its prediction with the highest value.

    Args:
        values: (A,) of the predictions.
        predictions: of the image.
        assigned: of the predictions.
        count: of the objects.
        factors: from pixels of the image to those of the network's input.
    """
    centres, boxes = np.full((count, 2), np.nan), np.full((count, 4), np.nan)
    for i in range(count):
        own = np.flatnonzero((assigned.objects == i) & (assigned.overlaps > 0))
        if len(own):
            best = own[values[own].argmax()]
            centres[i] = predictions.centres[best] / factors[:2]
            boxes[i] = predictions.boxes[best] / factors
    return Places(centres.astype(np.float32), boxes.astype(np.float32))
