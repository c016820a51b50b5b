"""`tood-export`: parses arguments, nothing else."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import DONE, CommandParser, add_model_options, load_options, run_command
from tood_deploy.errors import DeviceError, InputError, ToodError, not_installed
from tood_deploy.export.config import (
    CheckpointOptions,
    EngineOptions,
    Order,
    PrecisionOrder,
    SizeOptions,
    TritonOptions,
    default_output,
)

if TYPE_CHECKING:
    from tood_deploy.benchmark.evaluation.evaluate import DataSet
    from tood_deploy.export.precision.convert import (
        AnnotatedApOf,
        Int8Options,
        PrecisionOptions,
        QualityOf,
    )


TARGETS = ("onnx", "openvino", "engine", "triton")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
EXTRAS = {
    "openvino": ("export", "openvino"),
    "pycocotools": ("export", "eval"),
}  # that bring what is missing; else "export"
PACKAGES = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
    "safetensors",
    "filelock",
)  # of every export

EPILOG = """\
what comes out:
  --to onnx (the default)  one .onnx for ONNX Runtime, with pre- and post-processing inside; every other target is made from it
  --to openvino            .xml and .bin for OpenVINO on CPUs
  --to engine              a TensorRT or TensorRT-RTX engine; the precision is written into the graph, the network strongly typed
  --to triton              a model in a repository of NVIDIA Triton Inference Server (docs/serving.md)

precision:
  bf16 and fp16 keep normalisation, decoding, scores and suppression in float32. In OpenVINO bf16 is a property of the run. ONNX Runtime
  on CPUs does not open an .onnx in bf16 and only emulates fp16: they are for engines, OpenVINO (bf16) and GPUs (fp16). int8 needs
  images like those to come (--calib-data); --max-ap-drop with --annotations and --images, or --max-drop without annotations, keeps
  layers that cost too much in float32. --autotune-precision measures instead which mixture of precisions is fastest within that.

checkpoints:
  Files of MMDetection 2.x and 3.x, of the TOOD authors, and our own (.pth, .pt, .safetensors) load as they are. A preset's name in
  place of a file downloads its published weights once. An .onnx of tood-export is taken further.

class counts:
  Any number of classes works: the count is read from the weights, the names from the file's metadata. Where the metadata has no
  names, classes are numbered; name them with --classes person,car,dog or --classes names.txt (one a line).

anchor-free or anchor-based:
  Both kinds have the same weights. Where a file's metadata does not tell them apart (a bare state_dict), say it with
  --preset r50-1x or --preset r50-anchor-1x.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = CommandParser(
        prog="tood-export", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "checkpoint",
        metavar="MODEL",
        help="a checkpoint file, the name of a preset, or an .onnx of tood-export",
    )
    result.add_argument(
        "--to", choices=TARGETS, default="onnx", help="what to make (default: onnx)"
    )
    result.add_argument(
        "--output",
        type=Path,
        metavar="PLACE",
        help="where to (default: the checkpoint's name, what it is made into, here)",
    )
    result.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of convolutions (default: fp32, or that of the .onnx)",
    )
    result.add_argument(
        "--autotune-precision",
        action="store_true",
        help="the fastest mixture whose quality drops by no more than --max-ap-drop or --max-drop, measured on this machine",
    )
    result.add_argument(
        "--rest",
        choices=PRECISIONS[:-1],
        help="precision of what is not 8-bit, in an int8 model (default: fp32) or a search for an engine (default: fp16)",
    )
    result.add_argument(
        "--keep",
        metavar="NAMES",
        help="patterns of layers that stay in float32, separated by commas",
    )
    result.add_argument(
        "--imgsz",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="the artefact's default image size: short and long side",
    )
    result.add_argument(
        "--max-det", type=int, metavar="N", help="the most detections a image (default: 100)"
    )
    result.add_argument(
        "--deform",
        choices=("op", "gather"),
        help="deformable convolutions as ONNX's operator (ONNX Runtime, TensorRT) or as gathers (OpenVINO, TensorRT-RTX)",
    )
    result.add_argument(
        "--verify-images",
        type=Path,
        metavar="DIR",
        help="images to verify on, in addition to the built-in ones (the first 16)",
    )
    result.add_argument(
        "--timings", action="store_true", help="print where the time went, step by step"
    )
    result.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _add_int8_options(result.add_argument_group("int8"))
    _add_engine_options(result.add_argument_group("engine and triton"))
    _add_triton_options(result.add_argument_group("triton"))
    add_model_options(result)
    return result


