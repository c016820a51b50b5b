"""The best thresholds, what scores mean, and which images hold the mistakes.

Annotations, detections and their matches in; cuts, calibration and mistakes out. A detection is
right where it overlaps an object of its class by 0.5 or more (IoU). Lower suppression thresholds
than the run's are tried by suppressing its detections once more: what a run at that threshold
gives, but for the rare box that was suppressed by one that would itself be gone. The matching is
pycocotools's. Knows no detector and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from tood_deploy.data.coco import Annotations, Boxes
from tood_deploy.data.coco_metrics import OVERLAPS, STANDARD_COUNT, Matches, match
from tood_deploy.data.results import Results
from tood_deploy.draw import class_colour, draw_boxes, line_width

LOWEST_IOU, HIGHEST_IOU, IOU_STEP = 0.30, 0.70, 0.05


@dataclass(frozen=True, eq=False)
class F1Curve:
    """Precision and recall of the detections with at least a score, from the best score down.

    Attributes:
        scores: (N,) distinct, falling.
        precision, recall: (N,) fractions.
    """

    scores: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """Return (N,) the harmonic mean of the two."""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)


@dataclass(frozen=True)
class Cut:
    """The best thresholds, and what they give.

    Attributes:
        conf: keep detections above this score: halfway between the last one kept and the first one
            not.
        iou: suppression threshold; None for results whose own is unknown and best left as it is.
        f1, precision, recall: fractions.
    """

    conf: float
    iou: float | None
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The best cuts. Classes are missing that have no objects, or no right detection.

    Attributes:
        best: of every class, both thresholds free.
        as_run: of every class, at the run's own suppression threshold.
        together: one cut for all classes, counted together; None where nothing is right.
        curves: of every class with objects, at the run's own suppression threshold.
    """

    best: Mapping[str, Cut]
    as_run: Mapping[str, Cut]
    together: Cut | None
    curves: Mapping[str, F1Curve]


def find_thresholds(
    truth: Annotations,
    results: Results,
    conf: float = 0.0,
    iou: float | None = None,
    count: int = STANDARD_COUNT,
) -> Thresholds:
    """Find the best cuts of detections.

    Args:
        truth: the annotations.
        results: the detections.
        conf: score threshold that they were made with.
        iou: suppression threshold that they were made with; None where it is unknown.
        count: detections of a class in an image, the best, that count.
    """
    matches = match(truth, results, count=count)
    tries: dict[float | None, tuple[Results, Matches]] = {iou: (results, matches)}
    for lower, kept in zip(lower_ious(iou), suppress(results, lower_ious(iou)), strict=True):
        if not kept.all():
            fewer = results.pick(kept)
            tries[lower] = fewer, match(truth, fewer, count=count)
    cuts: dict[str, dict[float | None, Cut]] = {}
    curves: dict[str, F1Curve] = {}
    for key, name in truth.categories.items():
        by_iou = {tried: f1_curve(truth, *pair, key) for tried, pair in tries.items()}
        cuts[name] = _cuts(by_iou, conf)
        if (curve := by_iou[iou]) is not None:
            curves[name] = curve
    together = _cuts({tried: f1_curve(truth, *pair, None) for tried, pair in tries.items()}, conf)
    return Thresholds(
        {name: _best(of_class) for name, of_class in cuts.items() if of_class},
        {name: of_class[iou] for name, of_class in cuts.items() if iou in of_class},
        _best(together) if together else None,
        curves,
    )


def lower_ious(iou: float | None) -> list[float]:
    """Return the suppression thresholds to try, all below the run's own."""
    steps = np.arange(LOWEST_IOU, HIGHEST_IOU + IOU_STEP / 2, IOU_STEP).round(2).tolist()
    return [step for step in steps if iou is None or step < iou - 1e-9]


def f1_curve(
    truth: Annotations, results: Results, matches: Matches, category: int | None
) -> F1Curve | None:
    """Return precision and recall over the score; None where there are no objects.

    Args:
        truth: the annotations.
        results: the detections.
        matches: of the two.
        category: id; None: all categories counted together.
    """
    of_category = (truth.boxes.category_ids == category) | (category is None)
    objects = np.count_nonzero(~matches.truth_ignored & of_category)
    if not objects:
        return None
    counted = ~matches.ignored[:, 0] & (
        (results.category_ids[matches.rows] == category) | (category is None)
    )
    scores, matched = results.scores[matches.rows[counted]], matches.matched[counted, 0]
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(matched[order])
    # Equal scores are kept or dropped together, so only the last of them is a point of the curve.
    last = np.append(np.diff(scores) != 0, True)[: len(scores)]
    total = np.arange(1, len(scores) + 1)
    return F1Curve(scores[last], (right / total)[last], (right / objects)[last])


