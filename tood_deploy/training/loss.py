"""What the losses of all detectors share: positives, focal and box losses, averaging factors.

Maps and ground truth in, sums of every level out. A detector's own loss is a file in `losses`.
Knows no images and no optimiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.errors import ToodError
from tood_deploy.model.boxes import box_giou
from tood_deploy.model.head import HeadMaps
from tood_deploy.presets import Preset
from tood_deploy.training.assign import AnchorGrid, Assignment, Targets, assign_atss
from tood_deploy.training.distributed import mean_over_ranks

BOX_WEIGHT = 2.0  # of TOOD, ATSS and GFL
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0

ClassLoss = Callable[[Tensor, Tensor], Tensor]


class Losses(NamedTuple):
    """The terms, already averaged; the loss is their sum.

    Attributes:
        terms: scalars by name: "cls", "box", and the third that ATSS ("centerness"), GFL
            ("distribution") and PAA ("overlap") have.
        levels: (L,) by name, what each level adds to them, detached.
        positives: how many anchor points learn a box.
    """

    terms: dict[str, Tensor]
    levels: dict[str, Tensor]
    positives: int

    @classmethod
    def of_anchors(
        cls, by_anchor: Mapping[str, Tensor], grid: AnchorGrid, positives: Positives
    ) -> Losses:
        """Sum up.

        Args:
            by_anchor: (A,) of every term.
            grid: the anchor points.
            positives: of the batch.
        """
        levels = {
            name: torch.stack([part.sum() for part in values.split(grid.level_lengths)])
            for name, values in by_anchor.items()
        }
        terms = {name: values.sum() for name, values in levels.items()}
        detached = {name: values.detach() for name, values in levels.items()}
        return cls(terms, detached, len(positives.anchors))

    @property
    def cls(self) -> Tensor:
        """Return the class loss."""
        return self.terms["cls"]

    @property
    def box(self) -> Tensor:
        """Return the box loss."""
        return self.terms["box"]

    @property
    def total(self) -> Tensor:
        """Return the sum of all terms."""
        return torch.stack(list(self.terms.values())).sum()


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

    @classmethod
    def of_image(
        cls, image: int, assigned: Assignment, target: Targets, scores: Tensor, weights: Tensor
    ) -> Positives:
        """Return those of one image.

        Args:
            image: position in the batch.
            assigned: P pairs of anchor points and boxes.
            target: of the image.
            scores, weights: (P,) see the class.
        """
        images = torch.full_like(assigned.anchors, image)
        labels, boxes = target.labels[assigned.boxes], target.boxes[assigned.boxes]
        return cls(images, assigned.anchors, labels, boxes, scores, weights)

    @classmethod
    def join(cls, parts: Sequence[Positives]) -> Positives:
        """Return those of all images."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def of(self, maps: Tensor) -> Tensor:
        """Return (P, C), what flattened maps (B, C, A) hold at the positives."""
        return maps[self.images, :, self.anchors]

    def sum_at_anchors(self, values: Tensor, count: int) -> Tensor:
        """Return (A,) the sum over the batch of values (P,), for A = `count` anchor points.

        Without positives it is zeros that depend on the values: every worker then has a gradient to
        share.
        """
        return values.new_zeros(count).index_add(0, self.anchors, values)

    def points_strides(self, grid: AnchorGrid) -> Tensor:
        """Return (P, 2) x, y of the anchor points, in strides."""
        return grid.points[self.anchors] / grid.strides[self.anchors].unsqueeze(1)

    def boxes_strides(self, grid: AnchorGrid) -> Tensor:
        """Return (P, 4) what the boxes shall be, in strides."""
        return self.boxes_net / grid.strides[self.anchors].unsqueeze(1)


class FlatMaps(NamedTuple):
    """A batch of raw maps, levels joined, with its ground truth.

    Attributes:
        classes: (B, K, A) logits.
        regression: (B, C, A) in the head's own coding.
        quality: (B, A) logits; no values where the head predicts none.
        grid: the anchor points.
        targets: of every image, on the maps' device.
        valid: (B, A) bool, anchor points on the images.
    """

    classes: Tensor
    regression: Tensor
    quality: Tensor
    grid: AnchorGrid
    targets: list[Targets]
    valid: Tensor

    @classmethod
    def of(cls, maps: HeadMaps, targets: Sequence[Targets], preset: Preset) -> FlatMaps:
        """Join the levels, in float32.

        Raises:
            ToodError: the number of targets, or a label, does not fit the maps.
        """
        check_targets(maps.classes[0], targets)
        grid = AnchorGrid.of_maps(maps.classes, preset.anchor_side, preset.anchor_offset)
        classes, regression = flatten(maps.classes), flatten(maps.regression)
        quality = flatten(maps.quality).squeeze(1) if maps.quality else classes.new_zeros(0)
        moved = [target.to(classes.device) for target in targets]
        valid = torch.stack([grid.valid_mask(target.valid_hw) for target in moved])
        return cls(classes, regression, quality, grid, moved, valid)


