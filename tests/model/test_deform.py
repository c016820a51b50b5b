"""Sampling between cells against slow loops and the reference's numbers, and its gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tood_deploy.model.deform import DeformConv2d, align_boxes, deform_conv2d

Goldens = Callable[[str], dict[str, NDArray[Any]]]


def read(plane: NDArray[np.float64], y: float, x: float) -> float:
    """Return one bilinear sample; cells outside count as zero."""
    top, left, total = math.floor(y), math.floor(x), 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 7), (6, 1), (5, 4)])
def test_alignment_equals_a_loop(size_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    boxes = rng.standard_normal((2, 4, *size_hw))
    offsets = rng.standard_normal((2, 8, *size_hw)) * 2
    expected = np.empty_like(boxes)
    for b, c, i, j in np.ndindex(boxes.shape):
        dy, dx = offsets[b, 2 * c : 2 * c + 2, i, j]
        expected[b, c, i, j] = read(boxes[b, c], i + dy, j + dx)
    aligned = align_boxes(torch.tensor(boxes), torch.tensor(offsets))
    np.testing.assert_allclose(aligned, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("offset_groups", "groups", "stride"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (4, 4, 1)]
)
def test_deformable_convolution_equals_a_loop(offset_groups: int, groups: int, stride: int) -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((2, 8, 5, 6)), rng.standard_normal((4, 8 // groups, 3, 3))
    rows, columns = (5 + 1) // stride if stride == 2 else 5, 6 // stride
    offset = rng.standard_normal((2, 18 * offset_groups, rows, columns))
    mask = rng.random((2, 9 * offset_groups, rows, columns))
    expected = np.zeros((2, 4, rows, columns))
    for b, o, i, j in np.ndindex(expected.shape):
        for c in range(8 // groups):
            channel = o // (4 // groups) * (8 // groups) + c
            group = channel // (8 // offset_groups)
            for tap in range(9):
                dy, dx = offset[b, 18 * group + 2 * tap : 18 * group + 2 * tap + 2, i, j]
                y, column = i * stride - 1 + tap // 3 + dy, j * stride - 1 + tap % 3 + dx
                sample = mask[b, 9 * group + tap, i, j] * read(x[b, channel], y, column)
                expected[b, o, i, j] += weight[o, c, tap // 3, tap % 3] * sample
    tensors = (torch.tensor(array) for array in (x, offset, mask, weight))
    out = deform_conv2d(*tensors, stride=stride, groups=groups)
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_gradients_are_those_of_the_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    offset = (torch.randn(1, 36, 4, 3, dtype=torch.float64) + 0.25).requires_grad_()
    mask = torch.rand(1, 18, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(deform_conv2d, (x, offset, mask, weight))
    boxes = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    shifts = (torch.randn(1, 8, 3, 4, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(align_boxes, (boxes, shifts), fast_mode=True)


def test_half_precision_features_are_read_at_exact_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 2, 300).bfloat16()  # which has no odd number beyond 256
    offset, mask = torch.zeros(1, 18, 2, 300).bfloat16(), torch.ones(1, 9, 2, 300).bfloat16()
    weight = torch.randn(3, 4, 3, 3).bfloat16()
    out = deform_conv2d(x, offset, mask, weight)
    assert out.dtype == torch.bfloat16
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_senseless_offsets_never_read_outside(value: float) -> None:
    out = align_boxes(torch.ones(1, 4, 3, 3), torch.full((1, 8, 3, 3), value))
    assert out.shape == (1, 4, 3, 3)
    assert math.isnan(value) or not (out.nan_to_num() > 1).any()


def test_offset_convolution_has_the_layout_of_mmcv() -> None:
    layer = DeformConv2d(8, 8, 3, padding=1, offset_groups=4)
    assert layer.conv_offset.weight.shape == (108, 8, 3, 3)
    with torch.no_grad():
        layer.conv_offset.get_parameter("bias").copy_(torch.arange(108.0))
    offset, mask = layer.offset_and_mask(torch.zeros(1, 8, 2, 2))
    assert offset[0, :, 0, 0].tolist() == list(range(72))
    torch.testing.assert_close(mask[0, :, 0, 0], torch.arange(72.0, 108.0).sigmoid())


@pytest.mark.shared
def test_alignment_equals_the_reference(goldens: Goldens) -> None:
    units = goldens("units")
    boxes, offsets = (
        torch.tensor(units[key], requires_grad=True) for key in ("sample_feat", "sample_offset")
    )
    out = align_boxes(boxes, offsets)
    out.backward(torch.tensor(units["sample_gradout"]))
    for tensor, key in (
        (out.detach(), "out"),
        (boxes.grad, "grad_feat"),
        (offsets.grad, "grad_offset"),
    ):
        assert tensor is not None
        np.testing.assert_allclose(tensor, units[f"sample_{key}"], rtol=0, atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "stride", "groups"), [("dcn_s1", 1, 1), ("dcn_s2", 2, 1), ("dcn_g4", 2, 4)]
)
def test_deformable_convolution_equals_the_reference(
    case: str, stride: int, groups: int, goldens: Goldens
) -> None:
    units = goldens("units")
    keys = ("dcn_x", f"{case}_off", f"{case}_mask", f"{case}_w")
    tensors = (torch.tensor(units[key]) for key in keys)
    out = deform_conv2d(*tensors, stride=stride, groups=groups)
    np.testing.assert_allclose(out, units[f"{case}_out"], rtol=0, atol=5e-6)