def _add_int8_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calib-data",
        type=Path,
        metavar="DIR",
        help="images to calibrate on, 64 or more; for fp16: to find what it cannot hold",
    )
    group.add_argument(
        "--target-cpu",
        choices=("portable", "native"),
        help="int8 for CPUs: weights that every CPU adds up exactly, or all 8 bits, which need VNNI instructions (default: portable)",
    )
    group.add_argument(
        "--calib-method",
        choices=("entropy", "percentile", "minmax"),
        help="how ranges are chosen (default: percentile)",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="D",
        help="keep the most sensitive layers in float until quality drops by no more: per cent of mismatched detections",
    )
    group.add_argument(
        "--max-ap-drop",
        type=float,
        metavar="D",
        help="the same in points of AP, 0 to 100, on annotated images",
    )
    group.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="of --max-ap-drop: COCO annotations of the images in --images",
    )
    group.add_argument(
        "--calib-pictures",
        type=int,
        metavar="N",
        help="at most so many of the folder (default: 128)",
    )


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch",
        metavar="MIN,OPT,MAX",
        help="batches that it takes, and the one to be fastest at (default: 1,1,8)",
    )
    group.add_argument(
        "--shapes",
        metavar="HxW,...",
        help="padded image sizes, 1 to 6, or auto with --images (default: landscape and portrait of --imgsz)",
    )
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="images of --annotations, and whose sizes --shapes auto is chosen by; one folder for both",
    )
    group.add_argument(
        "--shapes-plot",
        type=Path,
        metavar="FILE",
        help="a plot of what --shapes auto proposes (.png, .svg, .pdf)",
    )
    group.add_argument(
        "--flavour",
        choices=("tensorrt", "tensorrt_rtx"),
        help="where both are installed (default: the one that is)",
    )
    group.add_argument("--workspace", type=int, metavar="MIB", help="the most memory of one layer")
    group.add_argument(
        "--optimisation-level", type=int, metavar="N", help="0 builds fast, 5 runs fast (TensorRT)"
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="measured times, read and written (TensorRT)",
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="also runs in later versions (TensorRT)"
    )
    group.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="also runs on other GPUs, Ampere and newer (TensorRT)",
    )
    group.add_argument(
        "--compute-capability", metavar="X.Y,...", help="the GPUs to build for (TensorRT-RTX)"
    )
    group.add_argument(
        "--nms",
        choices=("unrolled", "loop"),
        help="suppression in a fixed number of rounds, as CUDA graphs need it, or as a loop in the network (default: unrolled)",
    )
    group.add_argument(
        "--nms-rounds",
        type=int,
        metavar="N",
        help="how many; a image for which they are too few is an error (default: 16)",
    )
    group.add_argument(
        "--list-layers", action="store_true", help="print every layer with its precision"
    )


def _add_triton_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--name", metavar="NAME", help="of the model on the server (default: the file's name)"
    )
    group.add_argument(
        "--backend",
        choices=("onnxruntime", "tensorrt"),
        help="what runs the model (default: onnxruntime)",
    )
    group.add_argument(
        "--queue-delay",
        type=int,
        metavar="US",
        help="microseconds a image waits for others (default: 1000)",
    )
    group.add_argument(
        "--device", choices=("gpu", "cpu"), help="what the instances run on (default: gpu)"
    )
    group.add_argument(
        "--gpus", metavar="N,...", help="numbers of the GPUs that get instances (default: all)"
    )
    group.add_argument(
        "--instances", type=int, metavar="N", help="on each GPU, or on the CPU (default: 1)"
    )
    group.add_argument(
        "--warm-up",
        metavar="N,...",
        help="batches to run before the model counts as ready, or none (default: 1)",
    )


