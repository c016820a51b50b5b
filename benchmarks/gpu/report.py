"""The results as JSON and as Markdown for docs/results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.gpu.nms_cost import NmsRow
from benchmarks.gpu.settings import Row
from tood_deploy.benchmark.html_report import Cell as TableCell
from tood_deploy.benchmark.html_report import Table, write_json, write_markdown
from tood_deploy.benchmark.latency.report import Summary, speedup, summarise


def write_report(
    stem: Path,
    rows: Sequence[Row],
    nms_rows: Sequence[NmsRow],
    facts: Mapping[str, Any],
    floors: Mapping[str, float],
    failures: Sequence[str],
) -> list[Path]:
    """Writes <stem>.json, with every single time, and <stem>.md.

    Args:
        stem: where to, without suffix.
        rows: of all cells, in order.
        nms_rows: of suppression alone.
        facts: what was run on what, as plain values.
        floors: milliseconds by the cell's name; empty on a CPU.
        failures: why the run counts as failed; empty where it does not.

    Raises:
        OutputError: it cannot be written.
    """
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    values = {
        "facts": facts,
        "floors_ms": floors,
        "failures": failures,
        "rows": [_row_values(row, rows) for row in rows],
    }
    write_json(paths[0], values | {"nms": [asdict(row) for row in nms_rows]})
    write_markdown(paths[1], _markdown(rows, nms_rows, facts, floors, failures))
    return paths


def _row_values(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    call, whole = summary_of(row.call_ms), summary_of(row.whole_ms)
    base = _baseline(row, rows)
    faster = asdict(speedup(base.call_ms, row.call_ms)) if base and call else None
    summaries = {
        "call": asdict(call) if call else None,
        "whole": asdict(whole) if whole else None,
        "times_faster_than_eager_fp32": faster,
    }
    return asdict(row) | {"cell": row.cell.name, "summary": summaries}


def summary_of(rounds: Sequence[Sequence[float]]) -> Summary | None:
    """Of all times of all rounds; None where there are none."""
    times = list(chain.from_iterable(rounds))
    return summarise(times) if times else None


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """PyTorch, eager, fp32 of the same cell, where it ran in as many rounds."""
    fitting = [
        each
        for each in rows
        if each.cell == row.cell and (each.how, each.precision) == ("eager", "fp32")
    ]
    return next(
        (each for each in fitting if each.call_ms and len(each.call_ms) == len(row.call_ms)), None
    )


def _markdown(
    rows: Sequence[Row],
    nms_rows: Sequence[NmsRow],
    facts: Mapping[str, Any],
    floors: Mapping[str, float],
    failures: Sequence[str],
) -> list[str]:
    parts = [
        "# Speed on a GPU" if floors else "# The GPU benchmark's flow, on a CPU",
        _facts_list(facts),
    ]
    parts += [f"**Failed:** {'; '.join(failures)}"] if failures else []
    for cell in dict.fromkeys(row.cell for row in rows):
        mine = [row for row in rows if row.cell == cell]
        parts += [f"## {cell.name}", _speed_table(mine, floors.get(cell.name)).markdown()]
        if notes := [
            f"- {row.name}: **{row.status}**. {row.note}".rstrip()
            for row in mine
            if row.note or row.status != "ok"
        ]:
            parts.append("\n".join(notes))
    return [
        *parts,
        *_parity_parts(rows),
        "## Suppression alone",
        _nms_table(nms_rows).markdown(),
        *_nms_notes(nms_rows),
    ]


def _facts_list(facts: Mapping[str, Any]) -> str:
    flat = {
        name: _in_words(value) if isinstance(value, Mapping) else value
        for name, value in facts.items()
    }
    return "\n".join(f"- {name}: {value}" for name, value in flat.items() if value)


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in values.items() if value not in ("", None, [])
    )


def _speed_table(rows: Sequence[Row], floor: float | None) -> Table:
    headers = (
        "runs",
        "call ms",
        "p90",
        "images/s",
        "x floor",
        "x eager fp32",
        "from frames ms",
        "p90",
        "memory MiB",
        "to open s",
    )
    note = (
        "Call: inputs on the device, detections in host memory, normalising and suppression included. From frames: decoded images "
        "in host memory to detections in their own pixels, scaled and padded one after the other."
    )
    if floor is not None:
        note += f" Floor: {floor:.2f} ms, the network's arithmetic at the GPU's highest bf16 rate, whatever the row's precision."
    return Table(headers, [_speed_cells(row, rows, floor) for row in rows], note)


def _speed_cells(row: Row, rows: Sequence[Row], floor: float | None) -> list[TableCell]:
    call, whole, base = summary_of(row.call_ms), summary_of(row.whole_ms), _baseline(row, rows)
    if row.status != "ok" or call is None:
        return [row.name, row.status, *[None] * 8]
    faster = speedup(base.call_ms, row.call_ms).value if base else None
    times = [
        call.median,
        call.p90,
        row.cell.batch / call.median * 1e3,
        call.median / floor if floor else None,
        faster,
    ]
    ends = [whole.median, whole.p90] if whole else [None, None]
    return [
        row.name,
        *times,
        *ends,
        None if row.memory_mib is None else round(row.memory_mib),
        round(row.open_seconds, 1),
    ]


def _parity_parts(rows: Sequence[Row]) -> list[str]:
    compared = [row for row in rows if row.parity]
    if not compared:
        return []
    headers = (
        "runs",
        "images",
        "detections",
        "matched",
        "added",
        "score off by",
        "box off by px",
        "outside tolerance",
        "slots differ",
    )
    keys = (
        "images",
        "reference",
        "matched",
        "added",
        "score_deviation",
        "box_deviation_px",
        "images_outside",
        "slots_that_differ",
    )
    cells = [[row.name, *(_digits(row.parity[key]) for key in keys)] for row in compared]
    note = "Against PyTorch in float32 on the CPU, on the same padded images; deviations are the largest of matched pairs."
    return [f"## Parity, {compared[0].cell.name}", Table(headers, cells, note).markdown()]


def _digits(value: float) -> TableCell:
    return value if isinstance(value, int) else f"{value:.2g}"


def _nms_table(rows: Sequence[NmsRow]) -> Table:
    headers = (
        "suppression",
        "batch",
        "candidates",
        "ms",
        "p90",
        "images that differ from the exact loop",
    )
    cells: list[list[TableCell]] = []
    for row in rows:
        found = summary_of(row.times_ms)
        times: list[TableCell] = (
            [f"{found.median:.3f}", f"{found.p90:.3f}"] if found else [row.status, None]
        )
        cells.append(
            [row.how, row.batch, row.candidates, *times, row.images_that_differ if found else None]
        )
    return Table(
        headers,
        cells,
        "Candidates: above the score threshold, in the image that has most. Positions are copied to the host.",
    )


def _nms_notes(rows: Sequence[NmsRow]) -> list[str]:
    notes = [
        f"- {row.how}, batch {row.batch}: **{row.status}**. {row.note}"
        for row in rows
        if row.status != "ok"
    ]
    return ["\n".join(notes)] if notes else []


def failures_of(rows: Sequence[Row], nms_rows: Sequence[NmsRow]) -> list[str]:
    """What makes the run fail: faults, and ways that are not equal to the reference. What is absent or refused does not."""
    from benchmarks.gpu.parity import verdict

    faults = [f"{row.cell.name}: {row.name}: {row.note}" for row in rows if row.status == "failed"]
    faults += [
        f"suppression, {row.how}, batch {row.batch}: {row.note}"
        for row in nms_rows
        if row.status == "failed"
    ]
    unequal = [
        f"{row.cell.name}: {row.name}: {verdict(row.parity)}" for row in rows if verdict(row.parity)
    ]
    return faults + unequal
