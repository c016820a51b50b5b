"""Reports of latencies: JSON with every single time, Markdown, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tood_deploy.benchmark.figure import embed_figure
from tood_deploy.benchmark.latency import Measurement, describe
from tood_deploy.benchmark.latency_figures import accuracy_figure, distribution_figure, throughput_figure
from tood_deploy.benchmark.latency_tables import (
    STAGES,
    fps,
    has_transfers,
    latency_table,
    resource_table,
    speedups,
    stage_table,
    summary_of,
    throughput_table,
)
from tood_deploy.benchmark.latency_worker import END_TO_END, ENGINE
from tood_deploy.benchmark.report import Section, Table, Tile, render_page, write_json, write_markdown

KINDS = (END_TO_END, ENGINE)


def tables(measurements: Sequence[Measurement]) -> dict[str, Table]:
    """All tables by their titles."""
    found = {"End to end": latency_table(measurements, END_TO_END), "Engine only": latency_table(measurements, ENGINE)}
    found["Parts of an end-to-end call"] = stage_table(measurements, END_TO_END)
    if has_transfers(measurements):
        found["Parts of an engine call"] = stage_table(measurements, ENGINE)
    return found | {"Throughput": throughput_table(measurements), "Memory and start-up": resource_table(measurements)}


def write_latency_reports(
    folder: Path,
    measurements: Sequence[Measurement],
    facts: Mapping[str, str],
    machine: Mapping[str, Any],
    ap: Mapping[str, float],
    warnings: Sequence[str],
) -> list[Path]:
    """Writes latency.json, latency.md and latency.html into a folder.

    Args:
        folder: is made where it does not exist.
        measurements: in the order they were made.
        facts: what was run on what, for people.
        machine: the same for programs, the load included.
        ap: AP (0 to 100) by model's name, as far as it is known.
        warnings: what speaks against the numbers.

    Raises:
        OutputError: it cannot be written.
    """
    paths = [folder / f"latency.{suffix}" for suffix in ("json", "md", "html")]
    write_json(paths[0], {"facts": facts, "machine": machine, "ap": ap, "warnings": warnings, "measurements": _values(measurements)})
    parts = [f"## {title}\n\n{table.markdown()}" for title, table in tables(measurements).items()]
    notes = "\n".join([*(f"- {name}: {value}" for name, value in facts.items()), *(f"- warning: {warning}" for warning in warnings)])
    write_markdown(paths[1], ["# Latency", notes, *parts])
    sections = _sections(measurements, ap)
    names = ", ".join(dict.fromkeys(each.case.name for each in measurements))
    render_page(f"Latency: {names}", sections, paths[2], tiles=_tiles(measurements), facts=facts, warnings=warnings)
    return paths


def _values(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    ratios = speedups(measurements)
    return [_measurement_values(each, asdict(ratios[i]) if i in ratios else None) for i, each in enumerate(measurements)]


def _measurement_values(measurement: Measurement, speedup: dict[str, float] | None) -> dict[str, Any]:
    kinds = {}
    for kind in KINDS:
        found = {part: summary_of(measurement, kind, part) for part in ("total", *STAGES)}
        kinds[kind] = {part: asdict(summary) for part, summary in found.items() if summary is not None}
    rounds = [turn.calls for turn in measurement.rounds]
    return describe(measurement) | {"fps": fps(measurement), "times_faster": speedup, "ms": kinds, "rounds": rounds}


def _tiles(measurements: Sequence[Measurement]) -> list[Tile]:
    tiles = []
    for each in measurements:
        found = summary_of(each, END_TO_END)
        assert found is not None
        tiles.append(
            Tile(f"{each.case.name}, batch {each.case.batch}", f"{found.median:.1f} ms", f"{fps(each):.2f} fps, p95 {found.p95:.1f} ms")
        )
    return tiles


def _sections(measurements: Sequence[Measurement], ap: Mapping[str, float]) -> list[Section]:
    sections = [Section(title, table.html()) for title, table in tables(measurements).items()]
    figures = {"Distribution": (distribution_figure(measurements), "Share of calls that took at most so long.")}
    if len({each.case.batch for each in measurements}) > 1:
        figures["Throughput over batch"] = (throughput_figure(measurements), "")
    if ap:
        figures["AP over latency"] = (accuracy_figure(measurements, ap), "AP as recorded in the manifests or given with --ap.")
    return sections + [Section(title, embed_figure(figure, title), lead) for title, (figure, lead) in figures.items()]