def export_command(argv: Sequence[str] | None) -> int:
    """Asks for all that is needed first, then loads, exports and verifies, and says what was made."""
    arguments = parser().parse_args(argv)
    from tood_deploy.export.option_rules import check_options

    check_options(vars(arguments))
    _check_packages(arguments)
    from rich.console import Console

    from tood_deploy.export.preflight import check_order

    console = Console(
        stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=arguments.quiet
    )
    data = open_annotated(arguments)
    order = order_from(
        arguments, shlex.join(["tood-export", *(sys.argv[1:] if argv is None else argv)]), data
    )
    check_order(order)
    console.print(f"{order.source}: checked all that its export needs; starting PyTorch")
    from tood_deploy.export.export import carry_out
    from tood_deploy.export.timings import record_timings

    with record_timings() as timings:
        precision = precision_from(arguments, order, data)
        made = carry_out(order, precision, console.print, console.print)
    if arguments.timings:
        console.print(timings.table())
    out = Console(soft_wrap=True, highlight=False, markup=False, quiet=arguments.quiet)
    for part in made.report(list_layers=arguments.list_layers):
        out.print(part)
    return DONE


def _check_packages(arguments: argparse.Namespace) -> None:
    """Refuses to begin where a package is missing that is needed later, before anything imports one."""
    needed = [*PACKAGES, *(["openvino"] if arguments.to == "openvino" else [])]
    needed += ["pycocotools"] if arguments.annotations else []
    lowered = arguments.precision in ("bf16", "fp16")
    needed += (
        ["matplotlib"] if lowered and not (arguments.calib_data or arguments.verify_images) else []
    )  # whose photograph is run
    for name in needed:
        if not is_installed(name):
            raise DeviceError(not_installed(name, *EXTRAS.get(name, ("export",))))


def is_installed(name: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run_command(export_command, argv)


def open_annotated(arguments: argparse.Namespace) -> DataSet | None:
    """Reads the annotations that AP is measured by, and finds their images; None where none are given.

    Raises:
        InputError: the annotations cannot be read, or an image is missing.
    """
    if arguments.annotations is None:
        return None
    from tood_deploy.benchmark.evaluation.evaluate import open_data_set

    return open_data_set(arguments.annotations, arguments.images)


def order_from(arguments: argparse.Namespace, command: str, data: DataSet | None = None) -> Order:
    """The arguments, which `check_options` has passed, as an order. Imports nothing heavy.

    Args:
        arguments: of the command.
        command: makes the same again.
        data: what `open_annotated` gives.

    Raises:
        ToodError: a value that cannot be.
    """
    made = {"imgsz": arguments.imgsz, "max_det": arguments.max_det, "deform": arguments.deform}
    return Order(
        source=arguments.checkpoint,
        output=arguments.output or _default_output(arguments),
        to=arguments.to,
        precision=_precision_order(arguments, data),
        checkpoint=CheckpointOptions(load=load_options(arguments), **_given(made)),
        sizes=SizeOptions(
            arguments.shapes, arguments.batch, arguments.images, arguments.shapes_plot
        ),
        engine=_engine_from(arguments),
        flavour=arguments.flavour,
        triton=_triton_from(arguments),
        verify_images=arguments.verify_images,
        check_classes=_class_check(data),
        command=command,
        quiet=arguments.quiet,
    )


def _precision_order(arguments: argparse.Namespace, data: DataSet | None) -> PrecisionOrder:
    from tood_deploy.data.images import ImagesToCheck

    values = {
        name: getattr(arguments, name)
        for name in ("precision", "rest", "target_cpu", "calib_data", "annotations")
    }
    values |= {"max_drop": _max_drop(arguments), "most_images": arguments.calib_pictures}
    annotated = (
        None
        if data is None
        else ImagesToCheck("--images", tuple(data.files.values()), _decode_annotated)
    )
    return PrecisionOrder(tuned=arguments.autotune_precision, annotated=annotated, **_given(values))


def _decode_annotated(path: Path) -> object:
    """Decodes an image as an evaluation does.

    Raises:
        InputError: it cannot be read.
    """
    from tood_deploy.data.images import decode_image

    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image") from error


def _class_check(data: DataSet | None) -> Any:
    """A function of class names that raises ToodError where they are not the categories of the annotations."""
    if data is None:
        return None
    from tood_deploy.data.categories import map_categories

    return partial(map_categories, truth=data.truth)


def _max_drop(arguments: argparse.Namespace) -> float | None:
    return arguments.max_drop if arguments.max_ap_drop is None else arguments.max_ap_drop


def _default_output(arguments: argparse.Namespace) -> Path:
    return default_output(
        arguments.checkpoint,
        arguments.to,
        "tuned" if arguments.autotune_precision else arguments.precision,
    )


def _engine_from(arguments: argparse.Namespace) -> EngineOptions:
    values = {
        "workspace_mib": arguments.workspace,
        "optimisation_level": arguments.optimisation_level,
        "timing_cache": arguments.timing_cache,
        "version_compatible": arguments.version_compatible,
        "hardware_compatible": arguments.hardware_compatible,
        "compute_capabilities": _parts(arguments.compute_capability),
        "nms": arguments.nms,
        "nms_rounds": arguments.nms_rounds,
    }
    return EngineOptions(**_given(values))


def _triton_from(arguments: argparse.Namespace) -> TritonOptions:
    served: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("name", "backend", "device", "instances")
    }
    served |= {"queue_delay_us": arguments.queue_delay, "gpus": _numbers("--gpus", arguments.gpus)}
    served |= {
        "warm_up_batches": ()
        if arguments.warm_up == "none"
        else _numbers("--warm-up", arguments.warm_up)
    }
    return TritonOptions(**_given(served))


