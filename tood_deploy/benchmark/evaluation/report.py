"""Writes an evaluation: report.html (all of it, self-contained), report.md, report.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from tood_deploy.benchmark.evaluation.analysis import (
    BINS,
    Calibration,
    Cut,
    F1Curve,
    MistakeFinder,
    Mistakes,
)
from tood_deploy.benchmark.evaluation.evaluate import Evaluation
from tood_deploy.benchmark.html_report import (
    SERIES,
    Card,
    Cell,
    Section,
    Table,
    Tile,
    embed_figure,
    fold,
    gallery,
    image,
    new_figure,
    pair,
    paragraph,
    render_page,
    show,
    write_json,
    write_markdown,
)
from tood_deploy.data.coco_metrics import AREAS, OVERLAPS, RECALLS, CocoMetrics
from tood_deploy.data.images import decode_image

SHOWN_OVERLAPS = (0.50, 0.60, 0.70, 0.75, 0.80, 0.90)
SMALL = (3.0, 2.1)
GREY = SERIES[-1]


def precision_recall(metrics: CocoMetrics) -> Markup:
    """Precision over recall, the mean of the classes, at several overlaps and over all."""
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
    """Precision over recall of one class, small: solid at IoU 0.50, dashed at 0.75, dotted at 0.90."""
    figure, axes = new_figure(*SMALL)
    for overlap, style in ((0.50, "-"), (0.75, "--"), (0.90, ":")):
        axes.plot(RECALLS, metrics.curve(overlap, k), style, color=SERIES[0], linewidth=1.4)
    _unit_axes(axes, "recall", "precision")
    return embed_figure(figure, f"precision over recall of class {metrics.class_names[k]}")


def ap_by_size(metrics: CocoMetrics, counts: dict[str, int]) -> Markup:
    """AP of all, small, medium and large objects; the number of objects below each."""
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
    """AP over the overlap that counts as found."""
    figure, axes = new_figure(height=2.7)
    values = [100 * metrics.ap_at(overlap) for overlap in OVERLAPS]
    axes.plot(OVERLAPS, values, "o-", color=SERIES[0])
    axes.set_ylim(0, 105)
    axes.set_xlabel("overlap (IoU) that counts as found")
    axes.set_ylabel("AP")
    return embed_figure(figure, "AP over the overlap that counts as found")


def reliability(calibration: Calibration) -> Markup:
    """Share of right detections over the score, and how many detections there are."""
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


def f1_over_score(curves: dict[str, F1Curve]) -> Markup:
    """F1 over the score threshold, a line a class."""
    figure, axes = new_figure()
    for name, curve in curves.items():
        axes.step(curve.scores, curve.f1, where="post", label=name, linewidth=1.4)
    _unit_axes(axes, "keep detections from this score on", "F1")
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=3)
    return embed_figure(figure, "F1 over the score threshold")


def _unit_axes(axes: Axes, x_name: str, y_name: str) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)


MEANINGS = {
    "AP": "overlaps 0.50 to 0.95, all sizes",
    "AP50": "overlap 0.50",
    "AP75": "overlap 0.75",
    "APs": "objects under 32 x 32 pixels",
    "APm": "32 x 32 to 96 x 96 pixels",
    "APl": "over 96 x 96 pixels",
    "AR1": "recall with 1 detection an image",
    "AR10": "recall with 10",
    "AR100": "recall with 100",
    "ARs": "recall of objects under 32 x 32",
    "ARm": "recall of 32 x 32 to 96 x 96",
    "ARl": "recall of objects over 96 x 96",
}


def percent(value: float | None) -> float | None:
    """A fraction as a percentage; None for what does not exist (-1, as pycocotools has it)."""
    return None if value is None or value < 0 else 100 * value


def numbers_table(metrics: CocoMetrics) -> Table:
    """The 12 COCO numbers with what they mean."""
    rows = [
        (f"{name}: {MEANINGS[name]}", percent(value)) for name, value in metrics.numbers.items()
    ]
    return Table(("", "%"), rows, "By pycocotools. A dash: the annotations have no such object.")


def class_table(evaluation: Evaluation) -> Table:
    """A row a class: objects, detections, AP, recall."""
    metrics, truth = evaluation.metrics, evaluation.truth
    objects = truth.boxes.category_ids[~truth.boxes.crowd]
    rows = []
    for k, (key, name) in enumerate(truth.categories.items()):
        counts: tuple[Cell, ...] = (
            int(np.sum(objects == key)),
            int(np.sum(evaluation.results.category_ids == key)),
        )
        overlaps = (metrics.ap_of(k, overlap) for overlap in (None, 0.50, 0.75))
        sizes = (metrics.ap_of(k, area=area) for area in ("small", "medium", "large"))
        rows.append((name, *counts, *map(percent, (*overlaps, *sizes, metrics.recall_of(k)))))
    return Table(
        ("class", "objects", "detections", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), rows
    )


def threshold_table(evaluation: Evaluation) -> Table:
    """A row a class, and one for all together: where F1 is highest."""
    thresholds = evaluation.thresholds
    rows = [
        _threshold_row(name, thresholds.best.get(name), thresholds.as_run.get(name))
        for name in evaluation.metrics.class_names
    ]
    if len(rows) > 1:
        rows.append(_threshold_row("all together", thresholds.together, None))
    note = (
        "Overlap 0.50 counts as found. conf and iou are for tood-infer; the last two columns keep the suppression threshold of this run. "
        "Lower thresholds were tried by suppressing this run's detections once more."
    )
    return Table(
        ("class", "best conf", "best iou", "F1", "precision", "recall", "conf as run", "F1 as run"),
        rows,
        note,
    )


def size_table(evaluation: Evaluation) -> Table:
    """AP of small, medium and large objects."""
    metrics, counts = evaluation.metrics, evaluation.size_counts()
    rows = [
        (
            area,
            counts[area],
            *(percent(metrics.ap_at(overlap, area)) for overlap in (None, 0.50, 0.75)),
        )
        for area in counts
    ]
    return Table(
        ("size", "objects", "AP", "AP50", "AP75"),
        rows,
        "Small is under 32 x 32 pixels, large over 96 x 96, by COCO's areas.",
    )


def calibration_table(evaluation: Evaluation) -> Table | None:
    """A row a filled bin of scores; None where scores are no probabilities."""
    found = evaluation.calibration
    if found is None:
        return None
    rows = [
        (
            f"{i / len(found.counts):.2f} to {(i + 1) / len(found.counts):.2f}",
            *map(float, values[:1]),
            int(values[3]),
            *values[1:3],
        )
        for i, values in enumerate(
            zip(
                100 * found.scores,
                100 * found.right50,
                100 * found.right75,
                found.counts,
                strict=True,
            )
        )
        if values[3]
    ]
    return Table(
        ("score", "mean %", "detections", "right at 0.50 %", "right at 0.75 %"),
        [(*row[:3], *map(float, row[3:])) for row in rows],
    )


def _threshold_row(name: str, best: Cut | None, as_run: Cut | None) -> tuple[Cell, ...]:
    if best is None:
        return (name, *[None] * 7)
    iou = "as they are" if best.iou is None else f"{best.iou:.2f}"
    shares = tuple(map(percent, (best.f1, best.precision, best.recall)))
    own = (None, None) if as_run is None else (f"{as_run.conf:.3f}", percent(as_run.f1))
    return (name, f"{best.conf:.3f}", iou, *shares, *own)


HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"
SHOWN_IMAGES = 8
OPEN_CLASSES = 12  # more small figures than this are folded away
LEGEND_CLASSES = 8


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes the three files.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_json(folder / JSON, evaluation_values(evaluation))
    write_markdown(folder / MARKDOWN, _markdown(evaluation))
    tiles = [
        Tile(name, show(percent(evaluation.metrics.numbers[name])), remark)
        for name, remark in _TILES.items()
    ]
    together = evaluation.thresholds.together
    if together is not None:
        tiles.append(
            Tile(
                "best F1",
                show(percent(together.f1)),
                f"of all classes, at conf {together.conf:.2f}",
            )
        )
    lead = f"{len(evaluation.results)} detections against {len(evaluation.truth.boxes)} objects in {len(evaluation.truth.images)} images."
    extras = {"lead": lead, "tiles": tiles, "facts": evaluation.facts, "warnings": evaluation.notes}
    render_page(f"Evaluation of {evaluation.name}", _sections(evaluation), folder / HTML, **extras)


_TILES = {
    "AP": "overlaps 0.50 to 0.95",
    "AP50": "overlap 0.50",
    "AP75": "overlap 0.75",
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "AR100": "recall",
}


def evaluation_values(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers as plain values. Fractions 0 to 1; -1, as in pycocotools, where there is no such object."""
    metrics, thresholds, calibration = (
        evaluation.metrics,
        evaluation.thresholds,
        evaluation.calibration,
    )
    curves = {f"{overlap:.2f}": metrics.curve(overlap) for overlap in OVERLAPS}
    names = metrics.class_names
    return {
        "name": evaluation.name,
        "facts": dict(evaluation.facts),
        "notes": list(evaluation.notes),
        "numbers": metrics.numbers,
        "classes": {name: _class_values(evaluation, k) for k, name in enumerate(names)},
        "sizes": {
            area: {"objects": count, "AP": metrics.ap_at(area=area)}
            for area, count in evaluation.size_counts().items()
        },
        "precision_recall": {
            "recall": RECALLS,
            "mean_precision": curves | {"0.50 to 0.95": metrics.curve()},
        },
        "calibration": None
        if calibration is None
        else vars(calibration) | {"error50": calibration.error50, "error75": calibration.error75},
        "best_for_all_classes": None
        if thresholds.together is None
        else asdict(thresholds.together),
        "mistakes": [
            asdict(each) | {"file": evaluation.truth.images[each.image_id].file_name}
            for each in evaluation.mistakes
        ],
    }


