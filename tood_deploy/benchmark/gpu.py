"""What NVML tells of an NVIDIA GPU during a run: clocks, throttling, power, energy, memory. Needs the package nvidia-ml-py."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

from tood_deploy.errors import DeviceError

PREFIX = "nvmlClocksThrottleReason"
HARMLESS = {"None", "All", "GpuIdle", "ApplicationsClocksSetting"}


@dataclass
class GpuAccount:
    """What was seen during a run.

    Attributes:
        name, driver: of the GPU.
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
        """Plain values."""
        return asdict(self) | {"throttled": sorted(self.throttled)}


class GpuMeter:
    """Looks at one GPU whenever `sample` is called.

    Attributes:
        account: what was seen so far.
    """

    def __init__(self, number: int = 0, nvml: ModuleType | Any = None) -> None:
        """Starts the account.

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
        except Exception as error:  # NVML's errors are of a type that exists only where the package does
            remedy = "install nvidia-ml-py and a driver, or use --device cpu"
            raise DeviceError(f"NVML tells nothing of GPU {number} ({error}); {remedy}") from error
        self.account = GpuAccount(str(nvml.nvmlDeviceGetName(self._gpu)), str(nvml.nvmlSystemGetDriverVersion()))

    def sample(self) -> None:
        """Looks once."""
        nvml, account = self._nvml, self.account
        clock = int(nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM))
        low, high = account.clock_mhz
        account.clock_mhz = (min(low or clock, clock), max(high, clock))
        account.power_w = max(account.power_w, nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000)
        account.throttled |= self._throttle_reasons()

    def memory_mib(self) -> float:
        """In use on the device, by anyone."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used) / 2**20

    def joules(self) -> float:
        """Taken by the device since its driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1000

    def close(self) -> None:
        """Ends NVML."""
        self._nvml.nvmlShutdown()

    def _throttle_reasons(self) -> set[str]:
        bits = int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu))
        reasons = {name.removeprefix(PREFIX): getattr(self._nvml, name) for name in dir(self._nvml) if name.startswith(PREFIX)}
        return {name for name, bit in reasons.items() if name not in HARMLESS and isinstance(bit, int) and bits & bit}
