"""What is in a data set and what is wrong with it, as tables: `tood-train --check-data`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.progress import track
from rich.table import Table

from tood_deploy.data.coco import MIN_IMAGE_SIDE, Annotations
from tood_deploy.training.data import read_image

SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)  # pixels: square root of a box's area
BAR = 30


def check_images(annotations: Annotations, progress: bool = False) -> None:
    """Decodes every image; those that fail join the problems."""
    for record in track(annotations.records, "reading images", disable=not progress):
        if read_image(record) is None:
            annotations.problems.add(
                "image unreadable or of another size than annotated", record.path.name
            )


def report(annotations: Annotations, title: str) -> RenderableType:
    """Counts, problems, and histograms of classes, box sizes, box shapes and image shapes."""
    boxes = (
        np.concatenate([record.boxes for record in annotations.records])
        if annotations.records
        else np.zeros((0, 4), np.float32)
    )
    labels = (
        np.concatenate([record.labels for record in annotations.records])
        if annotations.records
        else np.zeros(0, np.int64)
    )
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    without = sum(not len(record.boxes) for record in annotations.records)
    small = sum(min(record.size_hw) < MIN_IMAGE_SIDE for record in annotations.records)
    head = Table(title=f"{title}: {annotations.path}", show_header=False, title_justify="left")
    head.add_row("images that can be used", str(len(annotations.records)))
    head.add_row("  of these without boxes (not trained on)", str(without))
    head.add_row(f"  of these under {MIN_IMAGE_SIDE} pixels (not trained on)", str(small))
    head.add_row("boxes", str(len(boxes)))
    for line in annotations.problems.lines() or ["none"]:
        head.add_row("problem", line)
    shapes = Counter(f"{record.size_hw[1]} x {record.size_hw[0]}" for record in annotations.records)
    return Group(
        head,
        _histogram(
            "class",
            {name: int((labels == k).sum()) for k, name in enumerate(annotations.class_names)},
        ),
        _histogram(
            "box side in pixels (root of the area)", _binned(np.sqrt(width * height), SIDES)
        ),
        _histogram(
            "box shape (width / height)",
            _binned(width / np.maximum(height, 1e-6), (0, 0.25, 0.5, 0.8, 1.25, 2, 4)),
        ),
        _histogram("image size", dict(shapes.most_common(8))),
    )


def _binned(values: np.ndarray, edges: Sequence[float]) -> dict[str, int]:
    counts, _ = np.histogram(values, (*edges, np.inf))
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [
        f"{edges[-1]:g} and more"
    ]
    return dict(zip(names, counts.tolist(), strict=True))


def _histogram(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, "count", "", box=None, pad_edge=False)
    most = max([*counts.values(), 1])
    for name, count in counts.items():
        table.add_row(name, str(count), "#" * round(BAR * count / most))
    return table


SHOWN = (0, 5, 9)  # of the overlaps 0.50, 0.55, ... 0.95


def plot_learning(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Losses and AP by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name, label in (("cls", "classes"), ("box", "boxes")):
        losses.plot(epochs, [row.get(name, np.nan) for row in history], label=label)
    losses.set(xlabel="epoch", ylabel="mean loss of the epoch", ylim=(0, None))
    losses.legend()
    evaluated = [row for row in history if "AP" in row]
    for name in ("AP", "AP50", "AP75"):
        scores.plot(
            [row["epoch"] for row in evaluated],
            [row[name] for row in evaluated],
            marker=".",
            label=name,
        )
    scores.set(xlabel="epoch", ylabel="on the validation set", ylim=(0, 1))
    scores.legend()
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_precision_recall(precision: NDArray[np.float64], path: Path) -> None:
    """Precision over recall.

    Args:
        precision: (T, 101) at overlaps of 0.50 to 0.95, as `Evaluation.precision`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    recall = np.linspace(0, 1, precision.shape[1])
    for row in SHOWN:
        axes.plot(recall, precision[row], label=f"IoU {0.5 + 0.05 * row:.2f}")
    axes.plot(recall, precision.mean(axis=0), "k--", label="mean of 0.50 to 0.95")
    axes.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