def suppress(results: Results, ious: Sequence[float]) -> list[NDArray[np.bool_]]:
    """Return which detections remain, (N,) bool for each threshold, after greedy suppression.

    Args:
        results: the detections; those of one image and class suppress each other.
        ious: overlaps above which the weaker of two goes.
    """
    masks = [np.ones(len(results), bool) for _ in ious]
    order = np.lexsort((-results.scores, results.category_ids, results.image_ids))
    ids = np.stack([results.image_ids[order], results.category_ids[order]])
    starts = np.flatnonzero(np.append(True, (np.diff(ids) != 0).any(axis=0))[: len(results)])
    for group in np.split(order, starts[1:]) if len(ious) else ():
        boxes = results.boxes_xywh[group]
        overlaps = np.triu(_overlaps(boxes), 1) if len(group) > 1 else np.zeros((1, 1))
        for mask, iou in zip(masks, ious, strict=True):
            for position in np.flatnonzero((overlaps > iou).any(axis=1)):
                if mask[group[position]]:
                    mask[group[overlaps[position] > iou]] = False
    return masks


def _overlaps(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, N) the IoU of every pair."""
    boxes: Any = boxes_xywh  # pycocotools's types leave arrays of floats out
    return np.asarray(coco_mask.iou(boxes, boxes, [0] * len(boxes)), np.float64)


def _cuts(curves: Mapping[float | None, F1Curve | None], conf: float) -> dict[float | None, Cut]:
    """Return the best cut of each curve that has a right detection."""
    return {
        iou: _cut(curve, conf, iou)
        for iou, curve in curves.items()
        if curve is not None and curve.recall.any()
    }


def _cut(curve: F1Curve, conf: float, iou: float | None) -> Cut:
    best = int(np.argmax(curve.f1))
    is_last = best + 1 == len(curve.scores)
    below = min(conf, curve.scores[best]) if is_last else curve.scores[best + 1]
    values = (float(values[best]) for values in (curve.f1, curve.precision, curve.recall))
    return Cut(float(curve.scores[best] + below) / 2, iou, *values)


def _best(cuts: Mapping[float | None, Cut]) -> Cut:
    """Return the highest F1; of equals the first: the run's own suppression threshold."""
    return max(cuts.values(), key=lambda cut: cut.f1)


BINS = 20


@dataclass(frozen=True, eq=False)
class Calibration:
    """Detections by score, in bins of equal width from 0 to 1.

    Attributes:
        counts: (N,) detections in each bin; crowds' are not counted.
        scores: (N,) mean score; NaN in empty bins.
        right50, right75: (N,) share that overlaps an object by 0.50 and 0.75 (IoU); NaN in empty
            bins.
    """

    counts: NDArray[np.int64]
    scores: NDArray[np.float64]
    right50: NDArray[np.float64]
    right75: NDArray[np.float64]

    @property
    def error50(self) -> float:
        """Return the expected calibration error at an overlap of 0.50."""
        return self._error(self.right50)

    @property
    def error75(self) -> float:
        """Return the expected calibration error at an overlap of 0.75."""
        return self._error(self.right75)

    def _error(self, right: NDArray[np.float64]) -> float:
        filled = self.counts > 0
        distance = np.sum(self.counts[filled] * np.abs(self.scores - right)[filled])
        return float(distance / max(self.counts.sum(), 1))


def calibrate(results: Results, matches: Matches) -> Calibration | None:
    """Return the calibration of all classes; None where scores are not between 0 and 1."""
    scores = results.scores[matches.rows]
    if len(scores) and (scores.min() < 0 or scores.max() > 1):
        return None
    sums = [_bin_sums(scores, ~matches.ignored[:, 0], scores)]
    for overlap in (0.50, 0.75):
        at = int(np.argmin(np.abs(np.array(OVERLAPS) - overlap)))
        sums.append(_bin_sums(scores, ~matches.ignored[:, 0], matches.matched[:, at]))
    counts = _bin_sums(scores, ~matches.ignored[:, 0], np.ones_like(scores))
    means = (np.where(counts > 0, total / np.maximum(counts, 1), np.nan) for total in sums)
    return Calibration(counts.astype(np.int64), *means)


