"""What every key of a checkpoint's configuration means to this network, as tables.

A key is harmless, told by the weights too, computed, or of one value; one that no table names is refused by its name.
Sources: reference/SPEC.md sections 1, 2 and 4, and the arguments of MMDetection 2.x and 3.x, whose defaults hold where
a key is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, NoReturn, TypeGuard

from tood_deploy.errors import CheckpointError
from tood_deploy.model.config_text import unreadable_parts
from tood_deploy.presets import MAX_CANDIDATES, STRIDES, Preset

OUR_SCOPES = ("mmdet", "mmcv", "mmengine")
CURE = "train with a supported value, or run this checkpoint in the code that trained it"


class Harmless:
    """A key that changes nothing of what the network computes at test time."""


@dataclass(frozen=True)
class Only:
    """A key that this network has one value for, in one or several spellings."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Told:
    """A key whose value the weights tell too, as this field of the preset: the two must agree."""

    field: str


@dataclass(frozen=True)
class Computed:
    """A key that sets a field of the preset; `read` checks the value and may raise ValueError that says what is expected."""

    field: str
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class OrNone:
    """A section that may be None, as if it were missing."""

    table: Mapping[str, Any]


Rule = Harmless | Only | Told | Computed | OrNone | Mapping[str, Any]
Table = Mapping[str, Rule]


def only(*values: Any) -> Only:
    """Make the rule of a key of one value."""
    return Only(values)


def refuse(path: str, found: Any, expected: str, cure: str = CURE) -> NoReturn:
    """Raise CheckpointError: a setting, by its dotted path, that cannot be computed as it says."""
    raise CheckpointError(f"the configuration says {path} = {found!r}; {expected}: {cure}")


def apply_rules(table: Table, section: Any, path: str, weights: Preset) -> dict[str, Any]:
    """Hold a section of the configuration against its table.

    Args:
        table: the rule of every key that the section may have.
        section: the configuration's own.
        path: where it stands, with dots.
        weights: the preset that the shapes of the weights tell.

    Returns:
        The fields of the preset that it sets.

    Raises:
        CheckpointError: a key is unknown, cannot be read, or has a value that this network cannot compute.
    """
    if not isinstance(section, Mapping):
        refuse(path, section, "a dictionary is expected there")
    settings: dict[str, Any] = {}
    for key, value in section.items():
        settings |= _apply_rule(table.get(key) or SCOPE.get(key), value, f"{path}.{key}", weights)
    return settings


def _apply_rule(rule: Rule | None, value: Any, path: str, weights: Preset) -> dict[str, Any]:
    if isinstance(rule, Harmless):
        return {}
    if rule is None:
        refuse(path, value, "this key is not known to tood_deploy")
    if unreadable := next(unreadable_parts(value), None):
        refuse(
            path,
            unreadable,
            "only literal values can be read",
            "store the checkpoint with the configuration's final text",
        )
    match rule:
        case Only(values):
            if not any(same(without_scope(value), allowed) for allowed in values):
                refuse(path, value, f"only {' or '.join(map(repr, values))} is supported")
        case Told(field):
            if value is not None and not same(value, told := getattr(weights, field)):
                refuse(
                    path,
                    value,
                    f"the weights tell {told!r}",
                    "this configuration is not that of these weights",
                )
        case Computed(field, read):
            try:
                return {field: read(value)}
            except ValueError as error:
                refuse(path, value, str(error))
        case OrNone(table):
            return {} if value is None else apply_rules(table, value, path, weights)
        case _:
            return apply_rules(rule, value, path, weights)
    return {}


def same(first: Any, second: Any) -> bool:
    """Compare two values; True and False are no numbers."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def without_scope(value: Any) -> Any:
    """Return the plain name of a type of MMDetection's own: "mmdet.ResNet" and "mmdet.models.ResNet" are "ResNet"."""
    if isinstance(value, str) and value.split(".")[0] in OUR_SCOPES:
        return value.rsplit(".", 1)[-1]
    return value


# --- Readers of computed values: checked, in the preset's form.


