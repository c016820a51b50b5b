"""Reports of comparisons: JSON, Markdown and one self-contained HTML page for all artefacts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tood_deploy.benchmark.evaluation.coco_metrics import average_precision
from tood_deploy.benchmark.html_report import (
    SERIES,
    Card,
    Section,
    Table,
    Tile,
    embed_figure,
    gallery,
    image,
    new_figure,
    pair,
    paragraph,
    render_page,
    write_json,
    write_markdown,
)
from tood_deploy.benchmark.parity.attribution import Canvas, Difference
from tood_deploy.benchmark.parity.compare import Result
from tood_deploy.detections import Detections
from tood_deploy.draw import draw_boxes, line_width
from tood_deploy.matching import MIN_IOU
from tood_deploy.parity.deviation import Deviation, StageDeviations

SMALLEST_SHOWN, LARGEST_SHOWN = 1e-9, 1e3


def waterfall_figure(carried: StageDeviations, alone: StageDeviations | None) -> Figure:
    """Largest relative deviation of every stage, as deployed and alone, on a logarithmic axis; first stage on top."""
    figure, axes = new_figure(6.4, 4.2)
    settings = {"as deployed": carried.waterfall()} | (
        {} if alone is None else {"alone": alone.waterfall()}
    )
    names = list(
        dict.fromkeys(name for found in reversed(settings.values()) for name in found)
    )  # boxes that are NaN have no pairs
    height = 0.8 / len(settings)
    for i, (label, waterfall) in enumerate(settings.items()):
        values = [
            min(waterfall[name].relative_l2, LARGEST_SHOWN) if name in waterfall else 0.0
            for name in names
        ]
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
    axes.scatter(
        *scores[both].T, s=6, alpha=0.5, label=f"both ({both.sum()})", linewidths=0, rasterized=True
    )
    axes.scatter(
        *scores[~both].T,
        s=14,
        marker="x",
        color=SERIES[3],
        label=f"one only ({(~both).sum()})",
        rasterized=True,
    )
    axes.set(
        xlabel="score in PyTorch", ylabel=f"score in {name}", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
    )
    axes.legend(loc="upper left")
    return figure


SMALLEST_PX = 480
SHOWN_ABOVE = 0.3  # score of boxes that both found
BOTH_BGR = (200, 140, 40)


def draw_difference(difference: Difference) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The image with what the reference found and with what the artefact found, (H, W, 3) uint8 BGR; small ones are enlarged."""
    image_bgr = difference.image.read()
    scale = max(1, -(-SMALLEST_PX // max(image_bgr.shape[:2])))
    image_bgr = image_bgr.repeat(scale, axis=0).repeat(scale, axis=1)
    left = _draw_side(image_bgr, difference.reference, difference.pairs[:, 0], scale)
    return left, _draw_side(image_bgr, difference.found, difference.pairs[:, 1], scale)


def _draw_side(
    image_bgr: NDArray[np.uint8], found: Detections, paired: NDArray[np.intp], scale: int
) -> NDArray[np.uint8]:
    drawn = image_bgr.copy()
    for x1, y1, x2, y2 in (
        np.rint(found[paired].filter(SHOWN_ABOVE).boxes * scale).astype(int).tolist()
    ):
        cv2.rectangle(
            drawn, (x1, y1), (x2, y2), BOTH_BGR, line_width((drawn.shape[0], drawn.shape[1]))
        )
    single = found[np.delete(np.arange(len(found)), paired)]
    labels = [
        f"{name} {score:.2f}"
        for name, score in zip(single.names(), single.scores.tolist(), strict=True)
    ]
    return draw_boxes(drawn, single.boxes * np.float32(scale), single.class_ids, labels)


STAGES_NOTE = (
    "As deployed: with what the stages before handed on. Alone: from the reference's own values."
)
DETECTIONS_NOTE = "What lies before the detections was not looked at; where the runtime gives no more, the .onnx it was made from does."


def waterfall_table(result: Result) -> Table:
    """Every stage's deviation, as deployed and alone."""
    alone = result.comparison.alone.waterfall() if result.comparison.alone else {}
    rows = []
    for name, found in result.comparison.carried.waterfall().items():
        beside = _numbers(alone[name], full=False) if name in alone else ["0"] * 3 if alone else []
        rows.append([name, *_numbers(found, full=True), *beside])
    headers = ["stage", "max", "99 in 100", "relative L2", "outside"]
    return Table(
        headers + [f"alone: {header}" for header in ("max", "relative L2", "outside") if alone],
        rows,
        f"{STAGES_NOTE if alone else DETECTIONS_NOTE} Outside: share of elements beyond the tolerance. "
        "Pixels in normalised units, head boxes in strides, other boxes in pixels of the network's input.",
    )


def _numbers(found: Deviation, full: bool) -> list[str]:
    shown = [found.worst, *([found.p99] if full else []), found.relative_l2]
    return [
        *(f"{value:.1e}" if value else "0" for value in shown),
        f"{100 * found.outside_share:.3g}%",
    ]


def matching_table(result: Result) -> Table:
    """Boxes found again, lost and added."""
    comparison = result.comparison
    kinds = {
        "candidates": comparison.carried.rows["candidates"],
        "detections": comparison.carried.rows["detections"],
    }
    if comparison.alone:
        kinds |= {
            "candidates, alone": comparison.alone.rows["candidates"],
            "detections, alone": comparison.alone.rows["detections"],
        }
    kinds["batch slots"] = comparison.slots
    if comparison.canvas:
        kinds[_padded(comparison.canvas)] = comparison.canvas.change
    rows = [
        [
            name,
            found.reference,
            found.matched,
            found.lost,
            found.added,
            f"{100 * found.matched_share:.2f}%",
        ]
        for name, found in kinds.items()
        if found.reference + found.added
    ]
    note = (
        f"Matched: same class, IoU above {MIN_IOU}, each box once. Batch slots: the first image in every slot of a batch, "
        "against itself alone. Padded: on a canvas, as an engine of fixed shape does it, against padded as little as needed."
    )
    return Table(
        ("boxes", "reference", "matched", "lost", "added", "matched of either"), rows, note
    )


def ap_table(result: Result) -> Table:
    """AP, and what each part costs when it alone is swapped in."""
    reference, found = (
        average_precision(metrics) for metrics in (result.reference_metrics, result.metrics)
    )
    rows: list[list[Any]] = [["PyTorch", reference, 0.0], ["artefact", found, reference - found]]
    rows += [
        [f"swapped: {part}", reference - cost, cost] for part, cost in result.swap_costs.items()
    ]
    if result.canvas_ap and result.comparison.canvas:
        least, padded = result.canvas_ap
        rows.append([_padded(result.comparison.canvas), padded, least - padded])
    precise = [[name, f"{ap:.3f}", f"{cost:+.3f}"] for name, ap, cost in rows]
    swapped = "Swapped: the reference, with this part of the artefact in place of its own."
    note = " ".join(
        filter(
            None,
            (swapped if result.swap_costs else "", _precision_note(result), _canvas_note(result)),
        )
    )
    return Table(("run", "AP", "lost"), precise, note)


def _padded(canvas: Canvas) -> str:
    who = "PyTorch" if canvas.fixed else "artefact"
    return f"{who}, padded to {canvas.title}"


def _precision_note(result: Result) -> str:
    precision = result.comparison.subject.engine.precision
    if "precision" in result.swap_costs:
        return f"Precision: the reference's network run by PyTorch in {precision}."
    if precision == "fp32":
        return "Precision costs nothing: the artefact's arithmetic is fp32, as the reference's."
    return f"Precision has no row, because PyTorch cannot run the network in {precision}."


def _canvas_note(result: Result) -> str:
    canvas = result.comparison.canvas
    if canvas is None:
        return ""
    if canvas.fixed:
        return "The artefact takes images of fixed sizes alone, so both run on these; the last row is what that costs PyTorch in AP."
    return "The last row is what it costs the artefact to pad every image that far."


def class_table(result: Result) -> Table:
    """AP of every class on both sides."""
    assert result.reference_metrics is not None
    assert result.metrics is not None
    first, second = result.reference_metrics.class_ap, result.metrics.class_ap
    return Table(
        ("class", "reference", "artefact", "lost"),
        [
            [n, 100 * first[n], 100 * second[n], f"{100 * (first[n] - second[n]):+.3f}"]
            for n in first
        ],
    )


def sizes_table(result: Result) -> Table:
    """How an artefact fares at other input sizes."""
    rows = []
    for (height, width), found in result.comparison.sizes.items():
        detections, waterfall = found.rows["detections"], found.waterfall()
        maps = [
            f"{waterfall[name].worst:.1e}" if name in waterfall else None
            for name in ("head: scores", "head: boxes")
        ]
        verdict = next((failure.stage for failure in found.failures()), "passed")
        rows.append(
            [
                f"{height} x {width}",
                *maps,
                detections.reference,
                detections.matched,
                detections.added,
                verdict,
            ]
        )
    headers = (
        "input",
        "head scores, max",
        "head boxes, max",
        "detections",
        "matched",
        "added",
        "verdict",
    )
    fixed = " The artefact takes no others." if result.comparison.subject.engine.canvases_hw else ""
    return Table(headers, rows, f"One synthetic image each, as deployed.{fixed}")


SHOWN_FAILURES = 3

Facts = Mapping[str, str]


def write_reports(
    folder: Path, results: Sequence[Result], descriptions: Sequence[dict[str, Any]], facts: Facts
) -> list[Path]:
    """Writes parity.json, parity.md and parity.html into a folder.

    Args:
        folder: is made where it does not exist.
        results: one an artefact.
        descriptions: of the same, as `verdict.describe` gives them.
        facts: what was run on what: command, date, versions.

    Raises:
        OutputError: it cannot be written.
    """
    paths = [folder / f"parity.{suffix}" for suffix in ("json", "md", "html")]
    write_json(
        paths[0],
        {
            "facts": facts,
            "models": {
                result.comparison.subject.name: each
                for result, each in zip(results, descriptions, strict=True)
            },
        },
    )
    write_markdown(paths[1], markdown_parts(results, facts))
    sections = [section for result in results for section in _sections(result, len(results) > 1)]
    tiles = [tile for result in results for tile in _tiles(result)]
    warnings = [line for result in results for line in _warnings(result)]
    names = ", ".join(result.comparison.subject.name for result in results)
    render_page(
        f"Parity with PyTorch: {names}",
        sections,
        paths[2],
        lead=headline(results),
        tiles=tiles,
        facts=facts,
        warnings=warnings,
    )
    return paths


def _warnings(result: Result) -> list[str]:
    """The first limits that an artefact passed, the guilty stage's before all."""
    name, shown = (
        result.comparison.subject.name,
        [str(failure) for failure in result.failures[:SHOWN_FAILURES]],
    )
    left_out = len(result.failures) - len(shown)
    more = (
        [f"{left_out} more limits passed, most of them as a consequence; parity.md lists all"]
        if left_out
        else []
    )
    return [f"{name}: {line}" for line in (*shown, *more)]


def headline(results: Sequence[Result]) -> str:
    """A sentence for each artefact: the verdict, and the guilty stage."""
    return " ".join(
        f"{result.comparison.subject.name}: {verdict_line(result)}." for result in results
    )


def verdict_line(result: Result) -> str:
    """The verdict in a few words, and what costs most AP where anything does."""
    verdict = (
        "equal to the PyTorch reference within its limits"
        if result.passed
        else f"FAILED at the stage {result.guilty}"
    )
    return verdict + (f"; in AP, its {result.costliest} costs most" if result.costliest else "")


def tables(result: Result) -> dict[str, Table]:
    """All tables of an artefact, by their titles."""
    found = {"Waterfall": waterfall_table(result), "Boxes": matching_table(result)}
    if result.comparison.scoring:
        found["AP"] = ap_table(result)
    if result.reference_metrics and result.metrics:
        found["AP of every class"] = class_table(result)
    if result.comparison.sizes:
        found["Other input sizes"] = sizes_table(result)
    return found


def markdown_parts(results: Sequence[Result], facts: Facts) -> list[str]:
    """The report as Markdown."""
    parts = [
        "# Parity with PyTorch",
        "\n".join(
            f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}"
            for name, value in facts.items()
        ),
    ]
    for result in results:
        parts += [f"## {result.comparison.subject.name}", f"**{verdict_line(result)}**"]
        parts += ["\n".join(f"- {failure}" for failure in result.failures)]
        for title, table in tables(result).items():
            parts += [f"### {title}", table.markdown()]
    return parts


def _tiles(result: Result) -> list[Tile]:
    detections = result.comparison.carried.rows["detections"]
    name = result.comparison.subject.name
    tiles = [
        Tile(
            "verdict",
            "passed" if result.passed else "failed",
            name if result.passed else f"{name}, at: {result.guilty}",
        ),
        Tile(
            "detections matched",
            f"{100 * detections.matched_share:.2f}%",
            f"{detections.lost} lost, {detections.added} added of {detections.reference}",
        ),
        Tile(
            "largest score shift",
            f"{detections.score.worst:.1e}",
            f"boxes: {detections.box_px.worst:.1e} px",
        ),
    ]
    if result.comparison.scoring:
        ap = average_precision(result.metrics)
        tiles.append(
            Tile(
                "AP",
                f"{ap:.2f}",
                f"reference {average_precision(result.reference_metrics):.2f}, lost {result.ap_drop:+.3f}",
            )
        )
    return tiles


def _sections(result: Result, several: bool) -> list[Section]:
    comparison = result.comparison
    prefix = f"{comparison.subject.name}: " if several else ""
    bodies = {title: table.html() for title, table in tables(result).items()}
    bodies["Waterfall"] = (
        embed_figure(waterfall_figure(comparison.carried, comparison.alone), "deviation by stage")
        + bodies["Waterfall"]
    )
    leads = {
        "Waterfall": "How far every stage is from the reference. Where the bar of a stage alone is long, that stage is guilty."
    }
    sections = [
        Section(prefix + title, body, leads.get(title, "")) for title, body in bodies.items()
    ]
    sections.append(
        Section(
            f"{prefix}Scores",
            _scores(result),
            "Every box of the first images: its score on both sides.",
        )
    )
    return [*sections, _image_section(result, prefix)]


def _scores(result: Result) -> Markup:
    scores = result.comparison.differences.scores
    return (
        embed_figure(scores_figure(scores, result.comparison.subject.name), "scores of both runs")
        if len(scores)
        else paragraph("No boxes at all.")
    )


def _image_section(result: Result, prefix: str) -> Section:
    cards = []
    for each in result.comparison.differences.images:
        caption = f"{each.image.name}: {each.exchanged} boxes found by one alone, scores differ by {each.shift:.1e} at most"
        left, right = draw_difference(each)
        sides = pair(
            image(left, f"{each.image.name}: PyTorch"),
            image(right, f"{each.image.name}: the artefact"),
        )
        cards.append(Card(caption, sides))
    lead = f"First PyTorch, then the artefact. Blue: both found it (score above {SHOWN_ABOVE}). With its name: found by this one alone."
    return Section(f"{prefix}Most different images", gallery(cards, "one"), lead)
