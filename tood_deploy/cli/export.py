"""`tood-export`: parses arguments, nothing else."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.run import DONE, add_model_options, class_names_from, run_command
from tood_deploy.errors import ToodError

if TYPE_CHECKING:
    from tood_deploy.export.order import Order
    from tood_deploy.export.precision.lowering import PrecisionOptions
    from tood_deploy.export.tensorrt.engine_options import EngineOptions

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "engine": ".engine", "triton": ""}
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
OF_ENGINES = ("batch", "shapes", "flavour")
OF_BUILDS = ("workspace", "optimisation_level", "timing_cache", "version_compatible", "hardware_compatible", "compute_capability")
OF_INT8 = ("rest", "calib_method", "calib_pictures", "max_drop", "max_ap_drop")
OF_TRITON = ("name", "backend", "queue_delay", "device", "gpus", "instances", "warm_up")
OF_CHECKPOINTS = ("imgsz", "max_det", "deform", "preset", "classes", "convention")

EPILOG = """\
what comes out:
  --to onnx (the default)  one .onnx for ONNX Runtime, with pre- and post-processing inside; every other target is made from it
  --to openvino            .xml and .bin for OpenVINO on CPUs
  --to engine              a TensorRT or TensorRT-RTX engine; the precision is written into the graph, the network strongly typed
  --to triton              a model in a repository of NVIDIA Triton Inference Server (docs/serving.md)

precision:
  bf16 and fp16 keep normalisation, decoding, scores and suppression in float32. In OpenVINO bf16 is a property of the run. int8 needs
  pictures like those to come (--calib-data); --max-ap-drop with --annotations and --images, or --max-drop without annotations, keeps
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
    result = argparse.ArgumentParser(
        "tood-export",
        description="Turns a TOOD checkpoint into an artefact with pre- and post-processing inside, and proves it equal to PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("checkpoint", metavar="MODEL", help="a checkpoint file, the name of a preset, or an .onnx of tood-export")
    result.add_argument("--to", choices=tuple(SUFFIXES), default="onnx", help="what to make (default: onnx)")
    result.add_argument(
        "--output", type=Path, metavar="PLACE", help="where to (default: the checkpoint's name, what it is made into, here)"
    )
    result.add_argument("--precision", choices=PRECISIONS, help="of convolutions (default: fp32, or that of the .onnx)")
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
    result.add_argument("--keep", metavar="NAMES", help="patterns of layers that stay in float32, separated by commas")
    result.add_argument("--imgsz", type=int, nargs=2, metavar=("H", "W"), help="the artefact's default picture size: short and long side")
    result.add_argument("--max-det", type=int, metavar="N", help="the most detections a picture (default: 100)")
    result.add_argument(
        "--deform",
        choices=("op", "gather"),
        help="deformable convolutions as ONNX's operator (ONNX Runtime, TensorRT) or as gathers (OpenVINO, TensorRT-RTX)",
    )
    result.add_argument(
        "--verify-images", type=Path, metavar="DIR", help="pictures to verify on, in addition to the built-in ones (the first 16)"
    )
    result.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _add_int8_options(result.add_argument_group("int8"))
    _add_engine_options(result.add_argument_group("engine and triton"))
    _add_triton_options(result.add_argument_group("triton"))
    add_model_options(result)
    return result


def _add_int8_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calib-data", type=Path, metavar="DIR", help="pictures to calibrate on, 64 or more; for fp16: to find what it cannot hold"
    )
    group.add_argument("--calib-method", choices=("entropy", "percentile", "minmax"), help="how ranges are chosen (default: percentile)")
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="D",
        help="keep the most sensitive layers in float until quality drops by no more: per cent of mismatched detections",
    )
    group.add_argument("--max-ap-drop", type=float, metavar="D", help="the same in points of AP, 0 to 100, on annotated pictures")
    group.add_argument("--annotations", type=Path, metavar="FILE", help="of --max-ap-drop: COCO annotations of the pictures in --images")
    group.add_argument("--calib-pictures", type=int, metavar="N", help="at most so many of the folder (default: 128)")


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch", metavar="MIN,OPT,MAX", help="batches that it takes, and the one to be fastest at (default: 1,1,8)")
    group.add_argument(
        "--shapes",
        metavar="HxW,...",
        help="padded picture sizes, 1 to 6, or auto with --images (default: landscape and portrait of --imgsz)",
    )
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="pictures of --annotations, and whose sizes --shapes auto is chosen by; one folder for both",
    )
    group.add_argument("--shapes-plot", type=Path, metavar="FILE", help="a plot of what --shapes auto proposes (.png, .svg, .pdf)")
    group.add_argument("--flavour", choices=("tensorrt", "tensorrt_rtx"), help="where both are installed (default: the one that is)")
    group.add_argument("--workspace", type=int, metavar="MIB", help="the most memory of one layer")
    group.add_argument("--optimisation-level", type=int, metavar="N", help="0 builds fast, 5 runs fast (TensorRT)")
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="measured times, read and written (TensorRT)")
    group.add_argument("--version-compatible", action="store_true", help="also runs in later versions (TensorRT)")
    group.add_argument("--hardware-compatible", action="store_true", help="also runs on other GPUs, Ampere and newer (TensorRT)")
    group.add_argument("--compute-capability", metavar="X.Y,...", help="the GPUs to build for (TensorRT-RTX)")
    group.add_argument("--list-layers", action="store_true", help="print every layer with its precision")


