"""Write the results as JSON and as Markdown for docs/results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.gpu.nms_cost import NmsRow
from benchmarks.gpu.parity import verdict
from benchmarks.gpu.settings import Row
from tood_deploy.benchmark.html_report import Cell as TableCell
from tood_deploy.benchmark.html_report import Table, write_json, write_markdown
from tood_deploy.benchmark.latency.measure import Summary, speedup, summarise


def write_report(
    stem: Path,
    rows: Sequence[Row],
    nms_rows: Sequence[NmsRow],
    facts: Mapping[str, Any],
    floors: Mapping[str, float],
    failures: Sequence[str],
) -> list[Path]:
    """Write <stem>.json, with every single time, and <stem>.md.

    Args:
        stem: where to, without suffix.
        rows: of all cells, in order.
        nms_rows: of suppression alone.
        facts: machine and settings of the run, as plain values.
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
    """Return a row as plain values, with summaries and the comparison within `rows`."""
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
    """Summarise the times of all rounds; None where there are none."""
    times = list(chain.from_iterable(rounds))
    return summarise(times) if times else None


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row of eager fp32 PyTorch in the same cell, if it ran in as many rounds."""
    for other in rows:
        if (other.cell, other.how, other.precision) == (row.cell, "eager", "fp32"):
            return other if other.call_ms and len(other.call_ms) == len(row.call_ms) else None
    return None


def _markdown(
    rows: Sequence[Row],
    nms_rows: Sequence[NmsRow],
    facts: Mapping[str, Any],
    floors: Mapping[str, float],
    failures: Sequence[str],
) -> list[str]:
    """Return the paragraphs of the Markdown file; arguments as of `write_report`."""
    title = "# Speed on a GPU" if floors else "# The GPU benchmark's flow, on a CPU"
    parts = [title, _facts_list(facts)]
    parts += [f"**Failed:** {'; '.join(failures)}"] if failures else []
    for cell in dict.fromkeys(row.cell for row in rows):
        in_cell = [row for row in rows if row.cell == cell]
        parts += [f"## {cell.name}", _speed_table(in_cell, floors.get(cell.name)).markdown()]
        noted = [row for row in in_cell if row.note or row.status != "ok"]
        notes = [f"- {row.name}: **{row.status}**. {row.note}".rstrip() for row in noted]
        parts += ["\n".join(notes)] if notes else []
    parts += _parity_parts(rows) + _kernel_parts(rows, bool(floors))
    return [*parts, "## Suppression alone", _nms_table(nms_rows).markdown(), *_nms_notes(nms_rows)]


def _facts_list(facts: Mapping[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        text = _joined(value) if isinstance(value, Mapping) else value
        lines += [f"- {name}: {text}"] if text else []
    return "\n".join(lines)


def _joined(values: Mapping[str, Any]) -> str:
    filled = {name: value for name, value in values.items() if value not in ("", None, [])}
    return ", ".join(f"{name} {value}" for name, value in filled.items())


def _speed_table(rows: Sequence[Row], floor: float | None) -> Table:
    """Return the table of one cell's rows; `floor` is in milliseconds, None on a CPU."""
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
        "Call: inputs on the device, detections in host memory, normalising and suppression "
        "included. From frames: decoded images in host memory to detections in their own pixels, "
        "scaled and padded one after the other."
    )
    if floor is not None:
        note += (
            f" Floor: {floor:.2f} ms, the network's arithmetic at the GPU's highest bf16 rate, "
            "whatever the row's precision."
        )
    return Table(headers, [_speed_cells(row, rows, floor) for row in rows], note)


def _speed_cells(row: Row, rows: Sequence[Row], floor: float | None) -> list[TableCell]:
    """Return the table's cells of one row; other arguments as of `_speed_table`."""
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


def _kernel_parts(rows: Sequence[Row], on_gpu: bool) -> list[str]:
    parts: list[str] = []
    for row in rows:
        if row.kernels:
            kind = "Kernels" if on_gpu else "Operators"
            cells: list[list[TableCell]] = [
                [one.name[:100], round(one.launches, 1), round(one.ms, 3)] for one in row.kernels
            ]
            total = sum(one.ms for one in row.kernels)
            note = (
                f"Of a call, slowest first, by PyTorch's profiler after the times above: "
                f"{sum(one.launches for one in row.kernels):.0f} launches, {total:.2f} ms."
            )
            table = Table((kind.lower()[:-1], "launches", "ms"), cells, note)
            parts += [f"## {kind} of {row.name}, {row.cell.name}", table.markdown()]
    return parts


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
    note = (
        "Against PyTorch in float32 on the CPU, on the same padded images; deviations are the "
        "largest of matched pairs."
    )
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
        first: list[TableCell] = [row.how, row.batch, row.candidates]
        if times := summary_of(row.times_ms):
            numbers = [f"{times.median:.3f}", f"{times.p90:.3f}", row.images_that_differ]
            cells.append([*first, *numbers])
        else:
            cells.append([*first, row.status, None, None])
    note = (
        "Candidates: above the score threshold, in the image that has the most. Positions are "
        "copied to the host."
    )
    return Table(headers, cells, note)


def _nms_notes(rows: Sequence[NmsRow]) -> list[str]:
    problems = [row for row in rows if row.status != "ok"]
    notes = [f"- {row.how}, batch {row.batch}: **{row.status}**. {row.note}" for row in problems]
    return ["\n".join(notes)] if notes else []


def failures_of(rows: Sequence[Row], nms_rows: Sequence[NmsRow]) -> list[str]:
    """Return why the run fails: faults, and variants that are not equal to the reference.

    Variants that are absent or refused are no reason.
    """
    failures = [
        f"{row.cell.name}: {row.name}: {row.note}" for row in rows if row.status == "failed"
    ]
    for row in nms_rows:
        if row.status == "failed":
            failures.append(f"suppression, {row.how}, batch {row.batch}: {row.note}")
    for row in rows:
        if problem := verdict(row.parity):
            failures.append(f"{row.cell.name}: {row.name}: {problem}")
    return failures
