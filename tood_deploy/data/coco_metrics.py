"""COCO metrics by pycocotools, exactly: the only computation of AP.

Annotations and detections in; 12 numbers, AP by class, curves and matches out, for training,
evaluation, parity and the precision search. Images are matched in chunks and only what the metrics
need is kept, so memory grows by some hundred bytes a detection; accumulating is pycocotools's own,
over all images in ascending order of their ids, so the numbers are those of one run. Knows no
models and no images.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from tood_deploy.data.categories import map_categories
from tood_deploy.data.coco import Annotations, read_annotations
from tood_deploy.data.results import Results, results_from_rows
from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError

NUMBERS: tuple[str, ...] = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split())
AREAS = ("all", "small", "medium", "large")
OVERLAPS = tuple(Params("bbox").iouThrs.tolist())  # 0.50, 0.55 ... 0.95
RECALLS = tuple(Params("bbox").recThrs.tolist())  # 0.00, 0.01 ... 1.00
STANDARD_COUNTS = tuple(Params("bbox").maxDets)  # detections of a class in an image: 1, 10, 100
STANDARD_COUNT = STANDARD_COUNTS[-1]
COUNTED: tuple[str, ...] = tuple("AP AP50 AP75 APs APm APl AR ARs ARm ARl".split())
CHUNK_IMAGES = 250


@dataclass(frozen=True, eq=False)
class Matches:
    """What matched what, over all images and objects of all sizes.

    Crowds, and what lies on them are ignored.

    Attributes:
        rows: (D,) positions in the results; of a class and image at most the best that count, 100
            where not asked for more.
        matched: (D, T) bool, whether it matches an object, at T overlaps.
        ignored: (D, T) bool, whether it counts as neither right nor false.
        truth_scores: (G,) score of the detection that matches an object at the first overlap; -1
            where missed.
        truth_ignored: (G,) bool, crowds.
    """

    rows: NDArray[np.int64]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    truth_scores: NDArray[np.float64]
    truth_ignored: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class CocoMetrics:
    """How good detections are.

    Fractions 0 to 1; -1, as in pycocotools, where the truth has no such object.

    Attributes:
        numbers: the 12 of `NUMBERS`.
        class_names: K names, in ascending order of the category ids.
        precision: (T, R, K, A) at the overlaps `OVERLAPS`, recalls `RECALLS`, classes, sizes
            `AREAS`; 100 detections an image.
        recall: (T, K, A) the highest reached.
        matches: what matched what.
        count: detections of a class in an image of which `counted` and `matches` are; 100 or more.
        counted: the numbers of `COUNTED`, of so many detections.
    """

    numbers: dict[str, float]
    class_names: tuple[str, ...]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    matches: Matches
    count: int
    counted: dict[str, float]

    @property
    def counts_more(self) -> bool:
        """Whether more detections count than for COCO's own numbers."""
        return self.count > STANDARD_COUNT

    @property
    def class_ap(self) -> dict[str, float]:
        """Return AP of every class that the annotations have objects of."""
        values = {name: self.ap_of(k) for k, name in enumerate(self.class_names)}
        return {name: value for name, value in values.items() if value > -1}

    def ap_of(self, k: int, overlap: float | None = None, area: str = "all") -> float:
        """Return AP of one class; -1 where it has no such object.

        Args:
            k: position in `class_names`.
            overlap: one of `OVERLAPS`; None: the mean over all.
            area: one of `AREAS`.
        """
        return _mean(self._at(self.precision, overlap)[..., k, AREAS.index(area)])

    def recall_of(self, k: int) -> float:
        """Return average recall of class number `k`; -1 where it has no object."""
        return _mean(self.recall[:, k, 0])

    def ap_at(self, overlap: float | None = None, area: str = "all") -> float:
        """Return the mean over the classes of `ap_of`."""
        return _mean(self._at(self.precision, overlap)[..., AREAS.index(area)])

    def curve(self, overlap: float | None = None, k: int | None = None) -> NDArray[np.float64]:
        """Return (R,) precision at `RECALLS`; NaN where there are no objects.

        Args:
            overlap: one of `OVERLAPS`; None: the mean over all.
            k: position in `class_names`; None: the mean over the classes with objects.
        """
        chosen = self._at(self.precision, overlap)[..., 0]
        if k is not None:
            chosen = chosen[:, :, [k]]
        known = np.where(chosen > -1, chosen, np.nan)
        counts = np.sum(~np.isnan(known), axis=(0, 2))
        return np.where(counts > 0, np.nansum(known, axis=(0, 2)) / np.maximum(counts, 1), np.nan)

    @staticmethod
    def _at(values: NDArray[np.float64], overlap: float | None) -> NDArray[np.float64]:
        if overlap is None:
            return values
        return values[[int(np.argmin(np.abs(np.array(OVERLAPS) - overlap)))]]