def _class_values(evaluation: Evaluation, k: int) -> dict[str, Any]:
    metrics, thresholds = evaluation.metrics, evaluation.thresholds
    name = metrics.class_names[k]
    sizes = {f"AP{area[0]}": metrics.ap_of(k, area=area) for area in AREAS[1:]}
    numbers = {
        "AP": metrics.ap_of(k),
        "AP50": metrics.ap_of(k, 0.50),
        "AP75": metrics.ap_of(k, 0.75),
        **sizes,
        "AR100": metrics.recall_of(k),
    }
    cuts = {"best_cut": thresholds.best.get(name), "best_cut_as_run": thresholds.as_run.get(name)}
    curves = {f"{overlap:.2f}": metrics.curve(overlap, k) for overlap in (0.50, 0.75)}
    return (
        numbers
        | {key: None if cut is None else asdict(cut) for key, cut in cuts.items()}
        | {"precision": curves}
    )


def _markdown(evaluation: Evaluation) -> list[str]:
    calibration = evaluation.calibration
    parts = [
        f"# Evaluation of {evaluation.name}",
        *(f"**Note:** {note}" for note in evaluation.notes),
    ]
    parts += [
        "## COCO numbers",
        numbers_table(evaluation.metrics).markdown(),
        "## Classes",
        class_table(evaluation).markdown(),
    ]
    parts += [
        "## Sizes",
        size_table(evaluation).markdown(),
        "## Best thresholds",
        threshold_table(evaluation).markdown(),
    ]
    if calibration is not None:
        parts += ["## Scores", _calibration_text(evaluation)]
    most = sorted(evaluation.mistakes, key=lambda each: (-each.missed - each.false, each.image_id))[
        :SHOWN_IMAGES
    ]
    rows = [
        (evaluation.truth.images[each.image_id].file_name, each.missed, each.false) for each in most
    ]
    parts += ["## Images with most mistakes", Table(("image", "missed", "false"), rows).markdown()]
    return [*parts, "## What was run", Table(("", ""), list(evaluation.facts.items())).markdown()]


