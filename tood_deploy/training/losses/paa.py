"""The loss of PAA: raw maps in; class, box and overlap losses out.

Anchors that overlap a box a little are its candidates; a mixture of two Gaussians over their losses
tells which of them become positive. Source: reference/SPEC_FAMILY.md section 3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tood_deploy.model.boxes import box_iou_floored
from tood_deploy.training.assign import assign_max_iou
from tood_deploy.training.loss import (
    FlatMaps,
    MapsLoss,
    Positives,
    class_loss,
    focal_loss_of_logits,
    giou_loss,
)
from tood_deploy.training.losses.atss import decode_positives, quality_loss

MAX_STEPS = 100
TOLERANCE = 1e-3  # of the mean log-likelihood, between two steps
VARIANCE_FLOOR = 1e-6  # added to every variance


class Mixture(NamedTuple):
    """The parameters of two Gaussians for each of G rows, float64, all (G, 2)."""

    weights: Tensor
    means: Tensor
    precisions: Tensor

    def log_densities(self, values: Tensor) -> Tensor:
        """Return (G, N, 2) log of weight times density, for values (G, N) in float64."""
        weights, means, precisions = (part.unsqueeze(1) for part in self)
        distances = (values.unsqueeze(2) - means).square() * precisions
        return 0.5 * (precisions.log() - distances - math.log(2 * math.pi)) + weights.log()


def fit_two_gaussians(values: Tensor, mask: Tensor) -> Mixture:
    """Fit the mixtures by expectation maximisation, from the smallest and the largest value.

    Args:
        values: (G, N) float64.
        mask: (G, N) bool, which of them count; at least two of a row.
    """
    low = values.masked_fill(~mask, math.inf).amin(1)
    high = values.masked_fill(~mask, -math.inf).amax(1)
    means = torch.stack((low, high), dim=1)
    mixture = Mixture(torch.full_like(means, 0.5), means, torch.ones_like(means))
    values = values.masked_fill(~mask, 0.0)
    counts = mask.sum(1)
    likelihood = torch.full_like(low, -math.inf)
    running = torch.ones_like(low, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        densities = mixture.log_densities(values)
        totals = densities.logsumexp(2)
        now = (totals * mask).sum(1) / counts
        shares = (densities - totals.unsqueeze(2)).exp() * mask.unsqueeze(2)
        maximised = _maximise(values, shares)
        # A row that has come to rest keeps its parameters while others go on.
        still = running.unsqueeze(1)
        mixture = Mixture(
            *(torch.where(still, new, old) for new, old in zip(maximised, mixture, strict=True))
        )
        running = running & ((now - likelihood).abs() >= TOLERANCE)
        likelihood = now
        if not running.any():
            break
    return mixture


def _maximise(values: Tensor, shares: Tensor) -> Mixture:
    """Return the parameters that suit values (G, N) best, given their components' shares."""
    sums = shares.sum(1) + 10 * torch.finfo(values.dtype).eps
    means = (shares * values.unsqueeze(2)).sum(1) / sums
    squares = (shares * values.square().unsqueeze(2)).sum(1) / sums
    variances = squares - means.square() + VARIANCE_FLOOR
    return Mixture(sums / sums.sum(1, keepdim=True), means, 1 / variances)


BOX_WEIGHT, OVERLAP_WEIGHT = 1.3, 0.5
CANDIDATE_IOU = 0.1  # of an anchor with its box
TOPK = 9  # candidates of a box and level that the mixture is fitted to
SMALLEST_WEIGHT = 1e-12


