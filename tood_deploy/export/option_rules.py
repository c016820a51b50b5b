"""Which options of an export go together, and which need another one. Knows options by name; no parser, and nothing that is heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tood_deploy.errors import ToodError

OF_PROFILES = ("batch", "shapes")
OF_BUILDS = (
    "workspace",
    "optimisation_level",
    "timing_cache",
    "version_compatible",
    "hardware_compatible",
    "compute_capability",
    "nms",
    "nms_rounds",
)
OF_INT8 = ("rest", "calib_method", "calib_pictures", "max_drop", "max_ap_drop", "target_cpu")
OF_TRITON = ("name", "backend", "queue_delay", "device", "gpus", "instances", "warm_up")
OF_CHECKPOINTS = ("imgsz", "max_det", "deform", "preset", "classes", "convention", "weights_key")

OF_GRAPHS = ("precision", "autotune_precision", "keep", "calib_data", "verify_images")
from tood_deploy.graph_io import ENGINE_SUFFIXES

CALIBRATION = "DIR: a folder of 64 or more images like those to come"


@dataclass(frozen=True)
class Condition:
    """Options that mean something only where something else holds.

    Attributes:
        holds: whether it does.
        options: their names.
        needed: what else, in words.
    """

    holds: bool
    options: tuple[str, ...]
    needed: str


@dataclass(frozen=True)
class Need:
    """An option that another one cannot do without.

    Attributes:
        holds: whether that other one is given.
        what: the other one, as written.
        option: the name of the one that is needed.
        expected: its value, in words.
    """

    holds: bool
    what: str
    option: str
    expected: str


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options that mean nothing, or are not enough.

    Args:
        options: every option of `tood-export` by its name, with _ for -; None or False where it is not given.

    Raises:
        ToodError: there is one; the message names it.
    """
    given = {name for name, value in options.items() if value is not None and value is not False}
    for condition in _conditions(options, given):
        if not condition.holds and (
            strangers := [as_flag(name) for name in condition.options if name in given]
        ):
            raise ToodError(
                f"{', '.join(strangers)} {'needs' if len(strangers) == 1 else 'need'} {condition.needed}"
            )
    _check_search(options, given)
    for need in _needs(options, given):
        if need.holds and need.option not in given:
            raise ToodError(f"{need.what} needs {as_flag(need.option)} {need.expected}")


def as_flag(name: str) -> str:
    """The option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _conditions(options: Mapping[str, Any], given: set[str]) -> Iterator[Condition]:
    to, precision, tuned = options["to"], options["precision"], options["autotune_precision"]
    builds = to == "engine" or options["backend"] == "tensorrt"
    yield Condition(
        not builds, ("target_cpu",), "--to onnx, openvino, or triton with --backend onnxruntime"
    )
    yield Condition(to in ("engine", "triton"), OF_PROFILES, "--to engine or --to triton")
    yield Condition(to == "engine", ("flavour", "list_layers"), "--to engine")
    yield Condition(to == "triton", OF_TRITON, "--to triton")
    yield Condition(builds, OF_BUILDS, "--to engine, or --to triton with --backend tensorrt")
    yield Condition(
        tuned or precision == "int8", OF_INT8, "--precision int8 or --autotune-precision"
    )
    yield Condition(
        not tuned or to == "engine",
        ("rest",),
        "--to engine when it comes with --autotune-precision",
    )
    in_float = options["rest"] == "fp32" or to in ("openvino", "engine")
    yield Condition(in_float, ("rest",), "--to openvino or engine: ONNX Runtime gets it wrong")
    calibrated = tuned or precision in ("int8", "fp16")
    yield Condition(
        calibrated, ("calib_data",), "--precision int8 or fp16, or --autotune-precision"
    )
    lowered = precision in ("bf16", "fp16", "int8") and not tuned
    yield Condition(
        lowered or "max_ap_drop" in given,
        ("annotations",),
        "--precision bf16, fp16 or int8, or --max-ap-drop",
    )
    yield Condition(
        options["shapes"] == "auto" or "annotations" in given,
        ("images",),
        "--shapes auto or --annotations",
    )
    yield Condition(options["shapes"] == "auto", ("shapes_plot",), "--shapes auto")
    source = options["checkpoint"].lower()
    yield Condition(
        not source.endswith(ENGINE_SUFFIXES),
        (*OF_PROFILES, *OF_BUILDS, *OF_GRAPHS),
        "a checkpoint or an .onnx; an engine is served as it is",
    )
    from_checkpoint = not source.endswith((".onnx", *ENGINE_SUFFIXES))
    yield Condition(from_checkpoint, OF_CHECKPOINTS, "a checkpoint, the .onnx has them inside")


def _needs(options: Mapping[str, Any], given: set[str]) -> Iterator[Need]:
    yield Need(options["precision"] == "int8", "--precision int8", "calib_data", CALIBRATION)
    yield Need(options["autotune_precision"], "--autotune-precision", "calib_data", CALIBRATION)
    yield Need(
        "max_ap_drop" in given,
        "--max-ap-drop",
        "annotations",
        "FILE: COCO annotations (--max-drop does without)",
    )
    yield Need(
        "annotations" in given, "--annotations", "images", "DIR: the folder of the annotated images"
    )
    yield Need(
        options["shapes"] == "auto",
        "--shapes auto",
        "images",
        "DIR: a folder of images like those to come",
    )


def _check_search(options: Mapping[str, Any], given: set[str]) -> None:
    if {"max_drop", "max_ap_drop"} <= given:
        raise ToodError(
            "--max-drop and --max-ap-drop are two limits of one quality; give --max-ap-drop alone where there are annotations"
        )
    if not options["autotune_precision"]:
        return
    if strangers := [as_flag(name) for name in ("precision", "keep") if name in given]:
        raise ToodError(
            f"{', '.join(strangers)} beside --autotune-precision, which chooses precisions itself; leave one of them out"
        )
    if options["to"] == "triton":
        raise ToodError(
            "--autotune-precision does not make --to triton; make an .onnx with it first, and serve that"
        )
    if not given & {"max_drop", "max_ap_drop"}:
        raise ToodError(
            "--autotune-precision needs --max-ap-drop D with --annotations and --images, or --max-drop D without annotations"
        )
