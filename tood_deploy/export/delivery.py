"""The last step of an export: from a graph in its final precision to the target that was asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.export.made import Made
from tood_deploy.export.onnx_artefact import read_onnx
from tood_deploy.export.order import Order
from tood_deploy.export.precision.lowering import AnnotatedAp, images_to_verify
from tood_deploy.export.self_test import self_test_from
from tood_deploy.export.tensorrt.profiles import Profiles, default_shapes
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.to_openvino import openvino_from_onnx
from tood_deploy.export.triton.to_triton import triton_repository
from tood_deploy.half_precision import RUNTIMES, half_precision_of
from tood_deploy.manifest import atomic_paths, manifest_path, read_manifest
from tood_deploy.parity.reference import Reference

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Ready:
    """What every target is made from.

    Attributes:
        path: the .onnx artefact in its final precision.
        reference: what an artefact is compared with.
        profiles: sizes and batches; None where none were asked for.
        pictures: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        ap: measures AP for the verdict; None without annotations.
    """

    path: Path
    reference: Reference
    profiles: Profiles | None
    pictures: Sequence[NDArray[np.uint8]]
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
        manifest = replace(manifest, options=manifest.options | {"runtimes": list(RUNTIMES[half])})
    with atomic_paths(order.output, manifest_path(order.output)) as (onnx_file, manifest_file):
        shutil.move(ready.path, onnx_file)
        manifest_file.write_text(manifest.to_json(), encoding="utf-8")
    return Made(order.output, manifest)


def _deliver_openvino(order: Order, ready: Ready, say: Say) -> Made:
    wanted = order.precision
    rest: Any = {"bf16": "bf16", "int8": wanted.rest}.get(wanted.precision)  # else what the .onnx says
    pictures = ready.pictures
    if wanted.precision != "fp32" or read_onnx(ready.path).manifest.precision != "fp32":
        pictures = images_to_verify(wanted.calib_data, pictures)
    manifest = openvino_from_onnx(ready.path, order.output, reference=ready.reference, rest=rest, pictures=pictures, ap=ready.ap, say=say)
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


def _self_test(ready: Ready, profiles: Profiles) -> dict[str, Any]:
    """None for the form that servers batch: it has thresholds for every picture, which no engine of ours is given."""
    if "serving" in read_onnx(ready.path).manifest.options:
        return {}
    return self_test_from(ready.reference.run, profiles.shapes_hw)


def _deliver_triton(order: Order, ready: Ready, say: Say) -> Made:
    return serve(order, ready.path, ready.profiles)


def serve(order: Order, model: Path, profiles: Profiles | None = None) -> Made:
    """Adds an .onnx artefact or an engine to the order's Triton repository."""
    served = triton_repository(model, order.output, order.served_as, profiles=profiles, engine_options=order.engine, quiet=order.quiet)
    return Made(served.path, served.manifest)


_STEPS = {
    "onnx": "writing it",
    "openvino": "converting to OpenVINO, and comparing what it computes",
    "engine": "building the engine, which can take minutes",
    "triton": "adding the model to the repository, and comparing the form that is served",
}
_DELIVER = {"onnx": _deliver_onnx, "openvino": _deliver_openvino, "engine": _deliver_engine, "triton": _deliver_triton}
