"""Say in tables what the configurations of TOOD's relatives mean to their networks.

What `config_rules` is to TOOD, for ATSS, GFL, PAA, FCOS, VFNet and RetinaNet: the type of the head
decides which table its keys are held against, and the defaults of MMDetection's classes hold where
keys are missing. Sources: reference/SPEC_FAMILY.md; the arguments of MMDetection 2.x and 3.x.
"""

from collections.abc import Mapping
from typing import cast

from tood_deploy.model.config_rules import (
    ANCHOR_GENERATOR,
    BACKBONE,
    BOX_CODER,
    DETECTOR,
    HARMLESS,
    NECK,
    PLAIN_CONVOLUTION,
    TEST,
    Computed,
    FromWeights,
    Rule,
    Section,
    Settings,
    Table,
    harmless,
    is_number,
    one_of,
    read_count,
    read_number,
    refuse,
    same,
    without_scope,
)
from tood_deploy.presets import BASES, STRIDES, DetectorName, Preset

DETECTOR_OF_HEAD: dict[str, DetectorName] = {
    "TOODHead": "tood",
    "ATSSHead": "atss",
    "GFLHead": "gfl",
    "PAAHead": "paa",
    "FCOSHead": "fcos",
    "VFNetHead": "vfnet",
    "RetinaHead": "retinanet",
}
VFNET_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))  # pixels, of each level
NOT_THESE_WEIGHTS = "this configuration is not that of these weights"


# --- Readers: they check a value and give it in the preset's form.


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False is supported")
    return value


def _style(value: object) -> str:
    if value not in ("pytorch", "caffe"):
        raise ValueError("only 'pytorch' or 'caffe' is supported")
    return str(value)


def _bins(value: object) -> int:
    return read_count(value) + 1  # a distance of 0 has a bin too


def _ratios(value: object) -> tuple[float, ...]:
    ratios = value if isinstance(value, tuple) else ()
    numbers = tuple(float(ratio) for ratio in ratios if is_number(ratio) and ratio > 0)
    if not numbers or len(numbers) != len(ratios):
        raise ValueError("positive numbers, of height to width, are supported")
    return numbers


def _tower_bias(value: object) -> bool:
    """Read `conv_bias`; "auto" gives none to convolutions before a norm."""
    return False if value == "auto" else _flag(value)


# --- The tables.

FAMILY_BACKBONE = Section(
    {**BACKBONE, "style": Computed("backbone_style", _style)}, {"style": "pytorch"}
)
FAMILY_NECK = Section(
    {
        **NECK,
        "add_extra_convs": Computed("_extra_convs", lambda value: value),
        "extra_convs_on_inputs": Computed("_on_inputs", _flag),
        "relu_before_extra_convs": Computed("relu_before_p7", _flag),
    },
    {"add_extra_convs": False, "relu_before_extra_convs": False},
)
GROUP_NORM: Table = {
    "type": one_of("GN"),
    "num_groups": Computed("norm_groups", read_count),
    "eps": Computed("norm_eps", read_number(0, 1, above=True)),
    "requires_grad": HARMLESS,
    "affine": one_of(True),
}
# Without sigmoid, a softmax over one class more is applied.
CLASS_LOSS = Section({"use_sigmoid": one_of(True)}, {"use_sigmoid": False}, ignores_others=True)
DELTA_CODER = Section(
    {**BOX_CODER, "clip_border": one_of(True)},
    {"target_means": (0.0,) * 4, "target_stds": (1.0,) * 4},
)
DISTANCE_CODER: Table = {
    "type": one_of("DistancePointBBoxCoder"),
    "clip_border": one_of(True),
    "use_box_type": HARMLESS,
}
SQUARE_ANCHOR = Section(ANCHOR_GENERATOR, {"center_offset": 0.0})
SEVERAL_ANCHORS = Section(
    {
        **ANCHOR_GENERATOR,
        "scales": one_of(None),
        "octave_base_scale": Computed("anchor_side", read_number(0, 1e4, above=True)),
        "scales_per_octave": Computed("anchor_octaves", read_count),
        "ratios": Computed("anchor_ratios", _ratios),
        "scale_major": one_of(True),
    },
    {"center_offset": 0.0},
)

