"""Every setting of a configuration that the weights do not show: computed as it says, or refused by its name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tood_deploy.errors import CheckpointError
from tood_deploy.export.result import describe
from tood_deploy.model import Tood, load_checkpoint
from tood_deploy.presets import PRESETS, Preset

NAMES = ("cell", "dot", "ring")
CONFIG_3X = """
default_scope = 'mmdet'
model = dict(type='TOOD', init_cfg=None, train_cfg=dict(alpha=1),
    backbone=dict(type='ResNet', depth=18, base_channels=32, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True), norm_eval=True, style='pytorch'),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=64, start_level=1, add_extra_convs='on_output', num_outs=5),
    bbox_head=dict(type='TOODHead', num_classes=3, in_channels=64, feat_channels=64, stacked_convs=6, anchor_type='anchor_free',
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True)),
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
        pad_size_divisor=32),
    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100))
test_cfg = dict(type='TestLoop')
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(320, 240), keep_ratio=True), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]))
"""
CONFIG_2X = """
model = dict(type='TOOD', bbox_head=dict(type='TOODHead', anchor_type='anchor_free'))
test_cfg = dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_thr=0.5), max_per_img=50)
data = dict(test=dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(320, 240),
    flip=False, transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
    dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True), dict(type='Pad', size_divisor=32),
    dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])])]))
