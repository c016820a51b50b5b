"""Runs TensorRT's builder on a parsed network: a plan in memory, or one clear error. Writes no plan."""

from __future__ import annotations

import re
from typing import Any

from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.export.tensorrt.build_progress import Monitor
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.network import ParsedNetwork
from tood_deploy.export.tensorrt.profiles import Profiles
from tood_deploy.export.tensorrt.timing_cache import kept_timings
from tood_deploy.tensorrt_flavour import Flavour, Messages

MIB = 2**20
NO_ROOM = re.compile(r"within workspace limit", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|could not be allocated", re.IGNORECASE)


def build_plan(flavour: Flavour, parsed: ParsedNetwork, profiles: Profiles, options: EngineOptions, monitor: Monitor) -> Any:
    """The engine's plan as a buffer.

    Raises:
        DeviceError: no GPU where the library needs one, or out of memory.
        ArtefactError: the library cannot build the network, or the timing cache is not one.
    """
    with flavour.logger.collecting() as messages:
        config = _configure(flavour, parsed, profiles, options, messages)
        config.progress_monitor = monitor
        with kept_timings(flavour, config, options.timing_cache):
            plan = parsed.builder.build_serialized_network(parsed.network, config)
            if plan is None:
                raise _failure(flavour, messages, options)
    return plan


def _configure(flavour: Flavour, parsed: ParsedNetwork, profiles: Profiles, options: EngineOptions, messages: Messages) -> Any:
    trt, config = flavour.module, parsed.builder.create_builder_config()
    if config is None:  # the full library asks for the GPU at once
        raise _failure(flavour, messages, options)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # what is fp32 in the ONNX has to be fp32: 10 bits of mantissa are no more than fp16 has
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX would allocate while it runs, which no CUDA graph allows
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.optimisation_level is not None:
        config.builder_optimization_level = options.optimisation_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    _set_capabilities(flavour, config, options.compute_capabilities)
    _add_profiles(parsed, config, profiles)
    return config


def _set_capabilities(flavour: Flavour, config: Any, capabilities: tuple[str, ...]) -> None:
    if not capabilities:
        return
    known = known_capabilities(flavour)
    if unknown := [name for name in capabilities if name not in known]:
        raise ToodError(f"compute capability {', '.join(unknown)}: {flavour.title} builds for {', '.join(known)}")
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        config.set_compute_capability(known[name], i)


def known_capabilities(flavour: Flavour) -> dict[str, Any]:
    """What TensorRT-RTX can build for, such as "8.9", and its own value for it."""
    members = flavour.module.ComputeCapability.__members__
    numbered = {name.removeprefix("SM"): value for name, value in members.items() if name.startswith("SM")}
    return {f"{name[:-1]}.{name[-1]}": value for name, value in numbered.items()}


def _add_profiles(parsed: ParsedNetwork, config: Any, profiles: Profiles) -> None:
    """One optimisation profile a size. Inputs beside the pictures have the batch first, or, as numbers, no shape at all."""
    inputs = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    for size_hw in profiles.shapes_hw:
        profile = parsed.builder.create_optimization_profile()
        for tensor in inputs:
            if rest := tuple(tensor.shape)[1:]:
                fixed = (*size_hw, rest[-1]) if tensor.name == "images" else rest
                profile.set_shape(tensor.name, *((batch, *fixed) for batch in profiles.batch))
        config.add_optimization_profile(profile)


def _failure(flavour: Flavour, messages: Messages, options: EngineOptions) -> ToodError:
    """What went wrong, by what the library said of it."""
    reason, limit = messages.reason(), options.workspace_mib
    full = OUT_OF_MEMORY.search(reason)
    # TensorRT-RTX builds without a GPU: there the only memory that can be full is the workspace it was granted.
    if limit is not None and (NO_ROOM.search(reason) or (full and flavour.name == "tensorrt_rtx")):
        return ToodError(f"a layer needs more workspace than {limit} MiB ({reason}); give a larger --workspace, or leave it out")
    if full:
        return DeviceError(f"{flavour.title} ran out of memory in the build ({reason}); give a smaller --workspace, --batch or --shapes")
    if "CUDA" in reason.upper():
        return DeviceError(f"{flavour.title} could not use a GPU for the build ({reason}); look at nvidia-smi")
    return ArtefactError(f"{flavour.title} could not build the network: {reason}")