ANY_HEAD: dict[str, Rule] = {
    "num_classes": FromWeights("num_classes"),
    "in_channels": FromWeights("channels"),
    "feat_channels": FromWeights("channels"),
    "stacked_convs": FromWeights("tower_stages"),
    "conv_cfg": PLAIN_CONVOLUTION,
    "norm_cfg": GROUP_NORM,
    "loss_cls": CLASS_LOSS,
    **harmless("loss_bbox", "reg_decoded_bbox"),
    **harmless("train_cfg", "test_cfg", "init_cfg"),  # it is the detector's test_cfg that counts
}
ATSS_HEAD: dict[str, Rule] = {
    **ANY_HEAD,
    "type": one_of("ATSSHead"),
    "anchor_generator": SQUARE_ANCHOR,
    "bbox_coder": DELTA_CODER,
    "pred_kernel_size": one_of(3),
    "loss_centerness": HARMLESS,
}
POINT_HEAD: dict[str, Rule] = {
    **ANY_HEAD,
    "strides": one_of(STRIDES),
    "dcn_on_last_conv": one_of(False),
    "conv_bias": Computed("tower_bias", _tower_bias),
    "bbox_coder": DISTANCE_CODER,
    **harmless("center_sampling", "center_sample_radius", "loss_centerness"),
}
HEADS: dict[DetectorName, Rule] = {
    "atss": Section(ATSS_HEAD, {"bbox_coder": {}}),
    "paa": Section(
        {
            **ATSS_HEAD,
            "type": one_of("PAAHead"),
            "score_voting": Computed("score_voting", _flag),
            **harmless("topk", "covariance_type"),
        },
        {"bbox_coder": {}},
    ),
    "gfl": {
        **ANY_HEAD,
        "type": one_of("GFLHead"),
        "anchor_generator": SQUARE_ANCHOR,
        "bbox_coder": DISTANCE_CODER,
        "reg_max": Computed("bins", _bins),
        "loss_dfl": HARMLESS,
    },
    "fcos": Section(
        {
            **POINT_HEAD,
            "type": one_of("FCOSHead"),
            "norm_on_bbox": one_of(True),
            "centerness_on_reg": one_of(True),
            "regress_ranges": HARMLESS,
        },
        {"norm_on_bbox": False, "centerness_on_reg": False, "conv_bias": "auto"},
    ),
    "vfnet": Section(
        {
            **POINT_HEAD,
            "type": one_of("VFNetHead"),
            "regress_ranges": one_of(VFNET_RANGES),
            "anchor_generator": SQUARE_ANCHOR,
            "bbox_norm_type": one_of("reg_denom"),
            "use_atss": one_of(True),
            **harmless("sync_num_pos", "gradient_mul", "use_vfl", "loss_cls_fl"),
            "loss_bbox_refine": HARMLESS,
        },
        {"conv_bias": "auto"},
    ),
    "retinanet": Section(
        {
            **ANY_HEAD,
            "type": one_of("RetinaHead"),
            "norm_cfg": one_of(None),
            "anchor_generator": SEVERAL_ANCHORS,
            "bbox_coder": DELTA_CODER,
        },
        {"bbox_coder": {}},
    ),
}
# The same wrapper under several names.
WRAPPER = one_of(
    *("SingleStageDetector", "ATSS", "GFL", "PAA", "FCOS", "VFNet", "RetinaNet", "TOOD")
)