def evaluate(
    annotations: Annotations | Path,
    results: Results | Sequence[dict[str, Any]],
    count: int = STANDARD_COUNT,
) -> CocoMetrics:
    """Compute the COCO metrics of detections.

    Args:
        annotations: the truth, or its file.
        results: of these images; `Results`, or rows as in a COCO results file.
        count: detections of a class in an image, the best, of which `CocoMetrics.counted` is;
            `CocoMetrics.numbers` are COCO's own, of 100, whatever it is.

    Raises:
        InputError: the annotations or rows cannot be read or do not fit each other.
        ToodError: a count below 100.
    """
    check_count(count)
    truth = annotations if isinstance(annotations, Annotations) else read_annotations(annotations)
    results = results if isinstance(results, Results) else results_from_rows(results, truth)
    total = _new_eval(_params(count), truth)
    collected = _Collected(len(truth.categories) * len(total.params.areaRng))
    for chunk, start, truth_start in _match_chunks(truth, results, _params(count)):
        collected.add(chunk, start, truth_start)
    with contextlib.redirect_stdout(io.StringIO()):
        total.evalImgs = [entry for column in collected.columns for entry in column]
        total._paramsEval = total.params
        total.accumulate()
        total.summarize()
    numbers = dict(zip(NUMBERS, np.asarray(total.stats).tolist(), strict=True))
    names = tuple(truth.categories.values())
    precision, recall = total.eval["precision"], total.eval["recall"]
    standard = STANDARD_COUNTS.index(STANDARD_COUNT)
    return CocoMetrics(
        numbers,
        names,
        precision[..., standard],
        recall[..., standard],
        collected.matches(truth),
        count,
        _counted(precision[..., -1], recall[..., -1]),
    )


def check_count(count: int) -> int:
    """Return how many detections of a class in an image count.

    Raises:
        ToodError: fewer than COCO's own numbers count.
    """
    if count < STANDARD_COUNT:
        raise ToodError(
            f"the count of detections is {count}; expected {STANDARD_COUNT}, which COCO's numbers "
            "count, or more"
        )
    return count


def _params(count: int) -> Params:
    """Return pycocotools's settings; more detections than it counts are one more column."""
    params = Params("bbox")
    params.maxDets = [*STANDARD_COUNTS, *([count] if count > STANDARD_COUNT else [])]
    return params


