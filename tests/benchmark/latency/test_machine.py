import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tood_deploy.benchmark.latency import machine
from tood_deploy.benchmark.latency.machine import (
    GpuMeter,
    Load,
    LoadWatch,
    describe_machine,
    peak_memory_mib,
)
from tood_deploy.errors import DeviceError


def test_the_machine_in_plain_values() -> None:
    found = describe_machine().to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert 1 <= found["usable_cores"] <= found["cores"]


def test_the_governor_where_there_is_one(tmp_path: Path) -> None:
    for core, governor in enumerate(("powersave", "performance")):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
    assert machine._governor(tmp_path) == "performance, powersave"
    assert machine._governor(tmp_path / "none") == "not visible"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_a_small_process_does_not_inherit_its_parents_peak() -> None:
    ballast = bytearray(300 * 2**20)
    ballast[::4096] = b"1" * len(ballast[::4096])
    module = "tood_deploy.benchmark.latency.machine"
    code = f"from {module} import peak_memory_mib; print(peak_memory_mib())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert float(result.stdout) < 150
    assert peak_memory_mib() > 300


def test_own_work_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(10.0, 4.0, 100.0), (16.0, 9.0, 104.0)])  # busy, own, clock
    now = next(times)
    monkeypatch.setattr(machine, "_busy_seconds", lambda: now[0])
    monkeypatch.setattr(machine, "_own_seconds", lambda: now[1])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[2])
    watch = LoadWatch()
    now = next(times)
    assert watch.stop().others == pytest.approx((6 - 5) / 4)


def test_load_is_noticed_above_a_twentieth_of_the_machine() -> None:
    assert Load(0.1, 0.2, others=0.09, cores=2).warning == ""
    assert "1.2 of 2 cores" in Load(0.1, 0.2, others=1.2, cores=2).warning


class FakeNvml(SimpleNamespace):
    """A GPU that slows down when it is looked at the second time."""

    nvmlClocksThrottleReasonNone = 0  # noqa: N815
    nvmlClocksThrottleReasonGpuIdle = 1  # noqa: N815
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonAll = 7  # noqa: N815
    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        self.looks = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        if number:
            raise RuntimeError("Invalid Argument")
        return number

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return "a GPU"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "1.2"

    def nvmlDeviceGetClockInfo(self, gpu: int, kind: int) -> int:
        self.looks += 1
        return (1980, 1200)[self.looks - 1]

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        return (300_000, 700_000)[self.looks - 1]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: int) -> int:
        return (1, 5)[self.looks - 1]

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(used=512 * 2**20)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
        return 12_500


def test_a_gpu_is_looked_at() -> None:
    meter = GpuMeter(nvml=FakeNvml())
    meter.sample()
    meter.sample()
    assert meter.account.to_dict() == {
        "name": "a GPU",
        "driver": "1.2",
        "clock_mhz": (1200, 1980),
        "power_w": 700.0,
        "throttled": ["SwPowerCap"],
    }
    assert meter.memory_mib() == 512
    assert meter.joules() == 12.5


def test_no_such_gpu() -> None:
    with pytest.raises(DeviceError, match=r"GPU 1 .*Invalid Argument.*--device cpu"):
        GpuMeter(1, nvml=FakeNvml())


def test_own_seconds_grow_with_work() -> None:
    before = machine._own_seconds()
    while machine._own_seconds() - before < 0.02:
        sum(range(10_000))
    assert machine._own_seconds() <= sum(os.times()[:4])
