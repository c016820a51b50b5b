"""What is in a data set and what is wrong with it, as tables: `tood-train --check-data`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.progress import track
from rich.table import Table

from tood_deploy.training.annotations import SMALLEST_PICTURE, Annotations
from tood_deploy.training.data import read_picture

SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)  # pixels: square root of a box's area
BAR = 30


def check_pictures(annotations: Annotations, progress: bool = False) -> None:
    """Decodes every picture; those that fail join the problems."""
    for record in track(annotations.records, "reading pictures", disable=not progress):
        if read_picture(record) is None:
            annotations.problems.add("picture unreadable or of another size than annotated", record.path.name)


def report(annotations: Annotations, title: str) -> RenderableType:
    """Counts, problems, and histograms of classes, box sizes, box shapes and picture shapes."""
    boxes = np.concatenate([record.boxes for record in annotations.records]) if annotations.records else np.zeros((0, 4), np.float32)
    labels = np.concatenate([record.labels for record in annotations.records]) if annotations.records else np.zeros(0, np.int64)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    without = sum(not len(record.boxes) for record in annotations.records)
    small = sum(min(record.size_hw) < SMALLEST_PICTURE for record in annotations.records)
    head = Table(title=f"{title}: {annotations.path}", show_header=False, title_justify="left")
    head.add_row("pictures that can be used", str(len(annotations.records)))
    head.add_row("  of these without boxes (not trained on)", str(without))
    head.add_row(f"  of these under {SMALLEST_PICTURE} pixels (not trained on)", str(small))
    head.add_row("boxes", str(len(boxes)))
    for line in annotations.problems.lines() or ["none"]:
        head.add_row("problem", line)
    shapes = Counter(f"{record.size_hw[1]} x {record.size_hw[0]}" for record in annotations.records)
    return Group(
        head,
        _histogram("class", {name: int((labels == k).sum()) for k, name in enumerate(annotations.class_names)}),
        _histogram("box side in pixels (root of the area)", _binned(np.sqrt(width * height), SIDES)),
        _histogram("box shape (width / height)", _binned(width / np.maximum(height, 1e-6), (0, 0.25, 0.5, 0.8, 1.25, 2, 4))),
        _histogram("picture size", dict(shapes.most_common(8))),
    )


def _binned(values: np.ndarray, edges: Sequence[float]) -> dict[str, int]:
    counts, _ = np.histogram(values, (*edges, np.inf))
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:g} and more"]
    return dict(zip(names, counts.tolist(), strict=True))


def _histogram(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, "count", "", box=None, pad_edge=False)
    most = max([*counts.values(), 1])
    for name, count in counts.items():
        table.add_row(name, str(count), "#" * round(BAR * count / most))
    return table