def _add_triton_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", metavar="NAME", help="of the model on the server (default: the file's name)")
    group.add_argument("--backend", choices=("onnxruntime", "tensorrt"), help="what runs the model (default: onnxruntime)")
    group.add_argument("--queue-delay", type=int, metavar="US", help="microseconds a picture waits for others (default: 1000)")
    group.add_argument("--device", choices=("gpu", "cpu"), help="what the instances run on (default: gpu)")
    group.add_argument("--gpus", metavar="N,...", help="numbers of the GPUs that get instances (default: all)")
    group.add_argument("--instances", type=int, metavar="N", help="on each GPU, or on the CPU (default: 1)")
    group.add_argument("--warm-up", metavar="N,...", help="batches to run before the model counts as ready, or none (default: 1)")


def export_command(argv: Sequence[str] | None) -> int:
    """Loads, exports, verifies, and says what was made."""
    arguments = parser().parse_args(argv)
    check_arguments(arguments)
    from rich.console import Console

    from tood_deploy.export.order import carry_out

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=arguments.quiet)
    made = carry_out(
        order_from(arguments, shlex.join(["tood-export", *(sys.argv[1:] if argv is None else argv)])), console.print, console.print
    )
    out = Console(soft_wrap=True, highlight=False, markup=False, quiet=arguments.quiet)
    for part in made.report(list_layers=arguments.list_layers):
        out.print(part)
    return DONE


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses options that mean nothing here.

    Raises:
        ToodError: there is one; the message names it.
    """
    given = {name for name, value in vars(arguments).items() if value is not None and value is not False}
    tuned = arguments.autotune_precision
    conditions = (
        (arguments.to in ("engine", "triton"), (*OF_ENGINES, *OF_BUILDS), "--to engine or --to triton"),
        (arguments.to == "engine", ("list_layers",), "--to engine"),
        (arguments.to == "triton", OF_TRITON, "--to triton"),
        (tuned or arguments.precision == "int8", OF_INT8, "--precision int8 or --autotune-precision"),
        (not tuned or arguments.to == "engine", ("rest",), "--to engine when it comes with --autotune-precision"),
        (
            arguments.rest == "fp32" or arguments.to in ("openvino", "engine"),
            ("rest",),
            "--to openvino or engine: ONNX Runtime gets it wrong",
        ),
        (tuned or arguments.precision in ("int8", "fp16"), ("calib_data",), "--precision int8 or fp16, or --autotune-precision"),
        ("max_ap_drop" in given, ("annotations",), "--max-ap-drop"),
        (arguments.shapes == "auto" or "annotations" in given, ("images",), "--shapes auto or --annotations"),
        (arguments.shapes == "auto", ("shapes_plot",), "--shapes auto"),
        (not arguments.checkpoint.lower().endswith(".onnx"), OF_CHECKPOINTS, "a checkpoint, the .onnx has them inside"),
    )
    for holds, names, needed in conditions:
        if not holds and (strangers := [f"--{name.replace('_', '-')}" for name in names if name in given]):
            raise ToodError(f"{', '.join(strangers)} {'needs' if len(strangers) == 1 else 'need'} {needed}")
    _check_search(arguments, given)
    needs = (
        (arguments.precision == "int8", "--precision int8", "calib_data", "DIR: a folder of 64 or more pictures like those to come"),
        (tuned, "--autotune-precision", "calib_data", "DIR: a folder of 64 or more pictures like those to come"),
        ("max_ap_drop" in given, "--max-ap-drop", "annotations", "FILE: COCO annotations (--max-drop does without)"),
        ("annotations" in given, "--annotations", "images", "DIR: the folder of the annotated pictures"),
        (arguments.shapes == "auto", "--shapes auto", "images", "DIR: a folder of pictures like those to come"),
    )
    for holds, what, name, expected in needs:
        if holds and name not in given:
            raise ToodError(f"{what} needs --{name.replace('_', '-')} {expected}")


def _check_search(arguments: argparse.Namespace, given: set[str]) -> None:
    if {"max_drop", "max_ap_drop"} <= given:
        raise ToodError("--max-drop and --max-ap-drop are two limits of one quality; give --max-ap-drop alone where there are annotations")
    if not arguments.autotune_precision:
        return
    if strangers := [f"--{name}" for name in ("precision", "keep") if name in given]:
        raise ToodError(f"{', '.join(strangers)} beside --autotune-precision, which chooses precisions itself; leave one of them out")
    if arguments.to == "triton":
        raise ToodError("--autotune-precision does not make --to triton; make an .onnx with it first, and serve that")
    if not given & {"max_drop", "max_ap_drop"}:
        raise ToodError("--autotune-precision needs --max-ap-drop D with --annotations and --images, or --max-drop D without annotations")


def order_from(arguments: argparse.Namespace, command: str) -> "Order":
    """The arguments as the exporter takes them; `command` makes the same again."""
    from tood_deploy.export.order import CheckpointOptions, Order, SizeOptions
    from tood_deploy.export.tensorrt.engine_options import EngineOptions
    from tood_deploy.export.triton.options import TritonOptions

    load = {"preset": arguments.preset, "class_names": class_names_from(arguments.classes), "convention": arguments.convention}
    made = {"imgsz": arguments.imgsz, "max_det": arguments.max_det, "deform": arguments.deform}
    served: dict[str, Any] = {name: getattr(arguments, name) for name in ("name", "backend", "device", "instances")}
    served |= {"queue_delay_us": arguments.queue_delay, "gpus": _numbers("--gpus", arguments.gpus)}
    served |= {"warm_up_batches": () if arguments.warm_up == "none" else _numbers("--warm-up", arguments.warm_up)}
    engine = EngineOptions(
        workspace_mib=arguments.workspace,
        optimisation_level=arguments.optimisation_level,
        timing_cache=arguments.timing_cache,
        version_compatible=arguments.version_compatible,
        hardware_compatible=arguments.hardware_compatible,
        compute_capabilities=_parts(arguments.compute_capability),
    )
    return Order(
        source=arguments.checkpoint,
        output=arguments.output or default_output(arguments),
        to=arguments.to,
        precision=_precision_from(arguments, engine),
        checkpoint=CheckpointOptions(load=_given(load), **_given(made)),
        sizes=SizeOptions(arguments.shapes, arguments.batch, arguments.images, arguments.shapes_plot),
        engine=engine,
        flavour=arguments.flavour,
        triton=TritonOptions(**_given(served)),
        verify_images=arguments.verify_images,
        command=command,
        quiet=arguments.quiet,
    )


def default_output(arguments: argparse.Namespace) -> Path:
    """The model's name in the present folder; what is made from an .onnx says in its name what it is, as both have a manifest."""
    stem = Path(arguments.checkpoint).stem
    if arguments.checkpoint.lower().endswith(".onnx") and arguments.to != "triton":
        parts = (
            stem,
            arguments.to if arguments.to != "onnx" else None,
            arguments.precision,
            "tuned" if arguments.autotune_precision else None,
        )
        stem = "-".join(part for part in parts if part)
    return Path(f"{stem}{SUFFIXES[arguments.to]}")


