"""The test pipeline of a configuration: which size, colours, statistics and padding the network was tested with.

Both layouts: MMDetection 3.x, whose `data_preprocessor` normalises and pads after the pipeline, and 2.x, whose pipeline
does all of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal, NamedTuple

import numpy as np

from tood_deploy.model.config_rules import (
    HARMLESS,
    Computed,
    Rule,
    Table,
    apply_rules,
    is_number,
    only,
    refuse,
    same,
    without_scope,
)
from tood_deploy.presets import SIZE_DIVISOR, Preset

Layout = Literal["2.x", "3.x"]
Triple = tuple[float, float, float]


class Step(NamedTuple):
    """One step of a pipeline: its plain type, its arguments, and where it stands."""

    kind: str
    arguments: Mapping[str, Any]
    path: str


class Padding(NamedTuple):
    """A rule that pads: to a fixed size or to multiples of a divisor, with a value in RGB order after normalising."""

    path: str
    size_hw: tuple[int, int] | None
    divisor: int
    value: Triple


@dataclass(frozen=True)
class Statistics:
    """How pixels become the network's input.

    Attributes:
        mean, std: in RGB order.
        rgb: whether the network takes RGB.
        step: position of the pipeline's step that normalises; None where the data preprocessor or nothing does.
    """

    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    rgb: bool = False
    step: int | None = None


def _as_is(value: Any) -> Any:
    return value


def _keep(*keys: str) -> dict[str, Rule]:
    """Make the rules of keys whose values are read further below."""
    return {key: Computed(key, _as_is) for key in keys}


LOADING: dict[str, Rule] = {
    "to_float32": only(False),  # resizing would round otherwise
    "color_type": only("color"),
    "imdecode_backend": HARMLESS,  # who decodes: the pixels are the caller's
    **dict.fromkeys(("file_client_args", "backend_args", "ignore_empty"), HARMLESS),
}
RESIZING: dict[str, Rule] = {
    "backend": only("cv2"),
    "interpolation": only("bilinear"),
    **dict.fromkeys(("clip_object_border", "bbox_clip_border"), HARMLESS),  # of the annotations
}
STEPS: dict[str, Table | None] = {
    **dict.fromkeys(
        ("LoadImageFromFile", "LoadImageFromNDArray", "LoadImageFromWebcam", "InferencerLoader"),
        LOADING,
    ),
    "Resize": _keep("scale", "img_scale", "scale_factor", "keep_ratio")
    | RESIZING
    | {"multiscale_mode": HARMLESS, "ratio_range": only(None), "override": only(False)},
    "FixShapeResize": _keep("width", "height")
    | RESIZING
    | {"keep_ratio": only(False), "pad_val": HARMLESS},
    "Normalize": _keep("mean", "std", "to_rgb"),
    "Pad": _keep("size", "size_divisor", "pad_to_square", "pad_val")
    | {"padding_mode": only("constant")},
    "RandomFlip": {
        **dict.fromkeys(("prob", "flip_ratio"), only(None, 0)),
        **dict.fromkeys(("direction", "swap_seg_labels"), HARMLESS),
    },
    "MultiScaleFlipAug": _keep("img_scale")
    | {
        "transforms": HARMLESS,
        "scale_factor": only(None),
        "flip": only(False),
        "flip_direction": HARMLESS,
    },
    # What packs an image and its annotations changes no pixel, whatever its arguments.
    **dict.fromkeys(
        ("LoadAnnotations", "PackDetInputs", "Collect", "ImageToTensor", "DefaultFormatBundle"),
        None,
    ),
}

PREPROCESSOR: Table = {
    "type": only("DetDataPreprocessor", "ImgDataPreprocessor"),
    **_keep("mean", "std", "bgr_to_rgb", "rgb_to_bgr", "pad_size_divisor", "pad_value"),
    **dict.fromkeys(
        (
            "pad_mask",
            "mask_pad_value",
            "pad_seg",
            "seg_pad_value",
            "boxtype2tensor",
            "non_blocking",
        ),
        HARMLESS,
    ),
    "batch_augments": HARMLESS,  # at training time alone
}


def read_steps(pipeline: Any, path: str, weights: Preset) -> list[Step]:
    """Read the steps of a test pipeline, those inside MultiScaleFlipAug in its place.

    Raises:
        CheckpointError: a step, or an argument of one, that is not known or not supported.
    """
    if not isinstance(pipeline, tuple):
        refuse(path, pipeline, "a list of steps is expected there")
    return [
        step
        for i, entry in enumerate(pipeline)
        for step in _read_step(entry, f"{path}[{i}]", weights)
    ]


def _read_step(entry: Any, path: str, weights: Preset) -> Iterator[Step]:
    if not isinstance(entry, Mapping) or "type" not in entry:
        refuse(path, entry, "a dictionary with a type is expected there")
    kind = without_scope(entry["type"])
    if not isinstance(kind, str) or kind not in STEPS:
        refuse(
            f"{path}.type",
            entry["type"],
            f"of a test pipeline only {', '.join(STEPS)} are supported",
        )
    path, table = f"{path}({kind})", STEPS[kind]
    if table is None:
        return
    arguments = apply_rules({"type": HARMLESS, **table}, entry, path, weights)
    if kind != "MultiScaleFlipAug":
        yield Step(kind, arguments, path)
        return
    for step in read_steps(_inner_steps(entry.get("transforms")), f"{path}.transforms", weights):
        if step.kind == "Resize":
            step = step._replace(
                arguments={**step.arguments, "img_scale": arguments.get("img_scale")}
            )
        yield step


def _inner_steps(transforms: Any) -> Any:
    """Return the steps inside MultiScaleFlipAug without the flip, which its own `flip` decides on."""
    if not isinstance(transforms, tuple):
        return transforms
    flip = {"type": "RandomFlip"}
    return tuple(
        flip
        if isinstance(step, Mapping) and without_scope(step.get("type")) == "RandomFlip"
        else step
        for step in transforms
    )


def layout_of(path: str, steps: Any) -> Layout:
    """Tell the layout of a pipeline by where it stands and by steps that 2.x alone has."""
    kinds = (
        {without_scope(step.get("type")) for step in steps if isinstance(step, Mapping)}
        if isinstance(steps, tuple)
        else set()
    )
    return (
        "2.x"
        if path.startswith("data.")
        or kinds & {"MultiScaleFlipAug", "Collect", "DefaultFormatBundle"}
        else "3.x"
    )


def read_input(
    steps: list[Step] | None,
    layout: Layout,
    preprocessor: Mapping[str, Any] | None,
    path: str,
    weights: Preset,
) -> dict[str, Any]:
    """Read how an image becomes the network's input.

    Args:
        steps: of the test pipeline; None where the configuration has none.
        layout: of the pipeline.
        preprocessor: the configuration's `data_preprocessor`; None where there is none.
        path: where that stands.
        weights: the preset that the shapes of the weights tell.

    Returns:
        The fields of the preset that it sets.

    Raises:
        CheckpointError: a setting that cannot be computed as it says.
    """
    if (
        steps is not None
        and preprocessor is None
        and layout == "3.x"
        and not any(step.kind == "Normalize" for step in steps)
    ):
        refuse(
            "data_preprocessor",
            None,
            "the test pipeline leaves normalising and padding to it",
            "give the whole configuration",
        )
    after = {} if preprocessor is None else apply_rules(PREPROCESSOR, preprocessor, path, weights)
    statistics = _read_statistics(steps or [], after, path)
    settings: dict[str, Any] = {
        "mean": statistics.mean,
        "std": statistics.std,
        "channel_order": "rgb" if statistics.rgb else "bgr",
    }
    if steps is not None:
        settings |= _read_resizing(steps, layout)
    paddings = _read_paddings(steps or [], statistics, layout)
    if preprocessor is not None:
        paddings.append(_last_padding(after, path))
    return settings | _join_paddings(settings, paddings)


# --- Statistics and colours.


def _read_statistics(steps: list[Step], after: Mapping[str, Any], path: str) -> Statistics:
    converts = bool(after.get("bgr_to_rgb", False)) or bool(after.get("rgb_to_bgr", False))
    places = [i for i, step in enumerate(steps) if step.kind == "Normalize"]
    if not places:
        mean, std = _mean_and_std(after, path, converts)
        return Statistics(mean, std, converts)
    step = steps[places[0]]
    if len(places) > 1 or after.get("mean") is not None or converts:
        refuse(
            step.path,
            dict(step.arguments),
            "pixels are normalised or reordered twice, by another step or the data preprocessor too",
        )
    if any(other.kind in ("Resize", "FixShapeResize") for other in steps[places[0] :]):
        refuse(step.path, dict(step.arguments), "resizing after normalising is not supported")
    rgb = bool(step.arguments.get("to_rgb", True))
    return Statistics(*_mean_and_std(step.arguments, step.path, rgb), rgb, places[0])


def _mean_and_std(source: Mapping[str, Any], path: str, rgb: bool) -> tuple[Triple, Triple]:
    mean, std = source.get("mean"), source.get("std")
    if mean is None and std is None:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    means, deviations = _triple(mean, f"{path}.mean", rgb), _triple(std, f"{path}.std", rgb)
    if min(deviations) <= 0:
        refuse(f"{path}.std", std, "pixels would be divided by it; positive numbers are supported")
    return means, deviations


def _triple(value: Any, path: str, rgb: bool) -> Triple:
    """Read three numbers, or one for all three channels, into RGB order."""
    values = value if isinstance(value, tuple) else (value,)
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(map(is_number, values)):
        refuse(path, value, "three numbers, or one for all channels, are supported")
    first, second, third = (float(number) for number in values)
    return (first, second, third) if rgb else (third, second, first)


# --- Sizes.


def _read_resizing(steps: list[Step], layout: Layout) -> dict[str, Any]:
    resizing = [i for i, step in enumerate(steps) if step.kind in ("Resize", "FixShapeResize")]
    if not resizing:  # every image in its own size
        return {"resize": "stretch", "scale_factor": (1.0, 1.0)}
    step = steps[resizing[0]]
    if len(resizing) > 1 or any(other.kind == "Pad" for other in steps[: resizing[0]]):
        refuse(step.path, dict(step.arguments), "one resizing, before any padding, is supported")
    if step.kind == "FixShapeResize":
        width, height = (step.arguments.get(name) for name in ("width", "height"))
        return {"resize": "stretch", "imgsz": _size((width, height), step.path)[::-1]}
    keeps = step.arguments.get("keep_ratio", layout == "2.x")
    if not isinstance(keeps, bool):
        refuse(f"{step.path}.keep_ratio", keeps, "only True or False is supported")
    scale = (
        step.arguments.get("scale")
        if step.arguments.get("img_scale") is None
        else step.arguments["img_scale"]
    )
    if scale is None:
        return {"resize": "fit" if keeps else "stretch", "scale_factor": _factor(step)}
    size = _size(scale, f"{step.path} scale")
    return (
        {"resize": "fit", "imgsz": (min(size), max(size))}
        if keeps
        else {"resize": "stretch", "imgsz": size[::-1]}
    )


def _size(value: Any, path: str) -> tuple[int, int]:
    """Read one size (width, height), or one number for both."""
    values = (
        value[0]
        if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], tuple)
        else value
    )
    values = (
        (values, values) if isinstance(values, int) and not isinstance(values, bool) else values
    )
    if (
        not isinstance(values, tuple)
        or len(values) != 2
        or not all(type(side) is int and side > 0 for side in values)
    ):
        refuse(path, value, "one size of two positive whole numbers is supported")
    return values[0], values[1]


def _factor(step: Step) -> tuple[float, float]:
    """Read the factors of rows and columns from (of width, of height), or one for both."""
    value = step.arguments.get("scale_factor")
    values = value if isinstance(value, tuple) else (value, value)
    factors = [float(factor) for factor in values if is_number(factor) and factor > 0]
    if not len(values) == len(factors) == 2:
        refuse(f"{step.path}.scale_factor", value, "a size, or positive factors, are supported")
    return factors[1], factors[0]


# --- Padding.


def _read_paddings(steps: list[Step], statistics: Statistics, layout: Layout) -> list[Padding]:
    paddings = []
    square = _square_side(steps, layout)
    for i, step in enumerate(steps):
        if step.kind == "Pad":
            raw = statistics.step is None or i < statistics.step
            value = _pad_value(step, statistics, raw)
            size_hw, divisor = _pad_size(step, layout, square)
            paddings.append(Padding(step.path, size_hw, divisor, value))
    return paddings


def _square_side(steps: list[Step], layout: Layout) -> int | None:
    """Return the side that the longer side of every image has after resizing; None where that depends on the image."""
    settings = _read_resizing(steps, layout)
    rows, columns = settings.get("imgsz", (0, 1))
    return rows if rows == columns else None


def _pad_size(step: Step, layout: Layout, square: int | None) -> tuple[tuple[int, int] | None, int]:
    size, divisor = step.arguments.get("size"), step.arguments.get("size_divisor")
    if divisor is not None and not (type(divisor) is int and divisor > 0):
        refuse(f"{step.path}.size_divisor", divisor, "a positive whole number is supported")
    if step.arguments.get("pad_to_square"):
        if square is None:
            refuse(
                f"{step.path}.pad_to_square",
                True,
                "a square is supported where every image is resized to one side's length",
            )
        side = -(-square // divisor) * divisor if divisor else square
        return (side, side), 1
    if size is None:
        return None, divisor or 1
    first, second = _size(size, f"{step.path}.size")
    return (
        (first, second) if layout == "2.x" else (second, first)
    ), 1  # 2.x says height first, 3.x width first


def _pad_value(step: Step, statistics: Statistics, raw: bool) -> Triple:
    """Read the value that a step pads with; in pixels where it comes before normalising, which then applies to it."""
    value = step.arguments.get("pad_val", 0)
    value = value.get("img", 0) if isinstance(value, Mapping) else value
    rgb = statistics.rgb and not raw  # images are loaded as BGR
    values = _triple(value, f"{step.path}.pad_val", rgb)
    if not raw:
        return values
    normalised = (np.array(values, np.float32) - np.array(statistics.mean, np.float32)) / np.array(
        statistics.std, np.float32
    )
    first, second, third = (float(number) for number in normalised)
    return first, second, third


def _last_padding(after: Mapping[str, Any], path: str) -> Padding:
    """Read how the data preprocessor pads, after normalising."""
    divisor, value = after.get("pad_size_divisor", 1), after.get("pad_value", 0)
    if type(divisor) is not int or divisor < 1:
        refuse(f"{path}.pad_size_divisor", divisor, "a positive whole number is supported")
    if not is_number(value):
        refuse(f"{path}.pad_value", value, "one number is supported")
    return Padding(
        f"{path}.pad_size_divisor", None, divisor, (float(value), float(value), float(value))
    )


def _join_paddings(settings: Mapping[str, Any], paddings: list[Padding]) -> dict[str, Any]:
    """Return the canvas, the divisor and the value of all padding together, which must be of one value."""
    stretched = settings.get("imgsz") if settings.get("resize") == "stretch" else None
    size_hw, divisor, value, last = stretched, 1, None, ""
    for padding in paddings:
        target = padding.size_hw or (
            None if size_hw is None else _round_up(size_hw, padding.divisor)
        )
        changes = divisor % padding.divisor != 0 if target is None else target != size_hw
        last = padding.path if changes or not last else last
        if changes:
            if value is not None and not same(value, padding.value):
                refuse(
                    padding.path,
                    padding.divisor,
                    f"padding twice is supported with one value, found {value} and {padding.value}",
                )
            size_hw, divisor, value = target, lcm(divisor, padding.divisor), padding.value
    path = last or "the test pipeline's padding"
    if size_hw is not None:
        if any(side % SIZE_DIVISOR for side in size_hw):
            refuse(
                path,
                size_hw,
                f"a network input whose sides are multiples of {SIZE_DIVISOR} is supported",
            )
        canvas = None if stretched and _round_up(stretched, SIZE_DIVISOR) == size_hw else size_hw
        return {
            "canvas_hw": canvas,
            "pad_divisor": SIZE_DIVISOR,
            "pad_value": value or (0.0, 0.0, 0.0),
        }
    if divisor % SIZE_DIVISOR:
        refuse(
            path,
            divisor,
            f"{SIZE_DIVISOR} or a multiple of it is supported (1 is the default of a missing pad_size_divisor)",
        )
    return {"pad_divisor": divisor, "pad_value": value or (0.0, 0.0, 0.0)}


def _round_up(size_hw: tuple[int, int], divisor: int) -> tuple[int, int]:
    rows, columns = (-(-side // divisor) * divisor for side in size_hw)
    return rows, columns
