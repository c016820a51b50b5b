"""What a checkpoint's metadata says of the model: names, schedule, and the settings that leave no trace in the weights.

Every key of the configuration's model, preprocessing, test pipeline and test settings is held against the tables of
`config_rules` and `config_pipeline`: harmless, computed as it says, or refused by its dotted name.
Layouts: reference/SPEC.md section 5.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tood_deploy.errors import CheckpointError
from tood_deploy.model.config_pipeline import Layout, Step, layout_of, read_input, read_steps
from tood_deploy.model.config_rules import (
    BOX_CODER,
    DETECTOR,
    TEST,
    apply_rules,
    refuse,
    without_scope,
)
from tood_deploy.model.config_text import TextError, Unreadable, parse_config, plain
from tood_deploy.model.resnet import STAGE_BLOCKS
from tood_deploy.presets import PRESETS, Anchor, Preset

WRAPPERS = ("RepeatDataset", "ConcatDataset", "ClassBalancedDataset")
DATA_SETS = ("test_dataloader.dataset", "data.test", "val_dataloader.dataset", "data.val")
LEVELS_OF_NECK = {
    ((0, 1, 2, 3), 1),
    ((1, 2, 3), 0),
}  # out_indices of the backbone, start_level: C3 to C5
DEFAULT_STDS = (1.0, 1.0, 1.0, 1.0)  # of MMDetection's coder, where the configuration gives none


@dataclass(frozen=True)
class ConfigFacts:
    """What the metadata tells.

    Attributes:
        class_names: None where there are none.
        anchor: kind of the head; None where it does not tell.
        epochs: of the training; None where it does not tell.
        settings: fields of the preset that it sets, the anchor kind left out.
        problem: why the configuration could not be parsed; "" where it could, or there is none.
    """

    class_names: tuple[str, ...] | None = None
    anchor: Anchor | None = None
    epochs: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_config(meta: Mapping[str, Any], origin: str, weights: Preset) -> ConfigFacts:
    """Read the facts in a checkpoint's metadata.

    Args:
        meta: the framework's metadata.
        origin: names the file in errors.
        weights: the preset that the shapes of the weights tell.

    Raises:
        CheckpointError: a setting that this network cannot compute as it says, that is unknown, or that contradicts the weights.
    """
    names, stored = _class_names(meta), meta.get("cfg", meta.get("config"))
    try:
        config = parse_config(stored) if isinstance(stored, str) else plain(stored)
    except TextError as error:
        return ConfigFacts(names, problem=str(error))
    if not isinstance(config, Mapping):
        return ConfigFacts(names)
    try:
        settings = _read_settings(config, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    return ConfigFacts(names, settings.pop("anchor", None), _epochs(config), settings)


def _read_settings(config: Mapping[str, Any], weights: Preset) -> dict[str, Any]:
    if "_base_" in config:
        refuse(
            "_base_",
            config["_base_"],
            "files that are not here may say anything",
            "store the checkpoint with the merged configuration",
        )
    settings: dict[str, Any] = {}
    model = config.get("model")
    if "model" in config:
        settings |= _read_model(model, weights)
    return settings | _read_test(config, weights) | _read_input(config, weights)


def _read_model(model: Any, weights: Preset) -> dict[str, Any]:
    settings = apply_rules(DETECTOR, model, "model", weights)
    backbone, neck, head = (_mapping(model.get(part)) for part in ("backbone", "neck", "bbox_head"))
    if (
        stages := settings.pop("_deform_stages", weights.deform_stages)
    ) != weights.deform_stages and backbone.get("dcn"):
        refuse(
            "model.backbone.stage_with_dcn",
            backbone["stage_with_dcn"],
            f"the weights tell stages {weights.deform_stages}, not {stages}",
        )
    levels = backbone.get("out_indices", (0, 1, 2, 3)), neck.get("start_level", 0)
    if neck and levels not in LEVELS_OF_NECK:
        refuse(
            "model.neck.start_level",
            levels[1],
            f"with out_indices {levels[0]} of the backbone only C3 to C5 are supported",
        )
    side = [settings.pop(name, None) for name in ("_scale", "_octave_scale")]
    if chosen := [scale for scale in side if scale is not None]:
        settings["anchor_side"] = chosen[0]
    if head and settings.setdefault("anchor", "free") == "based":
        coder = head.get("bbox_coder", {})
        settings |= {"delta_stds": DEFAULT_STDS} | apply_rules(
            BOX_CODER, coder, "model.bbox_head.bbox_coder", weights
        )
    return settings


def _read_test(config: Mapping[str, Any], weights: Preset) -> dict[str, Any]:
    """Read the test settings: the detector's, else the whole's (2.x; 3.x has its loop there), else the head's."""
    for path in ("model.test_cfg", "test_cfg", "model.bbox_head.test_cfg"):
        found = _lookup(config, path)
        if found is None or str(_mapping(found).get("type", "")).endswith("Loop"):
            continue
        settings = apply_rules(TEST, found, path, weights)
        if "candidates_per_level" not in settings:
            refuse(
                f"{path}.nms_pre",
                None,
                "without it all candidates would be kept; a whole number is supported",
            )
        return settings
    return {}


def _read_input(config: Mapping[str, Any], weights: Preset) -> dict[str, Any]:
    path = (
        "data_preprocessor"
        if _lookup(config, "model.data_preprocessor") is None
        else "model.data_preprocessor"
    )
    preprocessor = _lookup(config, path)
    steps, layout = _test_steps(config, weights)
    if steps is None and preprocessor is None:
        return {}
    return read_input(steps, layout, preprocessor, path, weights)


