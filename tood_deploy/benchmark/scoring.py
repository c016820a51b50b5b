"""Detections against annotations: the category of every class, COCO rows, AP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tood_deploy.benchmark.categories import map_categories
from tood_deploy.benchmark.coco_ap import CocoMetrics, evaluate
from tood_deploy.benchmark.truth import Truth
from tood_deploy.detections import Detections

CocoRows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Scoring:
    """What detections are compared with.

    Attributes:
        truth: the annotations, of the categories that a class stands for.
        category_ids: of every class; None for one that is left out.
    """

    truth: Truth
    category_ids: Sequence[int | None]

    @classmethod
    def of(cls, truth: Truth, class_names: Sequence[str], mapping: Path | None) -> Scoring:
        """Pairs classes and categories by name, or as a mapping file says.

        Raises:
            ToodError: they do not fit.
        """
        ids = map_categories(class_names, truth, mapping)
        return cls(truth.only([key for key in ids if key is not None]), ids)

    def rows(self, found: Detections, image_id: int) -> CocoRows:
        """COCO results of one picture."""
        scored = [number for number, key in enumerate(self.category_ids) if key is not None]
        chosen = found[np.isin(found.class_ids, scored)]
        return chosen.to_coco(image_id, [0 if key is None else key for key in self.category_ids])

    def metrics(self, rows: CocoRows) -> CocoMetrics | None:
        """COCO metrics; None where a row holds what is not a number, which no metric can be computed of."""
        if not all(np.isfinite((*row["bbox"], row["score"])).all() for row in rows):
            return None
        return evaluate(self.truth, rows)


def average_precision(metrics: CocoMetrics | None) -> float:
    """AP in points, 0 to 100; NaN where there is none."""
    return float("nan") if metrics is None or metrics.numbers["AP"] < 0 else 100 * metrics.numbers["AP"]
