"""The loss of TOOD: the head's scores and boxes in, two sums out.

ATSS for some epochs, task-aligned learning after them. Which of the two it is comes in as an
argument; nothing is remembered between calls. Reads the output of any head. Source:
reference/SPEC.md section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tood_deploy.model.head import HeadOutput
from tood_deploy.presets import Convention, Preset, get_preset
from tood_deploy.training.assign import AnchorGrid, Targets, assign_task_aligned, normalised_metrics
from tood_deploy.training.distributed import mean_over_ranks
from tood_deploy.training.loss import (
    BOX_WEIGHT,
    Losses,
    Positives,
    atss_positives,
    check_targets,
    class_loss,
    flatten,
    focal_loss,
    giou_loss,
    quality_focal_loss,
)

WARMUP_EPOCHS = 4  # epochs of ATSS before task-aligned assignment
TINY_FACTOR = 1e-12  # below it the authors' code divides by 1


class ToodLoss:
    """The losses of a preset."""

    reads_maps = False
    term_names: tuple[str, ...] = ("cls", "box")

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
        check_targets(out.scores[0], targets)
        grid = AnchorGrid.of_maps(out.scores, self.preset.anchor_side, self.preset.anchor_offset)
        scores, boxes = flatten(out.scores), flatten(out.boxes_strides)
        targets = [target.to(scores.device) for target in targets]
        valid = torch.stack([grid.valid_mask(target.valid_hw) for target in targets])
        warmup = epoch < self.warmup_epochs
        if warmup:
            positives = atss_positives(grid, targets)
        else:
            positives = aligned_positives(scores.detach(), boxes.detach(), grid, targets, valid)
        if self.variant == "authors" and not warmup:
            valid = torch.ones_like(valid)
        cls_factor, box_factor = self._average_factors(positives)
        loss = focal_loss if warmup else quality_focal_loss
        box_losses = BOX_WEIGHT * positives.weights * self._giou_loss(boxes, positives, grid)
        by_anchor = {
            "cls": class_loss(scores, positives, loss, valid) / cls_factor,
            "box": positives.sum_at_anchors(box_losses, boxes.shape[2]) / box_factor,
        }
        return Losses.of_anchors(by_anchor, grid, positives)

    def _average_factors(self, positives: Positives) -> tuple[Tensor, Tensor]:
        """Return what the class and the box loss are divided by, the mean over all workers."""
        factors = mean_over_ranks(torch.stack((positives.scores.sum(), positives.weights.sum())))
        if self.variant == "authors":
            factors = torch.where(factors < TINY_FACTOR, 1.0, factors)
        else:
            factors = factors.clamp(min=1.0)
        return factors[0], factors[1]

    def _giou_loss(self, boxes: Tensor, positives: Positives, grid: AnchorGrid) -> Tensor:
        """Return (P,) losses of predicted boxes (B, 4, A) xyxy in strides."""
        goal = positives.boxes_strides(grid)
        return giou_loss(positives.of(boxes), goal, clamp_areas=self.variant == "authors")


def aligned_positives(
    scores: Tensor, boxes: Tensor, grid: AnchorGrid, targets: Sequence[Targets], valid: Tensor
) -> Positives:
    """Return what task-aligned assignment makes of a batch's predictions.

    Args:
        scores: (B, K, A) predicted probabilities, detached.
        boxes: (B, 4, A) predicted, xyxy in strides, detached.
        grid: the anchor points.
        targets: of the B images.
        valid: (B, A) bool; others are never assigned.
    """
    parts = []
    for i, target in enumerate(targets):
        boxes_net = (boxes[i] * grid.strides).T
        assigned = assign_task_aligned(
            scores[i], boxes_net, grid.points, valid[i], target.boxes, target.labels
        )
        metrics = normalised_metrics(assigned, len(target.boxes))
        parts.append(Positives.of_image(i, assigned, target, metrics, metrics))
    return Positives.join(parts)
