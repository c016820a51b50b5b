"""The machine a benchmark ran on, and how busy it was with other things."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

# What decides how fast a CPU computes, and whether it adds 8-bit products exactly; by the name that Linux has for it.
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_int8": "AMX",
}
CPU_FOLDER = Path("/sys/devices/system/cpu")
UNKNOWN = "not visible"
NOTICED_SHARE = 0.05


@dataclass(frozen=True)
class Machine:
    """What stays the same during a run.

    Attributes:
        cpu: the model's name, and what it can do.
        cores, usable_cores: logical ones, and those this process may use.
        governor: of the CPU's frequency.
        memory_gib: of the machine.
        system, python: versions.
    """

    cpu: str
    cores: int
    usable_cores: int
    governor: str
    memory_gib: float
    system: str
    python: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def describe_machine() -> Machine:
    """This machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        _cpu_name(),
        psutil.cpu_count() or 1,
        usable,
        _governor(),
        round(psutil.virtual_memory().total / 2**30, 1),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        platform.python_version(),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named, flags = (next((line.partition(":")[2] for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
    features = [feature for flag, feature in FEATURES.items() if flag in flags.split()]
    name = named.strip() or platform.processor() or UNKNOWN
    return f"{name} ({', '.join(features)})" if features else name


def _governor(folder: Path = CPU_FOLDER) -> str:
    found = {path.read_text(encoding="utf-8").strip() for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return ", ".join(sorted(found)) or UNKNOWN


def peak_memory_mib() -> float:
    """The most memory this process has held, in MiB.

    From Linux's own account of this program, because the process's resource usage also counts the one it was started from.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@dataclass(frozen=True)
class Load:
    """How busy the machine was.

    Attributes:
        before, after: load averages of the last minute at the start and the end; None where the system has none.
        others: cores that were busy with other processes, on average.
        cores: of the machine.
    """

    before: float | None
    after: float | None
    others: float
    cores: int

    @property
    def noticed(self) -> str:
        """A warning; "" where others took less than 5% of the machine."""
        if self.others < NOTICED_SHARE * self.cores:
            return ""
        busy = f"other processes kept {self.others:.1f} of {self.cores} cores busy during the run"
        return f"{busy}: times are longer and vary more than on a quiet machine"


class LoadWatch:
    """Measures between its making and `stop`; child processes must have ended by then to count as ours."""

    def __init__(self) -> None:
        self._before, self._started = _load_average(), time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def stop(self) -> Load:
        """How busy it was."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return Load(self._before, _load_average(), max(0.0, others / elapsed), psutil.cpu_count() or 1)


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times[: 3 if hasattr(times, "nice") else 2]) + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)


def _own_seconds() -> float:
    return sum(os.times()[:4])
