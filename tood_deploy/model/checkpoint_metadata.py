"""Read what a checkpoint shows of its model: settings in its metadata, structure in its shapes.

The framework's metadata and the shapes of the tensors in; class names, anchor kind, schedule and
fields of a preset out. Every key of the configuration's model, preprocessing, test pipeline and
test settings is held against the tables of `config_rules`: harmless, computed as it says, or
refused by its dotted name. Knows nothing of files, and builds no network.

Layouts: reference/SPEC.md section 5.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from tood_deploy.errors import CheckpointError
from tood_deploy.model.config_heads import (
    detector_of,
    detector_table,
    keys_of,
    settle,
    test_section,
)
from tood_deploy.model.config_pipeline import Layout, Step, layout_of, read_input, read_steps
from tood_deploy.model.config_rules import (
    BOX_CODER,
    MERGE_CURE,
    Settings,
    apply_rules,
    apply_section,
    refuse,
    without_scope,
)
from tood_deploy.model.config_text import TextError, Unreadable, parse_config, plain
from tood_deploy.model.heads import CLASS_LAYERS
from tood_deploy.model.resnet import STAGE_BLOCKS
from tood_deploy.presets import BASES, PRESETS, Anchor, DetectorName, Preset

WRAPPERS = ("RepeatDataset", "ConcatDataset", "ClassBalancedDataset")
DATA_SETS = ("test_dataloader.dataset", "data.test", "val_dataloader.dataset", "data.val")
# The backbone's out_indices and the neck's start_level that together give C3 to C5.
LEVELS_OF_NECK = {((0, 1, 2, 3), 1), ((1, 2, 3), 0)}
DEFAULT_STDS = (1.0, 1.0, 1.0, 1.0)  # of MMDetection's coder, where the configuration gives none

# Keys that every detector of the family has, one of each of its parts but the head.
LANDMARKS = (
    "backbone.conv1.weight",
    "backbone.layer1.0.conv2.weight",
    "neck.fpn_convs.0.conv.weight",
    "neck.fpn_convs.3.conv.weight",
)
CLASS_WEIGHTS: dict[str, DetectorName] = {
    f"bbox_head.{layer}.weight": keys_of(name) for name, layer in CLASS_LAYERS.items()
}

Metadata = Mapping[str, object]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConfigFacts:
    """The facts in a checkpoint's metadata.

    Attributes:
        class_names: None where there are none.
        detector: that the configuration is of; None where none says it.
        anchor: kind of the head; None where no configuration gives it.
        epochs: of the training; None where no configuration gives them.
        settings: fields of the preset that it sets, the anchor kind left out.
        problem: why the configuration could not be parsed; "" where it could, or there is none.
    """

    class_names: tuple[str, ...] | None = None
    detector: DetectorName | None = None
    anchor: Anchor | None = None
    epochs: int | None = None
    settings: Settings = field(default_factory=Settings)
    problem: str = ""


def read_config(meta: Metadata, origin: str, weights: Preset) -> ConfigFacts:
    """Read the facts in a checkpoint's metadata.

    Args:
        meta: the framework's metadata.
        origin: the file, for errors.
        weights: the preset that the shapes of the weights show.

    Raises:
        CheckpointError: a setting that this network cannot compute as it says, that is unknown, or
            that contradicts the weights.
    """
    names, stored = _class_names(meta), meta.get("cfg", meta.get("config"))
    try:
        config = parse_config(stored) if isinstance(stored, str) else plain(stored)
    except TextError as error:
        return ConfigFacts(names, problem=str(error))
    if not isinstance(config, Mapping):
        return ConfigFacts(names)
    try:
        detector, settings = _read_settings(config, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    anchor = cast(Anchor | None, settings.pop("anchor", None))  # as its rule gives it
    return ConfigFacts(names, detector, anchor, _epochs(config), settings)


def _read_settings(config: Metadata, weights: Preset) -> tuple[DetectorName | None, Settings]:
    if "_base_" in config:
        problem = "files that are not here may say anything"
        cure = "store the checkpoint with the merged configuration"
        refuse("_base_", config["_base_"], problem, cure)
    detector = detector_of(_mapping(_lookup(config, "model.bbox_head")), weights)
    known = detector or weights.detector
    settings = _read_model(config["model"], weights, known) if "model" in config else {}
    settings |= _read_test(config, weights, known) | _read_input(config, weights)
    return detector, settings


def _read_model(model: object, weights: Preset, detector: DetectorName) -> Settings:
    settings = apply_rules(detector_table(detector), model, "model", weights)
    backbone, neck, head = (
        _mapping(_lookup(model, part)) for part in ("backbone", "neck", "bbox_head")
    )
    stages = settings.pop("_deform_stages", weights.deform_stages)
    if stages != weights.deform_stages and backbone.get("dcn"):
        problem = f"the weights have stages {weights.deform_stages}, not {stages}"
        refuse("model.backbone.stage_with_dcn", backbone["stage_with_dcn"], problem)
    levels = backbone.get("out_indices", (0, 1, 2, 3)), neck.get("start_level", 0)
    if neck and levels not in LEVELS_OF_NECK:
        problem = f"with out_indices {levels[0]} of the backbone only C3 to C5 are supported"
        refuse("model.neck.start_level", levels[1], problem)
    scale, octave_scale = settings.pop("_scale", None), settings.pop("_octave_scale", None)
    if scale is not None or octave_scale is not None:
        settings["anchor_side"] = octave_scale if scale is None else scale
    if detector != "tood":
        return settle(settings, detector, weights)
    if head and settings.setdefault("anchor", "free") == "based":
        coder, path = head.get("bbox_coder", {}), "model.bbox_head.bbox_coder"
        settings |= {"delta_stds": DEFAULT_STDS} | apply_rules(BOX_CODER, coder, path, weights)
    return settings


def _read_test(config: Metadata, weights: Preset, detector: DetectorName) -> Settings:
    """Read the test settings: the detector's, else those at the top, else the head's.

    At the top they are in 2.x; 3.x has the test loop there.
    """
    for path in ("model.test_cfg", "test_cfg", "model.bbox_head.test_cfg"):
        section = _lookup(config, path)
        if section is None or str(_mapping(section).get("type", "")).endswith("Loop"):
            continue
        settings = apply_section(test_section(detector), section, path, weights)
        if "candidates_per_level" not in settings:
            problem = "without it all candidates would be kept; a whole number is supported"
            refuse(f"{path}.nms_pre", None, problem)
        return settings
    return {}


def _read_input(config: Metadata, weights: Preset) -> Settings:
    path = "model.data_preprocessor"
    if _lookup(config, path) is None:
        path = "data_preprocessor"
    preprocessor = _lookup(config, path)
    steps, layout = _test_steps(config, weights)
    if steps is None and preprocessor is None:
        return {}
    return read_input(steps, layout, preprocessor, path, weights)


def _test_steps(config: Metadata, weights: Preset) -> tuple[list[Step] | None, Layout]:
    """Read the steps of the test pipeline, None where there is none, and its layout."""
    for path in DATA_SETS:
        pipelines = list(_pipelines(_lookup(config, path), path))
        if pipelines:
            (place, pipeline), *others = pipelines
            if any(other != pipeline for _, other in others):
                places = tuple(place for place, _ in pipelines)
                refuse(path, places, "data sets of one pipeline are supported")
            return read_steps(pipeline, place, weights), layout_of(path, pipeline)
    pipeline = config.get("test_pipeline")
    if pipeline is None:
        return None, "3.x"
    return read_steps(pipeline, "test_pipeline", weights), layout_of("test_pipeline", pipeline)


def _pipelines(dataset: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield the pipelines of a data set and of those that it wraps, each after its dotted path."""
    if isinstance(dataset, Unreadable):
        refuse(path, dataset, "only literal values can be read", MERGE_CURE)
    if isinstance(dataset, tuple):
        for i, part in enumerate(dataset):
            yield from _pipelines(part, f"{path}[{i}]")
    elif isinstance(dataset, Mapping):
        keys = [key for key in ("dataset", "datasets") if dataset.get(key) is not None]
        if keys and without_scope(dataset.get("type")) not in WRAPPERS:
            problem = f"of data sets around others only {', '.join(WRAPPERS)} are supported"
            refuse(f"{path}.type", dataset.get("type"), problem)
        if dataset.get("pipeline") is not None:
            yield f"{path}.pipeline", dataset["pipeline"]
        for key in keys:
            yield from _pipelines(dataset[key], f"{path}.{key}")