class MapsLoss(ABC):
    """The losses of a preset whose head has separate towers: raw maps in, averaged terms out.

    Attributes:
        term_names: of what `terms` gives.
    """

    reads_maps = True
    term_names: tuple[str, ...]

    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    def __call__(self, maps: HeadMaps, targets: Sequence[Targets], epoch: int) -> Losses:
        """Compute the losses of one batch; differentiable in `maps`.

        Args:
            maps: of B images.
            targets: of the B images.
            epoch: counted from 0; all epochs are alike.

        Raises:
            ToodError: the number of targets, or a label, does not fit the maps.
        """
        flat = FlatMaps.of(maps, targets, self.preset)
        by_anchor, positives = self.terms(flat)
        return Losses.of_anchors(by_anchor, flat.grid, positives)

    @abstractmethod
    def terms(self, flat: FlatMaps) -> tuple[dict[str, Tensor], Positives]:
        """Return (A,) of every term, already averaged, and the positives that they are of."""


def flatten(levels: Sequence[Tensor]) -> Tensor:
    """Return (B, C, A) of maps (B, C, h, w), in float32."""
    return torch.cat([level.flatten(2) for level in levels], dim=2).float()


def atss_positives(grid: AnchorGrid, targets: Sequence[Targets]) -> Positives:
    """Return what ATSS assigns in a batch: class scores of 1, boxes weighed by centre-ness."""
    parts = []
    for i, target in enumerate(targets):
        assigned = assign_atss(grid, target.valid_hw, target.boxes)
        weights = centerness(grid.points[assigned.anchors], target.boxes[assigned.boxes])
        parts.append(Positives.of_image(i, assigned, target, assigned.metrics, weights))
    return Positives.join(parts)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """Return (P,) how central points (P, 2) lie in boxes (P, 4): 1 at the centre, 0 at a side."""
    near, far = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(near, far) / torch.maximum(near, far)).prod(1).sqrt()


def positives_factor(positives: Positives, batch: int) -> Tensor:
    """Return how many positives there are, an image without any counted as one.

    The mean over all workers (reference/SPEC_FAMILY.md section 0).
    """
    counts = positives.images.bincount(minlength=batch).clamp(min=1)
    return mean_over_ranks(counts.sum())


def weights_factor(weights: Tensor) -> Tensor:
    """Return the sum of weights (P,), the mean over all workers, raised to at least 1."""
    return mean_over_ranks(weights.sum()).clamp(min=1.0)


def giou_loss(boxes: Tensor, goal: Tensor, *, clamp_areas: bool = False) -> Tensor:
    """Return (P,) one minus the generalised IoU.

    Args:
        boxes, goal: (P, 4) xyxy, in one frame.
        clamp_areas: see `box_giou`.
    """
    return 1 - box_giou(boxes, goal, clamp_areas=clamp_areas)


def focal_loss(scores: Tensor, goal: Tensor) -> Tensor:
    """Compute focal loss on probabilities, element by element, for a goal of exactly 0 or 1."""
    return _focal_factor(scores, goal) * _cross_entropy(scores, goal)


def focal_loss_of_logits(logits: Tensor, goal: Tensor) -> Tensor:
    """Compute focal loss on logits, element by element, for a goal of exactly 0 or 1."""
    factor = _focal_factor(logits.sigmoid(), goal)
    return factor * F.binary_cross_entropy_with_logits(logits, goal, reduction="none")


def _focal_factor(scores: Tensor, goal: Tensor) -> Tensor:
    balance = torch.where(goal > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return balance * (goal - scores).abs().pow(FOCAL_GAMMA)


def quality_focal_loss(scores: Tensor, goal: Tensor) -> Tensor:
    """Compute |y - p|^2 BCE(p, y), element by element.

    Args:
        scores: probabilities p.
        goal: y, 0 to 1, of the same shape.
    """
    return (goal - scores).square() * _cross_entropy(scores, goal)


def quality_focal_loss_of_logits(logits: Tensor, goal: Tensor) -> Tensor:
    """Compute |y - p|^2 BCE(p, y) of logits of p, element by element; y from 0 to 1."""
    factor = (goal - logits.sigmoid()).square()
    return factor * F.binary_cross_entropy_with_logits(logits, goal, reduction="none")


def _cross_entropy(scores: Tensor, goal: Tensor) -> Tensor:
    # PyTorch stops at NaN with an error that names nothing; so NaN is taken out here, and stays in
    # the factor that this is multiplied by.
    return F.binary_cross_entropy(scores.nan_to_num(nan=0.0), goal, reduction="none")


def class_loss(predicted: Tensor, positives: Positives, loss: ClassLoss, valid: Tensor) -> Tensor:
    """Return (A,) the class loss of every anchor point, over all classes and the batch.

    Args:
        predicted: (B, K, A) probabilities, or logits.
        positives: of the batch.
        loss: of predictions and goals, element by element.
        valid: (B, A) bool; others count for nothing.
    """
    goal = torch.zeros_like(predicted)
    goal[positives.images, positives.labels, positives.anchors] = positives.scores
    return (loss(predicted, goal).sum(1) * valid).sum(0)


def check_targets(maps: Tensor, targets: Sequence[Targets]) -> None:
    """Raise ToodError unless targets fit a level's class maps (B, K, h, w)."""
    batch, classes = maps.shape[:2]
    if len(targets) != batch:
        raise ToodError(f"{len(targets)} targets for a batch of {batch} images; expected one each")
    for i, target in enumerate(targets):
        labels = target.labels
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ToodError(
                f"targets of image {i}: labels {labels.tolist()[:8]}; "
                f"expected class numbers from 0 to {classes - 1}"
            )
