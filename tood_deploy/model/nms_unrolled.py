"""`nms` with a fixed number of rounds and no loop: for CUDA graphs and compilers, where nothing may depend on the data.

It looks at the best `MOST` boxes only, all at once, and repeats `ROUNDS` times what `nms` repeats until nothing changes. Whether that was
enough is an output of its own, for every picture: where it says so the result is that of `nms`, else it must be thrown away.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.model.nms import overlapping
from tood_deploy.model.postprocess import MAX_DET, BatchResult, Candidates, take_kept

MOST = 1024
ROUNDS = 16  # crowded pictures settle within 6 to 10


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
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: Tensor | float, max_det: int, *, most: int = MOST, rounds: int = ROUNDS
) -> UnrolledKept:
    """Class-wise greedy suppression of the best boxes, in so many rounds.

    Args:
        boxes: (B, N, 4) xyxy, in any one frame, in order of falling score.
        scores: (B, N); 0 marks a row that holds no box, and all after it.
        labels: (B, N) int64, >= 0.
        iou_threshold: of two boxes of a class that overlap by more, the later goes.
        max_det: at most this many are kept.
        most: rows that are looked at.
        rounds: how often; each settles at least one more box, in practice a large part of those that are left.
    """
    count, looked_at = scores.shape[1], min(most, scores.shape[1])
    keep, changed = _rounds(boxes[:, :looked_at], scores[:, :looked_at], labels[:, :looked_at], iou_threshold, rounds)
    place = keep.long().cumsum(1)
    wanted = place - keep.long() < max_det  # up to the last box that is wanted: what is behind it need not have settled
    exact = ~(changed & wanted).any(1)
    if looked_at < count:
        exact = exact & ((place[:, -1] >= max_det) | (scores[:, looked_at] <= 0))
    # Positions counted from the end, so that the largest come first. Floats hold them exactly, and TopK takes these everywhere.
    from_end = torch.where(keep, looked_at - torch.arange(looked_at, device=keep.device), 0).float()
    from_end = F.pad(from_end, (0, max(0, max_det - looked_at))).topk(max_det, dim=1).values.long()
    return UnrolledKept(torch.where(from_end > 0, looked_at - from_end, count), place[:, -1].clamp(max=max_det), exact)


def _rounds(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: Tensor | float, rounds: int) -> tuple[Tensor, Tensor]:
    """What is kept after so many rounds, and what the last one changed: two (B, N) bool."""
    position = torch.arange(scores.shape[1], device=scores.device)
    suppresses = overlapping(boxes, labels, boxes, labels, iou_threshold) & (position[:, None] < position)
    matrix, valid = suppresses.float(), scores > 0
    before = keep = valid
    for _ in range(rounds):
        before, keep = keep, valid & (torch.bmm(keep.float().unsqueeze(1), matrix).squeeze(1) == 0)
    return keep, before != keep


def suppress_unrolled(candidates: Candidates, iou_threshold: Tensor | float, max_det: int = MAX_DET) -> tuple[BatchResult, Tensor]:
    """As `suppress`, and whether each picture's detections are those of `suppress`, (B,) bool."""
    found = nms_unrolled(*candidates, iou_threshold, max_det)
    return take_kept(candidates, found.kept, found.num_dets), found.exact