def _test_steps(config: Mapping[str, Any], weights: Preset) -> tuple[list[Step] | None, Layout]:
    """Read the steps of the test pipeline, of whichever version's layout; None where there is none."""
    for path in DATA_SETS:
        pipelines = list(_pipelines(_lookup(config, path), path))
        if pipelines:
            (place, pipeline), *others = pipelines
            if any(other != pipeline for _, other in others):
                refuse(
                    path,
                    tuple(place for place, _ in pipelines),
                    "data sets of one pipeline are supported",
                )
            return read_steps(pipeline, place, weights), layout_of(path, pipeline)
    pipeline = config.get("test_pipeline")
    if pipeline is None:
        return None, "3.x"
    return read_steps(pipeline, "test_pipeline", weights), layout_of("test_pipeline", pipeline)


def _pipelines(dataset: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Go through the pipelines of a data set, looking through what wraps it; its place and the pipeline each."""
    if isinstance(dataset, Unreadable):
        refuse(
            path,
            dataset,
            "only literal values can be read",
            "store the checkpoint with the configuration's final text",
        )
    if isinstance(dataset, tuple):
        for i, part in enumerate(dataset):
            yield from _pipelines(part, f"{path}[{i}]")
    elif isinstance(dataset, Mapping):
        inner = {
            key: dataset[key] for key in ("dataset", "datasets") if dataset.get(key) is not None
        }
        if inner and without_scope(dataset.get("type")) not in WRAPPERS:
            refuse(
                f"{path}.type",
                dataset.get("type"),
                f"of data sets around others only {', '.join(WRAPPERS)} are supported",
            )
        if dataset.get("pipeline") is not None:
            yield f"{path}.pipeline", dataset["pipeline"]
        for key, part in inner.items():
            yield from _pipelines(part, f"{path}.{key}")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _lookup(tree: Any, dotted: str) -> Any:
    """Return what stands at a dotted path, None where nothing does; what cannot be read stands for all below it."""
    for part in dotted.split("."):
        if isinstance(tree, Unreadable):
            return tree
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _class_names(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    dataset = _mapping(meta.get("dataset_meta"))
    names = dataset.get("classes", dataset.get("CLASSES", meta.get("CLASSES")))
    if isinstance(names, str):
        return (names,)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _epochs(config: Mapping[str, Any]) -> int | None:
    for dotted in ("train_cfg.max_epochs", "runner.max_epochs"):
        if isinstance(epochs := _lookup(config, dotted), int):
            return epochs
    return None


Shapes = Mapping[str, tuple[int, ...]]

# A key that each part of a TOOD detector has.
LANDMARKS = (
    "backbone.conv1.weight",
    "backbone.layer1.0.conv2.weight",
    "neck.fpn_convs.0.conv.weight",
    "bbox_head.tood_cls.weight",
)


def preset_from_shapes(shapes: Shapes, origin: str) -> Preset:
    """The network these tensors fill, as the first preset of its structure, else as one named "custom".

    The class count is the file's, with numbered names; anchor kind and convention leave no trace in shapes and are the preset's.

    Raises:
        CheckpointError: these are not the tensors of a TOOD detector.
    """
    if missing := [key for key in LANDMARKS if key not in shapes]:
        parts = sorted({".".join(key.split(".")[:2]) for key in shapes})
        raise CheckpointError(
            f"{origin}: not a TOOD detector: {', '.join(missing)} missing; found {len(shapes)} tensors of "
            f"{', '.join(parts[:6])}{' and more' if len(parts) > 6 else ''}"
        )
    found = _custom_preset(shapes, origin)
    for preset in PRESETS.values():
        if same_structure(preset, found):
            return replace(preset, class_names=found.class_names)
    return found


def same_structure(first: Preset, second: Preset) -> bool:
    """Whether the state dicts of two presets have the same keys and, the class count apart, shapes."""

    def structure(preset: Preset) -> tuple[object, ...]:
        width = preset.base_width if preset.groups > 1 else 0
        return (
            *(preset.depth, preset.groups, width, preset.base_channels, preset.deform_stages),
            *(preset.channels, preset.tower_stages, preset.deform_tower),
        )

    return structure(first) == structure(second)


def numbered_classes(count: int) -> tuple[str, ...]:
    """Names for classes that nobody named."""
    return tuple(f"class_{i}" for i in range(count))


def _custom_preset(shapes: Shapes, origin: str) -> Preset:
    width, group_width = shapes["backbone.layer1.0.conv2.weight"][:2]
    deform_stages = tuple(
        n for n in range(1, 5) if f"backbone.layer{n}.0.conv2.conv_offset.weight" in shapes
    )
    return Preset(
        "custom",
        _depth(shapes, origin),
        groups=width // group_width,
        base_width=group_width,
        base_channels=shapes["backbone.conv1.weight"][0],
        deform_stages=deform_stages,
        channels=shapes["neck.fpn_convs.0.conv.weight"][0],
        tower_stages=_count(r"bbox_head\.inter_convs\.(\d+)\.", shapes),
        deform_tower=_count(r"bbox_head\.inter_convs\.(\d+)\.conv\.conv_offset\.", shapes),
        class_names=numbered_classes(shapes["bbox_head.tood_cls.weight"][0]),
    )


def _count(pattern: str, shapes: Shapes) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _depth(shapes: Shapes, origin: str) -> int:
    blocks = tuple(_count(rf"backbone\.layer{n}\.(\d+)\.", shapes) for n in range(1, 5))
    bottlenecks = "backbone.layer1.0.conv3.weight" in shapes
    for depth, expected in STAGE_BLOCKS.items():
        if blocks == expected and (depth >= 50) == bottlenecks:
            return depth
    raise CheckpointError(
        f"{origin}: the backbone's stages have {blocks} blocks; expected a ResNet of depth {', '.join(map(str, STAGE_BLOCKS))}"
    )
