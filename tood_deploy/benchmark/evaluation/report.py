"""The report of an evaluation: report.html (all of it, self-contained), report.md and report.json.

An `Evaluation` in, three files out. Knows no detector and computes no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tood_deploy.benchmark.evaluation.alignment_report import (
    alignment_section,
    alignment_table,
    alignment_values,
)
from tood_deploy.benchmark.evaluation.analysis import Cut, MistakeFinder, Mistakes
from tood_deploy.benchmark.evaluation.evaluate import THRESHOLDS, Evaluation
from tood_deploy.benchmark.evaluation.figures import (
    ap_by_overlap,
    ap_by_size,
    class_precision_recall,
    f1_over_score,
    precision_recall,
    reliability,
)
from tood_deploy.benchmark.evaluation.thresholds import write_thresholds
from tood_deploy.benchmark.html_report import (
    Card,
    Cell,
    Section,
    Table,
    Tile,
    fold,
    gallery,
    image,
    pair,
    paragraph,
    render_page,
    show,
    write_json,
    write_markdown,
)
from tood_deploy.data.coco_metrics import AREAS, OVERLAPS, RECALLS, STANDARD_COUNT, CocoMetrics
from tood_deploy.data.images import read_image

if TYPE_CHECKING:
    from tood_deploy.benchmark.evaluation.alignment import Alignment

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"
COUNTED_AS = {"AR": "AR100"}  # COCO's name, where it has another
SHOWN_IMAGES = 8
OPEN_CLASSES = 12  # more small figures than this are folded away
LEGEND_CLASSES = 8
TILES = {
    "AP": "overlaps 0.50 to 0.95",
    "AP50": "overlap 0.50",
    "AP75": "overlap 0.75",
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "AR100": "recall",
}
CURVES_LEAD = (
    "The mean over the classes, then each class: solid at an overlap (IoU) of 0.50, "
    "dashed at 0.75, dotted at 0.90."
)
OVERLAPS_LEAD = "A steep fall means that objects are detected, but boxes do not fit tightly."
SCORES_LEAD = "Whether a score is the probability of being right."
SLICED_LEAD = "What searching images in slices costs and gives."
THRESHOLDS_LEAD = "Where F1, the harmonic mean of precision and recall, is highest."
WORST_LEAD = (
    "First the truth, then the detections above each class's best score. Green is right, red is "
    "missed (in the truth) or false (in the detections), blue are crowds, which do not count. "
    "Only mistakes and crowds have names."
)
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
    """Return a fraction as a percentage; None for -1, pycocotools's mark of what is absent."""
    return None if value is None or value < 0 else 100 * value


def numbers_table(metrics: CocoMetrics) -> Table:
    """Return the 12 COCO numbers with what they mean."""
    rows = [
        (f"{name}: {MEANINGS[name]}", percent(value)) for name, value in metrics.numbers.items()
    ]
    return Table(("", "%"), rows, "By pycocotools. A dash: the annotations have no such object.")


def counted_table(metrics: CocoMetrics) -> Table | None:
    """Return the numbers of more detections than COCO counts; None where none were asked for."""
    if not metrics.counts_more:
        return None
    rows: list[tuple[Cell, ...]] = [
        (name, *map(percent, (metrics.numbers[COUNTED_AS.get(name, name)], value)))
        for name, value in metrics.counted.items()
    ]
    names = ("%", f"{STANDARD_COUNT} detections", f"{metrics.count} detections")
    note = "Of a class in an image the best count; COCO's own numbers are those of the first."
    return Table(names, rows, note)


