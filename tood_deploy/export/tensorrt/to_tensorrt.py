"""Make a TensorRT engine of an .onnx artefact.

Comes in: an artefact, in memory or its file. Goes out: a plan file that holds the plan alone, and
the manifest beside it, or nothing at all. Knows nothing of checkpoints.
"""

from __future__ import annotations

import platform
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tood_deploy import __version__
from tood_deploy.engines.tensorrt.library import Flavour, load_flavour
from tood_deploy.errors import DeviceError, OutputError, ToodError
from tood_deploy.export.tensorrt.build import (
    Monitor,
    build_monitor,
    build_plan,
    parse_network,
    run_cancellable,
)
from tood_deploy.export.tensorrt.join_stages import join_stages
from tood_deploy.export.tensorrt.layers import LayerReport, inspect_plan, network_layers
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles, default_shapes
from tood_deploy.files import atomic_paths
from tood_deploy.graph_io import ENGINE_SUFFIXES
from tood_deploy.manifest import Manifest, manifest_path, neighbour
from tood_deploy.manifest_sections import EngineTarget, SelfTest
from tood_deploy.onnx_file import OnnxArtefact, read_onnx
from tood_deploy.reporter import Reporter

# NVIDIA: "By default, an engine built by TensorRT-RTX can be run on GPU devices with compute
# capability 8.0, 8.6, 8.9, 12.0, and later." Later ones are those that the library lists.
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


def engine_target(flavour: Flavour, profiles: Profiles, options: EngineOptions) -> EngineTarget:
    """Return what an engine is built for, for the manifest.

    Raises:
        DeviceError: TensorRT builds for the GPU of this machine, and there is none that CUDA can
            use; or the library has no kernels for the one that there is.
    """
    chosen = options.compute_capabilities
    target = EngineTarget(
        flavour.name,
        flavour.version,
        f"{sys.platform}-{platform.machine()}".lower(),
        chosen or RTX_CAPABILITIES,
        profiles.for_manifest(),
        later_compute_capabilities=not chosen,
        hardware_compatibility="ampere_plus" if options.hardware_compatible else "none",
        version_compatible=options.version_compatible,
    )
    if flavour.name == "tensorrt":
        return _for_gpu_here(target, options, flavour)
    if not chosen:
        check_gpu_here(flavour)
    return target


def check_gpu_here(flavour: Flavour) -> None:
    """Refuse to build for GPUs in general beside one that the library has no kernels for.

    Raises:
        DeviceError: there is such a one, and it is the one that CUDA would use.
    """
    try:
        from tood_deploy.engines.tensorrt.cuda import visible_gpu
    except DeviceError:  # without cuda-bindings nothing of ours runs an engine here
        return
    if gpu := visible_gpu():
        name, capability = gpu
        cure = "to build for another machine's GPU name it with --compute-capability; "
        flavour.check_gpu(capability, name, cure)


def _for_gpu_here(target: EngineTarget, options: EngineOptions, flavour: Flavour) -> EngineTarget:
    """Return the target with the GPU that TensorRT measures on, the first that CUDA sees.

    Its name and driver are information: another driver may run the plan.

    Args:
        target: without its GPU.
        options: of the builder.
        flavour: the library.
    """
    from tood_deploy.engines.tensorrt.cuda import Gpu, call, driver

    with closing(Gpu()) as gpu:
        capability, name = gpu.compute_capability, gpu.name
    flavour.check_gpu(capability, name)
    version = call(driver.cuDriverGetVersion)
    return replace(
        target,
        compute_capabilities=(capability,),
        later_compute_capabilities=options.hardware_compatible,
        gpu=name,
        driver=f"CUDA {version // 1000}.{version % 1000 // 10}",
    )


@dataclass(frozen=True)
class BuiltEngine:
    """One engine that was built.

    Attributes:
        manifest: what lies beside it.
        layers: its layers, and the precision they compute in.
        seconds: that reading and building took.
        size_bytes: of the plan.
    """

    manifest: Manifest
    layers: LayerReport
    seconds: float
    size_bytes: int


