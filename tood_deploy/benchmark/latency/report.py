"""Reports of latencies: JSON with every single time, Markdown, one HTML page.

A `LatencyRun` comes in, tables, figures and files go out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tood_deploy.benchmark.html_report import (
    SERIES,
    Section,
    Table,
    Tile,
    embed_figure,
    new_figure,
    render_page,
    write_json,
    write_markdown,
)
from tood_deploy.benchmark.latency.measure import (
    Measurement,
    describe,
    fps,
    speedups,
    summary_of,
    total_of,
)
from tood_deploy.benchmark.latency.peak import Arithmetic
from tood_deploy.benchmark.latency.worker import END_TO_END, ENGINE, PARTS

STAGES = ("pre", *PARTS, "post")


def _case(measurement: Measurement) -> list[str | int]:
    height, width = measurement.opened.net_hw
    return [
        measurement.case.name,
        measurement.opened.precision,
        measurement.case.batch,
        f"{height}x{width}",
    ]


CASE = ("model", "precision", "batch", "input")


def overview_table(
    measurements: Sequence[Measurement], arithmetic: Arithmetic | None = None
) -> Table:
    """Return the most important numbers, narrow enough for a terminal.

    Args:
        measurements: of all models.
        arithmetic: of their networks and of the CPU, where it is known.
    """
    rows = []
    faster = speedups(measurements)
    for position, measurement in enumerate(measurements):
        whole, engine = total_of(measurement, END_TO_END), total_of(measurement, ENGINE)
        ratio = faster.get(position)
        shown = f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "1"
        name, _, batch, size = _case(measurement)
        numbers = (
            f"{whole.median:.1f}",
            f"{whole.p95:.1f}",
            f"{engine.median:.1f}",
            f"{fps(measurement):.2f}",
            shown,
            f"{measurement.peak_mib:.0f}",
            *([_share_of_peak(measurement, arithmetic)] if arithmetic else []),
        )
        rows.append([name, batch, size, *numbers])
    headers = ("model", "batch", "input", "median", "p95", "engine", "fps", "times faster", "MiB")
    headers += ("of peak",) if arithmetic else ()
    return Table(
        headers,
        rows,
        "Milliseconds a call, end to end from decoded frames; of the engine alone; "
        "times faster with its 95% interval."
        + (" Of peak: arithmetic of the engine, in units of float32's." if arithmetic else ""),
    )


def _share_of_peak(measurement: Measurement, arithmetic: Arithmetic) -> str:
    return f"{_gmacs_per_second(measurement, arithmetic) / arithmetic.peak.best:.2f}"


def _gmacs_per_second(measurement: Measurement, arithmetic: Arithmetic) -> float:
    """Return the multiply-adds a second of the engine alone, in billions: of its median call."""
    gmacs = arithmetic.gmacs[measurement.opened.preset, measurement.opened.net_hw]
    return 1000 * gmacs * measurement.case.batch / total_of(measurement, ENGINE).median


def peak_table(measurements: Sequence[Measurement], arithmetic: Arithmetic) -> Table:
    """Return how much of the CPU's float32 arithmetic each engine uses.

    Args:
        measurements: of all models.
        arithmetic: of their networks and of the CPU.
    """
    rows = [
        [
            *_case(measurement),
            f"{arithmetic.gmacs[measurement.opened.preset, measurement.opened.net_hw]:.4g}",
            f"{_gmacs_per_second(measurement, arithmetic):.1f}",
            _share_of_peak(measurement, arithmetic),
        ]
        for measurement in measurements
    ]
    note = (
        f"The CPU's peak, before and after the run: {arithmetic.peak}. Counted are the network's "
        "convolutions and matrix products; the time is the engine's median, post-processing "
        "included. Lower precisions may exceed float32's peak."
    )
    return Table((*CASE, "GMAC an image", "GMAC/s", "share of peak"), rows, note)


def latency_table(measurements: Sequence[Measurement], kind: str) -> Table:
    """Return milliseconds a call of one kind, and how many times faster than the first."""
    rows = []
    faster = speedups(measurements, kind)
    for position, measurement in enumerate(measurements):
        summary = total_of(measurement, kind)
        ratio = faster.get(position)
        shown = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "1"
        numbers = (
            summary.median,
            summary.mean,
            summary.p90,
            summary.p95,
            summary.p99,
            summary.spread,
        )
        rows.append(
            [
                *_case(measurement),
                *(f"{ms:.1f}" for ms in numbers),
                summary.count,
                f"{1000 * measurement.case.batch / summary.mean:.2f}",
                shown,
            ]
        )
    headers = (
        *CASE,
        "median",
        "mean",
        "p90",
        "p95",
        "p99",
        "spread",
        "calls",
        "fps",
        "times faster",
    )
    note = (
        "Milliseconds a call. Spread: between the first and third quartile. "
        "Times faster than the first model: ratio of medians, 95% interval."
    )
    return Table(headers, rows, note)


def has_transfers(measurements: Sequence[Measurement]) -> bool:
    """Return whether an engine call has more than one part in any of them: none has on a CPU."""
    return any(summary_of(measurement, ENGINE, "h2d") for measurement in measurements)


def stage_table(measurements: Sequence[Measurement], kind: str) -> Table:
    """Return where a call of one kind spends its time: medians."""
    rows = []
    stages = STAGES if kind == END_TO_END else PARTS
    for measurement in measurements:
        whole = total_of(measurement, kind).median
        summaries = [summary_of(measurement, kind, stage) for stage in stages]
        shown = [
            part and f"{part.median:.2f} ({100 * part.median / whole:.1f}%)" for part in summaries
        ]
        rows.append([*_case(measurement), *shown])
    note = (
        "Median milliseconds a call and share of the whole. h2d and d2h: to the GPU and back, with "
        "what the CPU does for that. A dash: on a CPU nothing is transferred."
    )
    return Table((*CASE, *stages), rows, note)


def resource_table(measurements: Sequence[Measurement]) -> Table:
    """Return memory, start-up, warm-up, size and energy."""
    rows = []
    for measurement in measurements:
        opened, warm = measurement.opened, measurement.opened.warm_ups[END_TO_END]
        whole_start = opened.load_s + opened.first_result_s
        start = f"{whole_start:.2f} ({opened.load_s:.2f} + {opened.first_result_s:.2f})"
        warmed = f"{warm.calls} calls, {warm.seconds:.1f} s" + (
            "" if warm.stable else ", NOT stable"
        )
        joules = (
            f"{measurement.joules / measurement.images:.2f}"
            if measurement.device_mib is not None
            else None
        )
        rows.append(
            [
                *_case(measurement),
                f"{measurement.peak_mib:.0f}",
                _rounded(measurement.device_mib),
                start,
                warmed,
                _rounded(measurement.artefact_mib),
                joules,
            ]
        )
    headers = (
        *CASE,
        "peak host MiB",
        "peak device MiB",
        "start-up s",
        "warm-up",
        "file MiB",
        "J an image",
    )
    note = (
        "Each model in a process of its own. Start-up: loading the runtime and the model, and the "
        "first result. What a runtime compiles for a shape after many calls is compiled before the "
        "warm-up. "
        f"Warm-up of the {END_TO_END} calls, after that of the {ENGINE} ones."
    )
    return Table(headers, rows, note)


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def throughput_table(measurements: Sequence[Measurement]) -> Table:
    """Return frames a second at batch 1, and the best over all batches."""
    rows = []
    keys = dict.fromkeys(
        (measurement.case.name, measurement.opened.net_hw) for measurement in measurements
    )
    for name, net_hw in keys:
        own = [
            measurement
            for measurement in measurements
            if (measurement.case.name, measurement.opened.net_hw) == (name, net_hw)
        ]
        single = next(
            (f"{fps(measurement):.2f}" for measurement in own if measurement.case.batch == 1), None
        )
        best = max(own, key=fps)
        rows.append([name, f"{net_hw[0]}x{net_hw[1]}", single, f"{fps(best):.2f}", best.case.batch])
    return Table(
        ("model", "input", "fps at batch 1", "best fps", "at batch"),
        rows,
        "End to end from decoded frames, one call after another.",
    )


def distribution_figure(measurements: Sequence[Measurement]) -> Figure:
    """Draw the share of calls that took at most so long, of each measurement."""
    figure, axes = new_figure()
    for i, measurement in enumerate(measurements):
        times = np.sort([ms for turn in measurement.times_ms(END_TO_END) for ms in turn])
        label = f"{measurement.case.name}, batch {measurement.case.batch}"
        axes.step(
            times,
            np.arange(1, len(times) + 1) / len(times) * 100,
            where="post",
            label=label,
            color=SERIES[i % len(SERIES)],
        )
    axes.set(xlabel="milliseconds a call, end to end", ylabel="% of calls at most", ylim=(0, 101))
    axes.set_xlim(left=0)
    _legend(figure)
    return figure


def throughput_figure(measurements: Sequence[Measurement]) -> Figure:
    """Draw frames a second over the batch, a line a model."""
    figure, axes = new_figure()
    names = dict.fromkeys(measurement.case.name for measurement in measurements)
    for i, name in enumerate(names):
        points = sorted(
            (measurement.case.batch, fps(measurement))
            for measurement in measurements
            if measurement.case.name == name
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=SERIES[i % len(SERIES)])
    axes.set(
        xlabel="batch",
        ylabel="frames a second, end to end",
        xticks=sorted({measurement.case.batch for measurement in measurements}),
    )
    axes.set_ylim(bottom=0)
    _legend(figure)
    return figure


def accuracy_figure(measurements: Sequence[Measurement], ap: Mapping[str, float]) -> Figure:
    """Draw AP over the median latency at the smallest batch.

    Args:
        measurements: all of them.
        ap: points of AP by model's name.
    """
    figure, axes = new_figure()
    smallest = min(measurement.case.batch for measurement in measurements)
    shown = [
        measurement
        for measurement in measurements
        if measurement.case.batch == smallest and measurement.case.name in ap
    ]
    for i, measurement in enumerate(shown):
        name = measurement.case.name
        median = total_of(measurement, END_TO_END).median
        axes.scatter(median, ap[name], color=SERIES[i % len(SERIES)], label=name)
    axes.set(xlabel=f"median milliseconds a call, end to end, batch {smallest}", ylabel="AP")
    axes.set_xlim(left=0)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Put a legend below the axes, where it hides no line."""
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2)