def class_table(evaluation: Evaluation) -> Table:
    """Return a row a class: objects, detections, AP, recall."""
    metrics, truth = evaluation.metrics, evaluation.truth
    objects = truth.boxes.category_ids[~truth.boxes.crowd]
    rows = []
    for k, (key, name) in enumerate(truth.categories.items()):
        counts = (int(np.sum(objects == key)), int(np.sum(evaluation.results.category_ids == key)))
        overlaps = (metrics.ap_of(k, overlap) for overlap in (None, 0.50, 0.75))
        sizes = (metrics.ap_of(k, area=area) for area in ("small", "medium", "large"))
        rows.append((name, *counts, *map(percent, (*overlaps, *sizes, metrics.recall_of(k)))))
    names = ("class", "objects", "detections", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    return Table(names, rows)


def threshold_table(evaluation: Evaluation) -> Table:
    """Return a row a class, and one for all together: where F1 is highest."""
    thresholds = evaluation.thresholds
    rows = [
        _threshold_row(name, thresholds.best.get(name), thresholds.as_run.get(name))
        for name in evaluation.metrics.class_names
    ]
    if len(rows) > 1:
        rows.append(_threshold_row("all together", thresholds.together, None))
    note = (
        "Overlap 0.50 counts as right. conf and iou are for tood-infer; "
        "the last two columns keep the suppression threshold of this run. "
        "Lower thresholds were tried by suppressing this run's detections once more."
    )
    names = ("class", "best conf", "best iou", "F1", "precision", "recall")
    return Table((*names, "conf as run", "F1 as run"), rows, note)


def chosen_table(evaluation: Evaluation) -> Table:
    """Return a row a class: the threshold to go on with, and what it does."""
    chosen = evaluation.chosen
    rows = [
        (
            name,
            f"{choice.conf:.3f}",
            *map(percent, (choice.precision, choice.recall, choice.missed)),
            choice.images,
            "yes" if choice.kept else "no",
        )
        for name, choice in chosen.choices.items()
    ]
    note = f"Asked for: {chosen.wish}. In thresholds.json, which tood-infer --conf takes."
    if chosen.wish.kind == "miss_rate":
        note += (
            " The bound holds for each class alone, on images that are exchangeable with these: "
            "it is that of risk-controlling prediction sets (Bates et al. 2021), with the "
            "Hoeffding-Bentkus inequality."
        )
    names = ("class", "conf", "precision", "recall", "missed an image", "images", "fulfilled")
    return Table(names, rows, note)


def sliced_table(evaluation: Evaluation) -> Table | None:
    """Return the numbers without and with slices; None where there were no slices."""
    sliced = evaluation.sliced
    if sliced is None:
        return None
    rows: list[tuple[Cell, ...]] = []
    for name, value in evaluation.metrics.numbers.items():
        whole, now = percent(sliced.whole.numbers[name]), percent(value)
        gain = None if whole is None or now is None else f"{now - whole:+.1f}"
        rows.append((f"{name}: {MEANINGS[name]}", whole, now, gain))
    if evaluation.metrics.counts_more:
        rows += [
            (f"{name}: {evaluation.metrics.count} detections", whole, now, f"{now - whole:+.1f}")
            for name, value in evaluation.metrics.counted.items()
            if (whole := percent(sliced.whole.counted[name])) is not None
            and (now := percent(value)) is not None
        ]
    times = [None if ms is None else f"{ms:.0f}" for ms in (sliced.whole_ms, sliced.sliced_ms)]
    rows.append(("ms an image", *times, None))
    return Table(("", "whole", "sliced", "difference"), rows, "The same model and thresholds.")


def size_table(evaluation: Evaluation) -> Table:
    """Return AP of small, medium and large objects."""
    metrics, counts = evaluation.metrics, evaluation.size_counts()
    rows: list[tuple[Cell, ...]] = []
    for area, count in counts.items():
        values = (percent(metrics.ap_at(overlap, area)) for overlap in (None, 0.50, 0.75))
        rows.append((area, count, *values))
    return Table(
        ("size", "objects", "AP", "AP50", "AP75"),
        rows,
        "Small is under 32 x 32 pixels, large over 96 x 96, by COCO's areas.",
    )


def calibration_table(evaluation: Evaluation) -> Table | None:
    """Return a row a filled bin of scores; None where scores are no probabilities."""
    calibration = evaluation.calibration
    if calibration is None:
        return None
    bins = len(calibration.counts)
    shares = 100 * np.stack([calibration.scores, calibration.right50, calibration.right75])
    rows: list[tuple[Cell, ...]] = []
    for i in np.flatnonzero(calibration.counts).tolist():
        score, right50, right75 = shares[:, i].tolist()
        span = f"{i / bins:.2f} to {(i + 1) / bins:.2f}"
        rows.append((span, score, int(calibration.counts[i]), right50, right75))
    return Table(("score", "mean %", "detections", "right at 0.50 %", "right at 0.75 %"), rows)


def _threshold_row(name: str, best: Cut | None, as_run: Cut | None) -> tuple[Cell, ...]:
    if best is None:
        return (name, *[None] * 7)
    iou = "as they are" if best.iou is None else f"{best.iou:.2f}"
    shares = tuple(map(percent, (best.f1, best.precision, best.recall)))
    own = (None, None) if as_run is None else (f"{as_run.conf:.3f}", percent(as_run.f1))
    return (name, f"{best.conf:.3f}", iou, *shares, *own)


def write_evaluation(
    evaluation: Evaluation, folder: Path, alignment: Alignment | None = None
) -> None:
    """Write the report in its three forms, and the thresholds to go on with.

    Args:
        evaluation: to report.
        folder: of the files.
        alignment: of the same network, where it was asked for.

    Raises:
        OutputError: the folder cannot be written.
    """
    truth = evaluation.truth
    aligned = None if alignment is None else alignment_values(alignment, truth)
    write_json(folder / JSON, evaluation_values(evaluation) | {"alignment": aligned})
    write_thresholds(
        folder / THRESHOLDS,
        evaluation.chosen,
        evaluation.truth,
        evaluation.files,
        evaluation.facts.get("model", evaluation.name),
    )
    write_markdown(folder / MARKDOWN, _markdown(evaluation, alignment))
    sections = _sections(evaluation)
    if alignment is not None:
        sections.append(alignment_section(alignment, truth, evaluation.files))
    counts = f"{len(truth.boxes)} objects in {len(truth.images)} images"
    render_page(
        f"Evaluation of {evaluation.name}",
        sections,
        folder / HTML,
        lead=f"{len(evaluation.results)} detections against {counts}.",
        tiles=_tiles(evaluation),
        facts=evaluation.facts,
        warnings=evaluation.notes,
    )


def _tiles(evaluation: Evaluation) -> list[Tile]:
    numbers = evaluation.metrics.numbers
    tiles = [Tile(name, show(percent(numbers[name])), text) for name, text in TILES.items()]
    best = evaluation.thresholds.together
    if best is not None:
        remark = f"of all classes, at conf {best.conf:.2f}"
        tiles.append(Tile("best F1", show(percent(best.f1)), remark))
    return tiles


def evaluation_values(evaluation: Evaluation) -> dict[str, Any]:
    """Return all numbers as plain values.

    Fractions 0 to 1; -1, as in pycocotools, where there is no such object.
    """
    metrics, thresholds = evaluation.metrics, evaluation.thresholds
    calibration, best = evaluation.calibration, thresholds.together
    curves = {f"{overlap:.2f}": metrics.curve(overlap) for overlap in OVERLAPS}
    calibration_values = calibration and vars(calibration) | {
        "error50": calibration.error50,
        "error75": calibration.error75,
    }
    sizes = {
        area: {"objects": count, "AP": metrics.ap_at(area=area)}
        for area, count in evaluation.size_counts().items()
    }
    return {
        "name": evaluation.name,
        "facts": dict(evaluation.facts),
        "notes": list(evaluation.notes),
        "numbers": metrics.numbers,
        "counted": {"detections": metrics.count, "numbers": metrics.counted},
        "classes": {
            name: _class_values(evaluation, k) for k, name in enumerate(metrics.class_names)
        },
        "sizes": sizes,
        "precision_recall": {
            "recall": RECALLS,
            "mean_precision": curves | {"0.50 to 0.95": metrics.curve()},
        },
        "calibration": calibration_values,
        "best_for_all_classes": None if best is None else asdict(best),
        "whole_numbers": None if evaluation.sliced is None else evaluation.sliced.whole.numbers,
        "mistakes": [
            asdict(mistakes) | {"file": _file_name(evaluation, mistakes)}
            for mistakes in evaluation.mistakes
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


def _markdown(evaluation: Evaluation, alignment: Alignment | None) -> list[str]:
    scores: list[str] = []
    if evaluation.calibration is not None:
        scores = ["## Scores", _calibration_text(evaluation)]
    worst = sorted(evaluation.mistakes, key=_by_all_mistakes)[:SHOWN_IMAGES]
    sliced, counted = sliced_table(evaluation), counted_table(evaluation.metrics)
    return [
        f"# Evaluation of {evaluation.name}",
        *(f"**Note:** {note}" for note in evaluation.notes),
        "## COCO numbers",
        numbers_table(evaluation.metrics).markdown(),
        *([] if counted is None else ["## More detections", counted.markdown()]),
        "## Classes",
        class_table(evaluation).markdown(),
        "## Sizes",
        size_table(evaluation).markdown(),
        *([] if sliced is None else ["## Whole against sliced", sliced.markdown()]),
        "## Best thresholds",
        threshold_table(evaluation).markdown(),
        "## Thresholds to go on with",
        chosen_table(evaluation).markdown(),
        *scores,
        *(
            []
            if alignment is None
            else ["## Task alignment", alignment_table(alignment).markdown()]
        ),
        "## Images with most mistakes",
        _mistake_table(evaluation, worst).markdown(),
        "## What was run",
        Table(("", ""), list(evaluation.facts.items())).markdown(),
    ]


def _sections(evaluation: Evaluation) -> list[Section]:
    metrics = evaluation.metrics
    curves = precision_recall(metrics) + _class_curves(evaluation)
    sizes = ap_by_size(metrics, evaluation.size_counts()) + size_table(evaluation).html()
    classes = class_table(evaluation).html()
    sliced, counted = sliced_table(evaluation), counted_table(metrics)
    return [
        Section("COCO numbers", numbers_table(metrics).html()),
        *([] if counted is None else [Section("More detections", counted.html())]),
        *([] if sliced is None else [Section("Whole against sliced", sliced.html(), SLICED_LEAD)]),
        Section("Classes", classes, "AP and recall in percent; objects without crowds."),
        Section("Precision and recall", curves, CURVES_LEAD),
        Section("Sizes", sizes, "AP by the size of the objects."),
        Section("Overlaps", ap_by_overlap(metrics), OVERLAPS_LEAD),
        Section("Scores", _calibration(evaluation), SCORES_LEAD),
        Section("Best thresholds", _thresholds(evaluation), THRESHOLDS_LEAD),
        Section("Thresholds to go on with", chosen_table(evaluation).html()),
        Section("Most missed", _worst(evaluation, lambda image: image.missed), WORST_LEAD),
        Section("Most false", _worst(evaluation, lambda image: image.false), WORST_LEAD),
    ]


def _class_curves(evaluation: Evaluation) -> Markup:
    """Return a small figure for each class that has objects, folded away where they are many."""
    metrics = evaluation.metrics
    cards: list[Card] = []
    for k, name in enumerate(metrics.class_names):
        if name in metrics.class_ap:
            caption = f"{name}: AP {show(percent(metrics.ap_of(k)))}"
            cards.append(Card(caption, class_precision_recall(metrics, k)))
    figures = gallery(cards, "many")
    if len(cards) <= OPEN_CLASSES:
        return figures
    return fold(f"the {len(cards)} classes one by one", figures)


def _calibration_text(evaluation: Evaluation) -> str:
    calibration = evaluation.calibration
    if calibration is None:
        return "The scores are not between 0 and 1, so they are no probabilities."
    return (
        "Mean distance between score and share of right detections (expected calibration error): "
        f"{100 * calibration.error50:.1f} points where an overlap of 0.50 is right, "
        f"{100 * calibration.error75:.1f} where 0.75 is."
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
    truth = evaluation.truth
    ids = {name: key for key, name in truth.categories.items()}
    objects = {name: np.count_nonzero(truth.boxes.category_ids == ids[name]) for name in curves}
    shown = sorted(curves, key=lambda name: -objects[name])[:LEGEND_CLASSES]
    figure = f1_over_score({name: curves[name] for name in shown})
    if len(curves) > LEGEND_CLASSES:
        figure += paragraph(f"The figure shows the {LEGEND_CLASSES} classes with most objects.")
    return threshold_table(evaluation).html() + figure


def _worst(evaluation: Evaluation, count: Callable[[Mistakes], int]) -> Markup:
    """Return the images with most of one kind of mistake, the truth beside the detections."""
    worst = sorted(evaluation.mistakes, key=lambda image: (-count(image), *_by_all_mistakes(image)))
    shown = [mistakes for mistakes in worst if count(mistakes)][:SHOWN_IMAGES]
    if not shown:
        return paragraph("There are none.")
    if not evaluation.files:
        return _mistake_table(evaluation, shown).html() + paragraph(
            "The images were not given (--images), so they are not drawn."
        )
    finder = evaluation.mistake_finder()
    return gallery([_mistake_card(evaluation, finder, mistakes) for mistakes in shown], "one")


def _by_all_mistakes(mistakes: Mistakes) -> tuple[int, int]:
    """Return what images are sorted by: most mistakes first, then by id."""
    return -mistakes.missed - mistakes.false, mistakes.image_id


def _file_name(evaluation: Evaluation, mistakes: Mistakes) -> str:
    return evaluation.truth.images[mistakes.image_id].file_name


def _mistake_table(evaluation: Evaluation, shown: Iterable[Mistakes]) -> Table:
    rows = [
        (_file_name(evaluation, mistakes), mistakes.missed, mistakes.false) for mistakes in shown
    ]
    return Table(("image", "missed", "false"), rows)


def _mistake_card(evaluation: Evaluation, finder: MistakeFinder, mistakes: Mistakes) -> Card:
    image_bgr = read_image(evaluation.files[mistakes.image_id])
    left, right = finder.draw(mistakes.image_id, image_bgr)
    name = _file_name(evaluation, mistakes)
    both = pair(image(left, f"{name}: the truth"), image(right, f"{name}: the detections"))
    return Card(f"{name}: {mistakes.missed} missed, {mistakes.false} false", both)
