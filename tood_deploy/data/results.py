"""Detections of a whole data set: a COCO results file, or its rows, in; arrays out, and back.

Knows no images and no metrics.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.coco import Annotations, Boxes, load_json, whole_number
from tood_deploy.errors import InputError
from tood_deploy.files import atomic_path

ROW_KEYS = {"image_id", "category_id", "bbox", "score"}
EXPECTED_ROW = "image_id, category_id, bbox (x, y, width, height) and score"
EXPECTED = f"COCO results: a list of objects with {EXPECTED_ROW}"
SHOWN_LETTERS = 80


@dataclass(frozen=True, eq=False)
class Results(Boxes):
    """Detected boxes.

    Attributes:
        scores: (N,) float64.
    """

    scores: NDArray[np.float64]


def read_results(path: Path, truth: Annotations) -> Results:
    """Read a COCO results file.

    Raises:
        InputError: not such a file, nothing in it, a value that is not a number, or an image or
            category that the annotations do not have.
    """
    rows = load_json(path, EXPECTED)
    if not isinstance(rows, list):
        keys = ", ".join(list(rows)[:6]) if isinstance(rows, dict) else ""
        given = f"an object with {keys}" if keys else f"a {type(rows).__name__}"
        raise InputError(
            f"{path}: not COCO results: found {given}; "
            f"expected a list of objects with {EXPECTED_ROW}"
        )
    if not rows:
        raise InputError(
            f"{path}: the list is empty, there is nothing to score; expected {EXPECTED}"
        )
    return results_from_rows(rows, truth, str(path))


def results_from_rows(
    rows: Sequence[Mapping[str, Any]], truth: Annotations, origin: str = "results"
) -> Results:
    """Return the detections of rows as they stand in a COCO results file.

    Args:
        rows: with `image_id`, `category_id`, `bbox` (x, y, width, height in pixels of the image)
            and `score`.
        truth: the annotations of the same images.
        origin: of the rows, for errors.

    Raises:
        InputError: as `read_results`.
    """
    wrong = next((position for position, row in enumerate(rows) if not _is_row(row)), None)
    if wrong is not None:
        raise InputError(
            f"{origin}: row {wrong} is {json.dumps(rows[wrong])[:SHOWN_LETTERS]}; "
            f"expected {EXPECTED_ROW}"
        )
    try:
        image_ids, category_ids = _ids(rows, "image_id"), _ids(rows, "category_id")
        values = np.array([(*row["bbox"], row["score"]) for row in rows], np.float64).reshape(-1, 5)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{origin}: a value is not a number ({error}); expected {EXPECTED_ROW} in each row"
        ) from error
    _check_finite(values, origin)
    _check_known(image_ids, truth.images, "image", origin, truth)
    _check_known(category_ids, truth.categories, "category", origin, truth)
    return Results(image_ids, category_ids, values[:, :4], values[:, 4]).by_image()


def empty_results() -> Results:
    """Return no detections at all."""
    return Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))


def write_results(path: Path, results: Results) -> None:
    """Write a COCO results file, a row a line, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    columns = (
        column.tolist()
        for column in (results.image_ids, results.category_ids, results.boxes_xywh, results.scores)
    )
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for position, (image, category, box, score) in enumerate(zip(*columns, strict=True)):
            row = {"image_id": image, "category_id": category, "bbox": box, "score": score}
            file.write(("[\n" if not position else ",\n") + json.dumps(row))
        file.write("\n]\n" if len(results) else "[]\n")


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not row.keys() >= ROW_KEYS:
        return False
    return isinstance(row["bbox"], list | tuple) and len(row["bbox"]) == 4


def _ids(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.int64]:
    """Return the ids of a column; texts of digits count as numbers, as in the annotations."""
    column = np.array([row[key] for row in rows])
    if column.dtype.kind == "i" and column.ndim == 1:  # the usual case, in a hundredth of the time
        return column.astype(np.int64)
    return np.array([whole_number(row[key]) for row in rows], np.int64)


def _check_finite(values: NDArray[np.float64], origin: str) -> None:
    """Refuse values that are no numbers: left out, they would look like missed objects."""
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise InputError(
            f"{origin}: {len(wrong)} of {len(values)} detections hold NaN or infinite values, "
            f"the first is row {wrong[0]}; expected numbers: the model or its precision is broken"
        )


def _check_known(
    ids: NDArray[np.int64], known: Collection[int], what: str, origin: str, truth: Annotations
) -> None:
    """Refuse ids that the annotations do not list.

    Args:
        ids: (N,) of the rows.
        known: ids that there are.
        what: they are ids of.
        origin: of the rows, for errors.
        truth: the annotations, for errors.
    """
    unknown = np.flatnonzero(~np.isin(ids, list(known)))
    if len(unknown):
        raise InputError(
            f"{origin}: {what} id {ids[unknown[0]]} (row {unknown[0]}, "
            f"one of {len(unknown)} such rows) "
            f"is not in {truth.path}, which has {len(known)}; "
            "expected results for these annotations"
        )
