"""A whole export as a user asks for it: a checkpoint or an .onnx in; .onnx, OpenVINO, engine or Triton model out, or nothing at all.

Every target is made from one float32 .onnx, which is proven equal to the network first; then comes the precision, then the target.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export.artefact import export_onnx
from tood_deploy.export.made import Made, describe
from tood_deploy.export.onnx_artefact import read_onnx
from tood_deploy.export.pictures import read_pictures
from tood_deploy.export.precision.lowering import PrecisionOptions, lower_onnx
from tood_deploy.export.runners import Reference, onnx_reference, torch_reference
from tood_deploy.export.self_test import self_test_from
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.profiles import Profiles, batch_from_text, default_shapes, shapes_from_text
from tood_deploy.export.tensorrt.shape_plan import propose_shapes
from tood_deploy.export.tensorrt.shape_report import plot_proposal, proposal_table
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.to_openvino import openvino_from_onnx
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.export.triton.to_triton import triton_repository
from tood_deploy.manifest import Manifest, atomic_paths, manifest_path, neighbour, read_manifest
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.preprocess import check_imgsz
from tood_deploy.tensorrt_flavour import load_flavour

Target = Literal["onnx", "openvino", "engine", "triton"]
Say = Callable[[str], None]

MOST_VERIFY_PICTURES = 16
SUFFIXES: dict[Target, tuple[str, ...]] = {"onnx": (".onnx",), "openvino": (".xml",), "engine": (".engine", ".plan"), "triton": ()}


@dataclass(frozen=True)
class CheckpointOptions:
    """What a checkpoint is loaded and first exported with.

    Attributes:
        load: what `load_checkpoint` takes beside the file.
        imgsz: (short side, long side) that the artefact's pictures are scaled to fit; the preset's own where not given.
        max_det: the most detections a picture.
        deform: deformable convolutions as ONNX's operator or as gathers; what the target has where not given.
    """

    load: Mapping[str, Any] = field(default_factory=dict)
    imgsz: Sequence[int] | None = None
    max_det: int = 100
    deform: Literal["op", "gather"] | None = None


@dataclass(frozen=True)
class SizeOptions:
    """The sizes and batches of an engine or a served model, as the command line has them.

    Attributes:
        shapes: "800x1344,1344x800" or "auto"; landscape and portrait of the model's own size where not given.
        batch: "1,8,32" or "8"; 1 to 8 where not given.
        images: the folder whose pictures "auto" is chosen by.
        plot: a file for the plot of what "auto" proposes.
    """

    shapes: str | None = None
    batch: str | None = None
    images: Path | None = None
    plot: Path | None = None

    def profiles(self, imgsz: tuple[int, int], tell: Callable[[Any], None]) -> Profiles | None:
        """The profiles; None where nothing was asked for. A proposal is told as a table."""
        if self.shapes is None and self.batch is None:
            return None
        shapes = default_shapes(imgsz)
        if self.shapes == "auto":
            assert self.images is not None
            proposal = propose_shapes(self.images, imgsz)
            tell(proposal_table(proposal))
            if self.plot is not None:
                plot_proposal(proposal, self.plot)
            shapes = proposal.shapes_hw
        elif self.shapes is not None:
            shapes = shapes_from_text(self.shapes)
        return Profiles(shapes, batch_from_text(self.batch)) if self.batch else Profiles(shapes)


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        source: a checkpoint, a preset's name, or an .onnx of tood-export.
        output: the file, or for Triton the repository.
        to: what to make.
        precision: of the network.
        checkpoint: how a checkpoint is taken.
        sizes, engine, flavour: of engines and served models.
        triton: how a model is served.
        verify_images: a folder of pictures to verify on, in addition to the built-in ones.
        command: that makes the same again, for the manifest.
        quiet: no progress bars.
    """

    source: str
    output: Path
    to: Target = "onnx"
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    flavour: str | None = None
    triton: TritonOptions = field(default_factory=TritonOptions)
    verify_images: Path | None = None
    command: str = ""
    quiet: bool = False


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
    _check_output(order)
    pictures = read_pictures(order.verify_images, MOST_VERIFY_PICTURES) if order.verify_images else []
    with _working_folder(order.output) as folder:
        float_onnx, reference = _float_onnx(order, folder, pictures, say)
        profiles = order.sizes.profiles(reference.imgsz, tell)  # before the long work, as it may be wrong
        path = float_onnx
        options = _in_the_graph(order)
        if options.wanted:
            say(f"{order.source}: writing {options.wanted} into the graph, and comparing it with {reference.run.name}")
            path = lower_onnx(float_onnx, folder, options, reference, pictures=pictures, tell=tell, quiet=order.quiet)
        return _DELIVER[order.to](order, path, reference, profiles, pictures)


