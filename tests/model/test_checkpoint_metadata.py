"""Settings that the weights do not show: computed as the configuration says, or refused by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.configs import CONFIG_2X, CONFIG_3X, NAMES

from tood_deploy import Detector
from tood_deploy.errors import CheckpointError
from tood_deploy.export.result import describe_preset
from tood_deploy.model.checkpoint_file import read_checkpoint
from tood_deploy.model.checkpoint_metadata import read_config
from tood_deploy.presets import PRESETS, Preset

Change = tuple[str, str]
TINY = replace(PRESETS["tiny"], class_names=NAMES)

# Parts of the texts that several tests change.
DEPTH, OUTS, FEAT, OCTAVE = "depth=18", "num_outs=5", "feat_channels=64", "octave_base_scale=8"
LOAD, PACK = "dict(type='LoadImageFromFile'", "dict(type='PackDetInputs')"
RESIZE = "scale=(320, 240), keep_ratio=True)"
DIVISOR, RGB, MEAN = "pad_size_divisor=32", "bgr_to_rgb=True", "mean=[123.675, 116.28, 103.53]"
RESIZE_2X, PAD_2X = "img_scale=(320, 240)", "dict(type='Pad', size_divisor=32)"
DATA_2X, END_2X = "data = dict(test=dict(", "])])]))"
BASED = ("'anchor_free'", "'anchor_based'")

PUBLISHED_2X = {
    "score_threshold": 0.1,
    "iou_threshold": 0.5,
    "max_det": 50,
    "candidates_per_level": 500,
}
STRETCHED_256 = {"resize": "stretch", "imgsz": (256, 320), "canvas_hw": None}


def preset_of(text: str, *changes: Change) -> Preset:
    """Return the preset of a configuration after changes of its text."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    facts = read_config({"cfg": text}, "a.pth", TINY)
    assert not facts.problem
    assert facts.anchor is not None
    return replace(TINY, anchor=facts.anchor, **facts.settings)


def refusal(text: str, *changes: Change) -> str:
    """Return why a configuration is refused, in one line."""
    with pytest.raises(CheckpointError) as caught:
        preset_of(text, *changes)
    message = str(caught.value)
    assert message.startswith("a.pth")
    assert "\n" not in message
    return message


