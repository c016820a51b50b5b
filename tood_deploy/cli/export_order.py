"""From the arguments of `tood-export` to the order that `carry_out` takes; here, as the search for precisions lies above `export`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from tood_deploy.cli.run import load_options
from tood_deploy.errors import ToodError
from tood_deploy.export.order import CheckpointOptions, Order, SizeOptions, default_output
from tood_deploy.export.precision.int8 import Int8Options
from tood_deploy.export.precision.lowering import PrecisionOptions, QualityOf
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.triton.options import TritonOptions


def order_from(arguments: argparse.Namespace, command: str) -> Order:
    """The arguments, which `check_options` has passed, as an order; `command` makes the same again.

    Raises:
        ToodError: a value that cannot be.
    """
    made = {"imgsz": arguments.imgsz, "max_det": arguments.max_det, "deform": arguments.deform}
    engine = _engine_from(arguments)
    return Order(
        source=arguments.checkpoint,
        output=arguments.output or _default_output(arguments),
        to=arguments.to,
        precision=_precision_from(arguments, engine),
        checkpoint=CheckpointOptions(load=load_options(arguments), **_given(made)),
        sizes=SizeOptions(arguments.shapes, arguments.batch, arguments.images, arguments.shapes_plot),
        engine=engine,
        flavour=arguments.flavour,
        triton=_triton_from(arguments),
        verify_images=arguments.verify_images,
        command=command,
        quiet=arguments.quiet,
    )


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


def _precision_from(arguments: argparse.Namespace, engine: EngineOptions) -> PrecisionOptions:
    max_drop = arguments.max_drop if arguments.max_ap_drop is None else arguments.max_ap_drop
    values = {"method": arguments.calib_method, "max_drop": max_drop, "most_pictures": arguments.calib_pictures}
    scheme = "s8s8" if arguments.to == "engine" or arguments.backend == "tensorrt" else "u8s8"
    int8 = Int8Options(scheme=scheme, **_given(values))
    quality = _quality_from(arguments)
    if arguments.autotune_precision:
        return _search_from(arguments, engine, int8, quality)
    lowered = {name: getattr(arguments, name) for name in ("precision", "rest", "calib_data")}
    return PrecisionOptions(keep=_parts(arguments.keep), int8=int8, quality=quality, **_given(lowered))


def _quality_from(arguments: argparse.Namespace) -> QualityOf | None:
    """Quality in AP where there are annotations."""
    if arguments.annotations is None:
        return None
    from tood_deploy.benchmark.evaluation_run import open_data_set
    from tood_deploy.benchmark.precision_quality import ApDrop

    return partial(ApDrop, open_data_set(arguments.annotations, arguments.images), quiet=arguments.quiet)


def _search_from(arguments: argparse.Namespace, engine: EngineOptions, int8: Int8Options, quality: QualityOf | None) -> PrecisionOptions:
    from tood_deploy.benchmark.precision_latency import Opener
    from tood_deploy.benchmark.precision_search import PrecisionSearch

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
