"""Reports of comparisons: JSON, Markdown and one self-contained HTML page for all artefacts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tood_deploy.benchmark.figure import embed_figure
from tood_deploy.benchmark.parity import Result
from tood_deploy.benchmark.parity_figures import scores_figure, waterfall_figure
from tood_deploy.benchmark.parity_pictures import SHOWN_ABOVE, draw_difference
from tood_deploy.benchmark.parity_tables import ap_table, class_table, matching_table, sizes_table, waterfall_table
from tood_deploy.benchmark.report import (
    Card,
    Section,
    Table,
    Tile,
    gallery,
    pair,
    paragraph,
    picture,
    render_page,
    write_json,
    write_markdown,
)
from tood_deploy.benchmark.scoring import average_precision

SHOWN_FAILURES = 3

Facts = Mapping[str, str]


def write_reports(folder: Path, results: Sequence[Result], descriptions: Sequence[dict[str, Any]], facts: Facts) -> list[Path]:
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
        {"facts": facts, "models": {result.comparison.subject.name: each for result, each in zip(results, descriptions, strict=True)}},
    )
    write_markdown(paths[1], markdown_parts(results, facts))
    sections = [section for result in results for section in _sections(result, len(results) > 1)]
    tiles = [tile for result in results for tile in _tiles(result)]
    warnings = [line for result in results for line in _warnings(result)]
    names = ", ".join(result.comparison.subject.name for result in results)
    render_page(f"Parity with PyTorch: {names}", sections, paths[2], lead=headline(results), tiles=tiles, facts=facts, warnings=warnings)
    return paths


def _warnings(result: Result) -> list[str]:
    """The first limits that an artefact passed, the guilty stage's before all."""
    name, shown = result.comparison.subject.name, [str(failure) for failure in result.failures[:SHOWN_FAILURES]]
    left_out = len(result.failures) - len(shown)
    more = [f"{left_out} more limits passed, most of them as a consequence; parity.md lists all"] if left_out else []
    return [f"{name}: {line}" for line in (*shown, *more)]


def headline(results: Sequence[Result]) -> str:
    """A sentence for each artefact: the verdict, and the guilty stage."""
    return " ".join(f"{result.comparison.subject.name}: {verdict_line(result)}." for result in results)


def verdict_line(result: Result) -> str:
    """The verdict in a few words, and what costs most AP where anything does."""
    verdict = "equal to the PyTorch reference within its limits" if result.passed else f"FAILED at the stage {result.guilty}"
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
        "\n".join(f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}" for name, value in facts.items()),
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
        Tile("verdict", "passed" if result.passed else "failed", name if result.passed else f"{name}, at: {result.guilty}"),
        Tile(
            "detections matched",
            f"{100 * detections.matched_share:.2f}%",
            f"{detections.lost} lost, {detections.added} added of {detections.reference}",
        ),
        Tile("largest score shift", f"{detections.score.worst:.1e}", f"boxes: {detections.box_px.worst:.1e} px"),
    ]
    if result.comparison.scoring:
        ap = average_precision(result.metrics)
        tiles.append(Tile("AP", f"{ap:.2f}", f"reference {average_precision(result.reference_metrics):.2f}, lost {result.ap_drop:+.3f}"))
    return tiles


def _sections(result: Result, several: bool) -> list[Section]:
    comparison = result.comparison
    prefix = f"{comparison.subject.name}: " if several else ""
    bodies = {title: table.html() for title, table in tables(result).items()}
    bodies["Waterfall"] = embed_figure(waterfall_figure(comparison.carried, comparison.alone), "deviation by stage") + bodies["Waterfall"]
    leads = {"Waterfall": "How far every stage is from the reference. Where the bar of a stage alone is long, that stage is guilty."}
    sections = [Section(prefix + title, body, leads.get(title, "")) for title, body in bodies.items()]
    sections.append(Section(f"{prefix}Scores", _scores(result), "Every box of the first pictures: its score on both sides."))
    return [*sections, _picture_section(result, prefix)]


def _scores(result: Result) -> Markup:
    scores = result.comparison.differences.scores
    return (
        embed_figure(scores_figure(scores, result.comparison.subject.name), "scores of both runs")
        if len(scores)
        else paragraph("No boxes at all.")
    )


def _picture_section(result: Result, prefix: str) -> Section:
    cards = []
    for each in result.comparison.differences.pictures:
        caption = f"{each.picture.name}: {each.exchanged} boxes found by one alone, scores differ by {each.shift:.1e} at most"
        left, right = draw_difference(each)
        sides = pair(picture(left, f"{each.picture.name}: PyTorch"), picture(right, f"{each.picture.name}: the artefact"))
        cards.append(Card(caption, sides))
    lead = f"First PyTorch, then the artefact. Blue: both found it (score above {SHOWN_ABOVE}). With its name: found by this one alone."
    return Section(f"{prefix}Most different pictures", gallery(cards, "one"), lead)
