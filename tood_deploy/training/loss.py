"""The losses of TOOD: the head's output and the ground truth in, two sums out.

Source: reference/SPEC.md section 3. Which stage of training it is comes in as an argument; nothing
is remembered between calls. Knows no images and no optimiser.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.errors import ToodError
from tood_deploy.model.boxes import box_giou
from tood_deploy.model.head import HeadOutput
from tood_deploy.presets import Convention, Preset, get_preset
from tood_deploy.training.assign import (
    AnchorGrid,
    Assignment,
    Targets,
    assign_atss,
    assign_task_aligned,
    normalised_metrics,
)
from tood_deploy.training.distributed import mean_over_ranks

WARMUP_EPOCHS = 4  # epochs of ATSS before task-aligned assignment
BOX_WEIGHT = 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
TINY_FACTOR = 1e-12  # below it the authors' code divides by 1


class Losses(NamedTuple):
    """The two terms, already averaged; the loss is their sum.

    Attributes:
        cls, box: scalars.
        cls_levels, box_levels: (L,) what each level adds to them, detached.
        positives: how many anchor points learn a box.
    """

    cls: Tensor
    box: Tensor
    cls_levels: Tensor
    box_levels: Tensor
    positives: int


class Positives(NamedTuple):
    """The positives of a whole batch.

    Attributes:
        images, anchors, labels: (P,) positions in the batch, among the anchor points, among the
            classes.
        boxes_net: (P, 4) what the box shall be, xyxy, in pixels.
        scores: (P,) what the class score shall be.
        weights: (P,) of the box loss.
    """

    images: Tensor
    anchors: Tensor
    labels: Tensor
    boxes_net: Tensor
    scores: Tensor
    weights: Tensor


class ToodLoss:
    """The losses of a preset."""

    def __init__(
        self,
        preset: str | Preset,
        variant: Convention | None = None,
        warmup_epochs: int = WARMUP_EPOCHS,
    ) -> None:
        """Choose whose losses.

        Args:
            preset: says the number of classes, and the variant where that is not given.
            variant: "mmdet", or "authors": in task-aligned epochs their padding anchors count as
                negatives, their averaging factors are not raised to at least 1, and inverted boxes
                have no area.
            warmup_epochs: epochs of ATSS before task-aligned assignment.
        """
        self.preset = get_preset(preset) if isinstance(preset, str) else preset
        self.variant = variant or self.preset.convention
        self.warmup_epochs = warmup_epochs

    def __call__(self, out: HeadOutput, targets: Sequence[Targets], epoch: int) -> Losses:
        """Compute the losses of one batch; differentiable in `out`.

        Args:
            out: the head's maps for B images.
            targets: of the B images.
            epoch: counted from 0; decides between the warm-up and task-aligned assignment.

        Raises:
            ToodError: the number of targets, or a label, does not fit the maps.
        """
        _check_targets(out, targets)
        grid = AnchorGrid.of_maps(out.scores, self.preset.anchor_side, self.preset.anchor_offset)
        scores = torch.cat([level.flatten(2) for level in out.scores], dim=2)  # (B, K, A)
        boxes = torch.cat([level.flatten(2) for level in out.boxes_strides], dim=2)
        boxes = boxes.transpose(1, 2)  # (B, A, 4)
        targets = [target.to(scores.device) for target in targets]
        warmup = epoch < self.warmup_epochs
        by_image = [
            self._assign(i, scores, boxes, grid, target, warmup) for i, target in enumerate(targets)
        ]
        positives = _join(by_image)
        valid = torch.stack([grid.valid_mask(target.valid_hw) for target in targets])
        if self.variant == "authors" and not warmup:
            valid = torch.ones_like(valid)
        cls_factor, box_factor = self._average_factors(positives)
        class_loss = focal_loss if warmup else quality_focal_loss
        cls_anchors = _class_loss(scores, positives, class_loss, valid).sum(0) / cls_factor
        box_anchors = self._box_loss(boxes, positives, grid) / box_factor
        cls_levels, box_levels = (
            torch.stack([part.sum() for part in values.split(grid.level_lengths)])
            for values in (cls_anchors, box_anchors)
        )
        return Losses(
            cls_levels.sum(),
            box_levels.sum(),
            cls_levels.detach(),
            box_levels.detach(),
            len(positives.anchors),
        )

    def _assign(
        self,
        image: int,
        scores: Tensor,
        boxes: Tensor,
        grid: AnchorGrid,
        target: Targets,
        warmup: bool,
    ) -> Positives:
        if warmup:
            assigned = assign_atss(grid, target.valid_hw, target.boxes)
        else:
            boxes_net = boxes[image].detach() * grid.strides.unsqueeze(1)
            valid = grid.valid_mask(target.valid_hw)
            assigned = assign_task_aligned(
                scores[image].detach(), boxes_net, grid.points, valid, target.boxes, target.labels
            )
        return _positives_of_image(image, assigned, grid, target, warmup)

    def _average_factors(self, positives: Positives) -> tuple[Tensor, Tensor]:
        """Return what the class and the box loss are divided by, the mean over all workers."""
        factors = mean_over_ranks(torch.stack((positives.scores.sum(), positives.weights.sum())))
        if self.variant == "authors":
            factors = torch.where(factors < TINY_FACTOR, 1.0, factors)
        else:
            factors = factors.clamp(min=1.0)
        return factors[0], factors[1]

    def _box_loss(self, boxes: Tensor, positives: Positives, grid: AnchorGrid) -> Tensor:
        """Return (A,) weighted GIoU loss, summed over the batch.

        Where there are no positives, it is zeros that depend on the boxes: every worker then has a
        gradient to share.

        Args:
            boxes: (B, A, 4) predicted, xyxy in strides.
            positives: of the batch.
            grid: the anchor points.
        """
        if not len(positives.anchors):
            return (boxes * 0).sum((0, 2))
        predicted = boxes[positives.images, positives.anchors]
        goal = positives.boxes_net / grid.strides[positives.anchors].unsqueeze(1)
        giou = box_giou(predicted, goal, clamp_areas=self.variant == "authors")
        losses = BOX_WEIGHT * (1 - giou) * positives.weights
        return losses.new_zeros(boxes.shape[1]).index_add(0, positives.anchors, losses)


def quality_focal_loss(scores: Tensor, goal: Tensor) -> Tensor:
    """Compute |y - p|^2 BCE(p, y), element by element.

    Args:
        scores: probabilities p.
        goal: y, 0 to 1, of the same shape.
    """
    return (goal - scores).square() * _cross_entropy(scores, goal)


def focal_loss(scores: Tensor, goal: Tensor) -> Tensor:
    """Compute focal loss on probabilities, element by element, for a goal of exactly 0 or 1."""
    miss = (goal - scores).abs()
    balance = torch.where(goal > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return balance * miss.pow(FOCAL_GAMMA) * _cross_entropy(scores, goal)


def _cross_entropy(scores: Tensor, goal: Tensor) -> Tensor:
    # PyTorch stops at NaN with an error that names nothing; so NaN is taken out here, and stays in
    # the factor that this is multiplied by.
    return F.binary_cross_entropy(scores.nan_to_num(nan=0.0), goal, reduction="none")


def _class_loss(
    scores: Tensor, positives: Positives, loss: Callable[[Tensor, Tensor], Tensor], valid: Tensor
) -> Tensor:
    """Return (B, A) the loss of every anchor point over all classes.

    Args:
        scores: (B, K, A) probabilities.
        positives: of the batch.
        loss: of scores and goals, element by element.
        valid: (B, A) bool; others count for nothing.
    """
    goal = torch.zeros_like(scores)
    goal[positives.images, positives.labels, positives.anchors] = positives.scores
    return loss(scores, goal).sum(1) * valid


def _positives_of_image(
    image: int, assigned: Assignment, grid: AnchorGrid, target: Targets, warmup: bool
) -> Positives:
    boxes_net = target.boxes[assigned.boxes]
    if warmup:
        scores, weights = assigned.metrics, centerness(grid.points[assigned.anchors], boxes_net)
    else:
        scores = weights = normalised_metrics(assigned, len(target.boxes))
    return Positives(
        torch.full_like(assigned.anchors, image),
        assigned.anchors,
        target.labels[assigned.boxes],
        boxes_net,
        scores,
        weights,
    )


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """Return (P,) how central points (P, 2) lie in boxes (P, 4): 1 at the centre, 0 at a side."""
    near, far = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(near, far) / torch.maximum(near, far)).prod(1).sqrt()


def _join(parts: Sequence[Positives]) -> Positives:
    return Positives(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _check_targets(out: HeadOutput, targets: Sequence[Targets]) -> None:
    batch, classes = out.scores[0].shape[:2]
    if len(targets) != batch:
        raise ToodError(f"{len(targets)} targets for a batch of {batch} images; expected one each")
    for i, target in enumerate(targets):
        labels = target.labels
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ToodError(
                f"targets of image {i}: labels {labels.tolist()[:8]}; "
                f"expected class numbers from 0 to {classes - 1}"
            )
