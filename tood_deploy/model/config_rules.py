"""Say in tables what every key of a checkpoint's configuration means to this network.

A section of a parsed configuration in, the fields of the preset that it sets out. A key is
harmless, must have one of some values, must agree with the weights, or sets a field; a key that no
table names is refused by its name. Knows nothing of files and texts.

Sources: reference/SPEC.md sections 1, 2 and 4, and the arguments of MMDetection 2.x and 3.x, whose
defaults hold where a key is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import NoReturn, TypeGuard

from tood_deploy.errors import CheckpointError
from tood_deploy.model.config_text import unreadable_parts
from tood_deploy.presets import MAX_CANDIDATES, STRIDES, Preset

OUR_SCOPES = ("mmdet", "mmcv", "mmengine")
CURE = "train with a supported value, or run this checkpoint in the code that trained it"
MERGE_CURE = "store the checkpoint with the configuration's final text"


class Harmless:
    """A key that changes nothing of what the network computes at test time."""


@dataclass(frozen=True)
class OneOf:
    """A key that must have one of these values, which mean the same to this network."""

    values: tuple[object, ...]


@dataclass(frozen=True)
class FromWeights:
    """A key whose value the weights show too, as this field of the preset: the two must agree."""

    field: str


@dataclass(frozen=True)
class Computed:
    """A key that sets a field of the preset.

    Attributes:
        field: its name.
        read: checks the value and gives the field's; its ValueError says what is supported.
    """

    field: str
    read: Callable[[object], object]


@dataclass(frozen=True)
class OrNone:
    """A section that may be None, as if it were missing."""

    table: Mapping[str, "Rule"]


@dataclass(frozen=True)
class Section:
    """A section of which keys may be missing, or may not matter.

    Attributes:
        table: the rule of every key that matters.
        defaults: MMDetection's values of keys where they are missing, if these must be checked.
        ignores_others: whether keys that the table lacks change nothing.
    """

    table: Mapping[str, "Rule"]
    defaults: Mapping[str, object] = field(default_factory=dict)
    ignores_others: bool = False


Rule = Harmless | OneOf | FromWeights | Computed | OrNone | Section | Mapping[str, "Rule"]
Table = Mapping[str, Rule]
Settings = dict[str, object]  # fields of the preset that a configuration sets, by name

HARMLESS = Harmless()


def one_of(*values: object) -> OneOf:
    """Return the rule of a key that must have one of these values."""
    return OneOf(values)


def harmless(*keys: str) -> dict[str, Rule]:
    """Return the rules of keys that change nothing."""
    return dict.fromkeys(keys, HARMLESS)


def _keep(*keys: str) -> dict[str, Rule]:
    """Return the rules of keys whose values are read, and checked, elsewhere."""
    return {key: Computed(key, lambda value: value) for key in keys}


SCOPE: Table = {"_scope_": one_of("mmdet", None)}  # may stand in every section


def refuse(path: str, value: object, expected: str, cure: str = CURE) -> NoReturn:
    """Raise CheckpointError for a setting that cannot be computed as it says.

    Args:
        path: where it stands, with dots.
        value: what the configuration says.
        expected: what is supported, or why this is not.
        cure: what the user can do.
    """
    raise CheckpointError(f"the configuration says {path} = {value!r}; {expected}: {cure}")


def apply_rules(table: Table, section: object, path: str, weights: Preset) -> Settings:
    """Hold a section of the configuration against its table.

    Args:
        table: the rule of every key that the section may have.
        section: the configuration's own.
        path: where it stands, with dots.
        weights: the preset that the shapes of the weights show.

    Returns:
        The fields of the preset that it sets.

    Raises:
        CheckpointError: a key is unknown, cannot be read, or has a value that this network cannot
            compute.
    """
    if not isinstance(section, Mapping):
        refuse(path, section, "a dictionary is expected there")
    settings: Settings = {}
    for key, value in section.items():
        settings |= _apply_rule(table.get(key) or SCOPE.get(key), value, f"{path}.{key}", weights)
    return settings


def apply_section(section: Section, value: object, path: str, weights: Preset) -> Settings:
    """Hold a section against its rules as `apply_rules` does, with its defaults.

    Args:
        section: the rules.
        value: the configuration's own.
        path: where it stands, with dots.
        weights: the preset that the shapes of the weights show.
    """
    if not isinstance(value, Mapping):
        refuse(path, value, "a dictionary is expected there")
    known = {key: value[key] for key in value if key in section.table or key in SCOPE}
    given = known if section.ignores_others else value
    return apply_rules(section.table, {**section.defaults, **given}, path, weights)


def _apply_rule(rule: Rule | None, value: object, path: str, weights: Preset) -> Settings:
    """Return the fields that one key sets.

    Args:
        rule: of the key; None where no table names it.
        value: of the key.
        path: where it stands, with dots.
        weights: the preset that the shapes of the weights show.
    """
    if isinstance(rule, Harmless):
        return {}
    if rule is None:
        refuse(path, value, "this key is not known to tood_deploy")
    if unreadable := next(unreadable_parts(value), None):
        refuse(path, unreadable, "only literal values can be read", MERGE_CURE)
    match rule:
        case OneOf(values):
            if not any(same(without_scope(value), allowed) for allowed in values):
                refuse(path, value, f"only {' or '.join(map(repr, values))} is supported")
        case FromWeights(name):
            shown = getattr(weights, name)
            if value is not None and not same(value, shown):
                cure = "this configuration is not that of these weights"
                refuse(path, value, f"the weights have {shown!r}", cure)
        case Computed(name, read):
            try:
                return {name: read(value)}
            except ValueError as error:
                refuse(path, value, str(error))
        case Section():
            return apply_section(rule, value, path, weights)
        case OrNone(table):
            return {} if value is None else apply_rules(table, value, path, weights)
        case _:
            return apply_rules(rule, value, path, weights)
    return {}


def same(first: object, second: object) -> bool:
    """Return whether two values are equal; True and False are no numbers."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def without_scope(value: object) -> object:
    """Return the plain name of a type of MMDetection's own, any other value as it is.

    "mmdet.ResNet" and "mmdet.models.ResNet" are "ResNet".
    """
    if isinstance(value, str) and value.split(".")[0] in OUR_SCOPES:
        return value.rsplit(".", 1)[-1]
    return value