def precision_from(
    arguments: argparse.Namespace, order: Order, data: DataSet | None
) -> PrecisionOptions:
    """How the precision of an order is made. Imports PyTorch.

    Raises:
        ToodError: a value that cannot be.
    """
    from tood_deploy.export.precision.convert import Int8Options, PrecisionOptions

    values = {
        "method": arguments.calib_method,
        "max_drop": _max_drop(arguments),
        "max_images": arguments.calib_pictures,
    }
    scheme = (
        "s8s8" if order.builds_engine else "u8s8" if arguments.target_cpu == "native" else "u8s7"
    )
    int8 = Int8Options(scheme=scheme, **_given(values))
    measure_ap = _ap_from(data, arguments.quiet)
    quality = None if arguments.max_ap_drop is None else measure_ap
    if arguments.autotune_precision:
        return replace(_search_from(arguments, order.engine, int8, quality), measure_ap=measure_ap)
    lowered = {name: getattr(arguments, name) for name in ("precision", "rest", "calib_data")}
    return PrecisionOptions(
        keep=_parts(arguments.keep),
        int8=int8,
        quality=quality,
        measure_ap=measure_ap,
        **_given(lowered),
    )


def _ap_from(data: DataSet | None, quiet: bool) -> AnnotatedApOf | None:
    """What measures AP, where there are annotations."""
    if data is None:
        return None
    from tood_deploy.benchmark.precision_search import ApDrop

    return partial(ApDrop, data, quiet=quiet)


def _search_from(
    arguments: argparse.Namespace,
    engine: EngineOptions,
    int8: Int8Options,
    quality: QualityOf | None,
) -> PrecisionOptions:
    from tood_deploy.benchmark.precision_search import Opener, PrecisionSearch
    from tood_deploy.export.precision.convert import PrecisionOptions

    half: Any = (
        {"fp32": None, None: "fp16"}.get(arguments.rest, arguments.rest)
        if arguments.to == "engine"
        else None
    )
    opener = Opener(arguments.to, engine, arguments.flavour)
    search = PrecisionSearch(opener, arguments.calib_data, int8, half, quality, arguments.quiet)
    return PrecisionOptions(calib_data=arguments.calib_data, lower=search)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _parts(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Reads "0,1"; None where not given.

    Raises:
        ToodError: not whole numbers.
    """
    parts = _parts(text)
    if not all(part.isdecimal() for part in parts):
        raise ToodError(
            f"{option} is {text!r}; expected whole numbers with commas between them, for example 0,1"
        )
    return tuple(map(int, parts)) or None
