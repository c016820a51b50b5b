"""Run TensorRT's builder on an artefact's graph.

Comes in: an artefact, profiles and options. Goes out: a plan in memory, or one clear error. Writes
no plan, and knows nothing of manifests.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import onnx

from tood_deploy.engines.tensorrt.library import RUNS_THERE, Flavour, Messages
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles
from tood_deploy.files import atomic_path
from tood_deploy.onnx_file import OnnxArtefact
from tood_deploy.reporter import ProgressTask, Reporter

Result = TypeVar("Result")


class Monitor(Protocol):
    """The library's `IProgressMonitor`, for a builder configuration."""

    def cancel(self) -> None:
        """Stop the build at the end of the step it is at."""
        ...


def run_cancellable(build: Callable[[], Result], monitor: Monitor) -> Result:
    """Run `build` in a thread of its own, and cancel it on Ctrl-C.

    Python handles Ctrl-C between two instructions of the main thread. A build is one long
    instruction, and the library's calls back into Python swallow the interrupt.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(build).result()
        except KeyboardInterrupt:
            monitor.cancel()
            raise  # on leaving the block, once the builder has stopped


@contextmanager
def build_monitor(flavour: Flavour, reporter: Reporter) -> Iterator[Monitor]:
    """Show, while the block runs, the phases of a build that is given the monitor.

    Args:
        flavour: the library, whose own `IProgressMonitor` is the base class; it calls the monitor
            from threads of its own.
        reporter: shows the phases.
    """
    base: Any = flavour.module.IProgressMonitor

    class BuildMonitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.tasks: dict[str, ProgressTask] = {}
            self._cancelled = threading.Event()

        def cancel(self) -> None:
            self._cancelled.set()
            reporter.info("cancelling; TensorRT stops at the end of this step")

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.tasks[phase_name] = reporter.progress(
                f"building the engine: {phase_name}", num_steps
            )

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                self.tasks[phase_name].update(step + 1)
            return not self._cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                self.tasks.pop(phase_name).close()

    monitor = BuildMonitor()
    try:
        yield monitor
    finally:
        for task in monitor.tasks.values():  # of a build that failed on the way
            task.close()


AVOIDED_BY = {"DeformConv": "export the ONNX with --deform gather"}


@dataclass(frozen=True, eq=False)
class ParsedNetwork:
    """A network, and what must live as long as it.

    These are the builder that it belongs to, and the parser that owns its weights.
    """

    builder: Any
    parser: Any
    network: Any


def parse_network(flavour: Flavour, artefact: OnnxArtefact) -> ParsedNetwork:
    """Return the network of an artefact.

    Raises:
        ArtefactError: the library lacks an operator, or refuses how one is used.
    """
    trt = flavour.module
    builder = trt.Builder(flavour.logger)
    strongly_typed = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # TensorRT 11 may know nothing else
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, flavour.logger)
    if missing := sorted(
        name for name in set(operators(artefact.model.graph)) if not parser.supports_operator(name)
    ):
        advice = (
            "; ".join(AVOIDED_BY[name] for name in missing if name in AVOIDED_BY)
            or "export the ONNX again with tood-export"
        )
        raise ArtefactError(
            f"{artefact.path}: {flavour.title} has no operator {', '.join(missing)}; {advice}"
        )
    if not parser.parse(artefact.model.SerializeToString()):
        raise ArtefactError(
            f"{artefact.path}: {flavour.title} cannot take it: {_first_error(parser)}; export the "
            "ONNX again with tood-export"
        )
    return ParsedNetwork(builder, parser, network)


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the operator of every node, those in the bodies of loops too."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "the parser gave no reason"
    error = parser.get_error(0)
    return (
        f"operator {error.node_operator()} at node {error.node_name()}: "
        f"{' '.join(error.desc().split())}"
    )


@contextmanager
def kept_timings(flavour: Flavour, config: Any, path: Path | None) -> Iterator[None]:
    """Give the timings in a file to the builder for the block.

    If the block succeeds, they are written back with what the builder measured.

    Args:
        flavour: the library.
        config: of the builder.
        path: the file; need not be there yet. None: nothing is kept.

    Raises:
        ArtefactError: it is no file, or holds no timings, or those of another GPU or version.
        OutputError: it cannot be written.
    """
    if path is None:
        yield
        return
    with flavour.logger.collecting() as messages:
        cache = config.create_timing_cache(_content(path))
        if cache is None or messages.errors:
            raise ArtefactError(
                f"{path}: not a timing cache ({messages.reason()}); delete it, or give another "
                "--timing-cache"
            )
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise ArtefactError(
                f"{path}: measured on another GPU, or with another version than {flavour.title} "
                f"({messages.reason()}); "
                "delete it, or give another --timing-cache"
            )
    yield
    with atomic_path(path) as temporary:
        temporary.write_bytes(cache.serialize())


def _content(path: Path) -> bytes:
    """Return the timings of earlier builds; nothing where there is no file yet."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArtefactError(
            f"{path}: cannot be read as a file ({error.strerror}); give another --timing-cache"
        ) from error