# --- Readers: they check a value and give it in the preset's form.


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether this is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def read_number(low: float, high: float, *, above: bool = False) -> Callable[[object], float]:
    """Return the reader of a number in a range.

    Args:
        low, high: the range.
        above: leave `low` itself out.
    """

    def read(value: object) -> float:
        if not is_number(value) or not low <= value <= high or (above and value == low):
            first = "above" if above else "from"
            raise ValueError(f"a number {first} {low:g} to {high:g} is supported")
        return float(value)

    return read


def read_count(value: object) -> int:
    """Read a number of things."""
    if not is_number(value) or value != int(value) or not 1 <= value <= MAX_CANDIDATES:
        raise ValueError(f"a whole number from 1 to {MAX_CANDIDATES} is supported")
    return int(value)


def read_scale(value: object) -> float | None:
    """Read the one scale of the square anchors; None where `octave_base_scale` has it."""
    if value is None:
        return None
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != 1 or not is_number(values[0]) or values[0] <= 0:
        raise ValueError("one square anchor a cell is supported, of one positive scale")
    return float(values[0])


def read_four(value: object) -> tuple[float, ...]:
    """Read a number for each of dx, dy, dw and dh."""
    if not isinstance(value, tuple) or len(value) != 4 or not all(map(is_number, value)):
        raise ValueError("four numbers, of dx, dy, dw and dh, are supported")
    return tuple(float(number) for number in value)


def read_four_positive(value: object) -> tuple[float, ...]:
    """Read a positive number for each of dx, dy, dw and dh."""
    if min(values := read_four(value)) <= 0:
        raise ValueError("four positive numbers, of dx, dy, dw and dh, are supported")
    return values


def _anchor(value: object) -> str:
    kinds = {"anchor_free": "free", "anchor_based": "based"}
    if not isinstance(value, str) or value not in kinds:
        raise ValueError(f"only {' or '.join(map(repr, kinds))} is supported")
    return kinds[value]


def _stages(value: object) -> tuple[int, ...]:
    """Read the numbers, 1 to 4, of the stages whose flag is True."""
    flags = value if isinstance(value, tuple) else ()
    if len(flags) != 4 or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("True or False for each of four stages is expected")
    return tuple(number for number, flag in enumerate(flags, start=1) if flag)