def _check_output(order: Order) -> None:
    suffixes = SUFFIXES[order.to]
    if suffixes and order.output.suffix.lower() not in suffixes:
        raise ToodError(f"output is {order.output}; expected a name ending in {' or '.join(suffixes)}")
    if suffixes and (other := neighbour(order.output)):
        raise ToodError(
            f"{order.output}: its manifest {manifest_path(order.output).name} would replace that of {other.name}; "
            f"give another --output, such as {order.output.with_stem(f'{order.output.stem}-{order.to}')}"
        )


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}-", dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _float_onnx(order: Order, folder: Path, pictures: Sequence[NDArray[np.uint8]], say: Say) -> tuple[Path, Reference]:
    """The float32 .onnx with its manifest, and what everything made from it is compared with."""
    if Path(order.source).suffix.lower() == ".onnx":
        return _given_onnx(Path(order.source), order)
    options = order.checkpoint
    imgsz = check_imgsz(options.imgsz) if options.imgsz else None
    model = load_checkpoint(order.source, **options.load)
    model.preset = replace(model.preset, imgsz=imgsz or model.preset.imgsz)
    say(f"{order.source}: {describe(model.preset)}; exporting and verifying, which takes a minute or so")
    path = folder / "float32.onnx"
    export_onnx(model, path, deform=options.deform or _deform_form(order), max_det=options.max_det, verify_pictures=pictures)
    return path, torch_reference(model, options.max_det)


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


def _deliver_onnx(order: Order, path: Path, reference: Reference, profiles: Profiles | None, pictures: Sequence[NDArray[np.uint8]]) -> Made:
    with atomic_paths(order.output, manifest_path(order.output)) as temporary:
        for source, target in zip((path, manifest_path(path)), temporary, strict=True):
            shutil.move(source, target)
    return Made(order.output, _manifest_of(order.output))


def _deliver_openvino(
    order: Order, path: Path, reference: Reference, profiles: Profiles | None, pictures: Sequence[NDArray[np.uint8]]
) -> Made:
    wanted = order.precision
    rest: Any = {"bf16": "bf16", "int8": wanted.rest}.get(wanted.precision)  # else what the .onnx says
    manifest = openvino_from_onnx(path, order.output, reference=reference, rest=rest, pictures=pictures)
    return Made(order.output, manifest)


def _deliver_engine(
    order: Order, path: Path, reference: Reference, profiles: Profiles | None, pictures: Sequence[NDArray[np.uint8]]
) -> Made:
    profiles = profiles or Profiles(default_shapes(reference.imgsz))
    built = engine_from_onnx(
        path,
        order.output,
        profiles=profiles,
        options=order.engine,
        flavour=order.flavour,
        self_test=self_test_from(reference.run, profiles.shapes_hw),
        rebuild=order.command,
        quiet=order.quiet,
    )
    return Made(order.output, built.manifest, built.layers)


def _deliver_triton(
    order: Order, path: Path, reference: Reference, profiles: Profiles | None, pictures: Sequence[NDArray[np.uint8]]
) -> Made:
    options = replace(order.triton, name=order.triton.name or Path(order.source).stem)
    served = triton_repository(path, order.output, options, profiles=profiles, engine_options=order.engine, quiet=order.quiet)
    return Made(served.path, served.manifest)


def _manifest_of(path: Path) -> Manifest:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest


_DELIVER = {"onnx": _deliver_onnx, "openvino": _deliver_openvino, "engine": _deliver_engine, "triton": _deliver_triton}