def _bin_sums(
    scores: NDArray[np.float64],
    counted: NDArray[np.bool_],
    values: NDArray[np.float64] | NDArray[np.bool_],
) -> NDArray[np.float64]:
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    return np.asarray(
        np.bincount(bins[counted], values[counted].astype(np.float64), BINS), np.float64
    )


WRONG, IGNORED, RIGHT = 0, 1, 2  # class numbers whose colours are red, blue, green


@dataclass(frozen=True)
class Mistakes:
    """How many objects of an image are missed, and how many detections in it are false."""

    image_id: int
    missed: int
    false: int


class MistakeFinder:
    """Finds mistakes at a score threshold for each category; an overlap of 0.5 (IoU) is right."""

    def __init__(
        self, truth: Annotations, results: Results, matches: Matches, conf: Mapping[int, float]
    ) -> None:
        """Judge every object and detection.

        Args:
            truth: the annotations.
            results: the detections.
            matches: of the two.
            conf: by category id, the score above which detections count.
        """
        self.truth, self.results = truth, results
        min_scores = np.array([conf[key] for key in truth.boxes.category_ids.tolist()])
        self.truth_kind = np.where(
            matches.truth_ignored,
            IGNORED,
            np.where(matches.truth_scores > min_scores, RIGHT, WRONG),
        )
        rows = matches.rows
        counted = results.scores[rows] > np.array(
            [conf[key] for key in results.category_ids[rows].tolist()]
        )
        kind = np.where(
            matches.ignored[:, 0], IGNORED, np.where(matches.matched[:, 0], RIGHT, WRONG)
        )
        self.result_kind = np.full(len(results), -1)
        self.result_kind[rows[counted]] = kind[counted]

    def all(self) -> list[Mistakes]:
        """Return those of every image, in order of the ids."""
        ids = np.array(list(self.truth.images))
        missed = np.bincount(
            np.searchsorted(ids, self.truth.boxes.image_ids[self.truth_kind == WRONG]),
            minlength=len(ids),
        )
        false = np.bincount(
            np.searchsorted(ids, self.results.image_ids[self.result_kind == WRONG]),
            minlength=len(ids),
        )
        return [
            Mistakes(*values)
            for values in zip(ids.tolist(), missed.tolist(), false.tolist(), strict=True)
        ]

    def draw(
        self, image_id: int, image_bgr: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Draw the truth, red where missed, and beside it the detections, red where false.

        Crowds are blue.

        What is right has no label, so that mistakes stand out.

        Args:
            image_id: of the image.
            image_bgr: (H, W, 3) uint8.

        Returns:
            Two images of the same size.
        """
        objects, detections = (
            table.span(image_id, image_id) for table in (self.truth.boxes, self.results)
        )
        shown = np.flatnonzero(self.result_kind[detections] >= 0)
        results = self.results.pick(detections).pick(shown)
        scores = [f" {score:.2f}" for score in results.scores.tolist()]
        left = self._draw(
            image_bgr,
            self.truth.boxes.pick(objects),
            self.truth_kind[objects],
            [""] * len(self.truth_kind[objects]),
        )
        return left, self._draw(image_bgr, results, self.result_kind[detections][shown], scores)

    def _draw(
        self,
        image_bgr: NDArray[np.uint8],
        boxes: Boxes,
        kinds: NDArray[np.int64],
        endings: list[str],
    ) -> NDArray[np.uint8]:
        drawn = image_bgr.copy()
        xyxy = np.concatenate(
            [boxes.boxes_xywh[:, :2], boxes.boxes_xywh[:, :2] + boxes.boxes_xywh[:, 2:]], axis=1
        ).astype(np.float32)
        width = line_width((image_bgr.shape[0], image_bgr.shape[1]))
        for x1, y1, x2, y2 in np.rint(xyxy[kinds == RIGHT]).astype(int).tolist():
            cv2.rectangle(drawn, (x1, y1), (x2, y2), class_colour(RIGHT), width)
        names = [self.truth.categories[category] for category in boxes.category_ids.tolist()]
        labels = [name + ending for name, ending in zip(names, endings, strict=True)]
        labelled = np.flatnonzero(kinds != RIGHT)
        return draw_boxes(
            drawn, xyxy[labelled], kinds[labelled].astype(np.int32), [labels[i] for i in labelled]
        )
