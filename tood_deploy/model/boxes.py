"""Compute anchor points, and decode, measure and compare boxes.

Tensors in, tensors out, differentiable; every docstring names the frame of its coordinates.
Knows no network.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_RATIO = abs(math.log(16 / 1000))  # of a box's side to its anchor's, as MMDetection clips it


def anchor_points(size_hw: tuple[int, int], like: Tensor, offset: float = 0.0) -> Tensor:
    """Return x, y of the anchor points of one level, (2, H, W), in strides.

    Args:
        size_hw: rows and columns of the level.
        like: a tensor on the device to use.
        offset: from the cell's upper left corner, in strides; 0 in the published models, which have
            no half-cell shift.
    """
    height, width = size_hw
    x = torch.arange(width, device=like.device, dtype=torch.float32).expand(height, width)
    y = torch.arange(height, device=like.device, dtype=torch.float32)[:, None].expand(height, width)
    points = torch.stack((x, y))
    return points + offset if offset else points


def decode_distances(distances: Tensor, points: Tensor) -> Tensor:
    """Return the boxes of anchor-free heads.

    Args:
        distances: (B, 4, H, W) to the left, top, right and bottom side, >= 0, in strides.
        points: (2, H, W) x, y, in strides.

    Returns:
        (B, 4, H, W) xyxy in strides, not clipped.
    """
    return torch.cat((points - distances[:, :2], points + distances[:, 2:]), dim=1)


def decode_deltas(
    deltas: Tensor,
    points: Tensor,
    side: float | Tensor,
    means: Sequence[float],
    stds: Sequence[float],
) -> Tensor:
    """Return the boxes of anchor-based heads, coded as shifts and log-ratios of anchors.

    Source: reference/SPEC.md section 2.

    Args:
        deltas: (B, 4, ..., H, W) dx, dy, dw, dh, normalised, as the head gives them.
        points: (2, ..., H, W) x, y of the anchors' centres, in strides.
        side: length of a square anchor's side, in strides; of others their widths and heights, in
            a tensor that fits (2, ..., H, W).
        means, stds: the four means and standard deviations that the deltas were normalised by.

    Returns:
        (B, 4, ..., H, W) xyxy in strides, not clipped.
    """
    centre = points + _denormalise(deltas[:, :2], means[:2], stds[:2]) * side
    log_ratio = _denormalise(deltas[:, 2:], means[2:], stds[2:]).clamp(
        -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    half = log_ratio.exp() * side * 0.5
    return torch.cat((centre - half, centre + half), dim=1)


def _denormalise(values: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Return every value times the standard deviation plus the mean of its channel.

    Args:
        values: (B, C, ..., H, W).
        means, stds: of each of the C channels.
    """
    if len(set(stds)) == 1 and not any(means):  # one node in the exported graph, not a dozen
        return values * stds[0]
    return torch.cat(
        [
            values[:, i : i + 1] * std + mean
            for i, (mean, std) in enumerate(zip(means, stds, strict=True))
        ],
        dim=1,
    )


def box_area(boxes: Tensor) -> Tensor:
    """Return width times height (...) of boxes (..., 4) xyxy.

    Sides of inverted boxes are negative and not clamped, as in the reference.
    """
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of every pair, in any one frame.

    Args:
        first: (..., N, 4) xyxy.
        second: (..., M, 4) xyxy.

    Returns:
        (..., N, M); NaN between boxes without any area.
    """
    first, second = first.unsqueeze(-2), second.unsqueeze(-3)
    overlap = _overlap_area(first, second)
    return overlap / (box_area(first) + box_area(second) - overlap)


def box_iou_floored(first: Tensor, second: Tensor, eps: float = 1e-6) -> Tensor:
    """Return `box_iou` with the union raised to at least `eps`, as the reference trains.

    Between boxes without any area this is 0, not NaN.

    Args:
        first: (..., N, 4) xyxy.
        second: (..., M, 4) xyxy.
        eps: smallest union, in the square of the boxes' unit.

    Returns:
        (..., N, M).
    """
    first, second = first.unsqueeze(-2), second.unsqueeze(-3)
    overlap = _overlap_area(first, second)
    return overlap / (box_area(first) + box_area(second) - overlap).clamp(min=eps)


def box_giou(
    first: Tensor, second: Tensor, *, clamp_areas: bool = False, eps: float = 1e-6
) -> Tensor:
    """Return the generalised IoU of boxes one by one, in any one frame.

    Args:
        first, second: (..., 4) xyxy.
        clamp_areas: give inverted boxes no area, as the authors' code does, not a signed one.
        eps: smallest union and enclosing area, in the square of the boxes' unit.

    Returns:
        (...), from -1 to 1.
    """
    areas = [
        box_area(boxes).clamp(min=0) if clamp_areas else box_area(boxes)
        for boxes in (first, second)
    ]
    overlap = _overlap_area(first, second)
    union = (areas[0] + areas[1] - overlap).clamp(min=eps)
    sides = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(
        first[..., :2], second[..., :2]
    )
    enclosing = (sides[..., 0] * sides[..., 1]).clamp(min=eps)
    return overlap / union - (enclosing - union) / enclosing


def _overlap_area(first: Tensor, second: Tensor) -> Tensor:
    """Return the area (...) that boxes (..., 4) xyxy share, one by one."""
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(
        first[..., :2], second[..., :2]
    )
    sides = sides.clamp(min=0)
    return sides[..., 0] * sides[..., 1]
