"""The loss of GFL: raw maps in; quality focal, box and distribution focal losses out.

Source: reference/SPEC_FAMILY.md sections 0 and 2.
"""

import torch
from torch import Tensor

from tood_deploy.model.boxes import box_iou_floored, decode_distances
from tood_deploy.training.loss import (
    BOX_WEIGHT,
    FlatMaps,
    MapsLoss,
    Positives,
    atss_positives,
    class_loss,
    giou_loss,
    positives_factor,
    quality_focal_loss_of_logits,
    weights_factor,
)

DISTRIBUTION_WEIGHT = 0.25
LAST_BIN_MARGIN = 0.1  # that distances stay below the last bin, in strides


class GflLoss(MapsLoss):
    """The losses of a GFL preset."""

    term_names: tuple[str, ...] = ("cls", "box", "distribution")

    def terms(self, flat: FlatMaps) -> tuple[dict[str, Tensor], Positives]:
        """Return class, box and distribution losses, and the positives."""
        positives = atss_positives(flat.grid, flat.targets)
        goal, points = positives.boxes_strides(flat.grid), positives.points_strides(flat.grid)
        logits = positives.of(flat.regression).unflatten(1, (4, self.preset.bins))
        boxes = decode_distances(_mean_distances(logits), points)
        # The class score shall be the overlap; a box counts by how sure its class is.
        ious = box_iou_floored(boxes.detach().unsqueeze(1), goal.unsqueeze(1)).flatten()
        certainty = positives.of(flat.classes.detach()).sigmoid().amax(1)
        positives = positives._replace(scores=ious, weights=certainty)
        factor, anchors = weights_factor(certainty), flat.valid.shape[1]
        box_losses = BOX_WEIGHT * giou_loss(boxes, goal) * certainty
        distances = torch.cat((points - goal[:, :2], goal[:, 2:] - points), dim=1)
        side_losses = _distribution_loss(logits, distances)
        classes = class_loss(flat.classes, positives, quality_focal_loss_of_logits, flat.valid)
        by_anchor = {
            "cls": classes / positives_factor(positives, len(flat.targets)),
            "box": positives.sum_at_anchors(box_losses, anchors) / factor,
            "distribution": positives.sum_at_anchors(side_losses * certainty, anchors) / factor,
        }
        return by_anchor, positives


def _mean_distances(logits: Tensor) -> Tensor:
    """Return distances (P, 4) in strides, the means of distributions (P, 4, N) over bins."""
    bins = torch.arange(logits.shape[2], device=logits.device, dtype=logits.dtype)
    return (logits.softmax(2) * bins).sum(2)


def _distribution_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Return (P,) the weighed mean over four sides of the cross-entropy with the two nearest bins.

    Args:
        logits: (P, 4, N) of the distributions.
        distances: (P, 4) what they shall be, in strides.
    """
    bins = logits.shape[2]
    goal = distances.clamp(0, bins - 1 - LAST_BIN_MARGIN)
    lower = goal.long()
    share = goal - lower  # of the bin above
    nearest = torch.stack((lower, lower + 1), dim=2)
    weights = torch.stack((1 - share, share), dim=2)
    log_probabilities = logits.log_softmax(2).gather(2, nearest)
    return DISTRIBUTION_WEIGHT * -(log_probabilities * weights).sum(2).mean(1)
