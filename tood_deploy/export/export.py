"""Carries out a whole export: a checkpoint or an .onnx in; .onnx, OpenVINO, engine or Triton model out, or nothing at all.

Every target is made from one float32 .onnx, which is proven equal to the network first; then comes the precision, then the target.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from tood_deploy import __version__
from tood_deploy.data.images import read_images
from tood_deploy.engines.precision_support import RUNTIMES, half_precision_of
from tood_deploy.engines.self_test import self_test_from
from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export.config import Order, Profiles, default_shapes
from tood_deploy.export.graph import DeformForm
from tood_deploy.export.graph_cache import graph_of
from tood_deploy.export.precision.convert import (
    AnnotatedAp,
    PrecisionOptions,
    images_to_verify,
    lower_onnx,
)
from tood_deploy.export.precision.half import emulate_low_precision
from tood_deploy.export.preflight import MOST_VERIFY_IMAGES, check_deform
from tood_deploy.export.result import Made, describe
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.timings import timed
from tood_deploy.export.to_onnx import OPSET
from tood_deploy.export.to_openvino import openvino_from_onnx
from tood_deploy.export.triton.fit import plan_serving
from tood_deploy.export.triton.repository import triton_repository
from tood_deploy.files import atomic_path, atomic_paths, write_text
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import Build, Parity, SelfTest
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.model.tood import Tood
from tood_deploy.onnx_file import read_onnx, save_onnx
from tood_deploy.parity.onnx_reference import OnnxRunner, onnx_reference
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.torch_reference import torch_reference
from tood_deploy.parity.verify import verify_float32
from tood_deploy.preprocess import with_imgsz
from tood_deploy.presets import MAX_CANDIDATES, Preset


def export_onnx(
    model: Tood,
    output: Path,
    *,
    deform: DeformForm = "op",
    max_det: int | None = None,
    verify_images: Sequence[NDArray[np.uint8]] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Writes `output` (.onnx) and the manifest beside it, after proving the former equal to the network.

    Args:
        model: the network, as `load_checkpoint` gives it.
        output: where to; an artefact that is there already is replaced in one step.
        deform: the form of deformable convolutions: ONNX's operator, or gathers for runtimes that lack it.
        max_det: rows D of the outputs; the preset's where not given.
        verify_images: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        say: told what goes on, a line each.

    Raises:
        ToodError: an argument out of range, or a place that cannot be written.
        CheckFailed: the artefact deviates from PyTorch; nothing is left behind.
    """
    if output.suffix.lower() != ".onnx":
        raise ToodError(f"output is {output}; expected a name ending in .onnx")
    max_det = model.preset.max_det if max_det is None else max_det
    if not 1 <= max_det <= MAX_CANDIDATES:
        raise ToodError(f"max_det is {max_det}; expected 1 to {MAX_CANDIDATES}")
    manifest = Manifest(
        model.preset,
        max_det=max_det,
        checkpoint_sha256=model.checkpoint_sha256,
        build=Build(format="onnx", opset=OPSET, deform=deform if _is_deformable(model) else "none"),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with atomic_path(output) as temporary:
        say("making the graph")
        graph = graph_of(model, deform=deform, max_det=max_det, say=say)
        with timed("check"):
            save_onnx(graph, manifest, temporary)
        reference = torch_reference(model, max_det)
        with timed("verify"):
            parity = verify_float32(reference, OnnxRunner(temporary), images=verify_images, say=say)
            say("making its self-test")
            manifest = replace(
                manifest, parity=Parity.from_dict(parity), self_test=self_test_from(reference.run)
            ).with_artefact(temporary)
        write_text(manifest_path(output), manifest.to_json())
    return manifest


def _is_deformable(model: Tood) -> bool:
    return bool(model.preset.deform_stages or model.preset.deform_tower)


def _versions() -> dict[str, str]:
    return {
        "tood_deploy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Ready:
    """What every target is made from.

    Attributes:
        path: the .onnx artefact in its final precision.
        reference: what an artefact is compared with.
        profiles: sizes and batches; None where none were asked for.
        images: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        ap: measures AP for the verdict; None without annotations.
    """

    path: Path
    reference: Reference
    profiles: Profiles | None
    images: Sequence[NDArray[np.uint8]]
    ap: AnnotatedAp | None = None


def deliver(order: Order, ready: Ready, say: Say) -> Made:
    """Makes the order's target.

    Args:
        order: whose.
        ready: what it is made from.
        say: told what goes on, a line each.

    Raises:
        ToodError: something of the order cannot be.
        CheckFailed: the artefact deviates from its reference; nothing is left behind.
    """
    say(f"{order.output}: {_STEPS[order.to]}")
    return _DELIVER[order.to](order, ready, say)


def _deliver_onnx(order: Order, ready: Ready, say: Say) -> Made:
    manifest = read_manifest(ready.path)
    assert manifest is not None
    if half := half_precision_of(manifest):
        manifest = replace(manifest, build=replace(manifest.build, runtimes=RUNTIMES[half]))
    with atomic_paths(order.output, manifest_path(order.output)) as (onnx_file, manifest_file):
        shutil.move(ready.path, onnx_file)
        manifest_file.write_text(manifest.to_json(), encoding="utf-8")
    return Made(order.output, manifest)


def _deliver_openvino(order: Order, ready: Ready, say: Say) -> Made:
    wanted = order.precision
    rest: Any = {"bf16": "bf16", "int8": wanted.rest}.get(
        wanted.precision
    )  # else what the .onnx says
    images = ready.images
    if wanted.precision != "fp32" or read_onnx(ready.path).manifest.precision != "fp32":
        images = images_to_verify(wanted.calib_data, images)
    manifest = openvino_from_onnx(
        ready.path,
        order.output,
        reference=ready.reference,
        rest=rest,
        images=images,
        ap=ready.ap,
        say=say,
    )
    return Made(order.output, manifest)


def _deliver_engine(order: Order, ready: Ready, say: Say) -> Made:
    profiles = ready.profiles or Profiles(default_shapes(ready.reference.sizing.imgsz))
    built = engine_from_onnx(
        ready.path,
        order.output,
        profiles=profiles,
        options=order.engine,
        flavour=order.flavour,
        self_test=_self_test(ready, profiles),
        rebuild=order.command,
        quiet=order.quiet,
    )
    return Made(order.output, built.manifest, built.layers)


def _self_test(ready: Ready, profiles: Profiles) -> SelfTest | None:
    """None for the form that servers batch: it has thresholds for every image, which no engine of ours is given."""
    if read_onnx(ready.path).manifest.build.serving:
        return None
    return self_test_from(ready.reference.run, profiles.shapes_hw)


def _deliver_triton(order: Order, ready: Ready, say: Say) -> Made:
    return serve(order, ready.path, ready.profiles)


def serve(order: Order, model: Path, profiles: Profiles | None = None) -> Made:
    """Adds an .onnx artefact or an engine to the order's Triton repository."""
    served = triton_repository(
        model,
        order.output,
        order.served_as,
        profiles=profiles,
        engine_options=order.engine,
        quiet=order.quiet,
    )
    return Made(served.path, served.manifest)


_STEPS = {
    "onnx": "writing it",
    "openvino": "converting to OpenVINO, and comparing what it computes",
    "engine": "building the engine, which can take minutes",
    "triton": "adding the model to the repository, and comparing the form that is served",
}
_DELIVER = {
    "onnx": _deliver_onnx,
    "openvino": _deliver_openvino,
    "engine": _deliver_engine,
    "triton": _deliver_triton,
}


def carry_out(
    order: Order, lowering: PrecisionOptions, say: Say, tell: Callable[[Any], None]
) -> Made:
    """Makes what is asked for, and proves it.

    Args:
        order: what; `check_order` has passed it.
        lowering: how the order's precision is made.
        say: told what goes on, a line each.
        tell: given tables to print.

    Raises:
        ToodError: something of the order cannot be.
        CheckFailed: the artefact deviates from its reference; nothing is left behind.
    """
    if order.from_engine:
        say(f"{order.source}: copying the engine into {order.output}")
        return serve(order, Path(order.source))
    images = read_images(order.verify_images, MOST_VERIFY_IMAGES) if order.verify_images else []
    with _working_folder(order.output) as folder:
        float_onnx, reference = _float_onnx(order, lowering, folder, images, say)
        profiles = order.sizes.profiles(
            reference.sizing.imgsz, tell
        )  # before the long work, as it may be wrong
        path = float_onnx
        ap = lowering.measure_ap and lowering.measure_ap(read_onnx(float_onnx))
        options = _in_the_graph(order, lowering)
        if options.wanted:
            say(
                f"{order.source}: writing {options.wanted} into the graph, and comparing it with {reference.run.name}"
            )
            own_ap = (
                None if order.to == "openvino" else ap
            )  # what is made in the end is measured in its own runtime
            with timed("precision"):
                path = lower_onnx(
                    float_onnx,
                    folder,
                    options,
                    reference,
                    images=images,
                    ap=own_ap,
                    tell=tell,
                    quiet=order.quiet,
                )
        with timed("target"):
            return deliver(order, Ready(path, reference, profiles, images, ap), say)


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards, and so is the one that the output should have come into if nothing did.

    Raises:
        OutputError: it cannot be made.
    """
    new = not output.parent.exists()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}-", dir=output.parent))
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if new:
            with suppress(OSError):  # there is something in it
                output.parent.rmdir()


def _float_onnx(
    order: Order,
    lowering: PrecisionOptions,
    folder: Path,
    images: Sequence[NDArray[np.uint8]],
    say: Say,
) -> tuple[Path, Reference]:
    """The float32 .onnx with its manifest, and what everything made from it is compared with."""
    if order.from_onnx:
        return Path(order.source), _given_reference(Path(order.source))
    options = order.checkpoint
    say(f"{order.source}: loading the checkpoint")
    with timed("checkpoint"):
        model = load_checkpoint(order.source, **options.load)
    model.preset = with_imgsz(model.preset, options.imgsz)
    say(f"{order.source}: {describe(model.preset)}")
    max_det = model.preset.max_det if options.max_det is None else options.max_det
    _check_loaded(order, model.preset, max_det)
    if lowering.precision == "int8":
        _check_layers(
            lowering.keep,
            [key.removesuffix(".weight") for key in model.state_dict() if key.endswith(".weight")],
        )
    path = folder / "float32.onnx"
    deform = options.deform or _deform_form(order)
    export_onnx(model, path, deform=deform, max_det=max_det, verify_images=images, say=say)
    return path, torch_reference(model, max_det)


def _check_loaded(order: Order, preset: Preset, max_det: int) -> None:
    """Refuses, before the long work, what only the checkpoint could tell that it cannot be."""
    is_deformable = bool(preset.deform_stages or preset.deform_tower)
    check_deform(
        order.source, order.checkpoint.deform or "none" if is_deformable else "none", order
    )
    if order.check_classes is not None:
        order.check_classes(preset.class_names)
    if order.to == "triton":
        manifest = Manifest(preset, max_det=max_det)
        plan_serving(
            Path(order.source),
            manifest,
            order.output,
            order.served_as,
            order.sizes.without_proposal(preset.imgsz),
        )


def _check_layers(patterns: Collection[str], names: Collection[str]) -> None:
    """Refuses patterns that fit no layer at all; those that fit none of the 8-bit ones only the graph can tell."""
    if strangers := [
        pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)
    ]:
        raise ToodError(
            f"--keep {','.join(strangers)} fits no layer; expected patterns of names such as {', '.join(list(names)[:3])}"
        )


def _given_reference(path: Path) -> Reference:
    """The given .onnx as what its further forms are compared with; bf16 is emulated, as ONNX Runtime has none on CPUs."""
    artefact = read_onnx(path)
    if half_precision_of(artefact.manifest) == "bf16":
        artefact = replace(artefact, model=emulate_low_precision(artefact.model))
    return onnx_reference(artefact)


def _deform_form(order: Order) -> Literal["op", "gather"]:
    """The form that the target has."""
    if order.to == "openvino":
        return "gather"
    return (
        "gather"
        if order.to == "engine" and load_flavour(order.flavour).name == "tensorrt_rtx"
        else "op"
    )


def _in_the_graph(order: Order, lowering: PrecisionOptions) -> PrecisionOptions:
    """The precision that is written into the graph; bf16 in OpenVINO is a property of the run."""
    if order.to != "openvino":
        return lowering
    return PrecisionOptions() if lowering.precision == "bf16" else replace(lowering, rest="fp32")