def _precision_from(arguments: argparse.Namespace, engine: "EngineOptions") -> "PrecisionOptions":
    from functools import partial

    from tood_deploy.export.precision.int8 import Int8Options
    from tood_deploy.export.precision.lowering import PrecisionOptions

    max_drop = arguments.max_drop if arguments.max_ap_drop is None else arguments.max_ap_drop
    values = {"method": arguments.calib_method, "max_drop": max_drop, "most_pictures": arguments.calib_pictures}
    scheme = "s8s8" if arguments.to == "engine" or arguments.backend == "tensorrt" else "u8s8"
    int8 = Int8Options(scheme=scheme, **_given(values))
    quality = None
    if arguments.annotations is not None:
        from tood_deploy.benchmark.evaluation_run import open_data_set
        from tood_deploy.benchmark.precision_quality import ApDrop

        quality = partial(ApDrop, open_data_set(arguments.annotations, arguments.images), quiet=arguments.quiet)
    if arguments.autotune_precision:
        from tood_deploy.benchmark.precision_latency import Opener
        from tood_deploy.benchmark.precision_search import PrecisionSearch

        half: Any = {"fp32": None, None: "fp16"}.get(arguments.rest, arguments.rest) if arguments.to == "engine" else None
        opener = Opener(arguments.to, engine, arguments.flavour)
        search = PrecisionSearch(opener, arguments.calib_data, int8, half, quality, arguments.quiet)
        return PrecisionOptions(calib_data=arguments.calib_data, lower=search)
    lowered = {name: getattr(arguments, name) for name in ("precision", "rest", "calib_data")}
    return PrecisionOptions(keep=_parts(arguments.keep), int8=int8, quality=quality, **_given(lowered))


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
        raise ToodError(f"{option} is {text!r}; expected whole numbers with commas between them, for example 0,1")
    return tuple(map(int, parts)) or None


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run_command(export_command, argv)
