"""Small data sets for the tests of evaluation, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tood_deploy.data.coco import Annotations, read_annotations

Box = Sequence[float]


def annotation(image_id: int, category_id: int, bbox: Box, **values: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), **values}


def result(image_id: int, category_id: int, bbox: Box, score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def coco(
    annotations: Sequence[dict[str, Any]], names: Sequence[str] = ("cat", "dog"), images: int = 3
) -> dict[str, Any]:
    """Annotations of images 1, 2, 3 ... of 64 x 48 pixels and categories 1, 2 ..."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 48, "width": 64}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations, 1)],
    }


def write_json(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def truth_of(folder: Path, annotations: Sequence[dict[str, Any]], **options: Any) -> Annotations:
    return read_annotations(write_json(folder / "truth.json", coco(annotations, **options)))


def random_rows(
    seed: int, images: int = 12, categories: int = 2
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return objects, some of them crowds, and detections.

    These are jittered copies, copies of the wrong class, boxes from nowhere, and have tied scores.
    """
    rng = np.random.default_rng(seed)
    annotations, rows = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            box = np.concatenate([rng.uniform(0, 30, 2), rng.uniform(4, 30, 2)])
            category = int(rng.integers(1, categories + 1))
            annotations.append(
                annotation(
                    image,
                    category,
                    box.tolist(),
                    iscrowd=int(rng.random() < 0.1),
                    area=float(box[2] * box[3]),
                )
            )
            for _ in range(rng.integers(0, 4)):
                jittered = (box + rng.normal(0, 2, 4)).tolist()
                rows.append(
                    result(
                        image,
                        category if rng.random() < 0.8 else 1,
                        jittered,
                        float(rng.integers(1, 20) / 20),
                    )
                )
        rows += [
            result(image, 1, rng.uniform(1, 30, 4).tolist(), float(rng.integers(1, 20) / 20))
            for _ in range(rng.integers(0, 3))
        ]
    return annotations, rows