def _mapping(value: object) -> Metadata:
    return value if isinstance(value, Mapping) else {}


def _lookup(tree: object, dotted: str) -> object:
    """Return the value at a dotted path, None where there is none.

    A value that cannot be read stands for all below it.
    """
    for part in dotted.split("."):
        if isinstance(tree, Unreadable):
            return tree
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _class_names(meta: Metadata) -> tuple[str, ...] | None:
    dataset = _mapping(meta.get("dataset_meta"))
    names = dataset.get("classes", dataset.get("CLASSES", meta.get("CLASSES")))
    if isinstance(names, str):
        return (names,)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _epochs(config: Metadata) -> int | None:
    for dotted in ("train_cfg.max_epochs", "runner.max_epochs"):
        if isinstance(epochs := _lookup(config, dotted), int):
            return epochs
    return None


def preset_from_shapes(shapes: Shapes, origin: str) -> Preset:
    """Return the first preset whose network these tensors fill, else one named "custom".

    The class count is the file's, with numbered names. Anchor kind and convention leave no trace in
    shapes and are the preset's.

    Args:
        shapes: of the tensors, by their names in MMDetection 3.x.
        origin: the file, for errors.

    Raises:
        CheckpointError: these are not the tensors of a detector of the family.
    """
    missing = [key for key in LANDMARKS if key not in shapes]
    if not shapes.keys() & CLASS_WEIGHTS.keys():
        missing.append(" or ".join(CLASS_WEIGHTS))
    if missing:
        parts = sorted({".".join(key.split(".")[:2]) for key in shapes})
        listed = f"{', '.join(parts[:6])}{' and more' if len(parts) > 6 else ''}"
        raise CheckpointError(
            f"{origin}: not a detector of the family: {', '.join(missing)} missing; "
            f"found {len(shapes)} tensors of {listed}"
        )
    custom = _custom_preset(shapes, origin)
    for preset in PRESETS.values():
        if same_structure(preset, custom):
            return replace(preset, class_names=custom.class_names)
    return custom


