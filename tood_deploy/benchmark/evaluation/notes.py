"""What a reader of an evaluation must know beside its numbers, a sentence for every note.

Annotations, images and metrics in; sentences out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tood_deploy.data.coco import Annotations
from tood_deploy.data.coco_metrics import CocoMetrics
from tood_deploy.data.images import image_paths
from tood_deploy.data.results import Results
from tood_deploy.reporter import printable


def size_notes(truth: Annotations, sizes_hw: Mapping[int, tuple[int, int]]) -> list[str]:
    """Return a note where images are not of the annotated size: boxes do not fit there."""
    wrong = [
        (key, size)
        for key, size in sizes_hw.items()
        if truth.images[key].size_hw not in (None, size)
    ]
    if not wrong:
        return []
    (key, (height, width)) = wrong[0]
    image = truth.images[key]
    annotated_hw = image.size_hw or (0, 0)
    return [
        f"{len(wrong)} of {len(sizes_hw)} images are not of the size that the annotations give, "
        f"so their boxes do not fit: {image.file_name} is {width} x {height}, "
        f"the annotations say {annotated_hw[1]} x {annotated_hw[0]}."
    ]


def unlisted_notes(truth: Annotations, files: Mapping[int, Path]) -> list[str]:
    """Return a note where the folders of the images hold others, which are not evaluated."""
    folders = {path.parent for path in files.values()}
    there = {path for folder in folders for path in image_paths(folder)}
    extra = sorted(there - set(files.values()))
    if not extra:
        return []
    return [
        f"{len(extra)} images beside the {len(files)} of {truth.path} are not in it "
        f"and were left out, such as {extra[0]}."
    ]


def _listed(names: Iterable[str]) -> str:
    """Return names with commas between them; a line end in one breaks no line."""
    return ", ".join(map(printable, names))


def category_notes(
    truth: Annotations, class_names: Sequence[str], category_ids: Sequence[int | None]
) -> list[str]:
    """Return notes on the classes and categories that a mapping leaves out of the score.

    Args:
        truth: the annotations.
        class_names: of the model.
        category_ids: of every class; None for one that is left out.
    """
    classes = [name for name, key in zip(class_names, category_ids, strict=True) if key is None]
    categories = [name for key, name in truth.categories.items() if key not in category_ids]
    notes = [f"Left out by the mapping: the model's {_listed(classes)}."] if classes else []
    if categories:
        notes.append(
            "Not scored, as no class of the model stands for them: "
            f"the annotations' {_listed(categories)}."
        )
    return notes


def metric_notes(truth: Annotations, results: Results, metrics: CocoMetrics) -> list[str]:
    """Return notes on what the metrics themselves show.

    Args:
        truth: the annotations.
        results: the detections.
        metrics: of the two.
    """
    notes = []
    if not len(results):
        notes.append("There are no detections at all: every AP is 0.")
    elif metrics.numbers["AP"] == 0:
        notes.append(
            "Not one detection is right: AP is 0. Are the categories, "
            "the image size and the colours those of the model?"
        )
    without = [name for name in metrics.class_names if name not in metrics.class_ap]
    if without:
        notes.append(
            "Classes without objects in the annotations have no AP and do not count in the mean: "
            f"{_listed(without)}."
        )
    crowded = _most_objects(truth)
    if crowded > metrics.count:
        notes.append(
            f"An image has {crowded} objects of one class, of which the {metrics.count} best "
            "detections count: recall and AP are lower than they look in the images; "
            "--count N counts more, beside COCO's own numbers."
        )
    return notes


def _most_objects(truth: Annotations) -> int:
    """Return the largest number of objects of one class in one image."""
    boxes = truth.boxes.pick(~truth.boxes.crowd)
    if not len(boxes):
        return 0
    pairs = np.stack([boxes.image_ids, boxes.category_ids])
    return int(np.unique(pairs, axis=1, return_counts=True)[1].max())
