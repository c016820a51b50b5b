"""The head's own arithmetic: the geometric mean, norms, the decomposition, anchors in use."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tood_deploy.model import DenseDetector
from tood_deploy.model.head import geometric_mean_probability
from tood_deploy.model.heads.tood import TaskAlignedHead, TaskDecomposition, TowerMaps
from tood_deploy.presets import PRESETS, STRIDES

Goldens = Callable[[str], dict[str, NDArray[Any]]]


@pytest.mark.parametrize("logit", [-120.0, -20.0, -1.0, 0.0, 3.0, 90.0])
def test_geometric_mean_and_its_gradient_in_closed_form(logit: float) -> None:
    z, m = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (logit, 0.5))
    p = geometric_mean_probability(z, m)
    p.backward()
    sigmoid_z, sigmoid_m = (1 / (1 + math.exp(-value)) for value in (logit, 0.5))
    assert p.item() == pytest.approx(math.sqrt(sigmoid_z * sigmoid_m), rel=1e-8)
    assert z.grad is not None
    assert z.grad.item() == pytest.approx(p.item() * (1 - sigmoid_z) / 2, rel=1e-6, abs=1e-12)


@pytest.mark.shared
def test_geometric_mean_equals_the_reference(goldens: Goldens) -> None:
    units = goldens("units")
    x, y = (torch.tensor(units[key], requires_grad=True) for key in ("sgm_x", "sgm_y"))
    z = geometric_mean_probability(x, y)
    z.sum().backward()
    for computed, key in ((z.detach(), "sgm_z"), (x.grad, "sgm_gx"), (y.grad, "sgm_gy")):
        assert computed is not None
        np.testing.assert_allclose(computed, units[key], rtol=1e-5, atol=1e-8, err_msg=key)


def naive_group_norm(x: Tensor, norm: nn.GroupNorm, groups: int, eps: float) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for image in range(len(x)):
        for start in range(0, x.shape[1], size):
            part = x[image, start : start + size]
            deviation = (part.var(correction=0) + eps).sqrt()
            out[image, start : start + size] = (part - part.mean()) / deviation
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize(("groups", "eps"), [(32, 1e-5), (16, 1e-5), (64, 1e-1), (1, 1e-3)])
def test_group_norms_have_the_presets_settings(
    groups: int, eps: float, seeded_model: Callable[..., DenseDetector]
) -> None:
    head = seeded_model("tiny", norm_groups=groups, norm_eps=eps).double().bbox_head
    x = torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = [module for module in head.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 8  # six of the tower, two of the decompositions
    for norm in norms:
        torch.testing.assert_close(norm(x), naive_group_norm(x, norm, groups, eps))


def test_decomposition_weighs_stages() -> None:
    """Scaling the kernel by stage is scaling the features by stage."""
    torch.manual_seed(0)
    layer = TaskDecomposition(replace(PRESETS["tiny"], channels=32, tower_stages=3))
    nn.init.normal_(layer.layer_attention[2].get_parameter("bias"))
    features = torch.randn(2, 96, 5, 4)
    tower = TowerMaps(list(features.chunk(3, dim=1)), features, features.mean((2, 3), keepdim=True))
    weights = layer.layer_attention(tower.pooled).repeat_interleave(32, dim=1)
    expected = layer.reduction_conv(features * weights)
    torch.testing.assert_close(layer(tower), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("anchor", "more"), [("free", {}), ("based", {"anchor_side": 8.0})])
def test_moved_anchors_move_all_boxes(
    anchor: str, more: dict[str, float], seeded_model: Callable[..., DenseDetector]
) -> None:
    """Before alignment, that is; it is switched off here."""
    boxes = []
    for fields in ({}, {"anchor_offset": 0.5} | more):
        head = seeded_model("tiny", anchor=anchor, **fields).bbox_head
        assert isinstance(head, TaskAlignedHead)
        for name in ("weight", "bias"):
            nn.init.zeros_(head.reg_offset_module[2].get_parameter(name))
        generators = [torch.Generator().manual_seed(i) for i in range(len(STRIDES))]
        maps = [torch.randn(1, 64, 4, 4, generator=generator) for generator in generators]
        boxes.append(head.eval()(maps).boxes_strides)
    for before, after in zip(*boxes, strict=True):
        torch.testing.assert_close(after, before + 0.5, rtol=1e-5, atol=1e-5)
