"""The figures of an evaluation: metrics, curves and calibration in, images for the page out.

Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from tood_deploy.benchmark.evaluation.analysis import BINS, Calibration, F1Curve
from tood_deploy.benchmark.html_report import SERIES, embed_figure, new_figure
from tood_deploy.data.coco_metrics import AREAS, OVERLAPS, RECALLS, CocoMetrics

SHOWN_OVERLAPS = (0.50, 0.60, 0.70, 0.75, 0.80, 0.90)
SMALL = (3.0, 2.1)  # width and height in inches
GREY = SERIES[-1]


def precision_recall(metrics: CocoMetrics) -> Markup:
    """Draw precision over recall, the mean of the classes, at several overlaps and over all."""
    figure, axes = new_figure(height=4.4)
    for overlap in SHOWN_OVERLAPS:
        axes.plot(
            RECALLS,
            metrics.curve(overlap),
            label=f"IoU {overlap:.2f}: AP {100 * metrics.ap_at(overlap):.1f}",
            linewidth=1.4,
        )
    axes.plot(
        RECALLS,
        metrics.curve(),
        label=f"0.50 to 0.95: AP {100 * metrics.ap_at():.1f}",
        linewidth=2.4,
        color=GREY,
    )
    _unit_axes(axes, "recall", "precision")
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2)
    return embed_figure(figure, "precision over recall at several overlaps, mean of the classes")


def class_precision_recall(metrics: CocoMetrics, k: int) -> Markup:
    """Draw precision over recall of class number `k`, in a small figure.

    The line is solid at IoU 0.50, dashed at 0.75, dotted at 0.90.
    """
    figure, axes = new_figure(*SMALL)
    for overlap, style in ((0.50, "-"), (0.75, "--"), (0.90, ":")):
        axes.plot(RECALLS, metrics.curve(overlap, k), style, color=SERIES[0], linewidth=1.4)
    _unit_axes(axes, "recall", "precision")
    return embed_figure(figure, f"precision over recall of class {metrics.class_names[k]}")


def ap_by_size(metrics: CocoMetrics, counts: Mapping[str, int]) -> Markup:
    """Draw AP of all, small, medium and large objects; the number of objects below each."""
    figure, axes = new_figure(height=3.0)
    for position, (overlap, name) in enumerate(((None, "AP"), (0.50, "AP50"), (0.75, "AP75"))):
        values = [100 * max(metrics.ap_at(overlap, area), 0.0) for area in AREAS]
        bars = axes.bar(
            np.arange(len(AREAS)) + 0.27 * (position - 1),
            values,
            0.25,
            label=name,
            color=SERIES[position],
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(AREAS)), [f"{area}\n{counts[area]} objects" for area in AREAS])
    axes.set_ylim(0, 108)
    axes.grid(visible=False, axis="x")
    axes.legend(ncols=3, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return embed_figure(figure, "AP by size of the objects")


def ap_by_overlap(metrics: CocoMetrics) -> Markup:
    """Draw AP over the overlap that counts as right."""
    figure, axes = new_figure(height=2.7)
    values = [100 * metrics.ap_at(overlap) for overlap in OVERLAPS]
    axes.plot(OVERLAPS, values, "o-", color=SERIES[0])
    axes.set_ylim(0, 105)
    axes.set_xlabel("overlap (IoU) that counts as right")
    axes.set_ylabel("AP")
    return embed_figure(figure, "AP over the overlap that counts as right")


def reliability(calibration: Calibration) -> Markup:
    """Draw the share of right detections over the score, and how many detections there are."""
    figure, axes = new_figure(height=4.2)
    counts = axes.twinx()
    middles = (np.arange(BINS) + 0.5) / BINS
    counts.bar(middles, calibration.counts, 0.9 / BINS, color=GREY, alpha=0.35)
    counts.set_yscale("symlog", linthresh=1)
    counts.yaxis.set_major_formatter("{x:g}")
    counts.set_ylabel("detections (grey, logarithmic)")
    counts.spines[["top", "right"]].set_visible(False)
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(
        [0, 1], [0, 1], ":", color=GREY, linewidth=1.4, label="score = share of right detections"
    )
    for values, name, colour in (
        (calibration.right50, "IoU 0.50", SERIES[0]),
        (calibration.right75, "IoU 0.75", SERIES[1]),
    ):
        axes.plot(
            calibration.scores, values, "o-", markersize=4, color=colour, label=f"right at {name}"
        )
    _unit_axes(axes, "score", "share that is right")
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2)
    return embed_figure(figure, "share of right detections over their score")


def f1_over_score(curves: Mapping[str, F1Curve]) -> Markup:
    """Draw F1 over the score threshold, a line a class."""
    figure, axes = new_figure()
    for name, curve in curves.items():
        label = f" {name}" if name.startswith("_") else name  # matplotlib lists no such name
        axes.step(curve.scores, curve.f1, where="post", label=label, linewidth=1.4)
    _unit_axes(axes, "keep detections from this score on", "F1")
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=3)
    return embed_figure(figure, "F1 over the score threshold")


def _unit_axes(axes: Axes, x_name: str, y_name: str) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
