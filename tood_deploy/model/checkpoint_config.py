"""What a checkpoint's metadata says of the model: class names, anchor kind, picture size, schedule.

The configuration is Python text. It is parsed, never executed. Layouts: reference/SPEC.md section 5.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tood_deploy.errors import CheckpointError
from tood_deploy.presets import STRIDES, Anchor

# What this network takes for granted; a file that says otherwise describes another one.
EXPECTED = {
    "backbone.style": ("pytorch",),
    "neck.type": ("FPN",),
    "neck.start_level": (1,),
    "neck.add_extra_convs": ("on_output",),
    "bbox_head.type": ("TOODHead",),
    "bbox_head.anchor_generator.octave_base_scale": (8,),
    "bbox_head.anchor_generator.strides": (STRIDES,),
    "bbox_head.bbox_coder.target_stds": ((0.1, 0.1, 0.2, 0.2),),
    "data_preprocessor.bgr_to_rgb": (True,),
    "data_preprocessor.pad_size_divisor": (32,),
}


@dataclass(frozen=True)
class ConfigFacts:
    """What the metadata tells, None where it does not."""

    class_names: tuple[str, ...] | None = None
    anchor: Anchor | None = None
    imgsz: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    epochs: int | None = None


def read_config(meta: Mapping[str, Any], origin: str) -> ConfigFacts:
    """The facts in a checkpoint's `meta`; `origin` names the file in errors.

    Raises:
        CheckpointError: the configuration is of a network that differs from TOOD's published ones.
    """
    text = meta.get("cfg", meta.get("config"))
    config = _parse(text) if isinstance(text, str) else {}
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    _check(model, origin)
    mean, std = _statistics(config, origin)
    return ConfigFacts(_class_names(meta), _anchor(model), _image_size(config), mean, std, _epochs(config))


def _parse(text: str) -> dict[str, Any]:
    """The top-level assignments of a configuration; what is not a literal becomes None."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name))
    return {node.targets[0].id: _value(node.value) for node in assigned if isinstance(node.targets[0], ast.Name)}


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            return {keyword.arg: _value(keyword.value) for keyword in keywords if keyword.arg}
        case ast.Dict(keys=keys, values=values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if isinstance(k, ast.Constant)}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
    return None


def _lookup(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _check(model: Mapping[str, Any], origin: str) -> None:
    for dotted, allowed in EXPECTED.items():
        found = _lookup(model, dotted)
        if found is not None and found not in allowed:
            raise CheckpointError(
                f"{origin}: the configuration says {dotted} = {found!r}; only {allowed[0]!r} is supported, as in TOOD's published models"
            )


def _class_names(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    names = dataset.get("classes", dataset.get("CLASSES", meta.get("CLASSES")))
    if isinstance(names, str):
        return (names,)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _anchor(model: Mapping[str, Any]) -> Anchor | None:
    head = model.get("bbox_head")
    if not isinstance(head, Mapping):
        return None
    return "based" if head.get("anchor_type", "anchor_free") == "anchor_based" else "free"


def _test_steps(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of the test pipeline, nested ones included, of whichever version's layout."""
    for dotted in ("test_dataloader.dataset.pipeline", "data.test.pipeline", "test_pipeline"):
        steps = _lookup(config, dotted)
        if isinstance(steps, tuple):
            steps = [step for step in steps if isinstance(step, Mapping)]
            return steps + [inner for step in steps for inner in step.get("transforms") or () if isinstance(inner, Mapping)]
    return []


def _image_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    for step in _test_steps(config):
        scale = step.get("scale", step.get("img_scale"))
        if isinstance(scale, tuple) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
            return min(scale), max(scale)
    return None


def _statistics(config: Mapping[str, Any], origin: str) -> tuple[Any, Any]:
    source = _lookup(config, "model.data_preprocessor")
    source = source if isinstance(source, Mapping) else {}
    for step in _test_steps(config):
        if step.get("type") == "Normalize":
            source = step
            if step.get("to_rgb") is False:
                raise CheckpointError(
                    f"{origin}: the configuration feeds BGR pictures; only RGB is supported, as in TOOD's published models"
                )
    return _three_numbers(source.get("mean")), _three_numbers(source.get("std"))


def _three_numbers(values: Any) -> tuple[float, float, float] | None:
    if isinstance(values, tuple) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values):
        return float(values[0]), float(values[1]), float(values[2])
    return None


def _epochs(config: Mapping[str, Any]) -> int | None:
    for dotted in ("train_cfg.max_epochs", "runner.max_epochs"):
        if isinstance(epochs := _lookup(config, dotted), int):
            return epochs
    return None