def engine_from_onnx(
    source: Path | OnnxArtefact,
    output: Path,
    *,
    profiles: Profiles | None = None,
    options: EngineOptions | None = None,
    flavour: str | None = None,
    self_test: SelfTest | None = None,
    rebuild: str = "",
    reporter: Reporter | None = None,
) -> BuiltEngine:
    """Write an engine and the manifest beside it.

    Args:
        source: an .onnx artefact of tood-export, or its file; its precision is the engine's.
        output: an .engine or .plan file; what is there already is replaced in one step.
        profiles: the sizes and batches it takes; landscape and portrait of the model's own size,
            batches of 1 to 8 where not given.
        options: of the builder.
        flavour: "tensorrt" or "tensorrt_rtx"; the one that is installed where not given.
        self_test: a stored image and the answers to it on every size of `profiles`, for the
            manifest; see `self_test_from`.
        rebuild: the command that builds this engine again, for the manifest.
        reporter: of progress.

    Raises:
        DeviceError: no TensorRT, no GPU where it needs one, or out of memory.
        ArtefactError: not an ONNX of ours, an operator that TensorRT lacks, a precision that the
            network does not have, or suppression that cannot be unrolled.
        ToodError: an argument out of range, or a place that cannot be written.
    """
    options = options or EngineOptions()
    _check_output(output)
    library = load_flavour(flavour)
    options.check(library)
    artefact = join_stages(read_onnx(source) if isinstance(source, Path) else source)
    if options.nms == "unrolled":
        from tood_deploy.export.tensorrt.unroll_nms import unroll_nms  # PyTorch makes its graph

        artefact = unroll_nms(artefact, options.nms_rounds)
    profiles = profiles or Profiles(default_shapes(artefact.manifest.preset.imgsz))
    target = engine_target(library, profiles, options)
    started = time.perf_counter()
    with build_monitor(library, reporter or Reporter.silent()) as monitor:
        plan, layers = run_cancellable(
            lambda: _build(library, artefact, profiles, options, monitor), monitor
        )
    seconds = time.perf_counter() - started
    manifest = replace(
        _describe(artefact, library, options, layers, rebuild), target=target, self_test=self_test
    )
    with atomic_paths(output, manifest_path(output)) as (plan_file, manifest_file):
        plan_file.write_bytes(plan)
        manifest = manifest.with_artefact(plan_file)
        manifest_file.write_text(manifest.to_json(), encoding="utf-8")
    return BuiltEngine(manifest, layers, seconds, output.stat().st_size)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in ENGINE_SUFFIXES:
        raise ToodError(
            f"output is {output}; expected a name ending in {' or '.join(ENGINE_SUFFIXES)}"
        )
    if other := neighbour(output):
        raise OutputError(
            f"{output}: its manifest {manifest_path(output).name} would replace that of "
            f"{other.name}; "
            f"give another --output, such as {output.with_stem(output.stem + '-trt')}"
        )


def _build(
    library: Flavour,
    artefact: OnnxArtefact,
    profiles: Profiles,
    options: EngineOptions,
    monitor: Monitor,
) -> tuple[Any, LayerReport]:
    """Return the plan, and the report on its layers.

    A precision that nothing is computed in is refused before the long build.
    """
    layers = LayerReport(
        network_layers(library, parse_network(library, artefact).network, profiles.shapes_hw[0])
    )
    layers.check(artefact.manifest.precision)
    parsed = parse_network(library, artefact)
    with library.logger.collecting() as messages:
        plan = build_plan(library, parsed, profiles, options, monitor)
    engine, note = inspect_plan(library, plan, host_code=options.version_compatible)
    report = replace(layers, engine=engine, note=note)
    return plan, report.with_kernels(messages.kernels, len(profiles.shapes_hw))


def _describe(
    artefact: OnnxArtefact,
    library: Flavour,
    options: EngineOptions,
    layers: LayerReport,
    rebuild: str,
) -> Manifest:
    """Return the manifest of the engine: that of its ONNX, and what was added."""
    source = artefact.manifest
    settings = {
        "workspace_mib": options.workspace_mib,
        "optimisation_level": options.optimisation_level,
    }
    details = {name: value for name, value in settings.items() if value is not None}
    kernels = {} if layers.kernels is None else {"kernels": asdict(layers.kernels)}
    build = replace(
        source.build,
        format="engine",
        onnx_sha256=artefact.sha256,
        nms=options.nms,
        rebuild=rebuild,
        details={**source.build.details, **details, "precisions": layers.to_dict(), **kernels},
    )
    compared = "the ONNX artefact that this engine was built from"
    parity = replace(source.parity, compared=compared) if source.parity else None
    return replace(
        source,
        build=build,
        versions=source.versions | {"tood_deploy": __version__, library.name: library.version},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=parity,
    )