KINDS = (END_TO_END, ENGINE)


def tables(
    measurements: Sequence[Measurement], arithmetic: Arithmetic | None = None
) -> dict[str, Table]:
    """Return all tables by their titles.

    Args:
        measurements: of all models.
        arithmetic: of their networks and of the CPU, where it is known.
    """
    by_title = {
        "End to end": latency_table(measurements, END_TO_END),
        "Engine only": latency_table(measurements, ENGINE),
        "Parts of an end-to-end call": stage_table(measurements, END_TO_END),
    }
    if has_transfers(measurements):
        by_title["Parts of an engine call"] = stage_table(measurements, ENGINE)
    if arithmetic:
        by_title["Share of peak"] = peak_table(measurements, arithmetic)
    return by_title | {
        "Throughput": throughput_table(measurements),
        "Memory and start-up": resource_table(measurements),
    }


@dataclass(frozen=True, eq=False)
class LatencyRun:
    """What a report is made of.

    Attributes:
        measurements: in the order they were made.
        facts: what was run on what, for people.
        machine: the same for programs, the load included.
        ap: AP (0 to 100) by model's name, as far as it is known.
        warnings: what speaks against the numbers.
        arithmetic: of the networks and of the CPU, where it is known.
    """

    measurements: Sequence[Measurement]
    facts: Mapping[str, str]
    machine: Mapping[str, object]
    ap: Mapping[str, float]
    warnings: Sequence[str]
    arithmetic: Arithmetic | None = None


