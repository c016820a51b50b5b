"""Presets as plain values: out, in again, of older versions, and refused out of range."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tood_deploy.errors import ToodError
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS, Preset, get_preset, like_presets

OLD_FIELDS = (
    *(
        "name",
        "depth",
        "groups",
        "base_width",
        "base_channels",
        "deform_stages",
        "channels",
        "tower_stages",
        "deform_tower",
        "anchor",
    ),
    *("class_names", "convention", "imgsz", "mean", "std", "published_ap"),
)
CHANGED: dict[str, Any] = {
    "norm_groups": 16,
    "delta_stds": (0.5, 0.5, 0.5, 0.5),
    "channel_order": "bgr",
    "pad_value": (0.5, 0.25, -1.0),
    "resize": "stretch",
    "scale_factor": (0.5, 0.25),
    "canvas_hw": (320, 640),
    "pad_divisor": 64,
    "max_det": 300,
}


@pytest.mark.parametrize("fields", [{}, CHANGED])
def test_comes_back_from_json(fields: dict[str, Any]) -> None:
    preset = replace(PRESETS["tiny"], **fields)
    assert Preset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    assert Manifest.from_json(Manifest(preset).to_json(), "a").preset == preset


def test_of_an_older_version_has_the_published_settings() -> None:
    values = {
        name: value
        for name, value in PRESETS["r50-anchor-1x"].to_dict().items()
        if name in OLD_FIELDS
    }
    assert Preset.from_dict(json.loads(json.dumps(values))) == replace(
        PRESETS["r50-anchor-1x"], weights=None
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"norm_groups": 5}, "norm_groups is 5; expected a number that divides the 64 channels"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; expected positive"),
        ({"std": (1.0, 0.0, 1.0)}, "std is .*expected positive"),
        ({"mean": (1.0, float("nan"), 1.0)}, "mean is .*finite"),
        ({"channel_order": "grey"}, "channel_order is 'grey'"),
        ({"resize": "crop"}, "resize is 'crop'"),
        ({"canvas_hw": (300, 320)}, "canvas_hw is .*multiples of 32"),
        ({"pad_divisor": 16}, "pad_divisor is 16; expected multiples of 32"),
        ({"iou_threshold": 1.5}, "iou_threshold is 1.5"),
        ({"max_det": 0}, "max_det is 0; expected 1 to 3840"),
        ({"candidates_per_level": 4000}, "candidates_per_level is 4000"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ToodError, match=f"preset tiny: {match}"):
        replace(PRESETS["tiny"], **fields)


def test_a_sizing_says_itself() -> None:
    tiny = PRESETS["tiny"]
    assert str(tiny.sizing) == "scaled to fit 240 x 320"
    assert str(replace(tiny, resize="stretch").sizing) == "stretched to 240 x 320"
    assert (
        str(replace(tiny, scale_factor=(0.5, 0.25), resize="stretch").sizing)
        == "stretched by factors of 0.5 and 0.25"
    )
    assert (
        str(replace(tiny, canvas_hw=(320, 320), pad_divisor=64).sizing)
        == "scaled to fit 240 x 320, padded to 320 x 320, sides multiples of 64"
    )


def test_a_name_that_is_no_presets_names_the_nearest() -> None:
    with pytest.raises(ToodError, match=r"'r50-3x'; expected one such as .*\br50-2x\b"):
        get_preset("r50-3x")
    assert like_presets("?").startswith("r50-1x, ")
