"""The figures of a campaign: cases by target and outcome, and every distinct kind of failure."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from datetime import UTC, datetime

from robustness.campaign import GOOD, OUTCOMES, Row

from tood_deploy import __version__
from tood_deploy.engines.self_test import processor


def table(rows: Iterable[Row]) -> str:
    """Return a table in Markdown: a line a target, a column an outcome."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.case.rsplit("/", 1)[0]][row.outcome] += 1
    lines = [f"| input | cases | {' | '.join(OUTCOMES)} |", f"|---|{'---:|' * (len(OUTCOMES) + 1)}"]
    for name, outcomes in [*counts.items(), ("**all**", sum(counts.values(), Counter()))]:
        cells = " | ".join(str(outcomes[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {name} | {outcomes.total()} | {cells} |")
    return "\n".join(lines)


def failures(rows: Iterable[Row]) -> str:
    """Return a line for each kind of failure: how often, where, and cases to run again."""
    kinds: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.outcome not in GOOD:
            kinds[row.outcome, row.place, row.line.split(":")[0][:60]].append(row)
    return "\n".join(
        f"{len(same)} x {outcome} {place}: {' '.join(same[0].line.split())[:160]} "
        f"({', '.join(row.case for row in same[:4])})"
        for (outcome, place, _), same in sorted(kinds.items(), key=lambda item: -len(item[1]))
    )


def markdown_report(rows: Collection[Row]) -> str:
    """Return the page of the results: date, machine, table, and what has failed."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    seconds = sum(row.seconds for row in rows)
    kills = sum(row.case.startswith(("kill ", "signal ")) for row in rows)
    limits = sum(" " in row.case for row in rows) - kills
    long = [row.mutation for row in rows if row.case.startswith("soak ")]
    machine = f"tood_deploy {__version__}, Python {platform.python_version()}, {processor()}"
    return f"""# Robustness

{date}, {machine}, one core: {len(rows) - kills - limits:,} mutated inputs,
{kills} kills and signals, {limits - len(long)} runs with limits and {len(long)} of a long video,
which took {seconds / 60:.0f} minutes. `make robustness` runs the campaign; a case is known by its
name, and `--case jpg/17` runs it again.

- clean error: one line, exit code 1 or 2; for a kill or signal: nothing unreadable, and the next
  run ended well and left nothing behind.
- memory, handles, disk, as inputs: the command has little more address space, file handles, or
  size of a file than at its start.
- soak: what a long run takes stays as it is{"".join(f" ({x})" for x in long)}.
- success: exit code 0.
- silent: exit code 0 and a wrong result: frames that are missing, files that cannot be read.

{table(rows)}

{failures(rows) or "Nothing else was seen."}
"""
