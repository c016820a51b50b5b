"""`nms` with a fixed number of rounds and no loop: for CUDA graphs and compilers, where nothing may depend on the data.

Blocks of boxes come one after the other, and each repeats so many times what `nms` repeats until nothing changes. Whether that was
enough is an output of its own, for every picture: where it says so the result is that of `nms`, else it must be thrown away.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tood_deploy.model.nms import overlapping
from tood_deploy.model.postprocess import MAX_DET, BatchResult, Candidates, take_kept

BLOCK = 1280  # three of them hold all candidates
ROUNDS = 16  # pictures were seen to need 12 at most (docs/tensorrt.md)


class UnrolledKept(NamedTuple):
    """What `nms_unrolled` keeps.

    Attributes:
        kept: (B, max_det) int64 positions, best first, N past the last.
        num_dets: (B,) int64, how many these are.
        exact: (B,) bool, whether this is what `nms` keeps.
    """

    kept: Tensor
    num_dets: Tensor
    exact: Tensor


def nms_unrolled(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: Tensor | float,
    max_det: int,
    *,
    block: int = BLOCK,
    rounds: int = ROUNDS,
) -> UnrolledKept:
    """Class-wise greedy suppression, in so many rounds.

    Args:
        boxes: (B, N, 4) xyxy, in any one frame, in order of falling score.
        scores: (B, N); 0 marks a row that holds no box, and all after it.
        labels: (B, N) int64, >= 0.
        iou_threshold: of two boxes of a class that overlap by more, the later goes.
        max_det: at most this many are kept.
        block: rows that are looked at together.
        rounds: how often; each settles at least one more box of a block, in practice a large part of those that are left.
    """
    batch, count = scores.shape
    # Positions counted from the end, 0 for none, so that the largest come first. Floats hold them exactly, and TopK takes these everywhere.
    from_end = torch.zeros(batch, max_det, device=scores.device)
    exact = torch.ones(batch, dtype=torch.bool, device=scores.device)
    for start in range(0, count, block):
        end = min(start + block, count)
        part, part_labels, valid = boxes[:, start:end], labels[:, start:end], scores[:, start:end] > 0
        if start:
            valid = valid & ~_covered(boxes, labels, count - from_end.long(), part, part_labels, iou_threshold)
        keep, changed = _rounds(part, part_labels, valid, iou_threshold, rounds)
        place = (from_end > 0).sum(1, keepdim=True) + keep.long().cumsum(1)
        wanted = place - keep.long() < max_det  # up to the last box that is wanted: what is behind it need not have settled
        exact = exact & ~(changed & wanted).any(1)
        own = torch.where(keep, count - torch.arange(start, end, device=keep.device), 0).float()
        from_end = torch.cat((from_end, own), 1).topk(max_det, dim=1).values
    return UnrolledKept(count - from_end.long(), (from_end > 0).sum(1), exact)


def _covered(boxes: Tensor, labels: Tensor, kept: Tensor, part: Tensor, part_labels: Tensor, iou_threshold: Tensor | float) -> Tensor:
    """Which boxes of a block overlap a kept one of an earlier block, (B, block) bool; `kept` holds positions, N for none."""
    rows = kept.clamp(max=labels.shape[1] - 1)
    kept_labels = torch.where(kept < labels.shape[1], labels.gather(1, rows), -1)
    return overlapping(boxes.gather(1, rows.unsqueeze(2).expand(-1, -1, 4)), kept_labels, part, part_labels, iou_threshold).any(1)


def _rounds(boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: Tensor | float, rounds: int) -> tuple[Tensor, Tensor]:
    """What of a block is kept after so many rounds, and what the last one changed: two (B, block) bool."""
    position = torch.arange(labels.shape[1], device=labels.device)
    matrix = (overlapping(boxes, labels, boxes, labels, iou_threshold) & (position[:, None] < position)).float()
    free = valid.float().unsqueeze(1)
    before = keep = free
    for _ in range(rounds):
        before, keep = keep, (free - torch.bmm(keep, matrix)).relu()  # less the number of kept boxes that overlap it: 1 or nothing
    return keep.squeeze(1) > 0, (before != keep).squeeze(1)


def suppress_unrolled(candidates: Candidates, iou_threshold: Tensor | float, max_det: int = MAX_DET) -> tuple[BatchResult, Tensor]:
    """As `suppress`, and whether each picture's detections are those of `suppress`, (B,) bool."""
    found = nms_unrolled(*candidates, iou_threshold, max_det)
    return take_kept(candidates, found.kept, found.num_dets), found.exact
