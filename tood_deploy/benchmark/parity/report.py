"""Reports of comparisons: JSON, Markdown and one self-contained HTML page.

Results of all artefacts of a run come in, files go out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

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
from tood_deploy.benchmark.parity.attribution import Difference, PaddingComparison
from tood_deploy.benchmark.parity.checks import Float32Check
from tood_deploy.benchmark.parity.compare import Result
from tood_deploy.data.coco_metrics import average_precision
from tood_deploy.detections import Detections
from tood_deploy.draw import draw_boxes, line_width
from tood_deploy.matching import MIN_IOU
from tood_deploy.parity.deviation import Deviation, StageDeviations

SMALLEST_SHOWN, LARGEST_SHOWN = 1e-9, 1e3


def waterfall_figure(deployed: StageDeviations, alone: StageDeviations | None) -> Figure:
    """Draw the relative deviation of every stage on a logarithmic axis, the first stage on top.

    Args:
        deployed: as deployed.
        alone: of each stage by itself; None where not known.
    """
    figure, axes = new_figure(6.4, 4.2)
    series = {"as deployed": deployed.by_stage()}
    if alone is not None:
        series["alone"] = alone.by_stage()
    # The first may lack stages that the last has: boxes that are NaN have no pairs.
    names = list(dict.fromkeys(name for stages in reversed(series.values()) for name in stages))
    height = 0.8 / len(series)
    for i, (label, stages) in enumerate(series.items()):
        values = [
            min(stages[name].relative_l2, LARGEST_SHOWN) if name in stages else 0.0
            for name in names
        ]
        axes.barh(
            np.arange(len(names)) + (i - (len(series) - 1) / 2) * height,
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
    """Draw the score of every box in reference and artefact; a box of one alone lies on an axis.

    Args:
        scores: (N, 2) in reference and artefact, 0 for the one that lacks the box.
        name: of the artefact.
    """
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
SHOWN_ABOVE = 0.3  # score of boxes that both have
BOTH_BGR = (200, 140, 40)


def draw_difference(difference: Difference) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw an image with the reference's detections, and with the artefact's.

    Returns:
        Two images (H, W, 3) uint8 BGR; small ones are enlarged.
    """
    image_bgr = difference.image.read()
    scale = max(1, -(-SMALLEST_PX // max(image_bgr.shape[:2])))
    image_bgr = image_bgr.repeat(scale, axis=0).repeat(scale, axis=1)
    left = _draw_side(image_bgr, difference.reference, difference.pairs[:, 0], scale)
    return left, _draw_side(image_bgr, difference.artefact, difference.pairs[:, 1], scale)


def _draw_side(
    image_bgr: NDArray[np.uint8], detections: Detections, paired: NDArray[np.intp], scale: int
) -> NDArray[np.uint8]:
    drawn = image_bgr.copy()
    width = line_width((drawn.shape[0], drawn.shape[1]))
    boxes = np.rint(detections[paired].filter(SHOWN_ABOVE).boxes * scale).astype(int)
    for x1, y1, x2, y2 in boxes.tolist():
        cv2.rectangle(drawn, (x1, y1), (x2, y2), BOTH_BGR, width)
    single = detections[np.delete(np.arange(len(detections)), paired)]
    labels = [
        f"{name} {score:.2f}"
        for name, score in zip(single.names(), single.scores.tolist(), strict=True)
    ]
    return draw_boxes(drawn, single.boxes * np.float32(scale), single.class_ids, labels)


STAGES_NOTE = (
    "As deployed: with what the stages before handed on. Alone: from the reference's own values."
)
DETECTIONS_NOTE = (
    "What lies before the detections was not looked at; where the runtime gives no more, "
    "the .onnx it was made from does."
)
LIMITS_NOTE = (
    "The same comparison and limits as tood-export's (docs/verification.md). All that is below "
    "explains the verdict and decides nothing."
)


def limits_table(result: Result) -> Table:
    """Return what was measured beside its limit."""
    rows = [[row.measure, row.value, row.limit] for row in result.limits]
    own = ", ".join(
        f"--{name.replace('_', '-')} {value:g}"
        for name, value in result.comparison.own.given().items()
    )
    note = LIMITS_NOTE + (f" Limits of your own: {own}." if own else "")
    return Table(("measure", "measured", "limit"), rows, note)


def waterfall_table(result: Result) -> Table:
    """Return every stage's deviation, as deployed and alone."""
    comparison = result.comparison
    alone = comparison.alone.by_stage() if comparison.alone else {}
    rows = []
    for name, deviation in comparison.deployed.by_stage().items():
        beside = ["0"] * 3 if alone else []
        if name in alone:
            beside = _numbers(alone[name], full=False)
        rows.append([name, *_numbers(deviation, full=True), *beside])
    headers = ["stage", "max", "99 in 100", "relative L2", "outside"]
    return Table(
        headers + [f"alone: {header}" for header in ("max", "relative L2", "outside") if alone],
        rows,
        f"{STAGES_NOTE if alone else DETECTIONS_NOTE} Outside: share of elements beyond what makes "
        "a stage suspect. Pixels in normalised units, head boxes in strides, other boxes in pixels "
        "of the network's input.",
    )


def _numbers(deviation: Deviation, *, full: bool) -> list[str]:
    shown = [deviation.worst, *([deviation.p99] if full else []), deviation.relative_l2]
    return [
        *(f"{value:.1e}" if value else "0" for value in shown),
        f"{100 * deviation.outside_share:.3g}%",
    ]


def matching_table(result: Result) -> Table:
    """Return how many boxes are in both, lost and added."""
    comparison = result.comparison
    kinds = {name: rows.counts for name, rows in comparison.deployed.rows.items()}
    if comparison.alone:
        kinds |= {f"{name}, alone": rows.counts for name, rows in comparison.alone.rows.items()}
    kinds["batch slots"] = comparison.check.batch_slots
    if comparison.padding:
        kinds[_padded(comparison.padding)] = comparison.padding.change.counts
    rows = [
        [
            name,
            counts.reference,
            counts.matched,
            counts.reference - counts.matched,
            counts.added,
            f"{100 * counts.matched_share:.2f}%",
        ]
        for name, counts in kinds.items()
        if counts.reference + counts.added
    ]
    note = (
        f"Matched: same class, IoU at least {MIN_IOU}, each box once. Batch slots: the first "
        "image in every slot of a batch, against itself alone. Padded: on a canvas, as an engine "
        "of fixed shape does it, against padded as little as needed."
    )
    return Table(
        ("boxes", "reference", "matched", "lost", "added", "matched of either"), rows, note
    )


def ap_table(result: Result) -> Table:
    """Return AP, and what each part costs when it alone is substituted."""
    reference, artefact = map(average_precision, (result.reference_metrics, result.metrics))
    rows: list[tuple[str, float, float]] = [
        ("PyTorch", reference, 0.0),
        ("artefact", artefact, reference - artefact),
    ]
    rows += [
        (f"swapped: {part}", reference - cost, cost) for part, cost in result.part_costs.items()
    ]
    if result.padding_ap and result.comparison.padding:
        least, padded = result.padding_ap
        rows.append((_padded(result.comparison.padding), padded, least - padded))
    precise = [[name, f"{ap:.3f}", f"{cost:+.3f}"] for name, ap, cost in rows]
    swapped = "Swapped: the reference, with this part of the artefact in place of its own."
    notes = (swapped if result.part_costs else "", _precision_note(result), _padding_note(result))
    return Table(("run", "AP", "lost"), precise, " ".join(note for note in notes if note))


def _padded(padding: PaddingComparison) -> str:
    who = "PyTorch" if padding.fixed else "artefact"
    return f"{who}, padded to {padding.title}"


def _precision_note(result: Result) -> str:
    precision = result.comparison.model.engine.precision
    if "precision" in result.part_costs:
        return f"Precision: the reference's network run by PyTorch in {precision}."
    if precision == "fp32":
        return "Precision costs nothing: the artefact's arithmetic is fp32, as the reference's."
    return f"Precision has no row, because PyTorch cannot run the network in {precision}."


def _padding_note(result: Result) -> str:
    padding = result.comparison.padding
    if padding is None:
        return ""
    if padding.fixed:
        return (
            "The artefact takes images of fixed sizes alone, so both run on these; the last row is "
            "what that costs PyTorch in AP."
        )
    return "The last row is what it costs the artefact to pad every image that far."


def class_table(result: Result) -> Table:
    """Return AP of every class on both sides."""
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
    """Return how an artefact fares at other input sizes."""
    in_float32 = isinstance(result.comparison.check, Float32Check)
    rows = []
    for (height, width), size in result.comparison.sizes.items():
        counts, stages = size.deviations.rows["detections"].counts, size.deviations.by_stage()
        maps = [
            f"{stages[name].worst:.1e}" if name in stages else None
            for name in ("head: scores", "head: boxes")
        ]
        passed = "passed" if in_float32 else "not judged"
        verdict = size.failures[0].stage if size.failures else passed
        numbers = counts.reference, counts.matched, counts.added
        rows.append([f"{height} x {width}", *maps, *numbers, verdict])
    maps_headers = ("head scores, max", "head boxes, max")
    headers = ("input", *maps_headers, "detections", "matched", "added", "verdict")
    fixed = (
        " The artefact takes no others." if result.comparison.model.engine.input_shapes_hw else ""
    )
    judged = "" if in_float32 else " A lower precision is judged on real images alone."
    return Table(headers, rows, f"One synthetic image each, as deployed.{fixed}{judged}")


SHOWN_FAILURES = 3

Facts = Mapping[str, str]


def write_reports(
    folder: Path, results: Sequence[Result], descriptions: Sequence[dict[str, Any]], facts: Facts
) -> list[Path]:
    """Write parity.json, parity.md and parity.html into a folder.

    Args:
        folder: is made where it does not exist.
        results: one an artefact.
        descriptions: of the same, as `run.describe` gives them.
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
                result.comparison.model.name: description
                for result, description in zip(results, descriptions, strict=True)
            },
        },
    )
    write_markdown(paths[1], markdown_parts(results, facts))
    sections = [section for result in results for section in _sections(result, len(results) > 1)]
    tiles = [tile for result in results for tile in _tiles(result)]
    warnings = [line for result in results for line in _warnings(result)]
    names = ", ".join(result.comparison.model.name for result in results)
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
    """Return the first limits that an artefact passed."""
    name, shown = (
        result.comparison.model.name,
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
    """Return a sentence for each artefact: the verdict, and the guilty stage."""
    return " ".join(
        f"{result.comparison.model.name}: {verdict_line(result)}." for result in results
    )


def verdict_line(result: Result) -> str:
    """Return the verdict in a few words, and what costs most AP where anything does."""
    verdict = (
        "equal to the PyTorch reference within its limits"
        if result.passed
        else f"FAILED at the stage {result.guilty}"
    )
    return verdict + (f"; in AP, its {result.costliest} costs most" if result.costliest else "")


def tables(result: Result) -> dict[str, Table]:
    """Return all tables of an artefact, by their titles."""
    by_title = {
        "Limits": limits_table(result),
        "Waterfall": waterfall_table(result),
        "Boxes": matching_table(result),
    }
    if result.comparison.scoring:
        by_title["AP"] = ap_table(result)
    if result.reference_metrics and result.metrics:
        by_title["AP of every class"] = class_table(result)
    if result.comparison.sizes:
        by_title["Other input sizes"] = sizes_table(result)
    return by_title


def markdown_parts(results: Sequence[Result], facts: Facts) -> list[str]:
    """Return the report as Markdown."""
    parts = [
        "# Parity with PyTorch",
        "\n".join(
            f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}"
            for name, value in facts.items()
        ),
    ]
    for result in results:
        parts += [f"## {result.comparison.model.name}", f"**{verdict_line(result)}**"]
        parts += ["\n".join(f"- {failure}" for failure in result.failures)]
        for title, table in tables(result).items():
            parts += [f"### {title}", table.markdown()]
    return parts


def _tiles(result: Result) -> list[Tile]:
    detections = result.comparison.deployed.rows["detections"]
    name = result.comparison.model.name
    counts = detections.counts
    tiles = [
        Tile(
            "verdict",
            "passed" if result.passed else "failed",
            name if result.passed else f"{name}, at: {result.guilty}",
        ),
        Tile(
            "detections matched",
            f"{100 * counts.matched_share:.2f}%",
            f"{detections.lost} lost, {counts.added} added of {counts.reference}",
        ),
        Tile(
            "largest score shift",
            f"{detections.score.worst:.1e}",
            f"boxes: {detections.box_px.worst:.1e} px",
        ),
    ]
    if result.comparison.scoring:
        ap, reference = map(average_precision, (result.metrics, result.reference_metrics))
        remark = f"reference {reference:.2f}, lost {result.ap_drop:+.3f}"
        tiles.append(Tile("AP", f"{ap:.2f}", remark))
    return tiles


def _sections(result: Result, several: bool) -> list[Section]:
    comparison = result.comparison
    prefix = f"{comparison.model.name}: " if several else ""
    bodies = {title: table.html() for title, table in tables(result).items()}
    bodies["Waterfall"] = (
        embed_figure(waterfall_figure(comparison.deployed, comparison.alone), "deviation by stage")
        + bodies["Waterfall"]
    )
    leads = {
        "Waterfall": "How far every stage is from the reference. "
        "Where the bar of a stage alone is long, that stage is guilty."
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
        embed_figure(scores_figure(scores, result.comparison.model.name), "scores of both runs")
        if len(scores)
        else paragraph("No boxes at all.")
    )


def _image_section(result: Result, prefix: str) -> Section:
    cards = []
    for difference in result.comparison.differences.images:
        caption = (
            f"{difference.image.name}: {difference.exchanged} boxes in one alone, "
            f"scores differ by {difference.shift:.1e} at most"
        )
        left, right = draw_difference(difference)
        sides = pair(
            image(left, f"{difference.image.name}: PyTorch"),
            image(right, f"{difference.image.name}: the artefact"),
        )
        cards.append(Card(caption, sides))
    lead = (
        f"First PyTorch, then the artefact. Blue: in both (score above {SHOWN_ABOVE}). "
        "With its name: in this one alone."
    )
    return Section(f"{prefix}Most different images", gallery(cards, "one"), lead)
