"""What the configurations of TOOD's relatives set, and what of them is refused by its name."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tood_deploy.errors import CheckpointError, ToodError
from tood_deploy.model import build_model, load_checkpoint, save_checkpoint
from tood_deploy.presets import PRESETS, Preset, PublishedWeights

SQUARE = """dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1,
    strides=[8, 16, 32, 64, 128])"""
NINE = """dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
    ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128])"""
DELTAS = "dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=%s)"
FOCAL = "loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25)"
CENTRE = "loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True)"
POINTS = "strides=[8, 16, 32, 64, 128], dcn_on_last_conv=False, center_sampling=True"
HEADS = {
    "atss": f"type='ATSSHead', anchor_generator={SQUARE}, {FOCAL}, {CENTRE}, "
    f"bbox_coder={DELTAS % '[0.1, 0.1, 0.2, 0.2]'}",
    "paa": f"type='PAAHead', anchor_generator={SQUARE}, {FOCAL}, {CENTRE}, topk=9, "
    f"score_voting=True, bbox_coder={DELTAS % '[0.1, 0.1, 0.2, 0.2]'}",
    "gfl": f"type='GFLHead', anchor_generator={SQUARE}, reg_max=16, "
    "loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0), "
    "loss_dfl=dict(type='DistributionFocalLoss')",
    "fcos": f"type='FCOSHead', {POINTS}, {FOCAL}, {CENTRE}, norm_on_bbox=True, "
    "centerness_on_reg=True, conv_bias=True",
    "vfnet": f"type='VFNetHead', {POINTS}, use_atss=True, use_vfl=True, "
    "loss_cls=dict(type='VarifocalLoss', use_sigmoid=True, alpha=0.75)",
    "retinanet": f"type='RetinaHead', anchor_generator={NINE}, {FOCAL}, "
    f"bbox_coder={DELTAS % '[1.0, 1.0, 1.0, 1.0]'}",
}
NECKS = {
    "fcos": "add_extra_convs='on_output', relu_before_extra_convs=True",
    "vfnet": "add_extra_convs='on_output', relu_before_extra_convs=True",
    "retinanet": "add_extra_convs='on_input'",
}
RGB = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True"
BGR = "mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False"
SMALL: dict[str, Any] = {"base_channels": 8, "channels": 32, "class_names": ("a", "b")}


def small(detector: str) -> Preset:
    """Return a preset of ResNet-50 at an eighth of its width."""
    return replace(PRESETS[f"{detector}-r50-1x"], **SMALL)


def config_of(detector: str, *changes: tuple[str, str]) -> str:
    """Return a configuration as MMDetection 3.x stores it, with parts of the text exchanged."""
    preset = small(detector)
    text = f"""
model = dict(type='SingleStageDetector',
    data_preprocessor=dict({BGR if detector == "fcos" else RGB}, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=50, base_channels=8, style='{preset.backbone_style}',
        norm_cfg=dict(type='BN', requires_grad=True), norm_eval=True),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=32, start_level=1,
        num_outs=5, {NECKS.get(detector, "add_extra_convs='on_output'")}),
    bbox_head=dict(num_classes=2, in_channels=32, feat_channels=32,
        stacked_convs={preset.tower_stages}, {HEADS[detector]}),
    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, max_per_img=100,
        nms=dict(type='nms', iou_threshold={preset.iou_threshold})))
test_pipeline = [dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True), dict(type='PackDetInputs')]
"""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


Write = Callable[..., Path]


@pytest.fixture(scope="module")
def networks() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {name: build_model(small(name)).state_dict() for name in HEADS}


@pytest.fixture
def write(tmp_path: Path, networks: dict[str, dict[str, torch.Tensor]]) -> Write:
    """Give a function that writes a detector's checkpoint with a configuration, or without one."""

    def save(detector: str, text: str | None = None) -> Path:
        path = tmp_path / f"{detector}.pth"
        meta = {"dataset_meta": {"classes": ("a", "b")}} | ({"cfg": text} if text else {})
        torch.save({"state_dict": networks[detector], "meta": meta}, path)
        return path

    return save


@pytest.mark.parametrize("detector", HEADS)
def test_a_published_configuration_gives_the_published_preset(detector: str, write: Write) -> None:
    loaded = load_checkpoint(write(detector, config_of(detector))).preset
    expected = replace(
        small(detector), name="custom", base_width=8, weights=None, published_ap=None
    )
    for field in fields(Preset):
        assert getattr(loaded, field.name) == getattr(expected, field.name), field.name