def write_latency_reports(folder: Path, run: LatencyRun) -> list[Path]:
    """Write latency.json, latency.md and latency.html into a folder.

    Args:
        folder: is made where it does not exist.
        run: what was measured.

    Raises:
        OutputError: it cannot be written.
    """
    paths = [folder / f"latency.{suffix}" for suffix in ("json", "md", "html")]
    measurements = run.measurements
    values = {name: getattr(run, name) for name in ("facts", "machine", "ap", "warnings")}
    peak = {"peak": asdict(run.arithmetic.peak)} if run.arithmetic else {}
    write_json(paths[0], values | peak | {"measurements": _values(measurements)})
    by_title = tables(measurements, run.arithmetic)
    parts = [f"## {title}\n\n{table.markdown()}" for title, table in by_title.items()]
    notes = [f"- {name}: {value}" for name, value in run.facts.items()]
    notes += [f"- warning: {warning}" for warning in run.warnings]
    write_markdown(paths[1], ["# Latency", "\n".join(notes), *parts])
    names = ", ".join(dict.fromkeys(measurement.case.name for measurement in measurements))
    render_page(
        f"Latency: {names}",
        _sections(by_title, measurements, run.ap),
        paths[2],
        tiles=_tiles(measurements),
        facts=run.facts,
        warnings=run.warnings,
    )
    return paths


def _values(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    ratios = speedups(measurements)
    return [
        _measurement_values(measurement, asdict(ratios[i]) if i in ratios else None)
        for i, measurement in enumerate(measurements)
    ]


def _measurement_values(
    measurement: Measurement, speedup: dict[str, float] | None
) -> dict[str, Any]:
    kinds = {}
    for kind in KINDS:
        parts = {part: summary_of(measurement, kind, part) for part in ("total", *STAGES)}
        kinds[kind] = {part: asdict(summary) for part, summary in parts.items() if summary}
    rounds = [turn.calls for turn in measurement.rounds]
    return describe(measurement) | {
        "fps": fps(measurement),
        "times_faster": speedup,
        "ms": kinds,
        "rounds": rounds,
    }


def _tiles(measurements: Sequence[Measurement]) -> list[Tile]:
    tiles = []
    for measurement in measurements:
        whole = total_of(measurement, END_TO_END)
        name = f"{measurement.case.name}, batch {measurement.case.batch}"
        remark = f"{fps(measurement):.2f} fps, p95 {whole.p95:.1f} ms"
        tiles.append(Tile(name, f"{whole.median:.1f} ms", remark))
    return tiles


def _sections(
    by_title: Mapping[str, Table], measurements: Sequence[Measurement], ap: Mapping[str, float]
) -> list[Section]:
    sections = [Section(title, table.html()) for title, table in by_title.items()]
    figures = {
        "Distribution": (
            distribution_figure(measurements),
            "Share of calls that took at most so long.",
        )
    }
    if len({measurement.case.batch for measurement in measurements}) > 1:
        figures["Throughput over batch"] = (throughput_figure(measurements), "")
    if ap:
        figures["AP over latency"] = (
            accuracy_figure(measurements, ap),
            "AP as recorded in the manifests or given with --ap.",
        )
    return sections + [
        Section(title, embed_figure(figure, title), lead)
        for title, (figure, lead) in figures.items()
    ]
