"""Export: load, make the graph, change its precision, write the target; prove each step.

Comes in: an `ExportConfig` that `preflight` has passed. Goes out: one artefact with its manifest,
proven equal to its reference, or nothing at all. The graph and its manifest stay in memory until
the last step, which alone writes. What only some targets need is imported where they begin.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from tood_deploy import __version__
from tood_deploy.data.images import read_images
from tood_deploy.engines.self_test import self_test_from
from tood_deploy.errors import ToodError
from tood_deploy.export.config import DeformForm, ExportConfig, PrecisionOptions
from tood_deploy.export.graph_cache import graph_of
from tood_deploy.export.options import flag_of
from tood_deploy.export.preflight import MAX_VERIFY_IMAGES, check_deform, needs_gather
from tood_deploy.export.result import ExportResult, describe_preset, timed
from tood_deploy.export.to_onnx import OPSET
from tood_deploy.files import no_empty_folder
from tood_deploy.graph_io import INNER_VALUES, ONNX_SUFFIX, Target
from tood_deploy.manifest import Manifest
from tood_deploy.manifest_sections import Build
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.onnx_file import OnnxArtefact, artefact_in_memory, read_onnx, write_onnx
from tood_deploy.parity.onnx_reference import OnnxRunner, onnx_reference
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.torch_reference import torch_reference
from tood_deploy.parity.verify import verify_float32
from tood_deploy.presets import MAX_CANDIDATES
from tood_deploy.reporter import Reporter

if TYPE_CHECKING:
    from tood_deploy.data.images import ImagesToCheck
    from tood_deploy.export.precision.convert import AnnotatedAp, Search
    from tood_deploy.export.tensorrt.options import Profiles

Images = Sequence[NDArray[np.uint8]]


class AnnotatedImages(Protocol):
    """Annotated images, on which AP is measured."""

    @property
    def images(self) -> ImagesToCheck:
        """Return the images, to be looked at before the long work."""
        ...

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raise ToodError for class names that are not the categories of the annotations."""
        ...

    def measure(self, artefact: OnnxArtefact) -> AnnotatedAp:
        """Return what measures AP against that of a float32 artefact."""
        ...


@dataclass(frozen=True, eq=False)
class PreparedExport:
    """What every target is written from.

    Attributes:
        artefact: the graph in its final precision, with its manifest.
        reference: what the written artefact is compared with.
        profiles: sizes and batches; None where none were asked for.
        images: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        ap: measures AP for the verdict; None without annotations.
    """

    artefact: OnnxArtefact
    reference: Reference
    profiles: Profiles | None
    images: Images
    ap: AnnotatedAp | None


