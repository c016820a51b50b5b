"""What is in a data set and what is wrong with it, as tables, and the curves of a run, as images.

Annotated images or a run's history in; tables for a terminal, or PNG files, out. Knows no torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table

from tood_deploy.reporter import Reporter, printable
from tood_deploy.training.config import LOSS_TERMS
from tood_deploy.training.records import MIN_IMAGE_SIDE, LabelledImages, read_image

SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)  # pixels: square root of a box's area
SHAPES = (0, 0.25, 0.5, 0.8, 1.25, 2, 4)  # width by height of a box
SHOWN_IMAGE_SIZES = 8
SHOWN_OVERLAPS = (0, 5, 9)  # positions among 0.50, 0.55, ... 0.95
BAR = 30  # characters of the longest


def check_images(labelled: LabelledImages, reporter: Reporter) -> None:
    """Decode every image; those that fail join the problems."""
    for record in reporter.track(labelled.records, "reading images"):
        if read_image(record) is None:
            labelled.problems.add(
                "image unreadable or of another size than annotated", record.path.name
            )


def data_report(labelled: LabelledImages, title: str) -> RenderableType:
    """Return counts, problems, and histograms of classes, box sizes, box shapes and image sizes."""
    records = labelled.records
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes for r in records)])
    labels = np.concatenate([np.zeros(0, np.int64), *(r.labels for r in records)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    classes = {name: int((labels == k).sum()) for k, name in enumerate(labelled.class_names)}
    shapes = Counter(f"{record.size_hw[1]} x {record.size_hw[0]}" for record in records)
    return Group(
        _overview(labelled, title, len(boxes)),
        _histogram("class", classes),
        _histogram(
            "box side in pixels (root of the area)", _binned(np.sqrt(width * height), SIDES)
        ),
        _histogram("box shape (width / height)", _binned(width / np.maximum(height, 1e-6), SHAPES)),
        _histogram("image size", dict(shapes.most_common(SHOWN_IMAGE_SIZES))),
    )


def _overview(labelled: LabelledImages, title: str, boxes: int) -> Table:
    records = labelled.records
    without = sum(not len(record.boxes) for record in records)
    small = sum(min(record.size_hw) < MIN_IMAGE_SIDE for record in records)
    table = Table(title=f"{title}: {labelled.path}", show_header=False, title_justify="left")
    table.add_row("images that can be used", str(len(records)))
    table.add_row("  of these without boxes (not trained on)", str(without))
    table.add_row(f"  of these under {MIN_IMAGE_SIDE} pixels (not trained on)", str(small))
    table.add_row("boxes", str(boxes))
    for line in labelled.problems.lines() or ["none"]:
        table.add_row("problem", printable(line))
    return table


def _binned(values: np.ndarray, edges: Sequence[float]) -> dict[str, int]:
    counts, _ = np.histogram(values, (*edges, np.inf))
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [
        f"{edges[-1]:g} and more"
    ]
    return dict(zip(names, counts.tolist(), strict=True))


def _histogram(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, "count", "", box=None, pad_edge=False)
    longest = max([*counts.values(), 1])
    for name, count in counts.items():
        table.add_row(printable(name), str(count), "#" * round(BAR * count / longest))
    return table


def plot_learning(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw losses and AP by epoch into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name, label in LOSS_TERMS.items():
        if any(name in row for row in history):
            losses.plot(epochs, [row.get(name, np.nan) for row in history], label=label)
    losses.set(xlabel="epoch", ylabel="mean loss of the epoch", ylim=(0, None))
    losses.legend()
    evaluated = [row for row in history if "AP" in row]
    for name in ("AP", "AP50", "AP75"):
        values = [row[name] for row in evaluated]
        scores.plot([row["epoch"] for row in evaluated], values, marker=".", label=name)
    scores.set(xlabel="epoch", ylabel="on the validation set", ylim=(0, 1))
    scores.legend()
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_precision_recall(precision: NDArray[np.float64], path: Path) -> None:
    """Draw precision over recall.

    Args:
        precision: (T, 101) at overlaps of 0.50 to 0.95, as `Evaluation.precision`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    recall = np.linspace(0, 1, precision.shape[1])
    for row in SHOWN_OVERLAPS:
        axes.plot(recall, precision[row], label=f"IoU {0.5 + 0.05 * row:.2f}")
    axes.plot(recall, precision.mean(axis=0), "k--", label="mean of 0.50 to 0.95")
    axes.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