class PaaLoss(MapsLoss):
    """The losses of a PAA preset.

    Averages are those of this worker's own images, as in the reference.
    """

    term_names: tuple[str, ...] = ("cls", "box", "overlap")

    def terms(self, flat: FlatMaps) -> tuple[dict[str, Tensor], Positives]:
        """Return class, box and overlap losses, and the positives."""
        positives = self.positives(flat)
        boxes = decode_positives(flat.regression, positives, flat.grid, self.preset)
        goal, (images, anchors) = positives.boxes_strides(flat.grid), flat.valid.shape
        ious = box_iou_floored(boxes.detach().unsqueeze(1), goal.unsqueeze(1)).flatten()
        box_losses = BOX_WEIGHT * giou_loss(boxes, goal) * ious.clamp(min=SMALLEST_WEIGHT)
        count, overlap = len(ious), ious.sum() + torch.finfo(ious.dtype).eps
        classes = class_loss(flat.classes, positives, focal_loss_of_logits, flat.valid)
        by_anchor = {
            "cls": classes / max(count, images),
            "box": positives.sum_at_anchors(box_losses, anchors) / overlap,
            "overlap": OVERLAP_WEIGHT * quality_loss(flat.quality, positives, ious) / max(count, 1),
        }
        return by_anchor, positives

    @torch.no_grad()
    def positives(self, flat: FlatMaps) -> Positives:
        """Return the candidates that the mixtures make positive."""
        candidates, owners = self.candidates(flat)
        lengths = torch.tensor(flat.grid.level_lengths, device=owners.device)
        levels = torch.arange(len(lengths), device=owners.device).repeat_interleave(lengths)
        losses = self.candidate_losses(flat, candidates)
        chosen = separate(losses, owners, levels[candidates.anchors])
        return Positives(*(part[chosen] for part in candidates))

    def candidates(self, flat: FlatMaps) -> tuple[Positives, Tensor]:
        """Return all candidates of a batch, and (P,) numbers of their boxes over the batch."""
        parts, owners, first = [], [], 0
        for i, target in enumerate(flat.targets):
            assigned = assign_max_iou(flat.grid, flat.valid[i], target.boxes, CANDIDATE_IOU)
            ones = assigned.metrics
            parts.append(Positives.of_image(i, assigned, target, ones, ones))
            owners.append(assigned.boxes + first)
            first += len(target.boxes)
        return Positives.join(parts), torch.cat(owners)

    def candidate_losses(self, flat: FlatMaps, candidates: Positives) -> Tensor:
        """Return (P,) class and box loss of candidates."""
        logits = candidates.of(flat.classes)
        goal = torch.zeros_like(logits).scatter_(1, candidates.labels.unsqueeze(1), 1.0)
        boxes = decode_positives(flat.regression, candidates, flat.grid, self.preset)
        box_losses = giou_loss(boxes, candidates.boxes_strides(flat.grid))
        return focal_loss_of_logits(logits, goal).sum(1) + BOX_WEIGHT * box_losses


def separate(losses: Tensor, owners: Tensor, levels: Tensor) -> Tensor:
    """Return positions of the candidates that become positive, box by box.

    Args:
        losses: (P,) of the candidates.
        owners: (P,) numbers of their boxes.
        levels: (P,) of their anchors.
    """
    # Of every box and level the best few.
    order = losses.argsort(stable=True)
    groups = owners * (int(levels.max()) + 1 if len(levels) else 1) + levels
    order = order[groups[order].argsort(stable=True)]
    order = order[_rank_in_group(groups[order]) < TOPK]
    # Of every box all of these, best first, as one row.
    order = order[losses[order].argsort(stable=True)]
    order = order[owners[order].argsort(stable=True)]
    boxes, rows, counts = owners[order].unique_consecutive(return_inverse=True, return_counts=True)
    if not len(boxes):
        return order
    columns = _rank_in_group(rows)
    table = torch.full((len(boxes), int(counts.max())), -1, device=order.device)
    table[rows, columns] = order
    table = table[counts >= 2]  # two Gaussians need two values; such a box learns nothing
    return table[_is_positive(losses[table], table >= 0)]


def _is_positive(losses: Tensor, mask: Tensor) -> Tensor:
    """Return (G, N) bool, which of the candidates of every box belong to the lower component.

    Of these no more than up to the one that is most likely under the mixture.

    Args:
        losses: (G, N) of the candidates of every box, ascending.
        mask: (G, N) bool, which of them there are.
    """
    # Hundreds of operations on some numbers: a GPU would wait for each of them.
    values, there = losses.cpu().double(), mask.cpu()
    densities = fit_two_gaussians(values, there).log_densities(values)
    lower = there & (densities[..., 0] >= densities[..., 1])
    likelihood = densities.logsumexp(2).masked_fill(~lower, -torch.inf)
    last = likelihood.argmax(1, keepdim=True)
    return (lower & (torch.arange(losses.shape[1]) <= last)).to(losses.device)


def _rank_in_group(groups: Tensor) -> Tensor:
    """Return (P,) each element's position within its run of equal group numbers."""
    _, inverse, counts = groups.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(groups), device=groups.device) - starts[inverse]