def assert_fields(preset: Preset, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        close = pytest.approx(value, rel=1e-6) if isinstance(value, tuple) else value
        assert getattr(preset, name) == close, name
    assert Preset.from_dict(preset.to_dict()).sizing == preset.sizing


@pytest.mark.parametrize(("text", "fields"), [(CONFIG_3X, {}), (CONFIG_2X, PUBLISHED_2X)])
def test_published_configurations_set_nothing_else(text: str, fields: dict[str, Any]) -> None:
    assert preset_of(text) == replace(TINY, **fields)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            FEAT,
            f"{FEAT}, norm_cfg=dict(type='GN', num_groups=16, eps=1e-3)",
            {"norm_groups": 16, "norm_eps": 1e-3},
        ),
        ("type='BN'", "type='SyncBN', eps=0.001", {"batch_norm_eps": 0.001}),
        (OCTAVE, "scales=[4]", {"anchor_side": 4.0}),
        (OCTAVE, "octave_base_scale=6", {"anchor_side": 6.0}),
        ("ratios=[1.0]", "ratios=[1.0], center_offset=0.5", {"anchor_offset": 0.5}),
        ("nms_pre=1000", "nms_pre=300", {"candidates_per_level": 300}),
        ("max_per_img=100", "max_per_img=300", {"max_det": 300}),
        ("score_thr=0.05", "score_thr=0.001", {"score_threshold": 0.001}),
        ("iou_threshold=0.6", "iou_threshold=0.3", {"iou_threshold": 0.3}),
        (
            RGB,
            "bgr_to_rgb=False",
            {
                "channel_order": "bgr",
                "mean": (103.53, 116.28, 123.675),
                "std": (57.375, 57.12, 58.395),
            },
        ),
        (f" {RGB},", "", {"channel_order": "bgr"}),  # the default
        (RGB, "rgb_to_bgr=True", {"channel_order": "rgb"}),  # the same exchange of channels
        (MEAN, "mean=[128]", {"mean": (128.0, 128.0, 128.0)}),
        (
            f"{MEAN},\n        std=[58.395, 57.12, 57.375], ",
            "",
            {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        ),
        (
            DIVISOR,
            "pad_size_divisor=64, pad_value=0.5",
            {"pad_divisor": 64, "pad_value": (0.5, 0.5, 0.5)},
        ),
        (RESIZE, "scale=(320, 256), keep_ratio=False)", STRETCHED_256),
        (RESIZE, "scale=(320, 256))", STRETCHED_256),  # 3.x keeps the aspect only if it is told to
        (RESIZE, "scale=300, keep_ratio=False)", STRETCHED_256 | {"imgsz": (300, 300)}),
        (
            RESIZE,
            "scale_factor=0.5, keep_ratio=True)",
            {"resize": "fit", "scale_factor": (0.5, 0.5)},
        ),
        (
            RESIZE,
            "scale_factor=(0.5, 0.25), keep_ratio=False)",
            {"resize": "stretch", "scale_factor": (0.25, 0.5)},
        ),
        (f"dict(type='Resize', {RESIZE},", "", {"resize": "stretch", "scale_factor": (1.0, 1.0)}),
        (
            f"dict(type='Resize', {RESIZE}",
            "dict(type='FixShapeResize', width=320, height=96)",
            {"resize": "stretch", "imgsz": (96, 320)},
        ),
        (
            PACK,
            "dict(type='Pad', size=(320, 256), pad_val=dict(img=(103.53, 116.28, 123.675)))",
            {"imgsz": (240, 320), "canvas_hw": (256, 320), "pad_value": (0.0, 0.0, 0.0)},
        ),
        (
            PACK,
            f"dict(type='Pad', size_divisor=64), {PACK}",
            {"pad_divisor": 64, "pad_value": (-2.1179039, -2.0357144, -1.8044444)},
        ),
        (
            RESIZE,
            "scale=(320, 320), keep_ratio=True), dict(type='Pad', pad_to_square=True, pad_val=255)",
            {"canvas_hw": (320, 320), "pad_value": (2.2489083, 2.4285715, 2.6400003)},
        ),
    ],
)
def test_computed_of_3x(old: str, new: str, expected: dict[str, Any]) -> None:
    assert_fields(preset_of(CONFIG_3X, (old, new)), expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([("to_rgb=True", "to_rgb=False")], {"channel_order": "bgr"}),
        ([(MEAN, "mean=7")], {"mean": (7.0, 7.0, 7.0)}),
        ([("keep_ratio=True", "keep_ratio=False")], {"resize": "stretch", "imgsz": (240, 320)}),
        ([("keep_ratio=True", "backend='cv2'")], {"resize": "fit"}),  # the default of 2.x
        ([(RESIZE_2X, "img_scale=[(320, 240)]")], {"imgsz": (240, 320)}),
        (
            [(PAD_2X, "dict(type='Pad', size=(256, 320), pad_val=0.5)")],
            {"canvas_hw": (256, 320), "pad_value": (0.5, 0.5, 0.5)},
        ),
        (
            [
                (DATA_2X, f"{DATA_2X}type='RepeatDataset', times=1, dataset=dict("),
                (END_2X, f"{END_2X[:-1]}))"),
            ],
            {},
        ),
        (
            [
                (DATA_2X, f"{DATA_2X}type='ConcatDataset', datasets=[dict("),
                (END_2X, f"{END_2X[:-1]}]))"),
            ],
            {},
        ),
        (
            [
                (f"{DATA_2X}type='CocoDataset', pipeline=[", "test_pipeline = ["),
                (END_2X, END_2X[:-2]),
            ],
            {},
        ),
    ],
)
def test_computed_of_2x(changes: list[Change], expected: dict[str, Any]) -> None:
    assert_fields(preset_of(CONFIG_2X, *changes), {"imgsz": (240, 320)} | expected)


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
def test_box_coder_of_anchor_based_heads(coder: str, means: Any, stds: Any) -> None:
    published = re.search(r"target_means=.*?\],\s+target_stds=.*?\]", CONFIG_3X)
    assert published is not None
    preset = preset_of(CONFIG_3X, BASED, (published[0], coder))
    assert (preset.anchor, preset.delta_means, preset.delta_stds) == ("based", means, stds)
    unused = preset_of(CONFIG_3X, (published[0], coder))  # by the anchor-free head
    assert unused.delta_stds == TINY.delta_stds


