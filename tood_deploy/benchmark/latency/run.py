"""`tood-bench latency` from file names to tables and reports.

A `LatencyPlan` comes in; reports, printed tables and the measurements go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from tood_deploy import __version__
from tood_deploy.benchmark.latency.machine import (
    GpuMeter,
    Load,
    LoadWatch,
    Machine,
    describe_machine,
)
from tood_deploy.benchmark.latency.measure import LatencyPlan, Measurement, measure
from tood_deploy.benchmark.latency.peak import Arithmetic, Peak, measure_peak, network_cost
from tood_deploy.benchmark.latency.report import LatencyRun, overview_table, write_latency_reports
from tood_deploy.benchmark.latency.worker import END_TO_END, Case
from tood_deploy.files import file_sha256
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.manifest import read_manifest
from tood_deploy.manifest_sections import BenchmarkVerdict
from tood_deploy.reporter import Reporter

MIN_ROUNDS = 6


def run_latency(
    plan: LatencyPlan, output: Path, *, ap: Mapping[str, float], command: str, reporter: Reporter
) -> list[Measurement]:
    """Measure, write the reports, and print the most important table.

    Args:
        plan: what to measure.
        output: folder for the reports.
        ap: AP (0 to 100) by model's name, in place of what the manifests say.
        command: the command line, for the report.
        reporter: shows progress, the table and warnings.

    Raises:
        ToodError: a model cannot be opened or run, or the reports cannot be written.
    """
    machine, watch = describe_machine(), LoadWatch()
    on_gpu = any(case.device == "cuda" for case in plan.cases)
    # Of an image in slices the network's cost is not that of one input.
    sliced = any("slicing" in case.options for case in plan.cases)
    peak = None if on_gpu or sliced else _measure_peak(plan)
    with closing(GpuMeter()) if on_gpu else nullcontext() as meter:
        measurements = measure(plan, reporter, meter)
        account = {"gpu": meter.account.to_dict()} if meter else {}
    load = watch.stop()
    warnings = _warnings(measurements, load)
    arithmetic = _arithmetic(measurements, peak, plan)
    if arithmetic is None and not (on_gpu or sliced):
        warnings.append(
            "share of peak is not shown: counting needs torch and onnx, of the extra export"
        )
    run = LatencyRun(
        measurements,
        facts={"command": command}
        | _facts(plan, machine, load, measurements)
        | {name: str(value) for name, value in account.items()},
        machine=machine.to_dict() | account | {"load": vars(load)},
        ap=recorded_ap(measurement.case for measurement in measurements) | dict(ap),
        warnings=warnings,
        arithmetic=arithmetic,
    )
    write_latency_reports(output, run)
    reporter.table(overview_table(measurements, arithmetic).rich())
    for warning in warnings:
        reporter.warn(warning)
    return measurements


def _measure_peak(plan: LatencyPlan) -> Peak | None:
    """Return what the CPU reaches with the plan's threads; None without onnx or torch."""
    if not all(find_spec(package) for package in ("onnx", "torch")):
        return None
    return measure_peak(plan.cases[0].threads)


def _arithmetic(
    measurements: Sequence[Measurement], before: Peak | None, plan: LatencyPlan
) -> Arithmetic | None:
    """Return the arithmetic of all networks, and the best of the CPU before and after.

    Args:
        measurements: of all models.
        before: what the CPU reached before them; None where that is not known.
        plan: of the measurements.
    """
    after = _measure_peak(plan) if before else None
    if before is None or after is None:
        return None
    networks = {(each.opened.preset, each.opened.net_hw) for each in measurements}
    return Arithmetic(
        before.better_of(after), {network: network_cost(*network)[1] for network in networks}
    )


def recorded_ap(cases: Iterable[Case]) -> dict[str, float]:
    """Return AP in points by name, as parity runs left it in the manifests.

    That is AP of artefacts, and of the checkpoints that these were compared with.
    """
    models = {case.name: Path(case.model) for case in cases}
    verdicts = {name: _verdict(path) for name, path in models.items()}
    references = {
        verdict.reference_sha256: verdict.ap("reference")
        for verdict in verdicts.values()
        if verdict
    }
    recorded = {name: verdict.ap("artefact") for name, verdict in verdicts.items() if verdict}
    for name, path in models.items():
        if not verdicts[name] and path.is_file():
            recorded[name] = references.get(file_sha256(path))
    return {name: ap for name, ap in recorded.items() if ap is not None}


def _verdict(path: Path) -> BenchmarkVerdict | None:
    """Return what a parity run left in the manifest of an artefact.

    None for checkpoints, also beside an artefact of the same name.
    """
    manifest = read_manifest(path) if path.suffix.lower() in ARTEFACT_SUFFIXES else None
    return manifest.parity.benchmark if manifest and manifest.parity else None


def _facts(
    plan: LatencyPlan, machine: Machine, load: Load, measurements: Sequence[Measurement]
) -> dict[str, str]:
    threads = plan.cases[0].threads
    cores = f"{machine.cores} logical cores, {machine.usable_cores} usable"
    engines = dict.fromkeys(measurement.opened.engine for measurement in measurements)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "CPU": f"{machine.cpu}, {cores}, governor {machine.governor}",
        "device": ", ".join(dict.fromkeys(case.device for case in plan.cases)),
        "threads": f"{threads} of each inference" if threads else "as many as the runtime chooses",
        "load": str(load),
        "memory": f"{machine.memory_gib} GiB",
        "software": f"tood_deploy {__version__}, Python {machine.python}, {machine.system}; "
        + "; ".join(engines),
        "images": "; ".join(
            dict.fromkeys(measurement.opened.images for measurement in measurements)
        ),
        "method": f"{plan.rounds} rounds; in each, every model in turn, in random order, "
        f"{plan.turn_s:g} s of each kind of call",
    }


def _warnings(measurements: Sequence[Measurement], load: Load) -> list[str]:
    warnings = [load.warning] if load.warning else []
    rounds = len(measurements[0].rounds)
    if rounds < MIN_ROUNDS:
        warnings.append(
            f"{rounds} rounds are too few for an interval to mean much; "
            f"expected at least {MIN_ROUNDS}: raise --rounds"
        )
    for measurement in measurements:
        who = f"{measurement.case.name}, batch {measurement.case.batch}"
        if not measurement.opened.warm_ups[END_TO_END].stable:
            warnings.append(
                f"{who}: was not stable when its warm-up time ran out; raise --warmup-seconds"
            )
        if not measurement.opened.detections:
            warnings.append(
                f"{who}: found nothing in the images, so post-processing had little to do"
            )
    return warnings
