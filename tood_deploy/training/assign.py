"""Which anchor points learn which box: ATSS, task-aligned assignment, and by largest overlap.

Boxes and predictions of one image in, pairs of anchor points and boxes out. Source:
reference/SPEC.md section 3, the paper's section 3.2; reference/SPEC_FAMILY.md section 3. Results
are lists of pairs, so that memory grows with the positives and not with anchor points times boxes:
500 boxes in an image of 800x1344 are 11 million pairs, of which some thousands matter. Knows no
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tood_deploy.errors import ToodError
from tood_deploy.model.boxes import box_iou_floored
from tood_deploy.preprocess import pad_size
from tood_deploy.presets import STRIDES


@dataclass(frozen=True, eq=False)
class Targets:
    """The ground truth of one image of a batch.

    Attributes:
        boxes: (G, 4) float32 xyxy, in pixels of the network input.
        labels: (G,) int64 class numbers.
        valid_hw: rows and columns of the input that hold real pixels.
    """

    boxes: Tensor
    labels: Tensor
    valid_hw: tuple[int, int]

    def __post_init__(self) -> None:
        count = self.labels.numel()
        if self.labels.shape != (count,) or self.boxes.shape != (count, 4):
            raise ToodError(
                f"targets: boxes {tuple(self.boxes.shape)} and labels {tuple(self.labels.shape)}; "
                "expected (G, 4) and (G,)"
            )

    def to(self, device: torch.device | str) -> Targets:
        """Return the same on another device."""
        return Targets(
            self.boxes.to(device, torch.float32), self.labels.to(device, torch.int64), self.valid_hw
        )


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """The anchor points of all levels, level by level, row by row.

    Attributes:
        sizes_hw: rows and columns of every level.
        points: (A, 2) x, y in pixels of the network input.
        strides: (A,) float32.
        anchor_side: of the square anchors, in strides.
        anchor_offset: of the points from their cells' upper left corners, in strides.
    """

    sizes_hw: tuple[tuple[int, int], ...]
    points: Tensor
    strides: Tensor
    anchor_side: float = 8.0
    anchor_offset: float = 0.0

    @classmethod
    def of_maps(
        cls, maps: Sequence[Tensor], anchor_side: float = 8.0, anchor_offset: float = 0.0
    ) -> AnchorGrid:
        """Return the grid behind maps.

        Args:
            maps: (..., h, w) of stride 8 to 128.
            anchor_side: of the square anchors, in strides.
            anchor_offset: of the points from their cells' upper left corners, in strides.
        """
        sizes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        points, strides = [], []
        for (height, width), stride in zip(sizes, STRIDES, strict=True):
            y, x = (
                torch.arange(side, device=maps[0].device, dtype=torch.float32) * stride
                + anchor_offset * stride
                for side in (height, width)
            )
            points.append(
                torch.stack(
                    (x.expand(height, width), y[:, None].expand(height, width)), dim=2
                ).reshape(-1, 2)
            )
            strides.append(x.new_full((height * width,), float(stride)))
        return cls(sizes, torch.cat(points), torch.cat(strides), anchor_side, anchor_offset)

    @property
    def level_lengths(self) -> list[int]:
        """Return the number of anchor points of every level."""
        return [height * width for height, width in self.sizes_hw]

    def valid_sizes(self, valid_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return rows and columns of every level that lie on the image.

        That is the image padded by itself to a multiple of 32 (reference/SPEC.md section 3).
        """
        padded = pad_size(valid_hw)
        return [
            (min(height, -(-padded[0] // stride)), min(width, -(-padded[1] // stride)))
            for (height, width), stride in zip(self.sizes_hw, STRIDES, strict=True)
        ]

    def valid_mask(self, valid_hw: tuple[int, int]) -> Tensor:
        """Return (A,) bool, the anchor points of `valid_sizes`."""
        masks = []
        for (height, width), (rows, columns) in zip(
            self.sizes_hw, self.valid_sizes(valid_hw), strict=True
        ):
            mask = torch.zeros(height, width, dtype=torch.bool, device=self.points.device)
            mask[:rows, :columns] = True
            masks.append(mask.flatten())
        return torch.cat(masks)


INSIDE_MARGIN = 0.01  # pixels that an anchor point must lie inside a box, from every side
ATSS_TOPK = 9  # anchors a level
TAL_TOPK = 13  # anchor points of all levels
# Boxes that are taken together should lie near one another: a strip of rows of boxes, and of it so
# many that their matrices fit the processor's cache.
BOXES_PER_STRIP, BOXES_AT_ONCE = 96, 8
METRIC_EPS = 1e-7


class Assignment(NamedTuple):
    """The positives of one image, as pairs in no particular order.

    Attributes:
        anchors: (P,) positions of the anchor points; each occurs once.
        boxes: (P,) positions of the boxes they learn.
        ious: (P,) overlap of the box with the anchor (ATSS) or with the predicted box
            (task-aligned).
        metrics: (P,) alignment metric: score times overlap to the sixth power; 1 in ATSS.
    """

    anchors: Tensor
    boxes: Tensor
    ious: Tensor
    metrics: Tensor


def assign_task_aligned(
    scores: Tensor,
    boxes_net: Tensor,
    points: Tensor,
    valid: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    topk: int = TAL_TOPK,
) -> Assignment:
    """Assign to each box the anchor points whose predictions suit it best.

    Args:
        scores: (K, A) predicted probabilities, detached.
        boxes_net: (A, 4) predicted boxes xyxy, in pixels, detached.
        points: (A, 2) anchor points x, y, in pixels.
        valid: (A,) bool; others are never assigned.
        gt_boxes: (G, 4) xyxy, in pixels.
        gt_labels: (G,).
        topk: anchor points a box, before those outside the box are taken out.
    """
    if not len(gt_boxes):
        return _no_positives(scores)
    chunks: list[tuple[Tensor, ...]] = []
    planes = boxes_net.T.contiguous()
    for rows in _neighbours(gt_boxes):
        chunk = gt_boxes[rows]
        near = _overlapping(planes, chunk, valid)
        ious = _pairwise_iou(chunk, planes[:, near])
        metrics = ious.square()
        metrics.mul_(metrics.square()).mul_(
            scores.index_select(0, gt_labels[rows]).index_select(1, near)
        )
        best, index = metrics.topk(min(topk, len(near)), dim=1)
        chunks.append(
            (
                near[index].flatten(),
                rows.repeat_interleave(best.shape[1]),
                ious.gather(1, index).flatten(),
                best.flatten(),
            )
        )
    pairs = Assignment(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
    kept = (pairs.metrics > 0) & _inside(points[pairs.anchors], gt_boxes[pairs.boxes])
    return _one_box_each(_select(pairs, kept), len(points))


def assign_atss(
    grid: AnchorGrid, valid_hw: tuple[int, int], gt_boxes: Tensor, topk: int = ATSS_TOPK
) -> Assignment:
    """Assign to each box the anchors near its centre that overlap it more than the others do.

    Args:
        grid: the anchor points.
        valid_hw: rows and columns that hold real pixels; only cells on them (padded to 32) take
            part.
        gt_boxes: (G, 4) xyxy, in pixels.
        topk: candidates a level.
    """
    if not len(gt_boxes):
        return _no_positives(gt_boxes)
    candidates = _nearest_anchors(grid, grid.valid_sizes(valid_hw), gt_boxes, topk)  # (G, N)
    points = grid.points[candidates]
    half = grid.strides[candidates].unsqueeze(2) * (grid.anchor_side / 2)
    ious = box_iou_floored(
        torch.cat((points - half, points + half), dim=2), gt_boxes.unsqueeze(1)
    ).squeeze(2)
    threshold = ious.mean(1, keepdim=True) + ious.std(1, keepdim=True)
    positive = (ious >= threshold) & _inside(points, gt_boxes.unsqueeze(1))
    rows = torch.arange(len(gt_boxes), device=gt_boxes.device).unsqueeze(1).expand_as(candidates)
    pairs = Assignment(
        candidates[positive], rows[positive], ious[positive], torch.ones_like(ious[positive])
    )
    return _one_box_each(pairs, len(grid.points))


def assign_max_iou(
    grid: AnchorGrid, valid: Tensor, gt_boxes: Tensor, threshold: float
) -> Assignment:
    """Assign to each box the anchors that overlap it by the threshold and more than other boxes.

    Besides, each box gets the anchors that overlap it most, however little that is.

    Args:
        grid: the anchor points.
        valid: (A,) bool; others are never assigned.
        gt_boxes: (G, 4) xyxy, in pixels.
        threshold: smallest overlap of an anchor with its box.
    """
    if not len(gt_boxes):
        return _no_positives(gt_boxes)
    anchors = valid.nonzero().squeeze(1)
    points, half = grid.points[anchors], grid.strides[anchors, None] * (grid.anchor_side / 2)
    ious = box_iou_floored(gt_boxes, torch.cat((points - half, points + half), dim=1))  # (G, V)
    best, boxes = ious.max(0)
    boxes = torch.where(best >= threshold, boxes, -1)
    # All that tie for a box's largest overlap are its own; of several such boxes the last has them.
    numbers = torch.arange(len(gt_boxes), device=boxes.device).unsqueeze(1)
    own = torch.where(ious == ious.amax(1, keepdim=True), numbers, -1).amax(0)
    boxes = torch.where(own >= 0, own, boxes)
    kept = boxes >= 0
    boxes = boxes[kept]
    overlaps = ious[:, kept].gather(0, boxes.unsqueeze(0)).squeeze(0)
    return Assignment(anchors[kept], boxes, overlaps, torch.ones_like(overlaps))


def normalised_metrics(assigned: Assignment, num_boxes: int) -> Tensor:
    """Return (P,) class score targets: a box's largest metric becomes its largest overlap."""
    best_metric, best_iou = (
        values.new_zeros(num_boxes).scatter_reduce(0, assigned.boxes, values, "amax")
        for values in (assigned.metrics, assigned.ious)
    )
    return assigned.metrics / (best_metric + METRIC_EPS)[assigned.boxes] * best_iou[assigned.boxes]


def _neighbours(boxes: Tensor) -> Iterator[Tensor]:
    """Yield positions of all boxes, in parts that lie near one another.

    A metric is positive only where two boxes overlap, and what overlaps one box of such a part
    mostly overlaps the others too.
    """
    centres = boxes[:, :2] + boxes[:, 2:]
    for strip in centres[:, 1].argsort().split(BOXES_PER_STRIP):
        yield from strip[centres[strip, 0].argsort()].split(BOXES_AT_ONCE)


def _overlapping(planes: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """Return positions of the valid predictions that overlap the rectangle around all boxes.

    Args:
        planes: (4, A) predicted boxes xyxy, in pixels.
        boxes: (G, 4) xyxy, in pixels.
        valid: (A,) bool.
    """
    x1, y1, x2, y2 = planes
    left, top = boxes[:, :2].amin(0)
    right, bottom = boxes[:, 2:].amax(0)
    return (valid & (x2 > left) & (y2 > top) & (x1 < right) & (y1 < bottom)).nonzero().squeeze(1)


def _pairwise_iou(boxes: Tensor, planes: Tensor) -> Tensor:
    """Return (G, N) overlaps of boxes (G, 4) with predictions (4, N).

    In place where it can be: this is most of the assignment's time.
    """
    x1, y1, x2, y2 = planes
    gx1, gy1, gx2, gy2 = boxes.T.unsqueeze(2)
    overlap = torch.minimum(gx2, x2).sub_(torch.maximum(gx1, x1)).clamp_(min=0)
    overlap.mul_(torch.minimum(gy2, y2).sub_(torch.maximum(gy1, y1)).clamp_(min=0))
    # No union is smaller than the larger of its boxes, so flooring these floors it, at less cost.
    areas = ((gx2 - gx1) * (gy2 - gy1)).clamp(min=1e-6), ((x2 - x1) * (y2 - y1)).clamp(min=0)
    return overlap.div_((areas[0] + areas[1]).sub_(overlap))


def _nearest_anchors(
    grid: AnchorGrid, valid_sizes: Sequence[tuple[int, int]], gt_boxes: Tensor, topk: int
) -> Tensor:
    """Return (G, N) positions of the valid anchors of every level nearest to each box's centre.

    They lie in a window of `topk` rows and columns around it, pushed inside the level where it
    would leave it.

    Args:
        grid: the anchor points.
        valid_sizes: rows and columns of every level that take part.
        gt_boxes: (G, 4) xyxy, in pixels.
        topk: anchors a level.
    """
    centres = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    chosen, offset = [], 0
    for (height, width), (rows, columns), stride in zip(
        grid.sizes_hw, valid_sizes, STRIDES, strict=True
    ):
        from_first = centres - grid.anchor_offset * stride  # from the level's first anchor point
        x = _window(from_first[:, 0] / stride, columns, topk)
        y = _window(from_first[:, 1] / stride, rows, topk)
        dx, dy = x * stride - from_first[:, :1], y * stride - from_first[:, 1:]
        distances = (dx.unsqueeze(1).square() + dy.unsqueeze(2).square()).sqrt().flatten(1)
        cells = (y.unsqueeze(2) * width + x.unsqueeze(1)).flatten(1) + offset
        chosen.append(
            cells.gather(
                1, distances.topk(min(topk, distances.shape[1]), dim=1, largest=False).indices
            )
        )
        offset += height * width
    return torch.cat(chosen, dim=1)


def _window(centre: Tensor, count: int, size: int) -> Tensor:
    """Return (G, min(size, count)) neighbouring cells of 0..count-1 around each centre."""
    start = (centre.round().long() - size // 2).clamp(min=0).clamp(max=max(count - size, 0))
    return start.unsqueeze(1) + torch.arange(min(size, count), device=centre.device)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Tell whether points (..., 2) lie inside boxes (..., 4), by more than the margin."""
    distances = torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)
    return distances.amin(-1) > INSIDE_MARGIN


def _one_box_each(pairs: Assignment, num_anchors: int) -> Assignment:
    """Keep of an anchor point's boxes the one of largest overlap; of equal ones the first."""
    best = pairs.ious.new_full((num_anchors,), -1.0).scatter_reduce(
        0, pairs.anchors, pairs.ious, "amax"
    )
    pairs = _select(pairs, pairs.ious == best[pairs.anchors])
    first = pairs.boxes.new_full((num_anchors,), torch.iinfo(torch.int64).max).scatter_reduce(
        0, pairs.anchors, pairs.boxes, "amin"
    )
    return _select(pairs, pairs.boxes == first[pairs.anchors])


def _select(pairs: Assignment, mask: Tensor) -> Assignment:
    return Assignment(*(part[mask] for part in pairs))


def _no_positives(like: Tensor) -> Assignment:
    none = torch.zeros(0, dtype=torch.int64, device=like.device)
    return Assignment(none, none, like.new_zeros(0), like.new_zeros(0))