def run_export(
    config: ExportConfig,
    *,
    annotated: AnnotatedImages | None = None,
    search: Search | None = None,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Make what is asked for, and prove it.

    Args:
        config: `check_export` has passed it.
        annotated: the images of `config.precision.annotations`.
        search: chooses the mixture of precisions where `config.precision.autotune` asks for it.
        reporter: of every step.

    Raises:
        ToodError: something that is asked for cannot be.
        CheckFailed: the artefact deviates from its reference; nothing is left behind.
    """
    reporter = reporter or Reporter.silent()
    if config.from_engine:
        reporter.info(f"{config.source}: copying the engine into {config.place}")
        return _serve(config, Path(config.source), None, reporter)
    images = read_images(config.verify_images, MAX_VERIFY_IMAGES) if config.verify_images else []
    with no_empty_folder(config.place.parent):
        if config.to == "torch":
            from tood_deploy.export.to_torch import write_torch

            return write_torch(config, _load(config, reporter), images, reporter)
        artefact, reference = _float32_artefact(config, images, annotated, reporter)
        profiles = _choose_profiles(config, reference, reporter)
        ap = annotated.measure(artefact) if annotated else None
        float32 = PreparedExport(artefact, reference, profiles, images, ap)
        if config.precision.precision == "auto":
            from tood_deploy.export.precision.choose import export_fastest

            return export_fastest(
                config,
                lambda one: _finish(one, float32, None, reporter),
                sizing=reference.sizing,
                images=images,
                reporter=reporter,
            )
        return _finish(config, float32, search, reporter)


def _finish(
    config: ExportConfig, float32: PreparedExport, search: Search | None, reporter: Reporter
) -> ExportResult:
    """Change the precision of the float32 graph as asked, and write the target.

    Args:
        config: what is asked for.
        float32: the graph as it was proven.
        search: chooses the mixture of precisions, where that is asked for.
        reporter: of every step.
    """
    prepared = float32
    if _graph_precision(config).changes_graph:
        with timed("precision"):
            prepared = replace(float32, artefact=_convert(config, float32, search, reporter))
    reporter.info(f"{config.place}: {_STEPS[config.to]}")
    with timed("target"):
        return _WRITERS[config.to](config, prepared, reporter)


def _float32_artefact(
    config: ExportConfig, images: Images, annotated: AnnotatedImages | None, reporter: Reporter
) -> tuple[OnnxArtefact, Reference]:
    """Return the float32 artefact, and what everything made from it is compared with."""
    if config.from_onnx:
        artefact = read_onnx(Path(config.source))
        return artefact, onnx_reference(_runnable(artefact))
    options, model = config.checkpoint, _load(config, reporter)
    max_det = model.preset.max_det if options.max_det is None else options.max_det
    _check_loaded(config, model, max_det, annotated)
    artefact = onnx_from_checkpoint(
        model,
        deform=options.deform or ("gather" if needs_gather(config) else "op"),
        max_det=max_det,
        verify_images=images,
        reporter=reporter,
    )
    return artefact, torch_reference(model, max_det)


def _load(config: ExportConfig, reporter: Reporter) -> DenseDetector:
    """Return the network of the checkpoint that is exported."""
    options = config.checkpoint
    reporter.info(f"{config.source}: loading the checkpoint")
    with timed("checkpoint"):
        model = load_checkpoint(
            config.source, **options.load, imgsz=options.imgsz, reporter=reporter
        )
    reporter.info(f"{config.source}: {describe_preset(model.preset)}")
    return model


def _runnable(artefact: OnnxArtefact) -> OnnxArtefact:
    """Return an artefact that ONNX Runtime runs on CPUs: bf16, which it lacks there, emulated."""
    from tood_deploy.engines.precision_support import half_precision_of

    if half_precision_of(artefact.manifest) != "bf16":
        return artefact
    from tood_deploy.export.precision.half import emulate_low_precision

    return replace(artefact, model=emulate_low_precision(artefact.model))


def _check_loaded(
    config: ExportConfig, model: DenseDetector, max_det: int, annotated: AnnotatedImages | None
) -> None:
    """Refuse, before the long work, what only the checkpoint could tell that it cannot be."""
    preset = model.preset
    if preset.is_deformable:
        check_deform(config.source, config.checkpoint.deform or "none", config)
    if annotated is not None:
        annotated.check_classes(preset.class_names)
    if config.to == "triton":
        from tood_deploy.export.triton.fit import plan_serving

        manifest, profiles = Manifest(preset, max_det=max_det), config.sizes.profiles(preset.imgsz)
        plan_serving(Path(config.source), manifest, config.place, config.served_as, profiles)
    if config.precision.changes_graph:
        _check_patterns(config.precision, model)


def _check_patterns(precision: PrecisionOptions, model: DenseDetector) -> None:
    """Refuse patterns of what stays float32 that fit no layer.

    Those that fit none of the 8-bit layers only the graph can tell. Half precision also takes the
    names of operators and of the stages' values; other names are those of a graph that exists.
    """
    layers = [key.removesuffix(".weight") for key in model.state_dict() if key.endswith(".weight")]
    names = [*layers]
    if precision.precision != "int8":
        names += [schema.name for schema in onnx.defs.get_all_schemas()] + [*INNER_VALUES]
    strange = [
        pattern
        for pattern in precision.keep_fp32
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if strange:
        raise ToodError(
            f"{flag_of(PrecisionOptions, 'keep_fp32')} {','.join(strange)} fits no layer; expected "
            f"patterns of names such as {', '.join(layers[:3])} (names of the graph's nodes and "
            "values: with an .onnx in place of the checkpoint)"
        )


def onnx_from_checkpoint(
    model: DenseDetector,
    *,
    deform: DeformForm = "op",
    max_det: int | None = None,
    verify_images: Images = (),
    reporter: Reporter | None = None,
) -> OnnxArtefact:
    """Return the float32 artefact of a network, in memory, after proving it equal to the network.

    Args:
        model: as `load_checkpoint` gives it.
        deform: deformable convolutions as ONNX's operator, or as gathers for runtimes that lack it.
        max_det: rows D of the outputs; the preset's where not given.
        verify_images: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        reporter: of every step.

    Raises:
        ToodError: `max_det` is out of range.
        CheckFailed: the artefact deviates from PyTorch.
    """
    reporter = reporter or Reporter.silent()
    max_det = model.preset.max_det if max_det is None else max_det
    if not 1 <= max_det <= MAX_CANDIDATES:
        raise ToodError(f"max_det is {max_det}; expected 1 to {MAX_CANDIDATES}")
    manifest = Manifest(
        model.preset,
        max_det=max_det,
        checkpoint_sha256=model.checkpoint_sha256,
        build=Build(
            format="onnx", opset=OPSET, deform=deform if model.preset.is_deformable else "none"
        ),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    reporter.info("making the graph")
    graph = graph_of(model, deform=deform, max_det=max_det, say=reporter.info)
    with timed("check"):
        artefact = artefact_in_memory(Path(f"{model.preset.name}{ONNX_SUFFIX}"), graph, manifest)
    reference = torch_reference(model, max_det)
    with timed("verify"):
        run = OnnxRunner(artefact.model)
        parity = verify_float32(reference, run, images=verify_images, reporter=reporter)
        reporter.info("making its self-test")
        self_test = self_test_from(reference.run)
    proven = replace(manifest, parity=parity, self_test=self_test)
    return replace(artefact, manifest=proven)


def export_onnx(
    model: DenseDetector,
    output: Path,
    *,
    deform: DeformForm = "op",
    max_det: int | None = None,
    verify_images: Images = (),
    reporter: Reporter | None = None,
) -> Manifest:
    """Write the float32 artefact of a network and its manifest, after proving it equal.

    Args:
        model: as `load_checkpoint` gives it.
        output: an .onnx file; an artefact that is there already is replaced in one step.
        deform, max_det, verify_images, reporter: as `onnx_from_checkpoint` takes them.

    Raises:
        ToodError: an argument out of range, or a place that cannot be written.
        CheckFailed: the artefact deviates from PyTorch; nothing is left behind.
    """
    if output.suffix.lower() != ONNX_SUFFIX:
        raise ToodError(f"output is {output}; expected a name ending in {ONNX_SUFFIX}")
    artefact = onnx_from_checkpoint(
        model, deform=deform, max_det=max_det, verify_images=verify_images, reporter=reporter
    )
    return write_onnx(artefact, output)


def _versions() -> dict[str, str]:
    return {
        "tood_deploy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _choose_profiles(
    config: ExportConfig, reference: Reference, reporter: Reporter
) -> Profiles | None:
    """Return the sizes and batches of the target, before the long work, as they may be wrong."""
    sizes, imgsz = config.sizes, reference.sizing.imgsz
    if sizes.shapes != "auto":
        return sizes.profiles(imgsz)
    from tood_deploy.export.tensorrt.shapes import plot_proposal, proposal_table, propose_shapes

    assert config.images is not None  # a rule of the options
    proposal = propose_shapes(config.images, imgsz)
    reporter.table(proposal_table(proposal))
    if sizes.shapes_plot is not None:
        plot_proposal(proposal, sizes.shapes_plot)
    return sizes.profiles(imgsz, proposal.shapes_hw)


def _graph_precision(config: ExportConfig) -> PrecisionOptions:
    """Return what is written into the graph; bf16 in OpenVINO is a property of the run."""
    precision = config.precision
    if config.to != "openvino":
        return precision
    return (
        PrecisionOptions() if precision.precision == "bf16" else replace(precision, fallback=None)
    )


def _convert(
    config: ExportConfig, float32: PreparedExport, search: Search | None, reporter: Reporter
) -> OnnxArtefact:
    """Return the artefact in the precision that is asked for, compared with the reference.

    Args:
        config: what is asked for.
        float32: the graph as it was proven.
        search: chooses the mixture of precisions, where that is asked for.
        reporter: of every step.
    """
    from tood_deploy.export.precision.convert import (
        convert_precision,
        images_to_verify,
        verify_converted,
    )

    artefact, reference, ap = float32.artefact, float32.reference, float32.ap
    precision = _graph_precision(config)
    name = "the best mixture of precisions" if precision.autotune else precision.precision
    reporter.info(
        f"{config.source}: writing {name} into the graph, and comparing it with "
        f"{reference.run.name}"
    )
    converted = convert_precision(
        artefact,
        precision,
        config.int8_scheme,
        quality=None if ap is None or precision.max_ap_drop is None else lambda _: ap,
        search=search,
        reporter=reporter,
    )
    return verify_converted(
        converted,
        reference,
        images_to_verify(precision.calib_data, float32.images),
        self_test=artefact.manifest.self_test,
        # What OpenVINO is given is measured in OpenVINO, at the end.
        ap=None if config.to == "openvino" else ap,
        reporter=reporter,
    )


def _write_onnx(config: ExportConfig, prepared: PreparedExport, reporter: Reporter) -> ExportResult:
    from tood_deploy.engines.precision_support import RUNTIMES, half_precision_of

    artefact, manifest = prepared.artefact, prepared.artefact.manifest
    if half := half_precision_of(manifest):
        build = replace(manifest.build, runtimes=RUNTIMES[half])
        artefact = artefact_in_memory(config.place, artefact.model, replace(manifest, build=build))
    return ExportResult(config.place, write_onnx(artefact, config.place))


def _write_openvino(
    config: ExportConfig, prepared: PreparedExport, reporter: Reporter
) -> ExportResult:
    from tood_deploy.export.precision.convert import images_to_verify
    from tood_deploy.export.to_openvino import openvino_from_onnx

    precision, images = config.precision, prepared.images
    # Of an .onnx that is not changed, its own manifest names the precision of the run.
    runs_in_bf16 = precision.precision == "bf16" or (
        precision.precision == "int8" and precision.fallback == "bf16"
    )
    if precision.precision != "fp32" or prepared.artefact.manifest.precision != "fp32":
        images = images_to_verify(precision.calib_data, images)
    manifest = openvino_from_onnx(
        prepared.artefact,
        config.place,
        reference=prepared.reference,
        fallback="bf16" if runs_in_bf16 else "fp32" if precision.precision == "int8" else None,
        images=images,
        ap=prepared.ap,
        reporter=reporter,
    )
    return ExportResult(config.place, manifest)


def _write_engine(
    config: ExportConfig, prepared: PreparedExport, reporter: Reporter
) -> ExportResult:
    from tood_deploy.export.tensorrt.options import Profiles, default_shapes
    from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx

    artefact, reference = prepared.artefact, prepared.reference
    profiles = prepared.profiles or Profiles(default_shapes(reference.sizing.imgsz))
    # The form that servers batch has thresholds for every image, which no engine of ours is given.
    is_served = artefact.manifest.build.serving is not None
    built = engine_from_onnx(
        artefact,
        config.place,
        profiles=profiles,
        options=config.engine,
        flavour=config.flavour,
        self_test=None if is_served else self_test_from(reference.run, profiles.shapes_hw),
        rebuild=config.command,
        reporter=reporter,
    )
    return ExportResult(config.place, built.manifest, built.layers)


def _write_triton(
    config: ExportConfig, prepared: PreparedExport, reporter: Reporter
) -> ExportResult:
    return _serve(config, prepared.artefact, prepared.profiles, reporter)


def _serve(
    config: ExportConfig, model: OnnxArtefact | Path, profiles: Profiles | None, reporter: Reporter
) -> ExportResult:
    """Add an .onnx artefact, or the file of an engine, to the Triton repository."""
    from tood_deploy.export.triton.repository import triton_repository

    served = triton_repository(
        model,
        config.place,
        config.served_as,
        profiles=profiles,
        engine_options=config.engine,
        reporter=reporter,
    )
    return ExportResult(served.path, served.manifest)


_STEPS: dict[Target, str] = {
    "onnx": "writing it",
    "openvino": "converting to OpenVINO, and comparing what it computes",
    "engine": "building the engine, which can take minutes",
    "triton": "adding the model to the repository, and comparing the form that is served",
}
_WRITERS: dict[Target, Callable[[ExportConfig, PreparedExport, Reporter], ExportResult]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "engine": _write_engine,
    "triton": _write_triton,
}
