"""Carries out a whole export: a checkpoint or an .onnx in; .onnx, OpenVINO, engine or Triton model out, or nothing at all.

Every target is made from one float32 .onnx, which is proven equal to the network first; then comes the precision, then the target.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export.artefact import export_onnx
from tood_deploy.export.delivery import Ready, deliver, serve
from tood_deploy.export.made import Made, describe
from tood_deploy.export.onnx_artefact import read_onnx
from tood_deploy.export.order import Order
from tood_deploy.export.pictures import read_pictures
from tood_deploy.export.precision.emulation import emulate_low_precision
from tood_deploy.export.precision.lowering import PrecisionOptions, lower_onnx
from tood_deploy.export.preflight import MOST_VERIFY_PICTURES, check_deform
from tood_deploy.export.runners import onnx_reference
from tood_deploy.export.triton.fit import plan_serving
from tood_deploy.half_precision import half_precision_of
from tood_deploy.manifest import Manifest
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.parity.reference import Reference, torch_reference
from tood_deploy.preprocess import with_imgsz
from tood_deploy.presets import Preset
from tood_deploy.tensorrt_flavour import load_flavour

Say = Callable[[str], None]


def carry_out(order: Order, lowering: PrecisionOptions, say: Say, tell: Callable[[Any], None]) -> Made:
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
    pictures = read_pictures(order.verify_images, MOST_VERIFY_PICTURES) if order.verify_images else []
    with _working_folder(order.output) as folder:
        float_onnx, reference = _float_onnx(order, lowering, folder, pictures, say)
        profiles = order.sizes.profiles(reference.sizing.imgsz, tell)  # before the long work, as it may be wrong
        path = float_onnx
        ap = lowering.measure_ap and lowering.measure_ap(read_onnx(float_onnx))
        options = _in_the_graph(order, lowering)
        if options.wanted:
            say(f"{order.source}: writing {options.wanted} into the graph, and comparing it with {reference.run.name}")
            own_ap = None if order.to == "openvino" else ap  # what is made in the end is measured in its own runtime
            path = lower_onnx(float_onnx, folder, options, reference, pictures=pictures, ap=own_ap, tell=tell, quiet=order.quiet)
        return deliver(order, Ready(path, reference, profiles, pictures, ap), say)


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
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if new:
            with suppress(OSError):  # there is something in it
                output.parent.rmdir()


def _float_onnx(
    order: Order, lowering: PrecisionOptions, folder: Path, pictures: Sequence[NDArray[np.uint8]], say: Say
) -> tuple[Path, Reference]:
    """The float32 .onnx with its manifest, and what everything made from it is compared with."""
    if order.from_onnx:
        return Path(order.source), _given_reference(Path(order.source))
    options = order.checkpoint
    say(f"{order.source}: loading the checkpoint")
    model = load_checkpoint(order.source, **options.load)
    model.preset = with_imgsz(model.preset, options.imgsz)
    say(f"{order.source}: {describe(model.preset)}")
    max_det = model.preset.max_det if options.max_det is None else options.max_det
    _check_loaded(order, model.preset, max_det)
    if lowering.precision == "int8":
        _check_layers(lowering.keep, [key.removesuffix(".weight") for key in model.state_dict() if key.endswith(".weight")])
    path = folder / "float32.onnx"
    deform = options.deform or _deform_form(order)
    export_onnx(model, path, deform=deform, max_det=max_det, verify_pictures=pictures, say=say)
    return path, torch_reference(model, max_det)


def _check_loaded(order: Order, preset: Preset, max_det: int) -> None:
    """Refuses, before the long work, what only the checkpoint could tell that it cannot be."""
    is_deformable = bool(preset.deform_stages or preset.deform_tower)
    check_deform(order.source, order.checkpoint.deform or "none" if is_deformable else "none", order)
    if order.check_classes is not None:
        order.check_classes(preset.class_names)
    if order.to == "triton":
        manifest = Manifest(preset, max_det=max_det)
        plan_serving(Path(order.source), manifest, order.output, order.served_as, order.sizes.without_proposal(preset.imgsz))


def _check_layers(patterns: Collection[str], names: Collection[str]) -> None:
    """Refuses patterns that fit no layer at all; those that fit none of the 8-bit ones only the graph can tell."""
    if strangers := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        raise ToodError(f"--keep {','.join(strangers)} fits no layer; expected patterns of names such as {', '.join(list(names)[:3])}")


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
    return "gather" if order.to == "engine" and load_flavour(order.flavour).name == "tensorrt_rtx" else "op"


def _in_the_graph(order: Order, lowering: PrecisionOptions) -> PrecisionOptions:
    """The precision that is written into the graph; bf16 in OpenVINO is a property of the run."""
    if order.to != "openvino":
        return lowering
    return PrecisionOptions() if lowering.precision == "bf16" else replace(lowering, rest="fp32")