def _sections(evaluation: Evaluation) -> list[Section]:
    metrics = evaluation.metrics
    small = [
        Card(_class_caption(evaluation, k), class_precision_recall(metrics, k))
        for k in _classes_with_objects(evaluation)
    ]
    classes = gallery(small, "many")
    folded = (
        classes
        if len(small) <= OPEN_CLASSES
        else fold(f"the {len(small)} classes one by one", classes)
    )
    sizes = ap_by_size(metrics, evaluation.size_counts()) + size_table(evaluation).html()
    return [
        Section("COCO numbers", numbers_table(metrics).html()),
        Section(
            "Classes",
            class_table(evaluation).html(),
            "AP and recall in percent; objects without crowds.",
        ),
        Section("Precision and recall", precision_recall(metrics) + folded, _CURVES_LEAD),
        Section("Sizes", sizes, "AP by the size of the objects."),
        Section(
            "Overlaps",
            ap_by_overlap(metrics),
            "A steep fall says that boxes are found but do not fit tightly.",
        ),
        Section(
            "Scores", _calibration(evaluation), "Whether a score is the probability of being right."
        ),
        Section(
            "Best thresholds",
            _thresholds(evaluation),
            "Where F1, the harmonic mean of precision and recall, is highest.",
        ),
        Section("Most missed", _worst(evaluation, lambda each: each.missed), _WORST_LEAD),
        Section("Most false", _worst(evaluation, lambda each: each.false), _WORST_LEAD),
    ]


