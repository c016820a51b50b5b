"""The head's own arithmetic: the geometric mean, box coding, anchors."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tood_deploy.model.boxes import anchor_points, box_iou, decode_deltas, decode_distances
from tood_deploy.model.head import TaskDecomposition, TowerMaps, geometric_mean_probability
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
    for found, key in ((z.detach(), "sgm_z"), (x.grad, "sgm_gx"), (y.grad, "sgm_gy")):
        assert found is not None
        np.testing.assert_allclose(found, units[key], rtol=1e-5, atol=1e-8, err_msg=key)


def test_anchor_points_have_no_half_cell_shift() -> None:
    points = anchor_points((2, 3), torch.zeros(1))
    assert points[0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert points[1].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_distances_go_to_the_four_sides() -> None:
    distances = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    assert decode_distances(
        distances, torch.tensor([10.0, 20.0]).reshape(2, 1, 1)
    ).flatten().tolist() == [9, 18, 13, 24]


def published_anchors(size_hw: tuple[int, int]) -> torch.Tensor:
    """(H*W, 4) xyxy in strides, row by row."""
    points, half = (
        anchor_points(size_hw, torch.zeros(1)).flatten(1).T,
        PRESETS["r50-anchor-1x"].anchor_side / 2,
    )
    return torch.cat((points - half, points + half), dim=1)


def test_first_anchor_of_p3_is_the_published_one() -> None:
    assert (published_anchors((1, 1)) * 8).tolist() == [[-32, -32, 32, 32]]


@pytest.mark.shared
def test_anchors_equal_the_reference(goldens: Goldens) -> None:
    units = goldens("units")
    grids = {0: (3, 4), 1: (2, 2), 2: (1, 2), 3: (1, 1), 4: (1, 1)}
    for level, size_hw in grids.items():
        found = published_anchors(size_hw) * STRIDES[level]
        np.testing.assert_array_equal(found, units[f"anchors_{level}"])


@pytest.mark.shared
def test_delta_coding_equals_the_reference(goldens: Goldens) -> None:
    units, published = goldens("units"), PRESETS["r50-anchor-1x"]
    coding = published.anchor_side, published.delta_means, published.delta_stds
    anchors, deltas = torch.tensor(units["coder_anchor"]), torch.tensor(units["coder_delta"])
    scale = (anchors[:, 2] - anchors[:, 0]) / 8  # pixels a stride
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 / scale[:, None]
    decoded = [
        decode_deltas(delta.reshape(1, 4, 1, 1), point.reshape(2, 1, 1), *coding).flatten() * s
        for delta, point, s in zip(deltas, centre, scale, strict=True)
    ]
    np.testing.assert_allclose(torch.stack(decoded), units["coder_out"], rtol=1e-5, atol=1e-3)


def test_decomposition_weighs_stages() -> None:
    """Scaling the kernel by stage is scaling the features by stage."""
    torch.manual_seed(0)
    layer = TaskDecomposition(replace(PRESETS["tiny"], channels=32, tower_stages=3))
    torch.nn.init.normal_(layer.layer_attention[2].get_parameter("bias"))
    features = torch.randn(2, 96, 5, 4)
    tower = TowerMaps(list(features.chunk(3, dim=1)), features, features.mean((2, 3), keepdim=True))
    weights = layer.layer_attention(tower.pooled).repeat_interleave(32, dim=1)
    torch.testing.assert_close(
        layer(tower), layer.reduction_conv(features * weights), rtol=1e-4, atol=1e-5
    )


def test_iou_of_known_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [4, 4, 4, 4]])
    found = box_iou(boxes, boxes)
    assert found[0, 1].item() == pytest.approx(1 / 7)
    assert found[0, 2].item() == 0
    assert found[3, 3].isnan()  # no area at all: overlaps nothing, as NaN is above no threshold
