"""Detections of a whole data set: from a COCO results file or rows of one, and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.coco import Boxes, Truth, load_json
from tood_deploy.errors import InputError
from tood_deploy.files import atomic_path

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


def read_results(path: Path, truth: Truth) -> Results:
    """Reads a COCO results file.

    Raises:
        InputError: not such a file, nothing in it, a value that is not a number, or an image or category that the truth does not have.
    """
    rows = load_json(path, EXPECTED)
    if not isinstance(rows, list):
        found = (
            f"an object with {', '.join(list(rows)[:6])}"
            if isinstance(rows, dict)
            else f"a {type(rows).__name__}"
        )
        raise InputError(
            f"{path}: not COCO results: found {found}; expected a list of objects with {EXPECTED_ROW}"
        )
    if not rows:
        raise InputError(
            f"{path}: the list is empty, there is nothing to score; expected {EXPECTED}"
        )
    return results_from_rows(rows, truth, str(path))


def results_from_rows(
    rows: Sequence[dict[str, Any]], truth: Truth, origin: str = "results"
) -> Results:
    """Detections from rows with `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`; `origin` names them in errors.

    Raises:
        InputError: as `read_results`.
    """
    wrong = next((position for position, row in enumerate(rows) if not _is_row(row)), None)
    if wrong is not None:
        raise InputError(
            f"{origin}: row {wrong} is {json.dumps(rows[wrong])[:SHOWN_LETTERS]}; expected {EXPECTED_ROW}"
        )
    try:
        ids = np.array([(row["image_id"], row["category_id"]) for row in rows]).reshape(-1, 2)
        values = np.array([(*row["bbox"], row["score"]) for row in rows], np.float64).reshape(-1, 5)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{origin}: a value is not a number ({error}); expected {EXPECTED_ROW} in each row"
        ) from error
    _check_finite(values, origin)
    _check_known(ids[:, 0], truth.images, "image", origin, truth)
    _check_known(ids[:, 1], truth.categories, "category", origin, truth)
    return Results(
        ids[:, 0].astype(np.int64), ids[:, 1].astype(np.int64), values[:, :4], values[:, 4]
    ).by_image()


def empty_results() -> Results:
    """No detections at all."""
    return Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))


def write_results(path: Path, results: Results) -> None:
    """Writes a COCO results file, a row a line, whole or not at all.

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


def _is_row(row: Any) -> bool:
    known = isinstance(row, dict) and {"image_id", "category_id", "bbox", "score"} <= row.keys()
    return known and isinstance(row["bbox"], list | tuple) and len(row["bbox"]) == 4


def _check_finite(values: NDArray[np.float64], origin: str) -> None:
    """Values that are not numbers are told, not dropped: dropped, they would look like missed objects."""
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise InputError(
            f"{origin}: {len(wrong)} of {len(values)} detections hold NaN or infinite values, the first is row {wrong[0]}; "
            "expected numbers: the model or its precision is broken"
        )


def _check_known(
    ids: NDArray[Any], known: Collection[int], what: str, origin: str, truth: Truth
) -> None:
    unknown = np.flatnonzero(~np.isin(ids, list(known)))
    if len(unknown):
        raise InputError(
            f"{origin}: {what} id {ids[unknown[0]]} (row {unknown[0]}, one of {len(unknown)} such rows) is not in {truth.path}, "
            f"which has {len(known)}; expected results for these annotations"
        )
