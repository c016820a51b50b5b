"""Learning curves and precision over recall as PNG. Needs matplotlib; knows no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
        scores.plot([row["epoch"] for row in evaluated], [row[name] for row in evaluated], marker=".", label=name)
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