def detector_of(head: Mapping[str, object], weights: Preset) -> DetectorName | None:
    """Return the detector that a configuration's head is of; None where it has no type.

    Args:
        head: the section of the configuration.
        weights: the preset that the shapes of the weights show, which do not tell ATSS from PAA.

    Raises:
        CheckpointError: the weights are another detector's. Types that are not known at all are
            refused by TOOD's table.
    """
    kind = without_scope(head.get("type"))
    if not isinstance(kind, str) or kind not in DETECTOR_OF_HEAD:
        return None
    detector = DETECTOR_OF_HEAD[kind]
    if keys_of(detector) != keys_of(weights.detector):
        shown = f"the weights are those of {weights.detector}"
        refuse("model.bbox_head.type", head.get("type"), shown, NOT_THESE_WEIGHTS)
    return detector


def keys_of(detector: DetectorName) -> DetectorName:
    """Return the detector by whose name a layout of keys is known: PAA has that of ATSS."""
    return "atss" if detector == "paa" else detector


def detector_table(detector: DetectorName) -> Table:
    """Return the rules of the section `model` of a detector."""
    if detector == "tood":
        return DETECTOR
    own = {"type": WRAPPER, "backbone": FAMILY_BACKBONE, "neck": FAMILY_NECK}
    return {**DETECTOR, **own, "bbox_head": HEADS[detector]}


def test_section(detector: DetectorName) -> Section:
    """Return the rules of a detector's test settings."""
    if detector == "tood":
        return Section(TEST)
    if detector == "paa":  # its own suppression drops no box by its size
        return Section({**TEST, "min_bbox_size": HARMLESS})
    return Section({**TEST, "min_bbox_size": one_of(0)}, {"min_bbox_size": -1})


def settle(settings: Settings, detector: DetectorName, weights: Preset) -> Settings:
    """Return the fields of a preset that the section `model` sets, checked against the weights.

    Args:
        settings: as the tables give them.
        detector: that the configuration is of.
        weights: the preset that the shapes of the weights show.

    Raises:
        CheckpointError: a setting contradicts the weights, or P6 is made in an unsupported way.
    """
    settings = dict(settings)
    extra, on_inputs = settings.pop("_extra_convs", None), settings.pop("_on_inputs", True)
    if extra is not None:
        settings["extra_levels"] = _extra_levels(extra, bool(on_inputs), weights)
    for field, path in (("bins", "reg_max"), ("tower_bias", "conv_bias")):
        if not same(settings.get(field, shown := getattr(weights, field)), shown):
            problem = f"the weights have {field} {shown!r}"
            refuse(f"model.bbox_head.{path}", settings[field], problem, NOT_THESE_WEIGHTS)
    if detector == "retinanet":
        _check_anchors(BASES[detector], settings, weights)
    return settings


def _check_anchors(base: Preset, settings: Settings, weights: Preset) -> None:
    """Refuse anchors that are not as many a cell as the weights have.

    Args:
        base: whose anchors hold where the configuration gives none.
        settings: of the configuration.
        weights: the preset that the shapes of the weights show.
    """
    octaves = cast(int, settings.get("anchor_octaves", base.anchor_octaves))
    ratios = cast(tuple[float, ...], settings.get("anchor_ratios", base.anchor_ratios))
    if octaves * len(ratios) != weights.anchors_per_cell:
        problem = f"the weights have {weights.anchors_per_cell} anchors a cell"
        path = "model.bbox_head.anchor_generator"
        refuse(path, (octaves, ratios), problem, NOT_THESE_WEIGHTS)


def _extra_levels(extra: object, on_inputs: bool, weights: Preset) -> str:
    """Return what P6 is made from.

    Args:
        extra: the setting `add_extra_convs`.
        on_inputs: the setting of 2.x that True of the first depends on.
        weights: the preset that the shapes of the weights show.
    """
    if extra is True:
        extra = "on_input" if on_inputs else "on_output"
    if extra not in ("on_input", "on_output"):
        supported = "only 'on_input' or 'on_output' is supported"
        refuse("model.neck.add_extra_convs", extra, supported)
    levels = str(extra).removeprefix("on_")
    if levels != weights.extra_levels and weights.c5_channels != weights.channels:
        problem = f"the weights make P6 from the pyramid's {weights.extra_levels}"
        refuse("model.neck.add_extra_convs", extra, problem, NOT_THESE_WEIGHTS)
    return levels