def test_levels_may_be_chosen_by_the_backbone() -> None:
    indices = ("out_indices=(0, 1, 2, 3)", "out_indices=(1, 2, 3)")
    level = ("start_level=1", "start_level=0")
    assert preset_of(CONFIG_3X, indices, level) == TINY
    assert "neck.start_level = 0" in refusal(CONFIG_3X, level)


@pytest.mark.parametrize("scope", ["mmdet.", "mmdet.models."])
def test_scoped_and_dotted_types_are_the_same(scope: str) -> None:
    types = "TOOD|ResNet|FPN|TOODHead|AnchorGenerator|DetDataPreprocessor|Resize|PackDetInputs"
    text = re.sub(rf"type='({types})'", rf"type='{scope}\1'", CONFIG_3X)
    assert text.count(scope) >= 8
    assert preset_of(text) == TINY


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("type='TOOD'", "type='DDOD'", "model.type = 'DDOD'"),
        ("type='ResNet'", "type='mmpretrain.ResNet'", "backbone.type = 'mmpretrain.ResNet'"),
        ("style='pytorch'", "style='caffe'", "model.backbone.style = 'caffe'"),
        (DEPTH, f"{DEPTH}, dilations=(1, 1, 1, 2)", "model.backbone.dilations = (1, 1, 1, 2)"),
        (DEPTH, f"{DEPTH}, strides=(1, 2, 2, 1)", "model.backbone.strides"),
        (DEPTH, "depth=34", "model.backbone.depth = 34"),
        (DEPTH, f"{DEPTH}, in_channels=1", "model.backbone.in_channels = 1"),
        (DEPTH, f"{DEPTH}, plugins=[dict(cfg=1)]", "model.backbone.plugins"),
        (DEPTH, f"{DEPTH}, conv_cfg=dict(type='ConvWS')", "model.backbone.conv_cfg"),
        (DEPTH, f"{DEPTH}, invented=1", "model.backbone.invented = 1"),
        ("type='BN'", "type='GN'", "model.backbone.norm_cfg.type = 'GN'"),
        (OUTS, f"{OUTS}, upsample_cfg=dict(mode='bilinear')", "neck.upsample_cfg.mode"),
        (OUTS, f"{OUTS}, relu_before_extra_convs=True", "neck.relu_before_extra_convs = True"),
        (OUTS, f"{OUTS}, norm_cfg=dict(type='BN')", "model.neck.norm_cfg"),
        (OUTS, f"{OUTS}, act_cfg=dict(type='ReLU')", "model.neck.act_cfg"),
        ("'on_output'", "'on_input'", "model.neck.add_extra_convs = 'on_input'"),
        ("stacked_convs=6", "stacked_convs=4", "model.bbox_head.stacked_convs = 4"),
        (FEAT, f"{FEAT}, norm_cfg=dict(type='BN')", "model.bbox_head.norm_cfg.type = 'BN'"),
        ("ratios=[1.0]", "ratios=[0.5, 1.0]", "anchor_generator.ratios = (0.5, 1.0)"),
        (OCTAVE, "scales=[4, 8]", "anchor_generator.scales = (4, 8)"),
        ("scales_per_octave=1", "scales_per_octave=3", "generator.scales_per_octave = 3"),
        ("strides=[8,", "strides=[4,", "anchor_generator.strides"),
        ("type='nms'", "type='soft_nms'", "model.test_cfg.nms.type = 'soft_nms'"),
        ("type='nms'", "type='nms', class_agnostic=True", "test_cfg.nms.class_agnostic = True"),
        ("max_per_img=100", "max_per_img=-1", "model.test_cfg.max_per_img = -1"),
        ("nms_pre=1000, ", "", "model.test_cfg.nms_pre"),
        ("min_bbox_size=0", "min_bbox_size=8", "model.test_cfg.min_bbox_size = 8"),
        ("std=[58.395,", "std=[0,", "data_preprocessor.std = (0,"),
        (MEAN, "mean=[1, 2]", "data_preprocessor.mean = (1, 2)"),
        (MEAN, "mean=statistics()", "data_preprocessor.mean = statistics()"),
        (DIVISOR, "pad_size_divisor=16", "data_preprocessor.pad_size_divisor = 16"),
        (f", {DIVISOR}", "", "data_preprocessor.pad_size_divisor = 1"),
        (DIVISOR, f"{DIVISOR}, non_local=1", "data_preprocessor.non_local"),
        (LOAD, f"{LOAD}, color_type='grayscale'", "pipeline[0](LoadImageFromFile).color_type"),
        (RESIZE, f"interpolation='area', {RESIZE}", "[1](Resize).interpolation = 'area'"),
        (RESIZE, "scale=[(320, 240), (640, 480)], keep_ratio=True)", "pipeline[1](Resize) scale"),
        (PACK, "dict(type='PhotoMetricDistortion')", "[3].type = 'PhotoMetricDistortion'"),
        (PACK, "dict(type='RandomFlip', prob=0.5)", "pipeline[3](RandomFlip).prob = 0.5"),
        (PACK, "dict(type='Pad', size=(330, 250))", "pad_size_divisor = 32; padding twice"),
        (PACK, "dict(type='Pad', padding_mode='reflect')", "(Pad).padding_mode = 'reflect'"),
        (PACK, "dict(type='Pad', pad_to_square=True)", "pad_to_square = True"),
        (PACK, "dict(type='Normalize', mean=[0], std=[1])", "pipeline[3](Normalize)"),
        ("type='CocoDataset'", "type='Odd', dataset=dict()", "dataset.type = 'Odd'"),
        ("default_scope = 'mmdet'", "_base_ = ['other.py']", "_base_"),
        ("data_preprocessor=dict(", "spare=dict(", "model.spare"),
    ],
)
def test_refused_by_name(old: str, new: str, name: str) -> None:
    assert name in refusal(CONFIG_3X, (old, new))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("flip=False", "flip=True", "pipeline[1](MultiScaleFlipAug).flip = True"),
        (f"{PAD_2X}, ", "", "padding = 1"),
        (PAD_2X, "dict(type='Pad', size_divisor=16)", "transforms[3](Pad) = 16"),
        (PAD_2X, "dict(type='Pad', size=(250, 320))", "transforms[3](Pad) = (250, 320)"),
        ("nms_pre=500", "nms_pre=-1", "test_cfg.nms_pre = -1"),
        (RESIZE_2X, "img_scale=[(320, 240), (640, 480)]", "(Resize) scale"),
    ],
)
def test_refused_by_name_of_2x(old: str, new: str, name: str) -> None:
    assert name in refusal(CONFIG_2X, (old, new))


