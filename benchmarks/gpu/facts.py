"""Describe the machine of a run: GPU, versions, the floor under all times, clocks while it runs."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.settings import Cell
from benchmarks.gpu.torch_variants import versions as torch_versions
from tood_deploy import __version__
from tood_deploy.benchmark.latency.machine import GpuMeter, describe_machine
from tood_deploy.errors import DeviceError
from tood_deploy.model.detector import build_model
from tood_deploy.presets import Preset

PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "triton",
    "torchvision",
    "cuda-bindings",
    "cuda-core",
)
MODULES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "torchvision")
PRODUCT_SIDE, PRODUCTS = 8192, 10


class GpuWatch:
    """NVML's measurements of the GPU, where there is one.

    Attributes:
        meter: None where there is no GPU, or NVML failed.
        error: why it failed; "" where it did not.
    """

    def __init__(self, device: str) -> None:
        """Open NVML where the device is "cuda"."""
        self.meter: GpuMeter | None = None
        self.error = ""
        if device == "cuda":
            try:
                self.meter = GpuMeter()
            except DeviceError as error:
                self.error = str(error)

    def sample(self) -> None:
        """Measure clocks, power and throttling once."""
        if self.meter:
            try:
                self.meter.sample()
            except Exception as error:  # NVML's errors have a type that exists only where it does
                self._give_up(error)

    def memory_mib(self) -> float | None:
        """Return the memory in use on the device, by anyone; None where it cannot be measured."""
        try:
            return self.meter.memory_mib() if self.meter else None
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self.meter, self.error = None, f"NVML: {error}"

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain values."""
        return {"error": self.error} | (self.meter.account.to_dict() if self.meter else {})


def describe(device: str) -> dict[str, Any]:
    """Return machine, GPU and versions as plain values."""
    gpu: dict[str, Any] = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "bf16_product_tflops": round(measure_product(), 1),
        }
    return {"machine": asdict(describe_machine()), "gpu": gpu, "versions": package_versions()}


def package_versions() -> dict[str, Any]:
    """Return the versions of all packages that can take part, and which modules are there.

    A module that was unpacked without its metadata has no version.
    """
    versions: dict[str, Any] = {"tood_deploy": __version__} | torch_versions()
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    for name in MODULES:
        present = importlib.util.find_spec(name) is not None
        versions[f"module {name}"] = "there" if present else "absent"
    return versions


def measure_product() -> float:
    """Return the TFLOP/s of a large bf16 matrix product on random data: what this GPU can reach."""
    first, second = (
        torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    for _ in range(3):
        first @ second
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(PRODUCTS):
        first @ second
    torch.cuda.synchronize()
    return 2 * PRODUCT_SIDE**3 * PRODUCTS / (time.perf_counter() - started) / 1e12


def network_gflop(preset: Preset, cell: Cell) -> float:
    """Return the network's operations in 10^9, a multiplication with its addition as two."""
    with torch.device("meta"):
        model = build_model(preset)
        images = torch.empty(cell.batch, 3, *cell.size_hw)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 1e9


def floor_ms(preset: Preset, cell: Cell, peak_tflops: float) -> float:
    """Return the time of the network's arithmetic at the GPU's highest rate, in milliseconds.

    Nothing is much faster.

    Args:
        preset: of the network.
        cell: size and batch.
        peak_tflops: the GPU's highest rate.
    """
    return network_gflop(preset, cell) / peak_tflops
