"""Settings that leave no trace in the weights, against naive computations that share no code with the network."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tood_deploy.model import FusedDetector, Tood, build_model
from tood_deploy.model.boxes import anchor_points, decode_deltas
from tood_deploy.presets import PRESETS, STRIDES

Build = Callable[..., Tood]


def naive_group_norm(x: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for image in range(len(x)):
        for group in range(groups):
            part = x[image, group * size : (group + 1) * size]
            out[image, group * size : (group + 1) * size] = (part - part.mean()) / (
                part.var(correction=0) + eps
            ).sqrt()
    return out * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize(("groups", "eps"), [(32, 1e-5), (16, 1e-5), (64, 1e-1), (1, 1e-3)])
def test_head_group_norms(groups: int, eps: float, seeded_model: Build) -> None:
    head = seeded_model("tiny", norm_groups=groups, norm_eps=eps).double().bbox_head
    x = torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = [module for module in head.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 8  # six of the tower, two of the decompositions
    for norm in norms:
        torch.testing.assert_close(
            norm(x), naive_group_norm(x, groups, eps, norm.weight, norm.bias)
        )


def test_backbone_batch_norms(seeded_model: Build) -> None:
    backbone = seeded_model("tiny", batch_norm_eps=0.5).double().eval().backbone
    for norm in (module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)):
        x = torch.randn(1, norm.num_features, 3, 2, dtype=torch.float64)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var, weight, bias = (
            part[:, None, None]
            for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        torch.testing.assert_close(norm(x), (x - mean) / (var + 0.5).sqrt() * weight + bias)


def test_every_norm_takes_the_setting_at_every_depth() -> None:
    preset = replace(PRESETS["x101-dcn-2x"], batch_norm_eps=0.25, norm_eps=0.125)
    with torch.device("meta"):
        model = build_model(preset)
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {
        0.25
    }
    assert {module.eps for module in model.modules() if isinstance(module, nn.GroupNorm)} == {0.125}


@pytest.mark.parametrize("stds", [(0.1, 0.1, 0.2, 0.2), (0.5, 0.25, 0.2, 0.4)])
@pytest.mark.parametrize("means", [(0.0, 0.0, 0.0, 0.0), (0.1, -0.2, 0.3, 0.0)])
@pytest.mark.parametrize(("side", "offset"), [(8.0, 0.0), (4.0, 0.5)])
def test_deltas_are_decoded_as_the_coder_says(
    side: float, offset: float, means: Any, stds: Any
) -> None:
    deltas = (
        torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * 20
    )
    found = decode_deltas(deltas, anchor_points((3, 5), deltas, offset), side, means, stds)
    limit = abs(np.log(16 / 1000))
    for stride in (8, 32):  # in pixels, as the reference computes it, box by box
        for image, row, column in np.ndindex(2, 3, 5):
            anchor_x, anchor_y, anchor_side = (
                (column + offset) * stride,
                (row + offset) * stride,
                side * stride,
            )
            dx, dy, dw, dh = (
                float(deltas[image, i, row, column]) * stds[i] + means[i] for i in range(4)
            )
            x, y = anchor_x + dx * anchor_side, anchor_y + dy * anchor_side
            w, h = (anchor_side * np.exp(np.clip(d, -limit, limit)) for d in (dw, dh))
            expected = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) / stride
            np.testing.assert_allclose(found[image, :, row, column], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("anchor", ["free", "based"])
def test_the_head_uses_offset_and_coder(anchor: str, seeded_model: Build) -> None:
    """A moved anchor moves every box before it is aligned; alignment is switched off here."""
    moved = (
        {"anchor_offset": 0.5} if anchor == "free" else {"anchor_offset": 0.5, "anchor_side": 8.0}
    )
    boxes = []
    for fields in ({}, moved):
        head = seeded_model("tiny", anchor=anchor, **fields).bbox_head
        for name in ("weight", "bias"):
            nn.init.zeros_(head.reg_offset_module[2].get_parameter(name))
        maps = [
            torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(i))
            for i in range(len(STRIDES))
        ]
        boxes.append(head.eval()(maps).boxes_strides)
    for before, after in zip(*boxes, strict=True):
        torch.testing.assert_close(after, before + 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("pad_value", [(0.0, 0.0, 0.0), (0.5, -1.0, 2.0)])
def test_pixels_are_normalised_padded_and_ordered(
    order: str, pad_value: Any, seeded_model: Build
) -> None:
    mean, std = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)
    detector = FusedDetector(
        seeded_model("tiny", mean=mean, std=std, channel_order=order, pad_value=pad_value)
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    valid_hw = np.array([[4, 3], [1, 6]], np.int32)
    found = detector.normalise(torch.from_numpy(images), torch.from_numpy(valid_hw))
    channels = "rgb".index if order == "rgb" else {"b": 2, "g": 1, "r": 0}.__getitem__
    for image, row, column, place in np.ndindex(2, 4, 6, 3):
        channel = channels(order[place])
        real = row < valid_hw[image, 0] and column < valid_hw[image, 1]
        expected = (
            (images[image, row, column, channel] - mean[channel]) / std[channel]
            if real
            else pad_value[channel]
        )
        assert found[image, place, row, column] == pytest.approx(expected), (
            image,
            row,
            column,
            place,
        )


def test_candidates_and_detections_are_as_many_as_the_preset_says(seeded_model: Build) -> None:
    detector = FusedDetector(seeded_model("tiny", candidates_per_level=3, max_det=7)).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8))
    with torch.inference_mode():
        stages = detector(images, torch.tensor([[64, 96]], dtype=torch.int32), 0.0, 0.9)
    assert stages.candidates.scores.shape == (1, 3 * len(STRIDES))
    assert stages.detections.scores.shape == (1, 7)
    best = (
        torch.cat([level.flatten(1).topk(3).values for level in stages.head.scores], dim=1)
        .sort(descending=True)
        .values
    )
    torch.testing.assert_close(stages.candidates.scores, best)