@pytest.mark.parametrize(
    ("detector", "changes", "expected"),
    [
        ("fcos", [("'caffe'", "'pytorch'")], {"backbone_style": "pytorch"}),
        ("fcos", [("style='caffe',", "")], {"backbone_style": "pytorch"}),
        ("fcos", [(", relu_before_extra_convs=True", "")], {"relu_before_p7": False}),
        ("gfl", [("style='pytorch'", "style='caffe'")], {"backbone_style": "caffe"}),
        ("gfl", [("'on_output'", "True, extra_convs_on_inputs=False")], {"extra_levels": "output"}),
        ("retinanet", [("'on_input'", "True")], {"extra_levels": "input"}),
        ("retinanet", [("scale=4", "scale=3")], {"anchor_side": 3.0}),
        (
            "retinanet",
            [("octave=3", "octave=1"), ("[0.5, 1.0, 2.0]", "[1, 2, 3, 4, 5, 6, 7, 8, 9]")],
            {"anchor_octaves": 1, "anchor_ratios": (1.0, 2, 3, 4, 5, 6, 7, 8, 9)},
        ),
        ("paa", [("score_voting=True", "score_voting=False")], {"score_voting": False}),
        (
            "atss",
            [(f", bbox_coder={DELTAS % '[0.1, 0.1, 0.2, 0.2]'}", "")],
            {"delta_stds": (1.0, 1.0, 1.0, 1.0)},
        ),
        ("paa", [("min_bbox_size=0, ", "")], {"detector": "paa"}),
        ("atss", [("octave_base_scale=8", "octave_base_scale=6")], {"anchor_side": 6.0}),
    ],
)
def test_settings_of_the_same_graph_are_computed(
    detector: str, changes: list[tuple[str, str]], expected: dict[str, Any], write: Write
) -> None:
    preset = load_checkpoint(write(detector, config_of(detector, *changes))).preset
    assert {name: getattr(preset, name) for name in expected} == expected


STACKED = "stacked_convs=4"


@pytest.mark.parametrize(
    ("detector", "old", "new", "name"),
    [
        ("atss", STACKED, "stacked_convs=3", "model.bbox_head.stacked_convs = 3"),
        ("atss", "use_sigmoid=True, gamma", "use_sigmoid=False, gamma", "loss_cls.use_sigmoid"),
        ("gfl", "use_sigmoid=True, beta", "beta", "loss_cls.use_sigmoid = False"),
        ("atss", "ratios=[1.0]", "ratios=[1.0, 2.0]", "anchor_generator.ratios = (1.0, 2.0)"),
        ("atss", STACKED, "pred_kernel_size=1", "bbox_head.pred_kernel_size = 1"),
        ("atss", STACKED, "norm_cfg=dict(type='BN')", "bbox_head.norm_cfg.type = 'BN'"),
        ("atss", "target_means", "clip_border=False, target_means", "coder.clip_border = False"),
        ("gfl", "reg_max=16", "reg_max=7", "model.bbox_head.reg_max = 8"),
        ("gfl", STACKED, "conv_cfg=dict(type='DCNv2')", "model.bbox_head.conv_cfg"),
        ("gfl", STACKED, "add_mean=True", "model.bbox_head.add_mean = True"),
        ("fcos", "norm_on_bbox=True", "norm_on_bbox=False", "norm_on_bbox = False"),
        ("fcos", "norm_on_bbox=True, ", "", "model.bbox_head.norm_on_bbox = False"),
        ("fcos", "centerness_on_reg=True, ", "", "bbox_head.centerness_on_reg = False"),
        ("fcos", "conv_bias=True", "conv_bias='auto'", "model.bbox_head.conv_bias = False"),
        ("fcos", "last_conv=False", "last_conv=True", "bbox_head.dcn_on_last_conv = True"),
        ("vfnet", "last_conv=False", "last_conv=True", "bbox_head.dcn_on_last_conv = True"),
        ("vfnet", "use_atss=True", "use_atss=False", "model.bbox_head.use_atss = False"),
        ("vfnet", "use_atss=True", "bbox_norm_type='stride'", "bbox_norm_type = 'stride'"),
        ("retinanet", "per_octave=3", "per_octave=2", "bbox_head.anchor_generator = (2,"),
        ("retinanet", STACKED, "norm_cfg=dict(type='GN')", "model.bbox_head.norm_cfg"),
        ("retinanet", "'on_input'", "'on_output'", "model.neck.add_extra_convs = 'on_output'"),
        ("gfl", "add_extra_convs='on_output'", "", "model.neck.add_extra_convs = False"),
        ("gfl", "'on_output'", "'on_lateral'", "model.neck.add_extra_convs = 'on_lateral'"),
        ("gfl", "min_bbox_size=0, ", "", "model.test_cfg.min_bbox_size = -1"),
        ("gfl", "style='pytorch'", "style='tensorflow'", "model.backbone.style = 'tensorflow'"),
        ("gfl", "type='SingleStageDetector'", "type='KnowledgeDistillation'", "model.type"),
        ("gfl", "type='GFLHead'", "type='LDHead'", "model.bbox_head.type = 'LDHead'"),
        ("gfl", "type='GFLHead'", "type='ATSSHead'", "model.bbox_head.type = 'ATSSHead'"),
    ],
)
def test_refused_by_name(detector: str, old: str, new: str, name: str, write: Write) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(detector, config_of(detector, (old, new))))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("detector", "question"),
    [
        ("atss", r"ATSS or of PAA"),
        ("paa", r"ATSS or of PAA"),
        ("fcos", r"Caffe or of PyTorch"),
        ("retinanet", r"Caffe or of PyTorch"),
    ],
)
def test_what_a_file_cannot_tell_is_asked_for(detector: str, question: str, write: Write) -> None:
    path = write(detector)
    with pytest.raises(CheckpointError, match=question):
        load_checkpoint(path)
    assert load_checkpoint(path, preset=small(detector)).preset.detector == detector


