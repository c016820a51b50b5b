"""A genuine checkpoint whose configuration is changed without a trace in its weights: each gives what it says, or is refused by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tood_deploy import Detector
from tood_deploy.errors import CheckpointError
from tood_deploy.model import load_checkpoint
from tood_deploy.model.checkpoint_file import read_checkpoint

pytestmark = pytest.mark.shared
SIZE = r"keep_ratio=True, scale=\(\s*320,\s*240,\s*\)"
PREPROCESSOR = r"    data_preprocessor=dict\(.*?type='DetDataPreprocessor'\),\n"
Variant = Callable[..., Path]


@pytest.fixture
def variant(shared: Path, tmp_path: Path) -> Variant:
    """A function of patterns and replacements in the configuration: a file with the genuine weights and that configuration."""
    file = read_checkpoint(shared / "reference" / "checkpoints" / "mmdet3_bccd_tiny.pth")

    def write(*changes: tuple[str, str], more: str = "") -> Path:
        text = file.meta["cfg"]
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
            assert count, pattern
        meta = {"cfg": text + more, "dataset_meta": {"classes": ("RBC", "WBC", "Platelets")}}
        torch.save({"meta": meta, "state_dict": file.state_dict}, tmp_path / "a.pth")
        return tmp_path / "a.pth"

    return write


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ((SIZE, "keep_ratio=False, scale=(320, 320)"), {"resize": "stretch", "imgsz": (320, 320)}),
        (
            ("num_classes=3", "num_classes=3, norm_cfg=dict(type='GN', num_groups=16)"),
            {"norm_groups": 16},
        ),
        (
            (
                r"norm_cfg=dict\(requires_grad=True, type='BN'\)",
                "norm_cfg=dict(type='BN', eps=0.001)",
            ),
            {"batch_norm_eps": 0.001},
        ),
        (("max_per_img=100", "max_per_img=300"), {"max_det": 300}),
        (("iou_threshold=0.6", "iou_threshold=0.3"), {"iou_threshold": 0.3}),
        ((r"type='(ResNet|FPN|TOODHead|TOOD)'", r"type='mmdet.\1'"), {"name": "tiny"}),
    ],
)
def test_computed(change: tuple[str, str], fields: dict[str, Any], variant: Variant) -> None:
    found = load_checkpoint(variant(change)).preset
    assert {name: getattr(found, name) for name in fields} == fields


def test_anchors_of_another_size(variant: Variant) -> None:
    found = load_checkpoint(
        variant(("octave_base_scale=8,", "scales=[4],"), ("anchor_free", "anchor_based"))
    ).preset
    assert (found.anchor, found.anchor_side, found.name) == ("based", 4.0, "custom")


def test_dilations_are_refused(variant: Variant) -> None:
    path = variant(("type='ResNet'", "type='ResNet', dilations=(1,1,1,2), strides=(1,2,2,1)"))
    with pytest.raises(CheckpointError, match=r"model\.backbone\.dilations"):
        load_checkpoint(path)


def test_a_top_level_preprocessor(variant: Variant) -> None:
    own = "\ndata_preprocessor=dict(bgr_to_rgb=False,mean=[0,0,0],std=[1,1,1]{})\n"
    with pytest.raises(
        CheckpointError, match=r"data_preprocessor\.pad_size_divisor = 1"
    ):  # its default: no padding to 32 at all
        load_checkpoint(variant((PREPROCESSOR, ""), more=own.format("")))
    found = load_checkpoint(
        variant((PREPROCESSOR, ""), more=own.format(", pad_size_divisor=32"))
    ).preset
    assert (found.channel_order, found.mean, found.std) == ("bgr", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_stretched_images_come_back_in_their_own_pixels(
    variant: Variant, synth_image_bgr: Callable[[int, int], Any]
) -> None:
    """The stretching detector equals the fitting one on an image that was stretched beforehand."""
    import cv2

    image = synth_image_bgr(240, 480)
    stretched = np.asarray(cv2.resize(image, (320, 320), interpolation=cv2.INTER_LINEAR), np.uint8)
    with Detector(variant((SIZE, "keep_ratio=False, scale=(320, 320)")), conf=0.05) as detector:
        assert detector.prepare(image).transform.resized_hw == (320, 320)
        found, expected = detector(image), detector(stretched)
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(
        found.boxes, expected.boxes * [1.5, 0.75, 1.5, 0.75], rtol=1e-5, atol=1e-3
    )