def same_structure(first: Preset, second: Preset) -> bool:
    """Return whether two presets have state dicts of the same keys and shapes.

    The class count may differ. ATSS and PAA have the same.
    """

    def structure(preset: Preset) -> tuple[object, ...]:
        width = preset.base_width if preset.groups > 1 else 0  # a plain ResNet does not use it
        from_c5 = preset.extra_levels == "input"
        return (
            *(preset.depth, preset.groups, width, preset.base_channels, preset.deform_stages),
            *(preset.channels, preset.tower_stages, preset.deform_tower),
            *(keys_of(preset.detector), preset.tower_bias, preset.anchors_per_cell),
            *(preset.bins if preset.detector == "gfl" else 0,),
            *(preset.c5_channels if from_c5 else preset.channels,),
        )

    return structure(first) == structure(second)


def numbered_classes(count: int) -> tuple[str, ...]:
    """Return names for classes that have none."""
    return tuple(f"class_{i}" for i in range(count))


def _custom_preset(shapes: Shapes, origin: str) -> Preset:
    """Return the preset of a structure, with published values where shapes show nothing."""
    width, group_width = shapes["backbone.layer1.0.conv2.weight"][:2]
    deform_stages = tuple(
        n for n in range(1, 5) if f"backbone.layer{n}.0.conv2.conv_offset.weight" in shapes
    )
    channels, *_ = shapes["neck.fpn_convs.0.conv.weight"]
    custom = replace(
        BASES[CLASS_WEIGHTS[next(key for key in CLASS_WEIGHTS if key in shapes)]],
        name="custom",
        weights=None,
        published_ap=None,
        depth=_depth(shapes, origin),
        groups=width // group_width,
        base_width=group_width,
        base_channels=shapes["backbone.conv1.weight"][0],
        deform_stages=deform_stages,
        channels=channels,
        extra_levels="output" if shapes["neck.fpn_convs.3.conv.weight"][1] == channels else "input",
    )
    return replace(custom, **_head_fields(shapes, custom.detector))


def _head_fields(shapes: Shapes, detector: DetectorName) -> dict[str, Any]:
    """Return the fields of a preset that the shapes of a head show."""
    count = shapes[f"bbox_head.{CLASS_LAYERS[detector]}.weight"][0]
    if detector == "tood":
        return {
            "tower_stages": _count(r"bbox_head\.inter_convs\.(\d+)\.", shapes),
            "deform_tower": _count(r"bbox_head\.inter_convs\.(\d+)\.conv\.conv_offset\.", shapes),
            "class_names": numbered_classes(count),
        }
    fields: dict[str, Any] = {
        "tower_stages": _count(r"bbox_head\.cls_convs\.(\d+)\.", shapes),
        "class_names": numbered_classes(count),
    }
    if detector == "fcos":
        fields["tower_bias"] = "bbox_head.cls_convs.0.conv.bias" in shapes
    if detector == "gfl":
        fields["bins"] = max(2, shapes.get("bbox_head.gfl_reg.weight", (0,))[0] // 4)
    if detector == "retinanet":
        anchors = max(1, shapes.get("bbox_head.retina_reg.weight", (4,))[0] // 4)
        fields["class_names"] = numbered_classes(max(1, count // anchors))
        if anchors != BASES[detector].anchors_per_cell:  # the configuration says which they are
            fields |= {"anchor_octaves": anchors, "anchor_ratios": (1.0,)}
    return fields


def _count(pattern: str, shapes: Shapes) -> int:
    """Return how many values the pattern's group takes at the beginning of keys."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _depth(shapes: Shapes, origin: str) -> int:
    blocks = tuple(_count(rf"backbone\.layer{n}\.(\d+)\.", shapes) for n in range(1, 5))
    bottlenecks = "backbone.layer1.0.conv3.weight" in shapes
    for depth, expected in STAGE_BLOCKS.items():
        if blocks == expected and (depth >= 50) == bottlenecks:
            return depth
    known = ", ".join(map(str, STAGE_BLOCKS))
    raise CheckpointError(
        f"{origin}: the backbone's stages have {blocks} blocks; expected a ResNet of depth {known}"
    )
