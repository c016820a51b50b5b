"""Anchor points, the coding of boxes, and overlaps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tood_deploy.model.boxes import anchor_points, box_iou, decode_deltas, decode_distances
from tood_deploy.presets import PRESETS, STRIDES

Goldens = Callable[[str], dict[str, NDArray[Any]]]


def test_anchor_points_have_no_half_cell_shift() -> None:
    points = anchor_points((2, 3), torch.zeros(1))
    assert points[0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert points[1].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_distances_go_to_the_four_sides() -> None:
    distances = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    points = torch.tensor([10.0, 20.0]).reshape(2, 1, 1)
    assert decode_distances(distances, points).flatten().tolist() == [9, 18, 13, 24]


@pytest.mark.parametrize("stds", [(0.1, 0.1, 0.2, 0.2), (0.5, 0.25, 0.2, 0.4)])
@pytest.mark.parametrize("means", [(0.0, 0.0, 0.0, 0.0), (0.1, -0.2, 0.3, 0.0)])
@pytest.mark.parametrize(("side", "offset"), [(8.0, 0.0), (4.0, 0.5)])
def test_deltas_are_decoded_as_the_coder_says(
    side: float, offset: float, means: Any, stds: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    deltas = 20 * torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    boxes = decode_deltas(deltas, anchor_points((3, 5), deltas, offset), side, means, stds)
    limit = abs(np.log(16 / 1000))
    for stride in (8, 32):  # in pixels, as the reference computes it, box by box
        for image, row, column in np.ndindex(2, 3, 5):
            anchor_side = side * stride
            cell = deltas[image, :, row, column].tolist()
            dx, dy, dw, dh = (cell[i] * stds[i] + means[i] for i in range(4))
            x, y = (
                (column + offset) * stride + dx * anchor_side,
                (row + offset) * stride + dy * anchor_side,
            )
            w, h = (anchor_side * np.exp(np.clip(d, -limit, limit)) for d in (dw, dh))
            expected = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) / stride
            np.testing.assert_allclose(boxes[image, :, row, column], expected, rtol=1e-5, atol=1e-4)


def published_anchors(size_hw: tuple[int, int]) -> torch.Tensor:
    """Return (H*W, 4) xyxy in strides, row by row."""
    points = anchor_points(size_hw, torch.zeros(1)).flatten(1).T
    half = PRESETS["r50-anchor-1x"].anchor_side / 2
    return torch.cat((points - half, points + half), dim=1)


def test_first_anchor_of_p3_is_the_published_one() -> None:
    assert (published_anchors((1, 1)) * 8).tolist() == [[-32, -32, 32, 32]]


@pytest.mark.shared
def test_anchors_equal_the_reference(goldens: Goldens) -> None:
    units = goldens("units")
    grids = {0: (3, 4), 1: (2, 2), 2: (1, 2), 3: (1, 1), 4: (1, 1)}
    for level, size_hw in grids.items():
        anchors = published_anchors(size_hw) * STRIDES[level]
        np.testing.assert_array_equal(anchors, units[f"anchors_{level}"])


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


def test_iou_of_known_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [4, 4, 4, 4]])
    overlaps = box_iou(boxes, boxes)
    assert overlaps[0, 1].item() == pytest.approx(1 / 7)
    assert overlaps[0, 2].item() == 0
    assert overlaps[3, 3].isnan()  # no area at all: overlaps nothing, as NaN is above no threshold