@pytest.mark.parametrize(
    "text",
    ["model = 5", "model = dict(bbox_head=7)", "model = make()", "model = dict()\nmodel.a(neck=1)"],
)
def test_senseless_configurations(text: str) -> None:
    assert "a dictionary is expected" in refusal(text)


def test_top_level_preprocessor_counts_where_the_model_has_none() -> None:
    own = re.search(r"    data_preprocessor=dict\(.*?32\),\n", CONFIG_3X, re.DOTALL)
    assert own is not None
    none = (own[0], "")
    outer = (
        "\ndata_preprocessor = dict(mean=[0, 0, 0], std=[1, 1, 1], pad_size_divisor=32,\n"
        "    bgr_to_rgb=False)\n"
    )
    preset = preset_of(CONFIG_3X + outer, none)
    assert (preset.mean, preset.std, preset.channel_order) == ((0.0,) * 3, (1.0,) * 3, "bgr")
    assert preset_of(CONFIG_3X + outer).channel_order == "rgb"
    assert "data_preprocessor = None" in refusal(CONFIG_3X, none)


def test_fields_that_differ_are_shown_before_an_export() -> None:
    assert "other than published" not in describe_preset(preset_of(CONFIG_3X))
    changes = (
        ("type='BN'", "type='BN', eps=0.001"),
        (RGB, "bgr_to_rgb=False"),
        ("max_per_img=100", "max_per_img=300"),
    )
    line = describe_preset(preset_of(CONFIG_3X, *changes))
    for part in ("0.001", "bgr", "300 detections", "103.53 116.28 123.675"):
        assert part in line