def test_both_presets_are_named_where_the_style_is_open(tmp_path: Path) -> None:
    path = tmp_path / "fcos.pth"
    with torch.device("meta"):
        shapes = build_model("fcos-r50-1x").state_dict()
    torch.save({key: torch.zeros(value.shape) for key, value in shapes.items()}, path)
    with pytest.raises(CheckpointError, match=r"fcos-r50-1x or fcos-r50-pytorch"):
        load_checkpoint(path)


@pytest.mark.parametrize("detector", ["gfl", "vfnet"])
def test_the_keys_alone_tell_the_others(detector: str, write: Write) -> None:
    assert load_checkpoint(write(detector)).preset.detector == detector


def test_a_preset_that_the_configuration_contradicts(write: Write) -> None:
    path = write("paa", config_of("paa"))
    with pytest.raises(CheckpointError, match=r"says paa, the preset atss-r50-1x is atss"):
        load_checkpoint(path, preset=small("atss"))
    path = write("fcos", config_of("fcos", ("'caffe'", "'pytorch'")))
    with pytest.raises(CheckpointError, match=r"says pytorch, the preset fcos-r50-1x is caffe"):
        load_checkpoint(path, preset=small("fcos"))


def test_a_published_file_is_known_by_its_hash(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an old framework wrote into its configuration."""
    path = write("fcos", "model = dict(type='FCOS', bbox_head=dict(num_classes=3, older=True))")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    from tood_deploy.files import file_sha256

    published = PublishedWeights("https://a/b.pth", file_sha256(path)[:8])
    preset = replace(small("fcos"), weights=published)
    monkeypatch.setitem(PRESETS, preset.name, preset)
    assert load_checkpoint(path).preset == preset


@pytest.mark.parametrize("detector", HEADS)
def test_our_own_files_hold_the_preset(
    detector: str, tmp_path: Path, networks: dict[str, dict[str, torch.Tensor]]
) -> None:
    model = build_model(small(detector))
    model.load_state_dict(networks[detector])
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").preset == replace(model.preset, weights=None)


@pytest.mark.parametrize(
    ("detector", "fields", "match"),
    [
        ("atss", {"convention": "authors"}, "convention is 'authors'; expected 'mmdet'"),
        ("gfl", {"score_voting": True}, "score_voting is True; expected False"),
        ("vfnet", {"deform_tower": 1}, "deform_tower is 1"),
        ("atss", {"anchor_octaves": 2}, "anchor_octaves is 2"),
        ("gfl", {"bins": 1}, "bins is 1"),
        ("fcos", {"detector": "yolo"}, "detector is 'yolo'"),
        ("fcos", {"backbone_style": "other"}, "backbone_style is 'other'"),
    ],
)
def test_presets_that_contradict_themselves(
    detector: str, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(ToodError, match=match):
        replace(small(detector), **fields)