def _counted(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """Return the numbers of `COUNTED`.

    Args:
        precision: (T, R, K, A), as of `CocoMetrics`.
        recall: (T, K, A).
    """
    at_overlaps = (precision[[OVERLAPS.index(overlap)], ..., 0] for overlap in (0.5, 0.75))
    by_size = (precision[..., area] for area in range(1, len(AREAS)))
    recalls = (recall[..., area] for area in range(len(AREAS)))
    parts = (precision[..., 0], *at_overlaps, *by_size, *recalls)
    return dict(zip(COUNTED, map(_mean, parts), strict=True))


def match(
    truth: Annotations, results: Results, overlap: float = 0.5, count: int = STANDARD_COUNT
) -> Matches:
    """Return what matches what at one overlap: a tenth of the work of `evaluate`.

    Args:
        truth: the annotations.
        results: the detections.
        overlap: IoU from which a detection matches an object of its class.
        count: detections of a class in an image, the best, that are matched.
    """
    params = _params(count)
    params.iouThrs = np.array([overlap])
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    collected = _Collected(len(truth.categories))
    for chunk, start, truth_start in _match_chunks(truth, results, params):
        collected.add(chunk, start, truth_start)
    return collected.matches(truth)


class _Collected:
    """Keeps what is needed of the matched images: entries to accumulate, and the matches."""

    def __init__(self, columns: int) -> None:
        self.columns: list[list[dict[str, Any] | None]] = [[] for _ in range(columns)]
        self.rows: list[NDArray[np.int64]] = []
        self.matched: list[NDArray[np.bool_]] = []
        self.ignored: list[NDArray[np.bool_]] = []
        self.truths: list[tuple[int, float, bool]] = []
        self.overlaps = 1

    def add(self, chunk: Any, start: int, truth_start: int) -> None:
        """Take in a chunk.

        Args:
            chunk: pycocotools's evaluation of some images.
            start: position of its first detection among all.
            truth_start: position of its first object among all.
        """
        images, sizes = len(chunk.params.imgIds), len(chunk.params.areaRng)
        self.overlaps = len(chunk.params.iouThrs)
        for column, kept in enumerate(self.columns):
            entries = chunk.evalImgs[column * images : (column + 1) * images]
            kept.extend(_compact(entry) for entry in entries)
            for entry in entries if column % sizes == 0 else ():
                if entry is not None:
                    self._add_matches(entry, start, truth_start)

    def _add_matches(self, entry: dict[str, Any], start: int, truth_start: int) -> None:
        self.rows.append(np.array(entry["dtIds"], np.int64) - 1 + start)
        self.matched.append((entry["dtMatches"] > 0).T)
        self.ignored.append(entry["dtIgnore"].T)
        scores = dict(zip(entry["dtIds"], entry["dtScores"], strict=True))
        matched = (scores.get(int(match), -1.0) for match in entry["gtMatches"][0])
        positions = (key - 1 + truth_start for key in entry["gtIds"])
        self.truths.extend(zip(positions, matched, map(bool, entry["gtIgnore"]), strict=True))

    def matches(self, truth: Annotations) -> Matches:
        """Return the matches of all chunks together."""
        scores, ignored = np.full(len(truth.boxes), -1.0), np.zeros(len(truth.boxes), bool)
        for position, score, ignore in self.truths:
            scores[position], ignored[position] = score, ignore
        none = np.zeros((0, self.overlaps), bool)
        rows = np.concatenate([np.zeros(0, np.int64), *self.rows])
        return Matches(
            rows,
            np.concatenate([none, *self.matched]),
            np.concatenate([none, *self.ignored]),
            scores,
            ignored,
        )


def _compact(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what `COCOeval.accumulate` reads of an entry, in a tenth of the memory."""
    if entry is None:
        return None
    values = {
        "dtScores": np.array(entry["dtScores"], np.float64),
        "dtMatches": entry["dtMatches"] > 0,
    }
    return values | {"dtIgnore": entry["dtIgnore"], "gtIgnore": np.array(entry["gtIgnore"], bool)}


def _match_chunks(
    truth: Annotations, results: Results, params: Params
) -> Iterator[tuple[Any, int, int]]:
    """Match some images at a time.

    Yields the chunks, each with the positions at which their detections and objects begin.
    """
    ids = list(truth.images)
    for first in range(0, len(ids), CHUNK_IMAGES):
        chunk_ids = ids[first : first + CHUNK_IMAGES]
        objects, detections = (
            table.span(chunk_ids[0], chunk_ids[-1]) for table in (truth.boxes, results)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            chunk = _new_eval(params, truth, chunk_ids)
            chunk.cocoGt = _coco(truth, chunk_ids, _truth_rows(truth, objects))
            chunk.cocoDt = _coco(truth, chunk_ids, _rows(results, detections))
            chunk.evaluate()
        yield chunk, detections.start, objects.start


def _new_eval(params: Params, truth: Annotations, image_ids: Sequence[int] | None = None) -> Any:
    result: Any = COCOeval(iouType="bbox")  # its type stubs leave out what is set and read here
    result.params = params
    params.imgIds, params.catIds = list(image_ids or truth.images), list(truth.categories)
    return result


def _coco(truth: Annotations, image_ids: Sequence[int], rows: list[dict[str, Any]]) -> Any:
    coco: Any = COCO()
    categories = [{"id": key, "name": name} for key, name in truth.categories.items()]
    coco.dataset = {
        "images": [{"id": key} for key in image_ids],
        "categories": categories,
        "annotations": rows,
    }
    coco.createIndex()
    return coco


def _truth_rows(truth: Annotations, span: slice) -> list[dict[str, Any]]:
    """Return annotations as pycocotools takes them.

    They are numbered from 1: an object with id 0 would count as never matched.
    """
    part = truth.boxes.pick(span)
    columns = (
        part.image_ids.tolist(),
        part.category_ids.tolist(),
        part.boxes_xywh.tolist(),
        part.areas.tolist(),
        part.crowd.tolist(),
    )
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (image, category, box, area, crowd) in enumerate(zip(*columns, strict=True), 1)
    ]


def _rows(results: Results, span: slice) -> list[dict[str, Any]]:
    part = results.pick(span)
    columns = (
        part.image_ids.tolist(),
        part.category_ids.tolist(),
        part.boxes_xywh.tolist(),
        part.scores.tolist(),
    )
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
        }
        for number, (image, category, box, score) in enumerate(zip(*columns, strict=True), 1)
    ]


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


CocoRows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Scoring:
    """What detections are compared with.

    Attributes:
        truth: the annotations, of the categories that a class stands for.
        category_ids: of every class; None for one that is left out.
    """

    truth: Annotations
    category_ids: Sequence[int | None]

    @classmethod
    def of(cls, truth: Annotations, class_names: Sequence[str], mapping: Path | None) -> Scoring:
        """Pair classes and categories by name, or as a mapping file says.

        Args:
            truth: the annotations.
            class_names: of the model, in order of its class numbers.
            mapping: as `map_categories` takes it.

        Raises:
            ToodError: they do not fit.
        """
        ids = map_categories(class_names, truth, mapping)
        return cls(truth.only([key for key in ids if key is not None]), ids)

    def rows(self, detections: Detections, image_id: int) -> CocoRows:
        """Return COCO results of one image."""
        scored = [number for number, key in enumerate(self.category_ids) if key is not None]
        chosen = detections[np.isin(detections.class_ids, scored)]
        return chosen.to_coco(image_id, [0 if key is None else key for key in self.category_ids])

    def metrics(self, rows: CocoRows) -> CocoMetrics | None:
        """Return COCO metrics.

        Return None where a row holds what is not a number: no metric can be computed of it.
        """
        if not all(np.isfinite((*row["bbox"], row["score"])).all() for row in rows):
            return None
        return evaluate(self.truth, rows)


def average_precision(metrics: CocoMetrics | None) -> float:
    """Return AP in points, 0 to 100; NaN where there is none."""
    if metrics is None or metrics.numbers["AP"] < 0:
        return float("nan")
    return 100 * metrics.numbers["AP"]