# --- The tables of the detector.

PLAIN_CONVOLUTION = one_of(None, {"type": "Conv"}, {"type": "Conv2d"})

BACKBONE: Table = {
    "type": one_of("ResNet", "ResNeXt"),
    "depth": FromWeights("depth"),
    "groups": FromWeights("groups"),
    "base_width": HARMLESS,  # the shapes show it; a plain ResNet does not use it
    "base_channels": FromWeights("base_channels"),
    "stem_channels": FromWeights("base_channels"),
    "in_channels": one_of(3),
    "num_stages": one_of(4),
    "strides": one_of((1, 2, 2, 2)),
    "dilations": one_of((1, 1, 1, 1)),
    "out_indices": one_of((0, 1, 2, 3), (1, 2, 3)),
    "style": one_of("pytorch"),
    "deep_stem": one_of(False),
    "avg_down": one_of(False),
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": {
        "type": one_of("BN", "BN2d", "SyncBN", "MMSyncBN"),
        "eps": Computed("batch_norm_eps", read_number(0, 1, above=True)),
        "momentum": HARMLESS,
        "requires_grad": HARMLESS,
        "affine": one_of(True),
        "track_running_stats": one_of(True),
    },
    "dcn": OrNone(
        {
            "type": one_of("DCNv2"),
            "deform_groups": one_of(1),
            "deformable_groups": one_of(1),
            "fallback_on_stride": HARMLESS,  # the keys show which layers are deformable
        }
    ),
    "stage_with_dcn": Computed("_deform_stages", _stages),
    "plugins": one_of(None, ()),
    **harmless(
        "norm_eval", "frozen_stages", "with_cp", "zero_init_residual", "pretrained", "init_cfg"
    ),
}

NECK: Table = {
    "type": one_of("FPN"),
    "in_channels": HARMLESS,  # the shapes show it
    "out_channels": FromWeights("channels"),
    "num_outs": one_of(5),
    "start_level": one_of(0, 1),
    "end_level": one_of(-1, 3),
    "add_extra_convs": one_of("on_output"),
    "extra_convs_on_inputs": one_of(False),
    "relu_before_extra_convs": one_of(False),
    "no_norm_on_lateral": HARMLESS,  # there are no norms
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": one_of(None),
    "act_cfg": one_of(None),
    "upsample_cfg": {"type": one_of("nearest"), "mode": one_of("nearest")},
    "init_cfg": HARMLESS,
}

ANCHOR_GENERATOR: Table = {
    "type": one_of("AnchorGenerator"),
    "strides": one_of(STRIDES),
    "ratios": one_of((1.0,)),
    "scales": Computed("_scale", read_scale),
    "octave_base_scale": Computed("_octave_scale", read_scale),
    "scales_per_octave": one_of(1, None),
    "base_sizes": one_of(None, STRIDES),
    "centers": one_of(None),
    "center_offset": Computed("anchor_offset", read_number(0, 1)),
    "scale_major": HARMLESS,  # of one scale and one ratio
    "use_box_type": HARMLESS,
}

BOX_CODER: Table = {
    "type": one_of("DeltaXYWHBBoxCoder"),
    "target_means": Computed("delta_means", read_four),
    "target_stds": Computed("delta_stds", read_four_positive),
    "clip_border": HARMLESS,  # the head decodes without an image size
    "add_ctr_clamp": one_of(False),
    "ctr_clamp": HARMLESS,
    "use_box_type": HARMLESS,
}

HEAD: Table = {
    "type": one_of("TOODHead"),
    "num_classes": FromWeights("num_classes"),
    "in_channels": FromWeights("channels"),
    "feat_channels": FromWeights("channels"),
    "stacked_convs": FromWeights("tower_stages"),
    "num_dcn": FromWeights("deform_tower"),
    "num_dcn_on_head": FromWeights("deform_tower"),
    "anchor_type": Computed("anchor", _anchor),
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": {
        "type": one_of("GN"),
        "num_groups": Computed("norm_groups", read_count),
        "eps": Computed("norm_eps", read_number(0, 1, above=True)),
        "requires_grad": HARMLESS,
        "affine": one_of(True),
    },
    "anchor_generator": ANCHOR_GENERATOR,
    "bbox_coder": HARMLESS,  # anchor-based heads' is read by BOX_CODER; the others do not use it
    "pred_kernel_size": HARMLESS,  # of ATSS' own layers
    **harmless("loss_cls", "loss_bbox", "initial_loss_cls", "loss_centerness", "reg_decoded_bbox"),
    **harmless("train_cfg", "test_cfg", "init_cfg"),  # it is the detector's test_cfg that counts
}

