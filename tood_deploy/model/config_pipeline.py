"""Read a configuration's test pipeline: the size, colours, statistics and padding of the input.

Steps of a parsed pipeline and the data preprocessor in, fields of the preset out, in either layout:
MMDetection 3.x, whose `data_preprocessor` normalises and pads after the pipeline, and 2.x, whose
pipeline does all of it. Knows nothing of the network, and resizes nothing itself.
"""

from collections.abc import Iterator, Mapping
from math import lcm
from typing import Literal, NamedTuple, TypeGuard

import numpy as np

from tood_deploy.model.config_rules import (
    HARMLESS,
    PREPROCESSOR,
    STEPS,
    Settings,
    apply_rules,
    is_number,
    refuse,
    same,
    without_scope,
)
from tood_deploy.presets import SIZE_DIVISOR, Preset, Resize

Layout = Literal["2.x", "3.x"]
Triple = tuple[float, float, float]

RESIZE_STEPS = ("Resize", "FixShapeResize")


class Step(NamedTuple):
    """One step of a pipeline.

    Attributes:
        kind: its type, without scope.
        arguments: the others than the type.
        path: where it stands, with dots.
    """

    kind: str
    arguments: Settings
    path: str


class Padding(NamedTuple):
    """How one step, or the data preprocessor, pads.

    Attributes:
        path: where that stands, with dots.
        size_hw: rows and columns to pad to; None for multiples of `divisor`.
        divisor: see there.
        value: that padding holds after normalising, in RGB order.
    """

    path: str
    size_hw: tuple[int, int] | None
    divisor: int
    value: Triple


class Statistics(NamedTuple):
    """How pixels become the network's input.

    Attributes:
        mean, std: in RGB order.
        rgb: whether the network takes RGB.
        step: position of the pipeline's step that normalises; None where the data preprocessor
            does, or nothing.
    """

    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    rgb: bool = False
    step: int | None = None


