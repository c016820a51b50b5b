"""List the kernels that take the most of a call's time, as PyTorch's profiler counts them.

A call in, kernels out; knows no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

CALLS, KERNELS = 5, 60


@dataclass(frozen=True)
class KernelTime:
    """One kernel; on a CPU, one operator.

    Attributes:
        name: of the library that it comes from.
        launches: in a call.
        ms: of a call that it takes.
    """

    name: str
    launches: float
    ms: float


def profile_call(call: Callable[[], object], device: str) -> list[KernelTime]:
    """Return the kernels of a call that take longest, slowest first; 60 at most.

    Args:
        call: ends with its result in host memory.
        device: "cuda" or "cpu".
    """
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else []
    with profile(activities=[ProfilerActivity.CPU, *activities]) as measured:
        for _ in range(CALLS):
            call()
    times = [
        KernelTime(
            event.key,
            event.count / CALLS,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / CALLS / 1e3,
        )
        for event in measured.key_averages()
        if not on_gpu or event.device_type.name == "CUDA"
    ]
    return sorted(times, key=lambda one: -one.ms)[:KERNELS]