def test_names_are_resolved_and_statements_are_not_run() -> None:
    norm = "norm = dict(mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True)\n"
    text = re.sub(r"mean=\[123.*?to_rgb=True", "**norm", CONFIG_2X, flags=re.DOTALL)
    assert preset_of(norm + text).mean == (1.0, 2.0, 3.0)
    message = refusal(f"{norm}{text}\nfor part in [1]:\n    data['test'] = part\n")
    assert "only literal values" in message or "dictionary" in message


# A genuine configuration, as MMDetection writes it, with changes that no weights show.
SIZE = r"keep_ratio=True, scale=\(\s*320,\s*240,\s*\)"
NORM = r"norm_cfg=dict\(requires_grad=True, type='BN'\)"
STRETCHED = (SIZE, "keep_ratio=False, scale=(320, 320)")


@pytest.fixture
def variant(shared: Path, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Return a function that changes the text by a pattern: a file with it, and the text itself."""
    file = read_checkpoint(shared / "reference" / "checkpoints" / "mmdet3_bccd_tiny.pth")

    def write(pattern: str, replacement: str) -> tuple[Path, str]:
        text, count = re.subn(pattern, replacement, str(file.meta["cfg"]), flags=re.DOTALL)
        assert count, pattern
        path, meta = tmp_path / "a.pth", {"cfg": text, "dataset_meta": {"classes": NAMES}}
        torch.save({"meta": meta, "state_dict": file.state_dict}, path)
        return path, text

    return write


@pytest.mark.shared
@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (STRETCHED, {"resize": "stretch", "imgsz": (320, 320)}),
        ((NORM, "norm_cfg=dict(type='BN', eps=0.001)"), {"batch_norm_eps": 0.001}),
        (("octave_base_scale=8,", "scales=[4],"), {"anchor_side": 4.0}),
        ((r"type='(ResNet|FPN|TOODHead|TOOD)'", r"type='mmdet.\1'"), {"imgsz": (240, 320)}),
    ],
)
def test_genuine_configurations(change: Change, fields: dict[str, Any], variant: Any) -> None:
    assert_fields(preset_of(variant(*change)[1]), fields)


@pytest.mark.shared
def test_stretched_images_come_back_in_their_own_pixels(
    variant: Any, synth_image_bgr: Callable[[int, int], Any]
) -> None:
    """The stretching detector equals the fitting one on an image that was stretched beforehand."""
    import cv2

    image = synth_image_bgr(240, 480)
    stretched = np.asarray(cv2.resize(image, (320, 320), interpolation=cv2.INTER_LINEAR), np.uint8)
    with Detector(variant(*STRETCHED)[0], conf=0.05) as detector:
        assert detector.prepare(image).transform.resized_hw == (320, 320)
        detections, expected = detector(image), detector(stretched)
    assert len(detections) == len(expected) > 0
    scaled = expected.boxes * [1.5, 0.75, 1.5, 0.75]
    np.testing.assert_allclose(detections.boxes, scaled, rtol=1e-5, atol=1e-3)