_CURVES_LEAD = "The mean over the classes, then each class: solid at an overlap (IoU) of 0.50, dashed at 0.75, dotted at 0.90."
_WORST_LEAD = (
    "First the truth, then the detections above each class's best score. Green is right, red is missed (in the truth) or false (in the "
    "detections), blue are crowds, which do not count. Only mistakes and crowds have names."
)


def _classes_with_objects(evaluation: Evaluation) -> list[int]:
    return [
        k
        for k, name in enumerate(evaluation.metrics.class_names)
        if name in evaluation.metrics.class_ap
    ]


def _class_caption(evaluation: Evaluation, k: int) -> str:
    return f"{evaluation.metrics.class_names[k]}: AP {show(percent(evaluation.metrics.ap_of(k)))}"


def _calibration_text(evaluation: Evaluation) -> str:
    found = evaluation.calibration
    if found is None:
        return "The scores are not between 0 and 1, so they are no probabilities."
    return (
        f"Mean distance between score and share of right detections (expected calibration error): {100 * found.error50:.1f} points "
        f"where an overlap of 0.50 is right, {100 * found.error75:.1f} where 0.75 is."
    )


def _calibration(evaluation: Evaluation) -> Markup:
    table, text = calibration_table(evaluation), paragraph(_calibration_text(evaluation))
    if table is None or evaluation.calibration is None:
        return text
    return text + reliability(evaluation.calibration) + fold("the numbers", table.html())


def _thresholds(evaluation: Evaluation) -> Markup:
    curves = evaluation.thresholds.curves
    if not curves:
        return paragraph("No class has objects.")
    objects = evaluation.truth.boxes.category_ids.tolist()
    by_count = sorted(curves, key=lambda name: -objects.count(_category_id(evaluation, name)))[
        :LEGEND_CLASSES
    ]
    figure = f1_over_score({name: curves[name] for name in by_count})
    hidden = (
        paragraph(f"The figure shows the {LEGEND_CLASSES} classes with most objects.")
        if len(curves) > LEGEND_CLASSES
        else Markup("")
    )
    return threshold_table(evaluation).html() + figure + hidden


def _category_id(evaluation: Evaluation, name: str) -> int:
    return next(key for key, other in evaluation.truth.categories.items() if other == name)


def _worst(evaluation: Evaluation, mistakes_of: Callable[[Mistakes], int]) -> Markup:
    """The images with most of one kind of mistake, the truth beside the detections."""
    most = sorted(
        evaluation.mistakes,
        key=lambda each: (-mistakes_of(each), -each.missed - each.false, each.image_id),
    )
    shown = [each for each in most if mistakes_of(each)][:SHOWN_IMAGES]
    if not shown:
        return paragraph("There are none.")
    if not evaluation.files:
        return _mistake_list(evaluation, shown).html() + paragraph(
            "The images were not given (--images), so they are not drawn."
        )
    finder = evaluation.mistake_finder()
    return gallery([_mistake_card(evaluation, finder, each) for each in shown], "one")


def _mistake_list(evaluation: Evaluation, shown: Sequence[Mistakes]) -> Table:
    rows = [
        (evaluation.truth.images[each.image_id].file_name, each.missed, each.false)
        for each in shown
    ]
    return Table(("image", "missed", "false"), rows)


def _mistake_card(evaluation: Evaluation, finder: MistakeFinder, each: Mistakes) -> Card:
    path = evaluation.files[each.image_id]
    left, right = finder.draw(each.image_id, decode_image(path.read_bytes(), str(path)))
    name = evaluation.truth.images[each.image_id].file_name
    both = pair(image(left, f"{name}: the truth"), image(right, f"{name}: the detections"))
    return Card(f"{name}: {each.missed} missed, {each.false} false", both)
