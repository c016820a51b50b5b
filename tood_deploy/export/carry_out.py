"""Carries out a whole export: a checkpoint or an .onnx in; .onnx, OpenVINO, engine or Triton model out, or nothing at all.

Every target is made from one float32 .onnx, which is proven equal to the network first; then comes the precision, then the target.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export.artefact import export_onnx
from tood_deploy.export.delivery import Ready, deliver, serve
from tood_deploy.export.made import Made, describe
from tood_deploy.export.onnx_artefact import read_onnx
from tood_deploy.export.order import SUFFIXES, Order
from tood_deploy.export.pictures import read_pictures
from tood_deploy.export.precision.calibration import choose_pictures
from tood_deploy.export.precision.lowering import PrecisionOptions, lower_onnx
from tood_deploy.export.runners import onnx_reference
from tood_deploy.export.triton.to_triton import SERVED_FLAVOUR
from tood_deploy.manifest import manifest_path, neighbour
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.parity.reference import Reference, torch_reference
from tood_deploy.preprocess import with_imgsz
from tood_deploy.tensorrt_flavour import load_flavour

Say = Callable[[str], None]

MOST_VERIFY_PICTURES = 16


def carry_out(order: Order, say: Say, tell: Callable[[Any], None]) -> Made:
    """Makes what is asked for, and proves it.

    Args:
        order: what.
        say: told what goes on, a line each.
        tell: given tables to print.

    Raises:
        ToodError: something of the order cannot be.
        CheckFailed: the artefact deviates from its reference; nothing is left behind.
    """
    if Path(order.source).suffix.lower() in SUFFIXES["engine"]:
        return _serve_engine(order)
    _check_output(order)
    _check_means(order)
    pictures = read_pictures(order.verify_images, MOST_VERIFY_PICTURES) if order.verify_images else []
    with _working_folder(order.output) as folder:
        float_onnx, reference = _float_onnx(order, folder, pictures, say)
        profiles = order.sizes.profiles(reference.sizing.imgsz, tell)  # before the long work, as it may be wrong
        path = float_onnx
        options = _in_the_graph(order)
        if options.wanted:
            say(f"{order.source}: writing {options.wanted} into the graph, and comparing it with {reference.run.name}")
            path = lower_onnx(float_onnx, folder, options, reference, pictures=pictures, tell=tell, quiet=order.quiet)
        return deliver(order, Ready(path, reference, profiles, pictures))


def _serve_engine(order: Order) -> Made:
    if order.to != "triton":
        raise ToodError(
            f"{order.source} is an engine, which can be served and not exported; give --to triton, or the .onnx it was built from"
        )
    return serve(order, Path(order.source))


def _check_output(order: Order) -> None:
    if order.to == "triton":
        return  # a folder, which may hold more
    suffixes = SUFFIXES[order.to]
    if order.output.suffix.lower() not in suffixes:
        raise ToodError(f"output is {order.output}; expected a name ending in {' or '.join(suffixes)}")
    if other := neighbour(order.output):
        raise ToodError(
            f"{order.output}: its manifest {manifest_path(order.output).name} would replace that of {other.name}; "
            f"give another --output, such as {order.output.with_stem(f'{order.output.stem}-{order.to}')}"
        )


def _check_means(order: Order) -> None:
    """Looks, before the long work, for what only its end needs: the library that builds, its GPU, and pictures to calibrate on."""
    if order.to == "engine" or order.triton.backend == "tensorrt":
        library = load_flavour(order.flavour if order.to == "engine" else SERVED_FLAVOUR)
        order.engine.check(library)
        if library.name == "tensorrt":  # builds on the GPU that it builds for
            from tood_deploy.cuda_device import check_driver

            check_driver()
    if order.precision.calib_data is not None:
        choose_pictures(order.precision.calib_data, order.precision.int8.most_pictures)


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


def _float_onnx(order: Order, folder: Path, pictures: Sequence[NDArray[np.uint8]], say: Say) -> tuple[Path, Reference]:
    """The float32 .onnx with its manifest, and what everything made from it is compared with."""
    if Path(order.source).suffix.lower() == ".onnx":
        return _given_onnx(Path(order.source), order)
    options = order.checkpoint
    model = load_checkpoint(order.source, **options.load)
    model.preset = with_imgsz(model.preset, options.imgsz)
    say(f"{order.source}: {describe(model.preset)}; exporting and verifying, which takes a minute or so")
    path = folder / "float32.onnx"
    max_det = model.preset.max_det if options.max_det is None else options.max_det
    export_onnx(model, path, deform=options.deform or _deform_form(order), max_det=max_det, verify_pictures=pictures)
    return path, torch_reference(model, max_det)


def _given_onnx(path: Path, order: Order) -> tuple[Path, Reference]:
    artefact = read_onnx(path)
    precision = artefact.manifest.precision
    if precision != "fp32" and order.precision.wanted:
        raise ToodError(f"{path} is in {precision} already; leave --precision out, or start from the float32 .onnx")
    if order.to == "onnx" and not order.precision.wanted:
        raise ToodError(f"{path} is an .onnx already; give --precision or --to openvino, engine or triton")
    return path, onnx_reference(artefact)


def _deform_form(order: Order) -> Literal["op", "gather"]:
    """The form that the target has."""
    if order.to == "openvino":
        return "gather"
    return "gather" if order.to == "engine" and load_flavour(order.flavour).name == "tensorrt_rtx" else "op"


def _in_the_graph(order: Order) -> PrecisionOptions:
    """The precision that is written into the graph; bf16 in OpenVINO is a property of the run."""
    if order.to != "openvino":
        return order.precision
    if "fp16" in (order.precision.precision, order.precision.rest):
        raise ToodError("OpenVINO on CPUs computes in fp32, bf16 and int8; give --precision bf16, or another --to")
    return PrecisionOptions() if order.precision.precision == "bf16" else replace(order.precision, rest="fp32")