class Resizing(NamedTuple):
    """How images are resized: the fields of `Sizing` that the pipeline sets.

    Attributes:
        resize: "fit" keeps the aspect, "stretch" does not.
        imgsz: (short side, long side) to fit, (rows, columns) to stretch to; None with a factor.
        scale_factor: of rows and columns.
    """

    resize: Resize
    imgsz: tuple[int, int] | None = None
    scale_factor: tuple[float, float] | None = None

    @property
    def settings(self) -> Settings:
        """Return the fields of the preset that it sets."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def stretched_hw(self) -> tuple[int, int] | None:
        """Return the rows and columns of every resized image; None where they depend on it."""
        return self.imgsz if self.resize == "stretch" else None


def read_steps(pipeline: object, path: str, weights: Preset) -> list[Step]:
    """Read the steps of a test pipeline, with the steps inside MultiScaleFlipAug in its place.

    Args:
        pipeline: the configuration's list of steps.
        path: where it stands, with dots.
        weights: the preset that the shapes of the weights show.

    Raises:
        CheckpointError: a step, or an argument of one, that is not known or not supported.
    """
    if not isinstance(pipeline, tuple):
        refuse(path, pipeline, "a list of steps is expected there")
    steps: list[Step] = []
    for i, entry in enumerate(pipeline):
        steps += _read_step(entry, f"{path}[{i}]", weights)
    return steps


def _read_step(entry: object, path: str, weights: Preset) -> Iterator[Step]:
    """Yield the step of an entry: none that changes no pixel, several of MultiScaleFlipAug.

    Args:
        entry: of the configuration's list.
        path: where it stands, with dots.
        weights: the preset that the shapes of the weights show.
    """
    if not isinstance(entry, Mapping) or "type" not in entry:
        refuse(path, entry, "a dictionary with a type is expected there")
    kind = without_scope(entry["type"])
    if not isinstance(kind, str) or kind not in STEPS:
        supported = f"of a test pipeline only {', '.join(STEPS)} are supported"
        refuse(f"{path}.type", entry["type"], supported)
    path, table = f"{path}({kind})", STEPS[kind]
    if table is None:
        return
    arguments = apply_rules({"type": HARMLESS, **table}, entry, path, weights)
    if kind != "MultiScaleFlipAug":
        yield Step(kind, arguments, path)
        return
    for step in read_steps(_inner_steps(entry.get("transforms")), f"{path}.transforms", weights):
        if step.kind == "Resize":  # takes its size from the step around it
            size = {"img_scale": arguments.get("img_scale")}
            step = step._replace(arguments=step.arguments | size)
        yield step


def _inner_steps(transforms: object) -> object:
    """Return the steps inside MultiScaleFlipAug without the flip, which its own `flip` decides."""
    if not isinstance(transforms, tuple):
        return transforms
    return tuple(
        {"type": "RandomFlip"} if _type_of(step) == "RandomFlip" else step for step in transforms
    )


def _type_of(step: object) -> object:
    """Return the type of a step as it stands in the configuration, without scope."""
    return without_scope(step.get("type")) if isinstance(step, Mapping) else None


def layout_of(path: str, steps: object) -> Layout:
    """Return the layout of a pipeline, by where it stands and by steps that only 2.x has."""
    kinds = set(map(_type_of, steps)) if isinstance(steps, tuple) else set()
    of_2x = kinds & {"MultiScaleFlipAug", "Collect", "DefaultFormatBundle"}
    return "2.x" if path.startswith("data.") or of_2x else "3.x"


def read_input(
    steps: list[Step] | None, layout: Layout, preprocessor: object, path: str, weights: Preset
) -> Settings:
    """Read how an image becomes the network's input.

    Args:
        steps: of the test pipeline; None where the configuration has none.
        layout: of the pipeline.
        preprocessor: the configuration's `data_preprocessor`; None where there is none.
        path: where that stands, with dots.
        weights: the preset that the shapes of the weights show.

    Returns:
        The fields of the preset that it sets.

    Raises:
        CheckpointError: a setting that cannot be computed as it says.
    """
    normalises = steps is None or layout == "2.x" or _has_step(steps, "Normalize")
    if preprocessor is None and not normalises:
        problem = "the test pipeline leaves normalising and padding to it"
        refuse("data_preprocessor", None, problem, "give the whole configuration")
    after = {} if preprocessor is None else apply_rules(PREPROCESSOR, preprocessor, path, weights)
    statistics = _read_statistics(steps or [], after, path)
    settings: Settings = {"mean": statistics.mean, "std": statistics.std}
    settings["channel_order"] = "rgb" if statistics.rgb else "bgr"
    resizing, paddings = None, []
    if steps is not None:
        resizing = _read_resizing(steps, layout)
        paddings = _read_paddings(steps, statistics, layout, resizing)
        settings |= resizing.settings
    if preprocessor is not None:
        paddings.append(_last_padding(after, path))
    return settings | _join_paddings(resizing.stretched_hw if resizing else None, paddings)


def _has_step(steps: list[Step], *kinds: str) -> bool:
    return any(step.kind in kinds for step in steps)


# --- Statistics and colours.


def _read_statistics(steps: list[Step], after: Settings, path: str) -> Statistics:
    """Read mean, standard deviation and colour order.

    Args:
        steps: of the pipeline.
        after: arguments of the data preprocessor.
        path: where that stands, with dots.
    """
    converts = bool(after.get("bgr_to_rgb", False)) or bool(after.get("rgb_to_bgr", False))
    places = [i for i, step in enumerate(steps) if step.kind == "Normalize"]
    if not places:
        mean, std = _mean_and_std(after, path, converts)
        return Statistics(mean, std, converts)
    step = steps[places[0]]
    if len(places) > 1 or after.get("mean") is not None or converts:
        problem = (
            "pixels are normalised or reordered twice, by another step or the data preprocessor"
        )
        refuse(step.path, step.arguments, problem)
    if _has_step(steps[places[0] :], *RESIZE_STEPS):
        refuse(step.path, step.arguments, "resizing after normalising is not supported")
    rgb = bool(step.arguments.get("to_rgb", True))
    return Statistics(*_mean_and_std(step.arguments, step.path, rgb), rgb, places[0])


def _mean_and_std(source: Settings, path: str, rgb: bool) -> tuple[Triple, Triple]:
    """Read both in RGB order.

    Args:
        source: the arguments that hold them.
        path: where these stand, with dots.
        rgb: whether they are in RGB order, not BGR.
    """
    mean, std = source.get("mean"), source.get("std")
    if mean is None and std is None:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    means, deviations = _triple(mean, f"{path}.mean", rgb), _triple(std, f"{path}.std", rgb)
    if min(deviations) <= 0:
        refuse(f"{path}.std", std, "pixels would be divided by it; positive numbers are supported")
    return means, deviations


def _triple(value: object, path: str, rgb: bool) -> Triple:
    """Read three numbers, or one for all three channels, into RGB order.

    Args:
        value: in the configuration.
        path: where it stands, with dots.
        rgb: whether it is in RGB order, not BGR.
    """
    values = value if isinstance(value, tuple) else (value,)
    values = values * 3 if len(values) == 1 else values
    numbers = [float(number) for number in values if is_number(number)]
    if not len(values) == len(numbers) == 3:
        refuse(path, value, "three numbers, or one for all channels, are supported")
    first, second, third = numbers
    return (first, second, third) if rgb else (third, second, first)


# --- Sizes.


def _read_resizing(steps: list[Step], layout: Layout) -> Resizing:
    places = [i for i, step in enumerate(steps) if step.kind in RESIZE_STEPS]
    if not places:  # every image in its own size
        return Resizing("stretch", scale_factor=(1.0, 1.0))
    step = steps[places[0]]
    if len(places) > 1 or _has_step(steps[: places[0]], "Pad"):
        refuse(step.path, step.arguments, "one resizing, before any padding, is supported")
    if step.kind == "FixShapeResize":
        width, height = _size(
            (step.arguments.get("width"), step.arguments.get("height")), step.path
        )
        return Resizing("stretch", (height, width))
    keeps = step.arguments.get("keep_ratio", layout == "2.x")
    if not isinstance(keeps, bool):
        refuse(f"{step.path}.keep_ratio", keeps, "only True or False is supported")
    scale = step.arguments.get("img_scale")
    scale = step.arguments.get("scale") if scale is None else scale
    if scale is None:
        return Resizing("fit" if keeps else "stretch", scale_factor=_factors(step))
    width, height = _size(scale, f"{step.path} scale")
    if keeps:
        return Resizing("fit", (min(width, height), max(width, height)))
    return Resizing("stretch", (height, width))


def _size(value: object, path: str) -> tuple[int, int]:
    """Read one size of two numbers, alone or the only one in a list, or one number for both."""
    only_one = isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], tuple)
    sides = value[0] if isinstance(value, tuple) and only_one else value
    sides = (sides, sides) if type(sides) is int else sides
    if isinstance(sides, tuple) and len(sides) == 2:
        first, second = sides
        if _is_positive_integer(first) and _is_positive_integer(second):
            return first, second
    refuse(path, value, "one size of two positive whole numbers is supported")


def _is_positive_integer(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _factors(step: Step) -> tuple[float, float]:
    """Read the factors of rows and columns from (of width, of height), or one for both."""
    value = step.arguments.get("scale_factor")
    values = value if isinstance(value, tuple) else (value, value)
    factors = [float(factor) for factor in values if is_number(factor) and factor > 0]
    if not len(values) == len(factors) == 2:
        refuse(f"{step.path}.scale_factor", value, "a size, or positive factors, are supported")
    return factors[1], factors[0]


# --- Padding.


def _read_paddings(
    steps: list[Step], statistics: Statistics, layout: Layout, resizing: Resizing
) -> list[Padding]:
    """Read the padding of every step that pads, in order.

    Args:
        steps: of the pipeline.
        statistics: that pixels are normalised by.
        layout: of the pipeline.
        resizing: of the images, before they are padded.
    """
    paddings = []
    for i, step in enumerate(steps):
        if step.kind == "Pad":
            in_pixels = statistics.step is None or i < statistics.step
            value = _pad_value(step, statistics, in_pixels)
            size_hw, divisor = _pad_size(step, layout, resizing)
            paddings.append(Padding(step.path, size_hw, divisor, value))
    return paddings


def _pad_size(step: Step, layout: Layout, resizing: Resizing) -> tuple[tuple[int, int] | None, int]:
    """Read the rows and columns that a step pads to, else None, and the divisor.

    Args:
        step: that pads.
        layout: of the pipeline.
        resizing: of the images.
    """
    size, divisor = step.arguments.get("size"), step.arguments.get("size_divisor")
    if divisor is not None and not _is_positive_integer(divisor):
        refuse(f"{step.path}.size_divisor", divisor, "a positive whole number is supported")
    if step.arguments.get("pad_to_square"):
        side, other = resizing.imgsz or (0, 1)
        if side != other:  # the longer side would depend on the image
            problem = "a square is supported where every image is resized to one side's length"
            refuse(f"{step.path}.pad_to_square", True, problem)
        return _round_up((side, side), divisor or 1), 1
    if size is None:
        return None, divisor or 1
    first, second = _size(size, f"{step.path}.size")
    return (first, second) if layout == "2.x" else (second, first), 1  # 3.x says the width first


def _pad_value(step: Step, statistics: Statistics, in_pixels: bool) -> Triple:
    """Read the value that a step pads with, as it is after normalising, in RGB order.

    Args:
        step: that pads.
        statistics: that pixels are normalised by.
        in_pixels: whether the step comes before normalising, which then changes its value too.
    """
    value = step.arguments.get("pad_val", 0)
    value = value.get("img", 0) if isinstance(value, Mapping) else value
    rgb = statistics.rgb and not in_pixels  # images are loaded as BGR
    values = _triple(value, f"{step.path}.pad_val", rgb)
    if not in_pixels:
        return values
    # In float32, as images are normalised, so that padding equals pixels of this value exactly.
    pixels, mean, std = (np.array(part, np.float32) for part in (values, *statistics[:2]))
    first, second, third = (float(number) for number in (pixels - mean) / std)
    return first, second, third


def _last_padding(after: Settings, path: str) -> Padding:
    """Read how the data preprocessor, whose arguments are `after`, pads after normalising."""
    divisor, value = after.get("pad_size_divisor", 1), after.get("pad_value", 0)
    if not _is_positive_integer(divisor):
        refuse(f"{path}.pad_size_divisor", divisor, "a positive whole number is supported")
    if not is_number(value):
        refuse(f"{path}.pad_value", value, "one number is supported")
    number = float(value)
    return Padding(f"{path}.pad_size_divisor", None, divisor, (number, number, number))


def _join_paddings(stretched_hw: tuple[int, int] | None, paddings: list[Padding]) -> Settings:
    """Return canvas, divisor and value of all padding together, which must be of one value.

    Args:
        stretched_hw: rows and columns of every resized image; None where they depend on it.
        paddings: in the order in which they are applied.
    """
    size_hw, divisor, value, last = stretched_hw, 1, None, ""
    for padding in paddings:
        target = padding.size_hw
        if target is None and size_hw is not None:
            target = _round_up(size_hw, padding.divisor)
        changes = divisor % padding.divisor != 0 if target is None else target != size_hw
        last = padding.path if changes or not last else last
        if changes:
            if value is not None and not same(value, padding.value):
                both = f"{value} and {padding.value}"
                problem = f"padding twice is supported with one value, found {both}"
                refuse(padding.path, padding.divisor, problem)
            size_hw, divisor, value = target, lcm(divisor, padding.divisor), padding.value
    path, value = last or "the test pipeline's padding", value or (0.0, 0.0, 0.0)
    if size_hw is None:
        return {"pad_divisor": _network_divisor(divisor, path), "pad_value": value}
    if any(side % SIZE_DIVISOR for side in size_hw):
        problem = f"a network input whose sides are multiples of {SIZE_DIVISOR} is supported"
        refuse(path, size_hw, problem)
    # Where stretched images are padded to the next multiples alone, that goes without a canvas.
    canvas = None if stretched_hw and _round_up(stretched_hw, SIZE_DIVISOR) == size_hw else size_hw
    return {"canvas_hw": canvas, "pad_divisor": SIZE_DIVISOR, "pad_value": value}


def _network_divisor(divisor: int, path: str) -> int:
    """Return a divisor that the network takes, or refuse it."""
    if divisor % SIZE_DIVISOR:
        supported = f"{SIZE_DIVISOR} or a multiple of it is supported"
        refuse(path, divisor, f"{supported} (1 is the default of a missing pad_size_divisor)")
    return divisor


def _round_up(size_hw: tuple[int, int], divisor: int) -> tuple[int, int]:
    rows, columns = (-(-side // divisor) * divisor for side in size_hw)
    return rows, columns