MIB = 2**20
NO_ROOM = re.compile(r"within workspace limit", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|could not be allocated", re.IGNORECASE
)


def build_plan(
    flavour: Flavour,
    parsed: ParsedNetwork,
    profiles: Profiles,
    options: EngineOptions,
    monitor: Monitor,
) -> Any:
    """Return the engine's plan as a buffer.

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


def _configure(
    flavour: Flavour,
    parsed: ParsedNetwork,
    profiles: Profiles,
    options: EngineOptions,
    messages: Messages,
) -> Any:
    trt, config = flavour.module, parsed.builder.create_builder_config()
    if config is None:  # the full library asks for the GPU at once
        raise _failure(flavour, messages, options)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(
        trt.BuilderFlag.TF32
    )  # what is fp32 in the ONNX has to be fp32: 10 bits of mantissa are no more than fp16 has
    if hasattr(
        trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"
    ):  # TensorRT-RTX would allocate while it runs, which no CUDA graph allows
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
    check_capabilities(flavour, capabilities)
    known = flavour.compute_capabilities
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        config.set_compute_capability(known[name], i)


def check_capabilities(flavour: Flavour, capabilities: tuple[str, ...]) -> None:
    """Refuse compute capabilities that a library does not build for.

    Raises:
        ToodError: there is one; the message lists those that there are.
    """
    known = flavour.compute_capabilities if capabilities else {}
    if unknown := [name for name in capabilities if name not in known]:
        raise ToodError(
            f"compute capability {', '.join(unknown)}: {flavour.title} builds for "
            f"{', '.join(known)}; {RUNS_THERE}"
        )


def _add_profiles(parsed: ParsedNetwork, config: Any, profiles: Profiles) -> None:
    """Add one optimisation profile for each size.

    Inputs beside the images have the batch first, or, as numbers, no shape at all.
    """
    inputs = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    for size_hw in profiles.shapes_hw:
        profile = parsed.builder.create_optimization_profile()
        for tensor in inputs:
            if rest := tuple(tensor.shape)[1:]:
                fixed = (*size_hw, rest[-1]) if tensor.name == "images" else rest
                profile.set_shape(tensor.name, *((batch, *fixed) for batch in profiles.batch))
        config.add_optimization_profile(profile)


def _failure(flavour: Flavour, messages: Messages, options: EngineOptions) -> ToodError:
    """Return the error of a build, by the messages of the library."""
    reason, limit = messages.reason(), options.workspace_mib
    full = OUT_OF_MEMORY.search(reason)
    # TensorRT-RTX builds without a GPU: there the only memory that can be full is the workspace it
    # was granted.
    if limit is not None and (NO_ROOM.search(reason) or (full and flavour.name == "tensorrt_rtx")):
        return ToodError(
            f"a layer needs more workspace than {limit} MiB ({reason}); give a larger "
            "--workspace, or leave it out"
        )
    if full:
        return DeviceError(
            f"{flavour.title} ran out of memory in the build ({reason}); give a smaller "
            "--workspace, --batch or --shapes"
        )
    if "CUDA" in reason.upper():
        return DeviceError(
            f"{flavour.title} could not use a GPU for the build ({reason}); look at nvidia-smi"
        )
    return ArtefactError(f"{flavour.title} could not build the network: {reason}")