def is_number(value: Any) -> TypeGuard[int | float]:
    """Tell whether this is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if not is_number(value) or not low <= value <= high or (above and value == low):
            raise ValueError(
                f"a number {'above' if above else 'from'} {low:g} to {high:g} is supported"
            )
        return float(value)

    return read


def _count(value: Any) -> int:
    if not is_number(value) or value != int(value) or not 1 <= value <= MAX_CANDIDATES:
        raise ValueError(f"a whole number from 1 to {MAX_CANDIDATES} is supported")
    return int(value)


def _scale(value: Any) -> float | None:
    """Read the one scale of the square anchors; None where the octaves tell it."""
    if value is None:
        return None
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != 1 or not is_number(values[0]) or values[0] <= 0:
        raise ValueError("one square anchor a cell is supported, of one positive scale")
    return float(values[0])


def _four(value: Any) -> tuple[float, ...]:
    if not isinstance(value, tuple) or len(value) != 4 or not all(map(is_number, value)):
        raise ValueError("four numbers, of dx, dy, dw and dh, are supported")
    return tuple(float(number) for number in value)


def _four_positive(value: Any) -> tuple[float, ...]:
    if min(values := _four(value)) <= 0:
        raise ValueError("four positive numbers, of dx, dy, dw and dh, are supported")
    return values


def _anchor(value: Any) -> str:
    kinds = {"anchor_free": "free", "anchor_based": "based"}
    if value not in kinds:
        raise ValueError(f"only {' or '.join(map(repr, kinds))} is supported")
    return kinds[value]


def _stages(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) != 4
        or not all(isinstance(flag, bool) for flag in value)
    ):
        raise ValueError("True or False for each of four stages is expected")
    return tuple(number for number, flag in enumerate(value, start=1) if flag)


# --- The tables.

HARMLESS = Harmless()
SCOPE: Table = {"_scope_": only("mmdet", None)}
PLAIN_CONVOLUTION = only(None, {"type": "Conv"}, {"type": "Conv2d"})

BACKBONE: Table = {
    "type": only("ResNet", "ResNeXt"),
    "depth": Told("depth"),
    "groups": Told("groups"),
    "base_width": HARMLESS,  # the shapes tell it; of a plain ResNet it counts for nothing
    "base_channels": Told("base_channels"),
    "stem_channels": Told("base_channels"),
    "in_channels": only(3),
    "num_stages": only(4),
    "strides": only((1, 2, 2, 2)),
    "dilations": only((1, 1, 1, 1)),
    "out_indices": only((0, 1, 2, 3), (1, 2, 3)),
    "style": only("pytorch"),
    "deep_stem": only(False),
    "avg_down": only(False),
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": {
        "type": only("BN", "BN2d", "SyncBN", "MMSyncBN"),
        "eps": Computed("batch_norm_eps", _number(0, 1, above=True)),
        "momentum": HARMLESS,
        "requires_grad": HARMLESS,
        "affine": only(True),
        "track_running_stats": only(True),
    },
    "dcn": OrNone(
        {
            "type": only("DCNv2"),
            "deform_groups": only(1),
            "deformable_groups": only(1),
            "fallback_on_stride": HARMLESS,  # which layers are deformable is told by their keys
        }
    ),
    "stage_with_dcn": Computed("_deform_stages", _stages),
    "plugins": only(None, ()),
    **dict.fromkeys(
        ("norm_eval", "frozen_stages", "with_cp", "zero_init_residual", "pretrained", "init_cfg"),
        HARMLESS,
    ),
}

NECK: Table = {
    "type": only("FPN"),
    "in_channels": HARMLESS,  # the shapes tell it
    "out_channels": Told("channels"),
    "num_outs": only(5),
    "start_level": only(0, 1),
    "end_level": only(-1, 3),
    "add_extra_convs": only("on_output"),
    "extra_convs_on_inputs": only(False),
    "relu_before_extra_convs": only(False),
    "no_norm_on_lateral": HARMLESS,  # there are no norms
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": only(None),
    "act_cfg": only(None),
    "upsample_cfg": {"type": only("nearest"), "mode": only("nearest")},
    "init_cfg": HARMLESS,
}

ANCHOR_GENERATOR: Table = {
    "type": only("AnchorGenerator"),
    "strides": only(STRIDES),
    "ratios": only((1.0,)),
    "scales": Computed("_scale", _scale),
    "octave_base_scale": Computed("_octave_scale", _scale),
    "scales_per_octave": only(1, None),
    "base_sizes": only(None, STRIDES),
    "centers": only(None),
    "center_offset": Computed("anchor_offset", _number(0, 1)),
    "scale_major": HARMLESS,  # of one scale and one ratio
    "use_box_type": HARMLESS,
}

BOX_CODER: Table = {
    "type": only("DeltaXYWHBBoxCoder"),
    "target_means": Computed("delta_means", _four),
    "target_stds": Computed("delta_stds", _four_positive),
    "clip_border": HARMLESS,  # the head decodes without an image size
    "add_ctr_clamp": only(False),
    "ctr_clamp": HARMLESS,
    "use_box_type": HARMLESS,
}

HEAD: Table = {
    "type": only("TOODHead"),
    "num_classes": Told("num_classes"),
    "in_channels": Told("channels"),
    "feat_channels": Told("channels"),
    "stacked_convs": Told("tower_stages"),
    "num_dcn": Told("deform_tower"),
    "num_dcn_on_head": Told("deform_tower"),
    "anchor_type": Computed("anchor", _anchor),
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": {
        "type": only("GN"),
        "num_groups": Computed("norm_groups", _count),
        "eps": Computed("norm_eps", _number(0, 1, above=True)),
        "requires_grad": HARMLESS,
        "affine": only(True),
    },
    "anchor_generator": ANCHOR_GENERATOR,
    "bbox_coder": HARMLESS,  # of anchor-based heads read by BOX_CODER; the others have no use for it
    "pred_kernel_size": HARMLESS,  # of ATSS' own layers
    **dict.fromkeys(
        ("loss_cls", "loss_bbox", "initial_loss_cls", "loss_centerness", "reg_decoded_bbox"),
        HARMLESS,
    ),
    **dict.fromkeys(
        ("train_cfg", "test_cfg", "init_cfg"), HARMLESS
    ),  # the detector's test_cfg is the one that counts
}

DETECTOR: Table = {
    "type": only(
        "TOOD", "SingleStageDetector", "GFL"
    ),  # the same but for the name; the authors' ResNeXt configurations have the last
    "backbone": BACKBONE,
    "neck": NECK,
    "bbox_head": HEAD,
    **dict.fromkeys(
        ("test_cfg", "data_preprocessor"), HARMLESS
    ),  # read apart, as they may stand elsewhere too
    **dict.fromkeys(("train_cfg", "pretrained", "init_cfg"), HARMLESS),
}

TEST: Table = {
    "score_thr": Computed("score_threshold", _number(0, 1)),
    "nms_pre": Computed("candidates_per_level", _count),
    "max_per_img": Computed("max_det", _count),
    "min_bbox_size": only(0, -1),  # an aligned box has some area in any case
    "nms": {
        "type": only("nms"),
        "iou_threshold": Computed("iou_threshold", _number(0, 1)),
        "iou_thr": Computed("iou_threshold", _number(0, 1)),
        "class_agnostic": only(False),
        "split_thr": HARMLESS,  # how the same is computed
        "offset": only(0),
        "max_num": only(-1),
        "score_threshold": only(0),
    },
}
