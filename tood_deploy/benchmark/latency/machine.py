"""The machine a benchmark ran on, and how busy it was with other things.

What the system, psutil and NVML say goes out as plain values. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tood_deploy.errors import DeviceError

# What decides how fast a CPU computes, and whether it adds 8-bit products exactly; by the name that
# Linux has for it.
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
        cores: logical ones.
        usable_cores: those that this process may use.
        governor: of the CPU's frequency.
        memory_gib: of the machine.
        system: its name, release and architecture.
        python: version.
    """

    cpu: str
    cores: int
    usable_cores: int
    governor: str
    memory_gib: float
    system: str
    python: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def describe_machine() -> Machine:
    """Describe this machine."""
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
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
    named, flags = (
        next((line.partition(":")[2] for line in lines if line.startswith(key)), "")
        for key in ("model name", "flags")
    )
    features = [feature for flag, feature in FEATURES.items() if flag in flags.split()]
    name = named.strip() or platform.processor() or UNKNOWN
    return f"{name} ({', '.join(features)})" if features else name


def _governor(folder: Path = CPU_FOLDER) -> str:
    governors = {
        path.read_text(encoding="utf-8").strip()
        for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    return ", ".join(sorted(governors)) or UNKNOWN


def peak_memory_mib() -> float:
    """Return the most memory that this process has held, in MiB.

    From Linux's own account of this program, because the process's resource usage also counts the
    one it was started from.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(
            line
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith("VmHWM")
        )
        return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@dataclass(frozen=True)
class Load:
    """How busy the machine was.

    Attributes:
        before: load average of the last minute at the start; None where the system has none.
        after: the same at the end.
        others: cores that were busy with other processes, on average.
        cores: of the machine.
    """

    before: float | None
    after: float | None
    others: float
    cores: int

    def __str__(self) -> str:
        averages = f"average {self.before} before, {self.after} after"
        return f"{averages}; others kept {self.others:.2f} cores busy"

    @property
    def warning(self) -> str:
        """Return a warning; "" where others took less than 5% of the machine."""
        if self.others < NOTICED_SHARE * self.cores:
            return ""
        busy = f"other processes kept {self.others:.1f} of {self.cores} cores busy during the run"
        return f"{busy}: times are longer and vary more than on a quiet machine"


class LoadWatch:
    """Measures between its making and `stop`.

    Child processes must have ended by then to count as ours.
    """

    def __init__(self) -> None:
        """Begin to measure."""
        self._before, self._started = _load_average(), time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def stop(self) -> Load:
        """Return how busy it was."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return Load(
            self._before, _load_average(), max(0.0, others / elapsed), psutil.cpu_count() or 1
        )


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return (
        sum(times[: 3 if hasattr(times, "nice") else 2])
        + getattr(times, "irq", 0.0)
        + getattr(times, "softirq", 0.0)
    )


def _own_seconds() -> float:
    return sum(os.times()[:4])


PREFIX = "nvmlClocksThrottleReason"
HARMLESS = {"None", "All", "GpuIdle", "ApplicationsClocksSetting"}


@dataclass
class GpuAccount:
    """What was seen during a run.

    Attributes:
        name: of the GPU.
        driver: its version.
        clock_mhz: lowest and highest clock of the multiprocessors.
        power_w: highest.
        throttled: reasons for running below the highest clock.
    """

    name: str
    driver: str
    clock_mhz: tuple[int, int] = (0, 0)
    power_w: float = 0.0
    throttled: set[str] = field(default_factory=set)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"throttled": sorted(self.throttled)}


class GpuMeter:
    """Looks at one GPU whenever `sample` is called.

    Attributes:
        account: what was seen so far.
    """

    def __init__(self, number: int = 0, nvml: ModuleType | Any = None) -> None:
        """Start the account.

        Args:
            number: of the GPU.
            nvml: in place of the module `pynvml`.

        Raises:
            DeviceError: the package or the GPU is not there.
        """
        try:
            if nvml is None:
                import pynvml as nvml  # pyright: ignore[reportMissingImports] - optional
            nvml.nvmlInit()
            self._nvml, self._gpu = nvml, nvml.nvmlDeviceGetHandleByIndex(number)
        except Exception as error:  # NVML's own types exist only where the package does
            remedy = "install nvidia-ml-py and a driver, or use --device cpu"
            raise DeviceError(f"NVML tells nothing of GPU {number} ({error}); {remedy}") from error
        self.account = GpuAccount(
            str(nvml.nvmlDeviceGetName(self._gpu)), str(nvml.nvmlSystemGetDriverVersion())
        )

    def sample(self) -> None:
        """Look once."""
        nvml, account = self._nvml, self.account
        clock = int(nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM))
        low, high = account.clock_mhz
        account.clock_mhz = (min(low or clock, clock), max(high, clock))
        account.power_w = max(account.power_w, nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000)
        account.throttled |= self._throttle_reasons()

    def memory_mib(self) -> float:
        """Return the memory in use on the device, by anyone."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used) / 2**20

    def joules(self) -> float:
        """Return the energy taken by the device since its driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1000

    def close(self) -> None:
        """End NVML."""
        self._nvml.nvmlShutdown()

    def _throttle_reasons(self) -> set[str]:
        bits = int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu))
        reasons = {
            name.removeprefix(PREFIX): getattr(self._nvml, name)
            for name in dir(self._nvml)
            if name.startswith(PREFIX)
        }
        return {
            name
            for name, bit in reasons.items()
            if name not in HARMLESS and isinstance(bit, int) and bits & bit
        }
