"""From the arguments of `tood-export` to what `check_order` and `carry_out` take.

It lies here, as annotations and the search for precisions lie above `export`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.run import load_options
from tood_deploy.errors import InputError, ToodError
from tood_deploy.export.image_check import ImageSet
from tood_deploy.export.order import CheckpointOptions, Order, PrecisionOrder, SizeOptions, default_output
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.triton.options import TritonOptions

if TYPE_CHECKING:
    from tood_deploy.benchmark.evaluation_run import DataSet
    from tood_deploy.export.precision.int8 import Int8Options
    from tood_deploy.export.precision.lowering import AnnotatedApOf, PrecisionOptions, QualityOf


def open_annotated(arguments: argparse.Namespace) -> DataSet | None:
    """Reads the annotations that AP is measured by, and finds their images; None where none are given.

    Raises:
        InputError: the annotations cannot be read, or an image is missing.
    """
    if arguments.annotations is None:
        return None
    from tood_deploy.benchmark.evaluation_run import open_data_set

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
        sizes=SizeOptions(arguments.shapes, arguments.batch, arguments.images, arguments.shapes_plot),
        engine=_engine_from(arguments),
        flavour=arguments.flavour,
        triton=_triton_from(arguments),
        verify_images=arguments.verify_images,
        check_classes=_class_check(data),
        command=command,
        quiet=arguments.quiet,
    )


def _precision_order(arguments: argparse.Namespace, data: DataSet | None) -> PrecisionOrder:
    values = {name: getattr(arguments, name) for name in ("precision", "rest", "target_cpu", "calib_data", "annotations")}
    values |= {"max_drop": _max_drop(arguments), "most_images": arguments.calib_pictures}
    annotated = None if data is None else ImageSet("--images", tuple(data.files.values()), _decode_annotated)
    return PrecisionOrder(tuned=arguments.autotune_precision, annotated=annotated, **_given(values))


def _decode_annotated(path: Path) -> object:
    """Decodes an image as an evaluation does.

    Raises:
        InputError: it cannot be read.
    """
    from tood_deploy.inference.images import decode_image

    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image") from error


def _class_check(data: DataSet | None) -> Any:
    """A function of class names that raises ToodError where they are not the categories of the annotations."""
    if data is None:
        return None
    from tood_deploy.benchmark.categories import map_categories

    return partial(map_categories, truth=data.truth)


def _max_drop(arguments: argparse.Namespace) -> float | None:
    return arguments.max_drop if arguments.max_ap_drop is None else arguments.max_ap_drop


def _default_output(arguments: argparse.Namespace) -> Path:
    return default_output(arguments.checkpoint, arguments.to, "tuned" if arguments.autotune_precision else arguments.precision)


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
    served: dict[str, Any] = {name: getattr(arguments, name) for name in ("name", "backend", "device", "instances")}
    served |= {"queue_delay_us": arguments.queue_delay, "gpus": _numbers("--gpus", arguments.gpus)}
    served |= {"warm_up_batches": () if arguments.warm_up == "none" else _numbers("--warm-up", arguments.warm_up)}
    return TritonOptions(**_given(served))


def precision_from(arguments: argparse.Namespace, order: Order, data: DataSet | None) -> PrecisionOptions:
    """How the precision of an order is made. Imports PyTorch.

    Raises:
        ToodError: a value that cannot be.
    """
    from tood_deploy.export.precision.int8 import Int8Options
    from tood_deploy.export.precision.lowering import PrecisionOptions

    values = {"method": arguments.calib_method, "max_drop": _max_drop(arguments), "most_pictures": arguments.calib_pictures}
    scheme = "s8s8" if order.builds_engine else "u8s8" if arguments.target_cpu == "native" else "u8s7"
    int8 = Int8Options(scheme=scheme, **_given(values))
    measure_ap = _ap_from(data, arguments.quiet)
    quality = None if arguments.max_ap_drop is None else measure_ap
    if arguments.autotune_precision:
        return replace(_search_from(arguments, order.engine, int8, quality), measure_ap=measure_ap)
    lowered = {name: getattr(arguments, name) for name in ("precision", "rest", "calib_data")}
    return PrecisionOptions(keep=_parts(arguments.keep), int8=int8, quality=quality, measure_ap=measure_ap, **_given(lowered))


def _ap_from(data: DataSet | None, quiet: bool) -> AnnotatedApOf | None:
    """What measures AP, where there are annotations."""
    if data is None:
        return None
    from tood_deploy.benchmark.precision_quality import ApDrop

    return partial(ApDrop, data, quiet=quiet)


def _search_from(arguments: argparse.Namespace, engine: EngineOptions, int8: Int8Options, quality: QualityOf | None) -> PrecisionOptions:
    from tood_deploy.benchmark.precision_latency import Opener
    from tood_deploy.benchmark.precision_search import PrecisionSearch
    from tood_deploy.export.precision.lowering import PrecisionOptions

    half: Any = {"fp32": None, None: "fp16"}.get(arguments.rest, arguments.rest) if arguments.to == "engine" else None
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
        raise ToodError(f"{option} is {text!r}; expected whole numbers with commas between them, for example 0,1")
    return tuple(map(int, parts)) or None
