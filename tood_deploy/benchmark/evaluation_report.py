"""Writes an evaluation: report.html (all of it, self-contained), report.md, report.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tood_deploy.benchmark import plots
from tood_deploy.benchmark.coco_ap import AREAS, OVERLAPS, RECALLS
from tood_deploy.benchmark.evaluation import Evaluation
from tood_deploy.benchmark.evaluation_tables import calibration_table, class_table, numbers_table, percent, size_table, threshold_table
from tood_deploy.benchmark.report import (
    Card,
    Section,
    Table,
    Tile,
    fold,
    gallery,
    pair,
    paragraph,
    picture,
    render_page,
    show,
    write_json,
    write_markdown,
)
from tood_deploy.benchmark.worst import MistakeFinder, Mistakes
from tood_deploy.inference.images import decode_image

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"
SHOWN_PICTURES = 8
OPEN_CLASSES = 12  # more small figures than this are folded away
LEGEND_CLASSES = 8


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes the three files.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_json(folder / JSON, evaluation_values(evaluation))
    write_markdown(folder / MARKDOWN, _markdown(evaluation))
    tiles = [Tile(name, show(percent(evaluation.metrics.numbers[name])), remark) for name, remark in _TILES.items()]
    together = evaluation.thresholds.together
    if together is not None:
        tiles.append(Tile("best F1", show(percent(together.f1)), f"of all classes, at conf {together.conf:.2f}"))
    lead = f"{len(evaluation.results)} detections against {len(evaluation.truth.boxes)} objects in {len(evaluation.truth.images)} pictures."
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
    metrics, thresholds, calibration = evaluation.metrics, evaluation.thresholds, evaluation.calibration
    curves = {f"{overlap:.2f}": metrics.curve(overlap) for overlap in OVERLAPS}
    names = metrics.class_names
    return {
        "name": evaluation.name,
        "facts": dict(evaluation.facts),
        "notes": list(evaluation.notes),
        "numbers": metrics.numbers,
        "classes": {name: _class_values(evaluation, k) for k, name in enumerate(names)},
        "sizes": {area: {"objects": count, "AP": metrics.ap_at(area=area)} for area, count in evaluation.size_counts().items()},
        "precision_recall": {"recall": RECALLS, "mean_precision": curves | {"0.50 to 0.95": metrics.curve()}},
        "calibration": None
        if calibration is None
        else vars(calibration) | {"error50": calibration.error50, "error75": calibration.error75},
        "best_for_all_classes": None if thresholds.together is None else asdict(thresholds.together),
        "mistakes": [asdict(each) | {"file": evaluation.truth.images[each.image_id].file_name} for each in evaluation.mistakes],
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
    return numbers | {key: None if cut is None else asdict(cut) for key, cut in cuts.items()} | {"precision": curves}


def _markdown(evaluation: Evaluation) -> list[str]:
    calibration = evaluation.calibration
    parts = [f"# Evaluation of {evaluation.name}", *(f"**Note:** {note}" for note in evaluation.notes)]
    parts += ["## COCO numbers", numbers_table(evaluation.metrics).markdown(), "## Classes", class_table(evaluation).markdown()]
    parts += ["## Sizes", size_table(evaluation).markdown(), "## Best thresholds", threshold_table(evaluation).markdown()]
    if calibration is not None:
        parts += ["## Scores", _calibration_text(evaluation)]
    most = sorted(evaluation.mistakes, key=lambda each: (-each.missed - each.false, each.image_id))[:SHOWN_PICTURES]
    rows = [(evaluation.truth.images[each.image_id].file_name, each.missed, each.false) for each in most]
    parts += ["## Pictures with most mistakes", Table(("picture", "missed", "false"), rows).markdown()]
    return [*parts, "## What was run", Table(("", ""), list(evaluation.facts.items())).markdown()]


def _sections(evaluation: Evaluation) -> list[Section]:
    metrics = evaluation.metrics
    small = [Card(_class_caption(evaluation, k), plots.class_precision_recall(metrics, k)) for k in _classes_with_objects(evaluation)]
    classes = gallery(small, "many")
    folded = classes if len(small) <= OPEN_CLASSES else fold(f"the {len(small)} classes one by one", classes)
    sizes = plots.ap_by_size(metrics, evaluation.size_counts()) + size_table(evaluation).html()
    return [
        Section("COCO numbers", numbers_table(metrics).html()),
        Section("Classes", class_table(evaluation).html(), "AP and recall in percent; objects without crowds."),
        Section("Precision and recall", plots.precision_recall(metrics) + folded, _CURVES_LEAD),
        Section("Sizes", sizes, "AP by the size of the objects."),
        Section("Overlaps", plots.ap_by_overlap(metrics), "A steep fall says that boxes are found but do not fit tightly."),
        Section("Scores", _calibration(evaluation), "Whether a score is the probability of being right."),
        Section("Best thresholds", _thresholds(evaluation), "Where F1, the harmonic mean of precision and recall, is highest."),
        Section("Most missed", _worst(evaluation, lambda each: each.missed), _WORST_LEAD),
        Section("Most false", _worst(evaluation, lambda each: each.false), _WORST_LEAD),
    ]


_CURVES_LEAD = "The mean over the classes, then each class: solid at an overlap (IoU) of 0.50, dashed at 0.75, dotted at 0.90."
_WORST_LEAD = (
    "First the truth, then the detections above each class's best score. Green is right, red is missed (in the truth) or false (in the "
    "detections), blue are crowds, which do not count. Only mistakes and crowds have names."
)


def _classes_with_objects(evaluation: Evaluation) -> list[int]:
    return [k for k, name in enumerate(evaluation.metrics.class_names) if name in evaluation.metrics.class_ap]


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
    return text + plots.reliability(evaluation.calibration) + fold("the numbers", table.html())


def _thresholds(evaluation: Evaluation) -> Markup:
    curves = evaluation.thresholds.curves
    if not curves:
        return paragraph("No class has objects.")
    objects = evaluation.truth.boxes.category_ids.tolist()
    by_count = sorted(curves, key=lambda name: -objects.count(_category_id(evaluation, name)))[:LEGEND_CLASSES]
    figure = plots.f1_over_score({name: curves[name] for name in by_count})
    hidden = paragraph(f"The figure shows the {LEGEND_CLASSES} classes with most objects.") if len(curves) > LEGEND_CLASSES else Markup("")
    return threshold_table(evaluation).html() + figure + hidden


def _category_id(evaluation: Evaluation, name: str) -> int:
    return next(key for key, other in evaluation.truth.categories.items() if other == name)


def _worst(evaluation: Evaluation, mistakes_of: Callable[[Mistakes], int]) -> Markup:
    """The pictures with most of one kind of mistake, the truth beside the detections."""
    most = sorted(evaluation.mistakes, key=lambda each: (-mistakes_of(each), -each.missed - each.false, each.image_id))
    shown = [each for each in most if mistakes_of(each)][:SHOWN_PICTURES]
    if not shown:
        return paragraph("There are none.")
    if not evaluation.files:
        return _mistake_list(evaluation, shown).html() + paragraph("The pictures were not given (--images), so they are not drawn.")
    finder = evaluation.mistake_finder()
    return gallery([_mistake_card(evaluation, finder, each) for each in shown], "one")


def _mistake_list(evaluation: Evaluation, shown: Sequence[Mistakes]) -> Table:
    rows = [(evaluation.truth.images[each.image_id].file_name, each.missed, each.false) for each in shown]
    return Table(("picture", "missed", "false"), rows)


def _mistake_card(evaluation: Evaluation, finder: MistakeFinder, each: Mistakes) -> Card:
    path = evaluation.files[each.image_id]
    left, right = finder.draw(each.image_id, decode_image(path.read_bytes(), str(path)))
    name = evaluation.truth.images[each.image_id].file_name
    both = pair(picture(left, f"{name}: the truth"), picture(right, f"{name}: the detections"))
    return Card(f"{name}: {each.missed} missed, {each.false} false", both)
