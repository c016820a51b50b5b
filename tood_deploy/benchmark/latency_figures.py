"""Figures of latencies: distribution, throughput over batch, AP over latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from tood_deploy.benchmark.figure import SERIES, new_figure
from tood_deploy.benchmark.latency import Measurement
from tood_deploy.benchmark.latency_tables import fps, summary_of
from tood_deploy.benchmark.latency_worker import END_TO_END


def distribution_figure(measurements: Sequence[Measurement]) -> Figure:
    """Share of calls that took at most so long, of each measurement."""
    figure, axes = new_figure()
    for i, each in enumerate(measurements):
        times = np.sort([ms for turn in each.times_ms(END_TO_END) for ms in turn])
        label = f"{each.case.name}, batch {each.case.batch}"
        axes.step(times, np.arange(1, len(times) + 1) / len(times) * 100, where="post", label=label, color=SERIES[i % len(SERIES)])
    axes.set(xlabel="milliseconds a call, end to end", ylabel="% of calls at most", ylim=(0, 101))
    axes.set_xlim(left=0)
    _legend(figure)
    return figure


def throughput_figure(measurements: Sequence[Measurement]) -> Figure:
    """Frames a second over the batch, a line a model."""
    figure, axes = new_figure()
    names = dict.fromkeys(each.case.name for each in measurements)
    for i, name in enumerate(names):
        points = sorted((each.case.batch, fps(each)) for each in measurements if each.case.name == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=SERIES[i % len(SERIES)])
    axes.set(xlabel="batch", ylabel="frames a second, end to end", xticks=sorted({each.case.batch for each in measurements}))
    axes.set_ylim(bottom=0)
    _legend(figure)
    return figure


def accuracy_figure(measurements: Sequence[Measurement], ap: Mapping[str, float]) -> Figure:
    """AP over the median latency at the smallest batch."""
    figure, axes = new_figure()
    smallest = min(each.case.batch for each in measurements)
    for i, each in enumerate(each for each in measurements if each.case.batch == smallest and each.case.name in ap):
        found = summary_of(each, END_TO_END)
        assert found is not None
        axes.scatter(found.median, ap[each.case.name], color=SERIES[i % len(SERIES)], label=each.case.name)
    axes.set(xlabel=f"median milliseconds a call, end to end, batch {smallest}", ylabel="AP")
    axes.set_xlim(left=0)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Below the axes, where it hides no line."""
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2)
