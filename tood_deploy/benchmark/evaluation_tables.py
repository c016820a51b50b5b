"""The tables of an evaluation. AP and shares in percent, as papers give them."""

from __future__ import annotations

import numpy as np

from tood_deploy.benchmark.coco_ap import CocoMetrics
from tood_deploy.benchmark.evaluation import Evaluation
from tood_deploy.benchmark.report import Cell, Table
from tood_deploy.benchmark.thresholds import Cut

MEANINGS = {
    "AP": "overlaps 0.50 to 0.95, all sizes",
    "AP50": "overlap 0.50",
    "AP75": "overlap 0.75",
    "APs": "objects under 32 x 32 pixels",
    "APm": "32 x 32 to 96 x 96 pixels",
    "APl": "over 96 x 96 pixels",
    "AR1": "recall with 1 detection a picture",
    "AR10": "recall with 10",
    "AR100": "recall with 100",
    "ARs": "recall of objects under 32 x 32",
    "ARm": "recall of 32 x 32 to 96 x 96",
    "ARl": "recall of objects over 96 x 96",
}


def percent(value: float | None) -> float | None:
    """A fraction as a percentage; None for what does not exist (-1, as pycocotools has it)."""
    return None if value is None or value < 0 else 100 * value


def numbers_table(metrics: CocoMetrics) -> Table:
    """The 12 COCO numbers with what they mean."""
    rows = [(f"{name}: {MEANINGS[name]}", percent(value)) for name, value in metrics.numbers.items()]
    return Table(("", "%"), rows, "By pycocotools. A dash: the annotations have no such object.")


def class_table(evaluation: Evaluation) -> Table:
    """A row a class: objects, detections, AP, recall."""
    metrics, truth = evaluation.metrics, evaluation.truth
    objects = truth.boxes.category_ids[~truth.boxes.crowd]
    rows = []
    for k, (key, name) in enumerate(truth.categories.items()):
        counts: tuple[Cell, ...] = (int(np.sum(objects == key)), int(np.sum(evaluation.results.category_ids == key)))
        overlaps = (metrics.ap_of(k, overlap) for overlap in (None, 0.50, 0.75))
        sizes = (metrics.ap_of(k, area=area) for area in ("small", "medium", "large"))
        rows.append((name, *counts, *map(percent, (*overlaps, *sizes, metrics.recall_of(k)))))
    return Table(("class", "objects", "detections", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), rows)


def threshold_table(evaluation: Evaluation) -> Table:
    """A row a class, and one for all together: where F1 is highest."""
    thresholds = evaluation.thresholds
    rows = [_threshold_row(name, thresholds.best.get(name), thresholds.as_run.get(name)) for name in evaluation.metrics.class_names]
    if len(rows) > 1:
        rows.append(_threshold_row("all together", thresholds.together, None))
    note = (
        "Overlap 0.50 counts as found. conf and iou are for tood-infer; the last two columns keep the suppression threshold of this run. "
        "Lower thresholds were tried by suppressing this run's detections once more."
    )
    return Table(("class", "best conf", "best iou", "F1", "precision", "recall", "conf as run", "F1 as run"), rows, note)


def size_table(evaluation: Evaluation) -> Table:
    """AP of small, medium and large objects."""
    metrics, counts = evaluation.metrics, evaluation.size_counts()
    rows = [(area, counts[area], *(percent(metrics.ap_at(overlap, area)) for overlap in (None, 0.50, 0.75))) for area in counts]
    return Table(("size", "objects", "AP", "AP50", "AP75"), rows, "Small is under 32 x 32 pixels, large over 96 x 96, by COCO's areas.")


def calibration_table(evaluation: Evaluation) -> Table | None:
    """A row a filled bin of scores; None where scores are no probabilities."""
    found = evaluation.calibration
    if found is None:
        return None
    rows = [
        (f"{i / len(found.counts):.2f} to {(i + 1) / len(found.counts):.2f}", *map(float, values[:1]), int(values[3]), *values[1:3])
        for i, values in enumerate(zip(100 * found.scores, 100 * found.right50, 100 * found.right75, found.counts, strict=True))
        if values[3]
    ]
    return Table(
        ("score", "mean %", "detections", "right at 0.50 %", "right at 0.75 %"), [(*row[:3], *map(float, row[3:])) for row in rows]
    )


def _threshold_row(name: str, best: Cut | None, as_run: Cut | None) -> tuple[Cell, ...]:
    if best is None:
        return (name, *[None] * 7)
    iou = "as they are" if best.iou is None else f"{best.iou:.2f}"
    shares = tuple(map(percent, (best.f1, best.precision, best.recall)))
    own = (None, None) if as_run is None else (f"{as_run.conf:.3f}", percent(as_run.f1))
    return (name, f"{best.conf:.3f}", iou, *shares, *own)
