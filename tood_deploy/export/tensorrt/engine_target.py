"""What an engine is for: the library, its version, the GPUs and the platform that must be met again when its plan is opened."""

from __future__ import annotations

import platform
import sys
from contextlib import closing
from typing import Any

from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.profiles import Profiles
from tood_deploy.tensorrt_flavour import Flavour

# NVIDIA: "By default, an engine built by TensorRT-RTX can be run on GPU devices with compute capability 8.0, 8.6, 8.9, 12.0, and later."
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


def engine_target(flavour: Flavour, profiles: Profiles, options: EngineOptions) -> dict[str, Any]:
    """Plain values for the manifest.

    Raises:
        DeviceError: TensorRT builds for the GPU of this machine, and there is none that CUDA can use.
    """
    gpus = _rtx_gpus(options) if flavour.name == "tensorrt_rtx" else _gpu_here(options)
    return {
        "flavour": flavour.name,
        "version": flavour.version,
        "version_compatible": options.version_compatible,
        "hardware_compatibility": "ampere_plus" if options.hardware_compatible else "none",
        "platform": f"{sys.platform}-{platform.machine()}".lower(),
        "profiles": profiles.to_list(),
        **gpus,
    }


def _rtx_gpus(options: EngineOptions) -> dict[str, Any]:
    chosen = options.compute_capabilities
    return {"compute_capabilities": list(chosen or RTX_CAPABILITIES), "later_compute_capabilities": not chosen}


def _gpu_here(options: EngineOptions) -> dict[str, Any]:
    """The GPU that TensorRT measures on, the first that CUDA sees; name and driver are information, as another driver may run the plan."""
    from tood_deploy.cuda_device import Gpu, call, driver

    with closing(Gpu()) as gpu:
        capability, name = gpu.compute_capability, gpu.name
    version = call(driver.cuDriverGetVersion)
    return {
        "compute_capabilities": [capability],
        "later_compute_capabilities": options.hardware_compatible,
        "gpu": name,
        "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
    }
