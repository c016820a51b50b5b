"""The loss of ATSS: raw maps in; class, box and centre-ness losses out.

Source: reference/SPEC_FAMILY.md sections 0 and 1.
"""

from torch import Tensor
from torch.nn import functional as F

from tood_deploy.model.boxes import decode_deltas
from tood_deploy.presets import Preset
from tood_deploy.training.assign import AnchorGrid
from tood_deploy.training.loss import (
    BOX_WEIGHT,
    FlatMaps,
    MapsLoss,
    Positives,
    atss_positives,
    class_loss,
    focal_loss_of_logits,
    giou_loss,
    positives_factor,
    weights_factor,
)


class AtssLoss(MapsLoss):
    """The losses of an ATSS preset."""

    term_names: tuple[str, ...] = ("cls", "box", "centerness")

    def terms(self, flat: FlatMaps) -> tuple[dict[str, Tensor], Positives]:
        """Return class, box and centre-ness losses, and the positives."""
        positives = atss_positives(flat.grid, flat.targets)
        count = positives_factor(positives, len(flat.targets))
        boxes = decode_positives(flat.regression, positives, flat.grid, self.preset)
        box_losses = giou_loss(boxes, positives.boxes_strides(flat.grid)) * positives.weights
        by_anchor = {
            "cls": class_loss(flat.classes, positives, focal_loss_of_logits, flat.valid) / count,
            "box": positives.sum_at_anchors(BOX_WEIGHT * box_losses, flat.valid.shape[1])
            / weights_factor(positives.weights),
            "centerness": quality_loss(flat.quality, positives, positives.weights) / count,
        }
        return by_anchor, positives


def decode_positives(
    regression: Tensor, positives: Positives, grid: AnchorGrid, preset: Preset
) -> Tensor:
    """Return the positives' predicted boxes, (P, 4) xyxy in strides.

    Args:
        regression: (B, 4, A) deltas.
        positives: of the batch.
        grid: the anchor points.
        preset: says how deltas are coded.
    """
    return decode_deltas(
        positives.of(regression),
        positives.points_strides(grid),
        preset.anchor_side,
        preset.delta_means,
        preset.delta_stds,
    )


def quality_loss(quality: Tensor, positives: Positives, goal: Tensor) -> Tensor:
    """Return (A,) the cross-entropy of the positives' quality, summed over the batch.

    Args:
        quality: (B, A) logits.
        positives: of the batch.
        goal: (P,) from 0 to 1.
    """
    logits = quality[positives.images, positives.anchors]
    losses = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    return positives.sum_at_anchors(losses, quality.shape[1])