DETECTOR: Table = {
    # The same but for the name; the authors' ResNeXt configurations have the last.
    "type": one_of("TOOD", "SingleStageDetector", "GFL"),
    "backbone": BACKBONE,
    "neck": NECK,
    "bbox_head": HEAD,
    **harmless("test_cfg", "data_preprocessor"),  # read apart, as they may stand elsewhere too
    **harmless("train_cfg", "pretrained", "init_cfg"),
}

TEST: Table = {
    "score_thr": Computed("score_threshold", read_number(0, 1)),
    "nms_pre": Computed("candidates_per_level", read_count),
    "max_per_img": Computed("max_det", read_count),
    "min_bbox_size": one_of(0, -1),  # an aligned box has some area in any case
    "nms": {
        "type": one_of("nms"),
        "iou_threshold": Computed("iou_threshold", read_number(0, 1)),
        "iou_thr": Computed("iou_threshold", read_number(0, 1)),
        "class_agnostic": one_of(False),
        "split_thr": HARMLESS,  # how the same is computed
        "offset": one_of(0),
        "max_num": one_of(-1),
        "score_threshold": one_of(0),
    },
}

# --- The tables of the test pipeline, whose sizes and values `config_pipeline` reads.

LOADING: dict[str, Rule] = {
    "to_float32": one_of(False),  # resizing would round otherwise
    "color_type": one_of("color"),
    "imdecode_backend": HARMLESS,  # who decodes: the pixels are the caller's
    **harmless("file_client_args", "backend_args", "ignore_empty"),
}
RESIZING: dict[str, Rule] = {
    "backend": one_of("cv2"),
    "interpolation": one_of("bilinear"),
    **harmless("clip_object_border", "bbox_clip_border"),  # of the annotations
}
STEPS: dict[str, Table | None] = {
    **dict.fromkeys(
        ("LoadImageFromFile", "LoadImageFromNDArray", "LoadImageFromWebcam", "InferencerLoader"),
        LOADING,
    ),
    "Resize": {
        **_keep("scale", "img_scale", "scale_factor", "keep_ratio"),
        **RESIZING,
        "multiscale_mode": HARMLESS,
        "ratio_range": one_of(None),
        "override": one_of(False),
    },
    "FixShapeResize": {
        **_keep("width", "height"),
        **RESIZING,
        "keep_ratio": one_of(False),
        "pad_val": HARMLESS,
    },
    "Normalize": _keep("mean", "std", "to_rgb"),
    "Pad": {
        **_keep("size", "size_divisor", "pad_to_square", "pad_val"),
        "padding_mode": one_of("constant"),
    },
    "RandomFlip": {
        "prob": one_of(None, 0),
        "flip_ratio": one_of(None, 0),
        **harmless("direction", "swap_seg_labels"),
    },
    "MultiScaleFlipAug": {
        **_keep("img_scale"),
        "transforms": HARMLESS,  # its steps are read one by one
        "scale_factor": one_of(None),
        "flip": one_of(False),
        "flip_direction": HARMLESS,
    },
    # Steps that pack an image and its annotations change no pixel, whatever their arguments.
    **dict.fromkeys(
        ("LoadAnnotations", "PackDetInputs", "Collect", "ImageToTensor", "DefaultFormatBundle"),
        None,
    ),
}

PREPROCESSOR: Table = {
    "type": one_of("DetDataPreprocessor", "ImgDataPreprocessor"),
    **_keep("mean", "std", "bgr_to_rgb", "rgb_to_bgr", "pad_size_divisor", "pad_value"),
    **harmless(
        "pad_mask", "mask_pad_value", "pad_seg", "seg_pad_value", "boxtype2tensor", "non_blocking"
    ),
    "batch_augments": HARMLESS,  # at training time alone
}
