"""Tables of latencies: what the user sees on the terminal and in the reports. Measurements in, `Table` out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tood_deploy.benchmark.engine_call import PARTS
from tood_deploy.benchmark.latency import Measurement
from tood_deploy.benchmark.latency_worker import END_TO_END, ENGINE
from tood_deploy.benchmark.report import Table
from tood_deploy.benchmark.statistics import Ratio, Summary, speedup, summarise

STAGES = ("pre", *PARTS, "post")


def summary_of(measurement: Measurement, kind: str, part: str = "total") -> Summary | None:
    """Over all rounds; None where the part does not exist on this device."""
    times = [ms for turn in measurement.times_ms(kind, part) for ms in turn]
    return summarise(times) if times else None


def fps(measurement: Measurement) -> float:
    """Pictures a second, end to end, one call after another."""
    found = summary_of(measurement, END_TO_END)
    assert found is not None
    return 1000 * measurement.case.batch / found.mean


def groups(measurements: Sequence[Measurement]) -> Iterator[list[Measurement]]:
    """Those that were measured together: the same size asked for, and batch."""
    for _, group in itertools.groupby(measurements, key=lambda each: (each.case.imgsz, each.case.batch)):
        yield list(group)


def speedups(measurements: Sequence[Measurement], kind: str = END_TO_END) -> dict[int, Ratio]:
    """Times faster than the first of the same group, by position; the first itself has none."""
    found, position = {}, 0
    for group in groups(measurements):
        for each in group:
            if each is not group[0]:
                found[position] = speedup(group[0].times_ms(kind), each.times_ms(kind))
            position += 1
    return found


def _case(measurement: Measurement) -> list[str | int]:
    height, width = measurement.opened.net_hw
    return [measurement.case.name, measurement.opened.precision, measurement.case.batch, f"{height}x{width}"]


CASE = ("model", "precision", "batch", "input")


def overview_table(measurements: Sequence[Measurement]) -> Table:
    """The most important numbers, narrow enough for a terminal."""
    rows = []
    faster = speedups(measurements)
    for position, each in enumerate(measurements):
        whole, engine = summary_of(each, END_TO_END), summary_of(each, ENGINE)
        assert whole is not None
        assert engine is not None
        ratio = faster.get(position)
        shown = f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "1"
        name, _, batch, size = _case(each)
        numbers = (f"{whole.median:.1f}", f"{whole.p95:.1f}", f"{engine.median:.1f}", f"{fps(each):.2f}", shown, f"{each.peak_mib:.0f}")
        rows.append([name, batch, size, *numbers])
    headers = ("model", "batch", "input", "median", "p95", "engine", "fps", "times faster", "MiB")
    return Table(
        headers, rows, "Milliseconds a call, end to end from decoded frames; of the engine alone; times faster with its 95% interval."
    )


def latency_table(measurements: Sequence[Measurement], kind: str) -> Table:
    """Milliseconds a call of one kind, and how many times faster than the first."""
    rows = []
    faster = speedups(measurements, kind)
    for position, each in enumerate(measurements):
        found = summary_of(each, kind)
        assert found is not None
        ratio = faster.get(position)
        shown = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "1"
        numbers = (found.median, found.mean, found.p90, found.p95, found.p99, found.spread)
        rows.append([*_case(each), *(f"{ms:.1f}" for ms in numbers), found.count, f"{1000 * each.case.batch / found.mean:.2f}", shown])
    headers = (*CASE, "median", "mean", "p90", "p95", "p99", "spread", "calls", "fps", "times faster")
    note = (
        "Milliseconds a call. Spread: between the first and third quartile. "
        "Times faster than the first model: ratio of medians, 95% interval."
    )
    return Table(headers, rows, note)


def has_transfers(measurements: Sequence[Measurement]) -> bool:
    """Whether an engine call has more than one part in any of them: none has on a CPU."""
    return any(summary_of(each, ENGINE, "h2d") for each in measurements)


def stage_table(measurements: Sequence[Measurement], kind: str) -> Table:
    """Where a call of one kind spends its time: medians."""
    rows = []
    stages = STAGES if kind == END_TO_END else PARTS
    for each in measurements:
        medians = [found.median if (found := summary_of(each, kind, stage)) else None for stage in stages]
        total = summary_of(each, kind)
        assert total is not None
        shown = [None if ms is None else f"{ms:.2f} ({100 * ms / total.median:.1f}%)" for ms in medians]
        rows.append([*_case(each), *shown])
    note = (
        "Median milliseconds a call and share of the whole. h2d and d2h: to the GPU and back, with what the CPU does for that. "
        "A dash: on a CPU nothing is transferred."
    )
    return Table((*CASE, *stages), rows, note)


def resource_table(measurements: Sequence[Measurement]) -> Table:
    """Memory, start-up, warm-up, size, energy."""
    rows = []
    for each in measurements:
        opened, warm = each.opened, each.opened.warm_ups[END_TO_END]
        start = f"{opened.load_s + opened.first_result_s:.2f} ({opened.load_s:.2f} + {opened.first_result_s:.2f})"
        warmed = f"{warm.calls} calls, {warm.seconds:.1f} s" + ("" if warm.stable else ", NOT stable")
        joules = f"{each.joules / each.images:.2f}" if each.device_mib is not None else None
        rows.append([*_case(each), f"{each.peak_mib:.0f}", _rounded(each.device_mib), start, warmed, _rounded(each.artefact_mib), joules])
    headers = (*CASE, "peak host MiB", "peak device MiB", "start-up s", "warm-up", "file MiB", "J an image")
    note = (
        "Each model in a process of its own. Start-up: loading the runtime and the model, and the first result. "
        "What a runtime compiles for a shape after many calls is compiled before the warm-up. "
        f"Warm-up of the {END_TO_END} calls, after that of the {ENGINE} ones."
    )
    return Table(headers, rows, note)


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def throughput_table(measurements: Sequence[Measurement]) -> Table:
    """Frames a second at batch 1, and the best over all batches."""
    rows = []
    keys = dict.fromkeys((each.case.name, each.opened.net_hw) for each in measurements)
    for name, net_hw in keys:
        own = [each for each in measurements if (each.case.name, each.opened.net_hw) == (name, net_hw)]
        single = next((f"{fps(each):.2f}" for each in own if each.case.batch == 1), None)
        best = max(own, key=fps)
        rows.append([name, f"{net_hw[0]}x{net_hw[1]}", single, f"{fps(best):.2f}", best.case.batch])
    return Table(
        ("model", "input", "fps at batch 1", "best fps", "at batch"), rows, "End to end from decoded frames, one call after another."
    )