"""
FEAT, LOAD, CLOSED = (
    "feat_channels=64",
    "dict(type='LoadImageFromFile'",
    "test_dataloader = dict(dataset=dict(type='CocoDataset'",
)
RESIZE, PACK = "scale=(320, 240), keep_ratio=True)", "dict(type='PackDetInputs')"
DIVISOR, RGB, MEAN = "pad_size_divisor=32", "bgr_to_rgb=True", "mean=[123.675, 116.28, 103.53]"
RESIZE_2X, PAD_2X = "img_scale=(320, 240)", "dict(type='Pad', size_divisor=32)"
BASED = ("'anchor_free'", "'anchor_based'")
Change = tuple[str, str]


@pytest.fixture(scope="module")
def state(seeded_model: Callable[..., Any]) -> dict[str, torch.Tensor]:
    return seeded_model("tiny", class_names=NAMES).state_dict()


@pytest.fixture
def load(state: dict[str, torch.Tensor], tmp_path: Path) -> Callable[..., Tood]:
    """A function of a configuration and changes of its text: the network of a file with that."""

    def load(text: str, *changes: Change) -> Tood:
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        torch.save({"state_dict": state, "meta": {"cfg": text}}, tmp_path / "a.pth")
        return load_checkpoint(tmp_path / "a.pth")

    return load


def test_a_published_configuration_sets_nothing_else(load: Callable[..., Tood]) -> None:
    for text, others in (
        (CONFIG_3X, {}),
        (CONFIG_2X, {"score_threshold", "iou_threshold", "max_det", "candidates_per_level"}),
    ):
        found, published = load(text).preset, PRESETS["tiny"]
        different = {
            name for name, value in found.to_dict().items() if value != published.to_dict()[name]
        }
        assert different == {"class_names", *others}
    assert "other than published" not in describe(load(CONFIG_3X).preset)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((FEAT, f"{FEAT}, norm_cfg=dict(type='GN', num_groups=16, eps=1e-3)"), {"norm_groups": 16, "norm_eps": 1e-3}),
        (("type='BN'", "type='SyncBN', eps=0.001"), {"batch_norm_eps": 0.001}),
        (("octave_base_scale=8, scales_per_octave=1", "scales=[4]"), {"anchor_side": 4.0}),
        (("octave_base_scale=8", "octave_base_scale=6"), {"anchor_side": 6.0}),
        (("ratios=[1.0]", "ratios=[1.0], center_offset=0.5"), {"anchor_offset": 0.5}),
        (("nms_pre=1000", "nms_pre=300"), {"candidates_per_level": 300}),
        (("max_per_img=100", "max_per_img=300"), {"max_det": 300}),
        (("score_thr=0.05", "score_thr=0.001"), {"score_threshold": 0.001}),
        (("iou_threshold=0.6", "iou_threshold=0.3"), {"iou_threshold": 0.3}),
        ((RGB, "bgr_to_rgb=False"), {"channel_order": "bgr", "mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395)}),
        ((f" {RGB},", ""), {"channel_order": "bgr"}),  # the default
        ((RGB, "rgb_to_bgr=True"), {"channel_order": "rgb"}),  # the same exchange of channels
        ((MEAN, "mean=[128]"), {"mean": (128.0, 128.0, 128.0)}),
        ((f"{MEAN}, std=[58.395, 57.12, 57.375], ", ""), {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ((DIVISOR, "pad_size_divisor=64, pad_value=0.5"), {"pad_divisor": 64, "pad_value": (0.5, 0.5, 0.5)}),
        ((RESIZE, "scale=(320, 256), keep_ratio=False)"), {"resize": "stretch", "imgsz": (256, 320), "canvas_hw": None}),
        ((RESIZE, "scale=(320, 256))"), {"resize": "stretch", "imgsz": (256, 320)}),  # 3.x does not keep the aspect unless told so
        ((RESIZE, "scale=300, keep_ratio=False)"), {"resize": "stretch", "imgsz": (300, 300), "canvas_hw": None}),
        ((RESIZE, "scale_factor=0.5, keep_ratio=True)"), {"resize": "fit", "scale_factor": (0.5, 0.5)}),
        ((RESIZE, "scale_factor=(0.5, 0.25), keep_ratio=False)"), {"resize": "stretch", "scale_factor": (0.25, 0.5)}),
        ((f"dict(type='Resize', {RESIZE}, ", ""), {"resize": "stretch", "scale_factor": (1.0, 1.0)}),
        (("dict(type='Resize', " + RESIZE, "dict(type='FixShapeResize', width=320, height=96)"), {"resize": "stretch", "imgsz": (96, 320)}),
        (
            (PACK, f"dict(type='Pad', size=(320, 256), pad_val=dict(img=(103.53, 116.28, 123.675))), {PACK}"),
            {"imgsz": (240, 320), "canvas_hw": (256, 320), "pad_value": (0.0, 0.0, 0.0)},
        ),
        ((PACK, f"dict(type='Pad', size_divisor=64), {PACK}"), {"pad_divisor": 64, "pad_value": (-2.1179039, -2.0357144, -1.8044444)}),
        (
            (RESIZE, "scale=(320, 320), keep_ratio=True), dict(type='Pad', pad_to_square=True, pad_val=255)"),
            {"canvas_hw": (320, 320), "pad_value": (2.2489083, 2.4285715, 2.6400003)},
        ),
    ],
)  # fmt: skip
def test_computed_of_3x(
    change: Change, expected: dict[str, Any], load: Callable[..., Tood]
) -> None:
    check(load(CONFIG_3X, change), expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((), {"candidates_per_level": 500, "score_threshold": 0.1, "iou_threshold": 0.5, "max_det": 50}),
        ([("to_rgb=True", "to_rgb=False")], {"channel_order": "bgr", "mean": (103.53, 116.28, 123.675)}),
        ([("mean=[123.675, 116.28, 103.53]", "mean=7")], {"mean": (7.0, 7.0, 7.0)}),
        ([("keep_ratio=True", "keep_ratio=False")], {"resize": "stretch", "imgsz": (240, 320)}),
        ([("keep_ratio=True", "backend='cv2'")], {"resize": "fit"}),  # 2.x keeps the aspect unless told otherwise
        ([(RESIZE_2X, "img_scale=[(320, 240)]")], {"imgsz": (240, 320)}),
        ([(PAD_2X, "dict(type='Pad', size=(256, 320), pad_val=0.5)")], {"canvas_hw": (256, 320), "pad_value": (0.5, 0.5, 0.5)}),
        ([("data = dict(test=dict(", "data = dict(test=dict(type='RepeatDataset', times=1, dataset=dict("), ("]))", "])))")], {}),
        ([("data = dict(test=dict(", "data = dict(test=dict(type='ConcatDataset', datasets=[dict("), ("])]))", "])])]))")], {}),
        ([("data = dict(test=dict(type='CocoDataset', pipeline=", "test_pipeline = list_ = ("), ("]))", "])"), ("list_ = ", "")], {}),
    ],
)  # fmt: skip
def test_computed_of_2x(
    changes: list[Change], expected: dict[str, Any], load: Callable[..., Tood]
) -> None:
    check(load(CONFIG_2X, *changes), {"imgsz": (240, 320)} | expected)


def check(model: Tood, expected: dict[str, Any]) -> None:
    found = {name: getattr(model.preset, name) for name in expected}
    for name, value in expected.items():
        assert found[name] == (
            pytest.approx(value, rel=1e-6) if isinstance(value, tuple) else value
        ), name
    assert Preset.from_dict(model.preset.to_dict()).sizing == model.preset.sizing


@pytest.mark.parametrize(
    ("coder", "means", "stds"),
    [
        (
            "target_means=[.1, .2, .3, .4], target_stds=[0.5, 0.6, 0.7, 0.8]",
            (0.1, 0.2, 0.3, 0.4),
            (0.5, 0.6, 0.7, 0.8),
        ),
        ("clip_border=True", (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)),  # the coder's defaults
    ],
)
def test_box_coder_of_anchor_based_heads(
    coder: str, means: Any, stds: Any, load: Callable[..., Tood]
) -> None:
    published = "target_means=[.0, .0, .0, .0], target_stds=[0.1, 0.1, 0.2, 0.2]"
    found = load(CONFIG_3X, BASED, (published, coder)).preset
    assert (found.anchor, found.delta_means, found.delta_stds) == ("based", means, stds)
    assert (
        load(CONFIG_3X, (published, coder)).preset.delta_stds == PRESETS["tiny"].delta_stds
    )  # of no use to the anchor-free head


def test_levels_may_be_chosen_by_the_backbone(load: Callable[..., Tood]) -> None:
    changed = (
        ("out_indices=(0, 1, 2, 3)", "out_indices=(1, 2, 3)"),
        ("start_level=1", "start_level=0"),
    )
    assert load(CONFIG_3X, *changed).preset.name == "tiny"
    with pytest.raises(CheckpointError, match=r"neck\.start_level = 0"):
        load(CONFIG_3X, changed[1])


@pytest.mark.parametrize("scope", ["mmdet.", "mmdet.models."])
def test_scoped_and_dotted_types_are_the_same(scope: str, load: Callable[..., Tood]) -> None:
    text = re.sub(
        r"type='(TOOD|ResNet|FPN|TOODHead|AnchorGenerator|DetDataPreprocessor|Resize|PackDetInputs)'",
        rf"type='{scope}\1'",
        CONFIG_3X,
    )
    assert text.count(scope) >= 8
    assert load(text).preset == load(CONFIG_3X).preset


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("type='TOOD', init_cfg", "type='DDOD', init_cfg"), "model.type = 'DDOD'"),
        (("type='ResNet'", "type='mmpretrain.ResNet'"), "model.backbone.type = 'mmpretrain.ResNet'"),
        (("style='pytorch'", "style='caffe'"), "model.backbone.style = 'caffe'"),
        (("depth=18", "depth=18, dilations=(1, 1, 1, 2)"), "model.backbone.dilations = (1, 1, 1, 2)"),
        (("depth=18", "depth=18, strides=(1, 2, 2, 1)"), "model.backbone.strides"),
        (("depth=18", "depth=34"), "model.backbone.depth = 34"),
        (("depth=18", "depth=18, in_channels=1"), "model.backbone.in_channels = 1"),
        (("depth=18", "depth=18, plugins=[dict(cfg=1)]"), "model.backbone.plugins"),
        (("depth=18", "depth=18, conv_cfg=dict(type='ConvWS')"), "model.backbone.conv_cfg"),
        (("depth=18", "depth=18, invented=1"), "model.backbone.invented = 1"),
        (("type='BN'", "type='GN'"), "model.backbone.norm_cfg.type = 'GN'"),
        (("num_outs=5", "num_outs=5, upsample_cfg=dict(mode='bilinear')"), "model.neck.upsample_cfg.mode = 'bilinear'"),
        (("num_outs=5", "num_outs=5, relu_before_extra_convs=True"), "model.neck.relu_before_extra_convs = True"),
        (("num_outs=5", "num_outs=5, norm_cfg=dict(type='BN')"), "model.neck.norm_cfg"),
        (("num_outs=5", "num_outs=5, act_cfg=dict(type='ReLU')"), "model.neck.act_cfg"),
        (("'on_output'", "'on_input'"), "model.neck.add_extra_convs = 'on_input'"),
        (("stacked_convs=6", "stacked_convs=4"), "model.bbox_head.stacked_convs = 4"),
        (("feat_channels=64", "feat_channels=64, norm_cfg=dict(type='BN')"), "model.bbox_head.norm_cfg.type = 'BN'"),
        (("feat_channels=64", "feat_channels=64, norm_cfg=dict(type='GN', num_groups=7)"), "norm_groups is 7"),
        (("ratios=[1.0]", "ratios=[0.5, 1.0]"), "anchor_generator.ratios = (0.5, 1.0)"),
        (("octave_base_scale=8, scales_per_octave=1", "scales=[4, 8]"), "anchor_generator.scales = (4, 8)"),
        (("scales_per_octave=1", "scales_per_octave=3"), "anchor_generator.scales_per_octave = 3"),
        (("strides=[8,", "strides=[4,"), "anchor_generator.strides"),
        (("type='nms'", "type='soft_nms'"), "model.test_cfg.nms.type = 'soft_nms'"),
        (("type='nms'", "type='nms', class_agnostic=True"), "model.test_cfg.nms.class_agnostic = True"),
        (("max_per_img=100", "max_per_img=-1"), "model.test_cfg.max_per_img = -1"),
        (("nms_pre=1000, ", ""), "model.test_cfg.nms_pre"),
        (("min_bbox_size=0", "min_bbox_size=8"), "model.test_cfg.min_bbox_size = 8"),
        (("std=[58.395,", "std=[0,"), "data_preprocessor.std = (0,"),
        ((MEAN, "mean=[1, 2]"), "data_preprocessor.mean = (1, 2)"),
        ((MEAN, "mean=statistics()"), "data_preprocessor.mean = statistics()"),
        ((DIVISOR, "pad_size_divisor=16"), "data_preprocessor.pad_size_divisor = 16"),
        ((f",\n        {DIVISOR}", ""), "data_preprocessor.pad_size_divisor = 1"),
        ((DIVISOR, f"{DIVISOR}, non_local=1"), "data_preprocessor.non_local"),
        ((LOAD, f"{LOAD}, color_type='grayscale'"), "pipeline[0](LoadImageFromFile).color_type"),
        ((RESIZE, "scale=(320, 240), keep_ratio=True, interpolation='area')"), "pipeline[1](Resize).interpolation = 'area'"),
        ((RESIZE, "scale=[(320, 240), (640, 480)], keep_ratio=True)"), "pipeline[1](Resize) scale"),
        ((PACK, f"dict(type='PhotoMetricDistortion'), {PACK}"), "pipeline[3].type = 'PhotoMetricDistortion'"),
        ((PACK, f"dict(type='RandomFlip', prob=0.5), {PACK}"), "pipeline[3](RandomFlip).prob = 0.5"),
        ((PACK, f"dict(type='Pad', size=(330, 250)), {PACK}"), "pad_size_divisor = 32; padding twice"),
        ((PACK, f"dict(type='Pad', size_divisor=64, padding_mode='reflect'), {PACK}"), "pipeline[3](Pad).padding_mode = 'reflect'"),
        ((PACK, f"dict(type='Pad', pad_to_square=True), {PACK}"), "pad_to_square = True"),
        ((PACK, f"dict(type='Normalize', mean=[0], std=[1]), {PACK}"), "pipeline[3](Normalize)"),
        ((CLOSED, "test_dataloader = dict(dataset=dict(type='Odd', dataset=dict()"), "dataset.type = 'Odd'"),
        (("default_scope = 'mmdet'", "_base_ = ['other.py']"), "_base_"),
        (("data_preprocessor=dict(", "spare=dict("), "model.spare"),
    ],
)  # fmt: skip
def test_refused_by_name(change: Change, name: str, load: Callable[..., Tood]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(CONFIG_3X, change)
    assert name in str(caught.value)
    assert "a.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("flip=False", "flip=True"), "pipeline[1](MultiScaleFlipAug).flip = True"),
        ((f", {PAD_2X}", ""), "padding = 1"),
        ((PAD_2X, "dict(type='Pad', size_divisor=16)"), "transforms[3](Pad) = 16"),
        ((PAD_2X, "dict(type='Pad', size=(250, 320))"), "transforms[3](Pad) = (250, 320)"),
        (("nms_pre=500", "nms_pre=-1"), "test_cfg.nms_pre = -1"),
        ((RESIZE_2X, "img_scale=[(320, 240), (640, 480)]"), "(Resize) scale"),
    ],
)
def test_refused_by_name_of_2x(change: Change, name: str, load: Callable[..., Tood]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(CONFIG_2X, change)
    assert name in str(caught.value)


def test_top_level_preprocessor_counts_where_the_model_has_none(load: Callable[..., Tood]) -> None:
    own = re.search(r"    data_preprocessor=dict\(.*?32\),\n", CONFIG_3X, re.DOTALL)
    assert own is not None
    outer = "\ndata_preprocessor = dict(mean=[0, 0, 0], std=[1, 1, 1], pad_size_divisor=32, bgr_to_rgb=False)\n"
    found = load(CONFIG_3X.replace(own[0], "") + outer).preset
    assert (found.mean, found.std, found.channel_order) == ((0.0,) * 3, (1.0,) * 3, "bgr")
    assert load(CONFIG_3X + outer).preset.channel_order == "rgb"
    with pytest.raises(CheckpointError, match="data_preprocessor = None"):
        load(CONFIG_3X.replace(own[0], ""))


def test_what_differs_is_shown_before_an_export(load: Callable[..., Tood]) -> None:
    line = describe(
        load(
            CONFIG_3X,
            ("type='BN'", "type='BN', eps=0.001"),
            (RGB, "bgr_to_rgb=False"),
            ("max_per_img=100", "max_per_img=300"),
        ).preset
    )
    for part in (
        "batch norm epsilon 0.001",
        "bgr",
        "at most 300 detections",
        "mean 103.53 116.28 123.675",
    ):
        assert part in line


def test_names_are_resolved_and_statements_are_not_run(load: Callable[..., Tood]) -> None:
    text = CONFIG_2X.replace(
        "data = dict", "norm = dict(mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True)\ndata = dict"
    )
    changed = ("mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True", "**norm")
    assert load(text, changed).preset.mean == (1.0, 2.0, 3.0)
    with pytest.raises(CheckpointError, match=r"only literal values|dictionary"):
        load(text + "\nfor part in [1]:\n    data['test'] = part\n", changed)
