"""`tood-bench latency` from file names to tables and reports."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from tood_deploy import __version__
from tood_deploy.benchmark.html_report import Table, show
from tood_deploy.benchmark.latency.machine import (
    GpuMeter,
    Load,
    LoadWatch,
    Machine,
    describe_machine,
)
from tood_deploy.benchmark.latency.measure import Measurement, Plan, measure
from tood_deploy.benchmark.latency.report import overview_table, write_latency_reports
from tood_deploy.benchmark.latency.worker import END_TO_END, Case
from tood_deploy.files import file_sha256
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.manifest import read_manifest
from tood_deploy.manifest_sections import BenchmarkVerdict

WIDE = 160
FEWEST_ROUNDS = 6


def run_latency(
    plan: Plan, output: Path, ap: Mapping[str, float], command: str, quiet: bool
) -> list[Measurement]:
    """Measures, writes the reports, and prints the most important tables.

    Args:
        plan: what to measure.
        output: folder for the reports.
        ap: AP (0 to 100) by model's name, in place of what the manifests say.
        command: the command line, for the report.
        quiet: print nothing.

    Raises:
        ToodError: a model cannot be opened or run, or the reports cannot be written.
    """
    machine, watch = describe_machine(), LoadWatch()
    on_gpu = any(case.device == "cuda" for case in plan.cases)
    with closing(GpuMeter()) if on_gpu else nullcontext() as meter:
        measurements = measure(
            plan, meter, lambda text: None if quiet else print(text, file=sys.stderr)
        )
        account = {"gpu": meter.account.to_dict()} if meter else {}
    load = watch.stop()
    found = recorded_ap(each.case for each in measurements) | dict(ap)
    values = machine.to_dict() | account | {"load": vars(load)}
    write_latency_reports(
        output,
        measurements,
        _facts(plan, machine, load, account, measurements, command),
        values,
        found,
        _warnings(measurements, load),
    )
    if not quiet:
        _print(measurements, _warnings(measurements, load))
    return measurements


def recorded_ap(cases: Iterable[Case]) -> dict[str, float]:
    """AP by name that parity runs left in the manifests: of artefacts, and of the checkpoints that these were compared with."""
    models = {case.name: Path(case.model) for case in cases}
    verdicts = {name: _verdict(path) for name, path in models.items()}
    references = {
        verdict.reference_sha256: verdict.ap("reference")
        for verdict in verdicts.values()
        if verdict
    }
    found = {name: verdict.ap("artefact") for name, verdict in verdicts.items() if verdict}
    for name, path in models.items():
        if not verdicts[name] and path.is_file():
            found[name] = references.get(file_sha256(path))
    return {name: ap for name, ap in found.items() if ap is not None}


def _verdict(path: Path) -> BenchmarkVerdict | None:
    """Return what a parity run left in the manifest of an artefact.

    None for checkpoints, also beside an artefact of the same name.
    """
    manifest = read_manifest(path) if path.suffix.lower() in ARTEFACT_SUFFIXES else None
    return manifest.parity.benchmark if manifest and manifest.parity else None


def _facts(
    plan: Plan,
    machine: Machine,
    load: Load,
    account: Mapping[str, object],
    measurements: Sequence[Measurement],
    command: str,
) -> dict[str, str]:
    threads = plan.cases[0].threads
    facts = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "CPU": f"{machine.cpu}, {machine.cores} logical cores, {machine.usable_cores} usable, governor {machine.governor}",
        "device": ", ".join(dict.fromkeys(case.device for case in plan.cases)),
        "threads": f"{threads} of each inference" if threads else "as many as the runtime chooses",
        "load": f"average {load.before} before, {load.after} after; others kept {load.others:.2f} cores busy",
        "memory": f"{machine.memory_gib} GiB",
        "software": f"tood_deploy {__version__}, Python {machine.python}, {machine.system}; "
        + "; ".join(dict.fromkeys(each.opened.engine for each in measurements)),
        "images": "; ".join(dict.fromkeys(each.opened.images for each in measurements)),
        "method": f"{plan.rounds} rounds; in each, every model in turn, in random order, {plan.turn_s:g} s of each kind of call",
    }
    return facts | {name: str(value) for name, value in account.items()}


def _warnings(measurements: Sequence[Measurement], load: Load) -> list[str]:
    found = [load.noticed] if load.noticed else []
    rounds = len(measurements[0].rounds)
    if rounds < FEWEST_ROUNDS:
        found.append(
            f"{rounds} rounds are too few for an interval to mean much; expected at least {FEWEST_ROUNDS}: raise --rounds"
        )
    for each in measurements:
        if not each.opened.warm_ups[END_TO_END].stable:
            found.append(
                f"{each.case.name}, batch {each.case.batch}: was not stable when its warm-up time ran out; raise --warmup-seconds"
            )
        if not each.opened.detections:
            found.append(
                f"{each.case.name}, batch {each.case.batch}: found nothing in the images, so post-processing had little to do"
            )
    return found


def _print(measurements: Sequence[Measurement], warnings: Sequence[str]) -> None:
    print_table(overview_table(measurements))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_table(table: Table) -> None:
    """Prints a table on stdout; as wide as it needs to be where that is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    shown = RichTable(caption=table.note, caption_justify="left")
    for number, header in enumerate(table.headers):
        shown.add_column(header, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*(show(cell) for cell in row))
    console.print(shown)
