"""The losses of TOOD: what the head said and what it should have said in, two sums out.

Source: reference/SPEC.md section 3. Which stage of training it is comes in as an argument; nothing is remembered between calls.
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
        images, anchors, labels: (P,) positions in the batch, among the anchor points, among the classes.
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
        """Chooses whose losses.

        Args:
            preset: says the number of classes, and the variant where that is not given.
            variant: "mmdet", or "authors": in task-aligned epochs their padding anchors count as negatives, their averaging factors
                are not raised to at least 1, and inverted boxes have no area.
            warmup_epochs: epochs of ATSS before task-aligned assignment.
        """
        self.preset = get_preset(preset) if isinstance(preset, str) else preset
        self.variant = variant or self.preset.convention
        self.warmup_epochs = warmup_epochs

    def __call__(self, out: HeadOutput, targets: Sequence[Targets], epoch: int) -> Losses:
        """The losses of one batch; differentiable in `out`.

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
        boxes = torch.cat([level.flatten(2) for level in out.boxes_strides], dim=2).transpose(
            1, 2
        )  # (B, A, 4)
        targets = [target.to(scores.device) for target in targets]
        warmup = epoch < self.warmup_epochs
        positives = _join(
            [
                self._assign(i, scores, boxes, grid, target, warmup)
                for i, target in enumerate(targets)
            ]
        )
        valid = torch.stack([grid.valid_mask(target.valid_hw) for target in targets])
        if self.variant == "authors" and not warmup:
            valid = torch.ones_like(valid)
        cls_factor, box_factor = self._average_factors(positives)
        cls_anchors = (
            _class_loss(scores, positives, focal_loss if warmup else quality_focal_loss, valid).sum(
                0
            )
            / cls_factor
        )
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
            found = assign_atss(grid, target.valid_hw, target.boxes)
        else:
            boxes_net = boxes[image].detach() * grid.strides.unsqueeze(1)
            valid = grid.valid_mask(target.valid_hw)
            found = assign_task_aligned(
                scores[image].detach(), boxes_net, grid.points, valid, target.boxes, target.labels
            )
        return _positives_of_image(image, found, grid, target, warmup)

    def _average_factors(self, positives: Positives) -> tuple[Tensor, Tensor]:
        """What the class and the box loss are divided by, the mean over all workers."""
        factors = mean_over_ranks(torch.stack((positives.scores.sum(), positives.weights.sum())))
        factors = (
            torch.where(factors < TINY_FACTOR, 1.0, factors)
            if self.variant == "authors"
            else factors.clamp(min=1.0)
        )
        return factors[0], factors[1]

    def _box_loss(self, boxes: Tensor, positives: Positives, grid: AnchorGrid) -> Tensor:
        """(A,) weighted GIoU loss, summed over the batch; where there are no positives, zeros that depend on the boxes."""
        if not len(positives.anchors):
            return (boxes * 0).sum((0, 2))
        predicted = boxes[positives.images, positives.anchors]
        wanted = positives.boxes_net / grid.strides[positives.anchors].unsqueeze(1)
        giou = box_giou(predicted, wanted, clamp_areas=self.variant == "authors")
        losses = BOX_WEIGHT * (1 - giou) * positives.weights
        return losses.new_zeros(boxes.shape[1]).index_add(0, positives.anchors, losses)


def quality_focal_loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """|y - p|^2 BCE(p, y), element by element.

    Args:
        scores: probabilities p.
        wanted: y, 0 to 1, of the same shape.
    """
    return (wanted - scores).square() * _cross_entropy(scores, wanted)


def focal_loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss on probabilities, element by element, for `wanted` of exactly 0 or 1."""
    miss = (wanted - scores).abs()
    balance = torch.where(wanted > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return balance * miss.pow(FOCAL_GAMMA) * _cross_entropy(scores, wanted)


def _cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    # PyTorch stops at NaN with an error that names nothing; so NaN is taken out here, and stays in the factor beside it.
    return F.binary_cross_entropy(scores.nan_to_num(nan=0.0), wanted, reduction="none")


def _class_loss(
    scores: Tensor, positives: Positives, loss: Callable[[Tensor, Tensor], Tensor], valid: Tensor
) -> Tensor:
    """(B, A) the loss of every anchor point over all classes."""
    wanted = torch.zeros_like(scores)
    wanted[positives.images, positives.labels, positives.anchors] = positives.scores
    return loss(scores, wanted).sum(1) * valid


def _positives_of_image(
    image: int, found: Assignment, grid: AnchorGrid, target: Targets, warmup: bool
) -> Positives:
    boxes_net = target.boxes[found.boxes]
    if warmup:
        scores, weights = found.metrics, centerness(grid.points[found.anchors], boxes_net)
    else:
        scores = weights = normalised_metrics(found, len(target.boxes))
    return Positives(
        torch.full_like(found.anchors, image),
        found.anchors,
        target.labels[found.boxes],
        boxes_net,
        scores,
        weights,
    )


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """(P,) how central points (P, 2) lie inside boxes (P, 4): 1 at the centre, 0 at a side."""
    near, far = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(near, far) / torch.maximum(near, far)).prod(1).sqrt()


def _join(parts: Sequence[Positives]) -> Positives:
    return Positives(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _check_targets(out: HeadOutput, targets: Sequence[Targets]) -> None:
    batch, classes = out.scores[0].shape[:2]
    if len(targets) != batch:
        raise ToodError(f"{len(targets)} targets for a batch of {batch} images; expected one each")
    for i, target in enumerate(targets):
        if (
            target.labels.numel()
            and not 0 <= int(target.labels.min()) <= int(target.labels.max()) < classes
        ):
            raise ToodError(
                f"targets of image {i}: labels {target.labels.tolist()[:8]}; expected class numbers from 0 to {classes - 1}"
            )
