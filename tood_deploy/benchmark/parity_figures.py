"""Figures of a comparison: deviation by stage, and scores of both runs."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tood_deploy.benchmark.figure import SERIES, new_figure
from tood_deploy.benchmark.stage_deviations import StageDeviations

SMALLEST_SHOWN, LARGEST_SHOWN = 1e-9, 1e3


def waterfall_figure(carried: StageDeviations, alone: StageDeviations | None) -> Figure:
    """Largest relative deviation of every stage, as deployed and alone, on a logarithmic axis; first stage on top."""
    figure, axes = new_figure(6.4, 4.2)
    settings = {"as deployed": carried.waterfall()} | ({} if alone is None else {"alone": alone.waterfall()})
    names = list(dict.fromkeys(name for found in reversed(settings.values()) for name in found))  # boxes that are NaN have no pairs
    height = 0.8 / len(settings)
    for i, (label, waterfall) in enumerate(settings.items()):
        values = [min(waterfall[name].relative_l2, LARGEST_SHOWN) if name in waterfall else 0.0 for name in names]
        axes.barh(
            np.arange(len(names)) + (i - (len(settings) - 1) / 2) * height,
            values,
            height,
            left=SMALLEST_SHOWN,
            label=label,
            color=SERIES[i],
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("L2 norm of the difference, relative to the reference")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def scores_figure(scores: NDArray[np.float32], name: str) -> Figure:
    """Score of every box in the reference and in the artefact; a box that only one has lies on the other's axis."""
    figure, axes = new_figure(4.6, 4.4)
    both = (scores > 0).all(axis=1)
    axes.plot([0, 1], [0, 1], color=SERIES[7], linewidth=0.8)
    axes.scatter(*scores[both].T, s=6, alpha=0.5, label=f"both ({both.sum()})", linewidths=0, rasterized=True)
    axes.scatter(*scores[~both].T, s=14, marker="x", color=SERIES[3], label=f"one only ({(~both).sum()})", rasterized=True)
    axes.set(xlabel="score in PyTorch", ylabel=f"score in {name}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="upper left")
    return figure
