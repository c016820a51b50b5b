"""Exact greedy non-maximum suppression as a fixed point, in blocks. Batched, static shapes, standard operators only.

Greedy suppression keeps a box exactly if no kept box before it overlaps it. With S[i, j] = "i comes before j, same class, IoU above
the threshold", its result is the one solution of keep = valid and not (keep @ S): iterating from keep = valid settles at least one more
box a round, so what no longer changes is greedy suppression's own result. Blocks of `BLOCK` boxes in order of score keep the
matrix small: a block is first checked against what is kept already, and no block is looked at once enough is kept.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.model.boxes import box_iou

BLOCK = 256

State = TypeVar("State", bound=tuple[Tensor, ...])


def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: Tensor | float, max_det: int
) -> tuple[Tensor, Tensor]:
    """Class-wise greedy suppression, stopped at `max_det` boxes.

    Args:
        boxes: (B, N, 4) xyxy, in any one frame, in order of falling score.
        scores: (B, N); 0 marks a row that holds no box, and all after it.
        labels: (B, N) int64, >= 0.
        iou_threshold: of two boxes of a class that overlap by more, the later goes.
        max_det: at most this many are kept.

    Returns:
        The positions of kept boxes (B, max_det) int64, best first, N past the last; and how many there are (B,) int64.
    """
    batch, count = scores.shape
    blocks = -(-count // BLOCK)
    spare = (
        blocks * BLOCK + 1 - count
    )  # at least one row beyond all boxes, that empty places point to
    boxes, scores, labels = (
        F.pad(boxes, (0, 0, 0, spare)),
        F.pad(scores, (0, spare)),
        F.pad(labels, (0, spare), value=-1),
    )

    def unfinished(start: Tensor, kept: Tensor, kept_count: Tensor) -> Tensor:
        more = scores.index_select(1, start.reshape(1)).squeeze(1) > 0
        return (more & (kept_count < max_det)).any()

    def next_block(
        start: Tensor, kept: Tensor, kept_count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = start + torch.arange(BLOCK, device=scores.device)
        block_boxes, block_labels = boxes.index_select(1, rows), labels.index_select(1, rows)
        kept_boxes = boxes.gather(1, kept.unsqueeze(2).expand(-1, -1, 4))
        covered = overlapping(
            kept_boxes, labels.gather(1, kept), block_boxes, block_labels, iou_threshold
        ).any(dim=1)
        valid = (scores.index_select(1, rows) > 0) & ~covered
        earlier = torch.arange(BLOCK, device=scores.device)
        suppresses = overlapping(
            block_boxes, block_labels, block_boxes, block_labels, iou_threshold
        ) & (earlier[:, None] < earlier)
        keep = _fixed_point(valid, suppresses)
        # Kept boxes go to the places behind those of earlier blocks, all others to a place that is then cut off.
        place = kept_count[:, None] + keep.long().cumsum(1) - 1
        place = torch.where(keep & (place < max_det), place, max_det)
        # At least as wide as a block, as TensorRT takes no scatter of more places than it has room for.
        room = F.pad(kept, (0, max(1, BLOCK - max_det)))
        kept = room.scatter(1, place, rows.expand(batch, -1))[:, :max_det].contiguous()
        return start + BLOCK, kept, (kept_count + keep.sum(1)).clamp(max=max_det)

    start = torch.zeros((), dtype=torch.int64, device=scores.device)
    nothing = torch.full((batch, max_det), count, dtype=torch.int64, device=scores.device)
    _, kept, kept_count = _repeat_while(
        unfinished, next_block, (start, nothing, torch.zeros_like(nothing[:, 0]))
    )
    return kept, kept_count


def overlapping(
    first: Tensor,
    first_labels: Tensor,
    second: Tensor,
    second_labels: Tensor,
    iou_threshold: Tensor | float,
) -> Tensor:
    """(B, N, M) bool: same class and IoU above the threshold."""
    return (box_iou(first, second) > iou_threshold) & (
        first_labels.unsqueeze(2) == second_labels.unsqueeze(1)
    )


def _fixed_point(valid: Tensor, suppresses: Tensor) -> Tensor:
    """The one solution (B, N) of keep = valid and not (keep @ suppresses), for a strictly upper triangular (B, N, N)."""
    matrix = suppresses.float()

    def settle(keep: Tensor) -> Tensor:
        return valid & (torch.bmm(keep.float().unsqueeze(1), matrix).squeeze(1) == 0)

    def changing(before: Tensor, after: Tensor) -> Tensor:
        return (before != after).any()

    def next_round(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        return after.clone(), settle(after)

    return _repeat_while(changing, next_round, (valid.clone(), settle(valid)))[1]


def _repeat_while(
    condition: Callable[..., Tensor], step: Callable[..., State], state: State
) -> State:
    """Repeats `step` while `condition` holds; one Loop in an exported graph, a plain loop otherwise."""
    if torch.compiler.is_exporting():
        return torch.while_loop(condition, step, state)
    while condition(*state):
        state = step(*state)
    return state


UNROLLED_BLOCK = 1280  # three of them hold all candidates
ROUNDS = 16  # images were seen to need 12 at most (docs/tensorrt.md)


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
    block: int = UNROLLED_BLOCK,
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
        part, part_labels, valid = (
            boxes[:, start:end],
            labels[:, start:end],
            scores[:, start:end] > 0,
        )
        if start:
            valid = valid & ~_covered(
                boxes, labels, count - from_end.long(), part, part_labels, iou_threshold
            )
        keep, changed = _rounds(part, part_labels, valid, iou_threshold, rounds)
        place = (from_end > 0).sum(1, keepdim=True) + keep.long().cumsum(1)
        wanted = (
            place - keep.long() < max_det
        )  # up to the last box that is wanted: what is behind it need not have settled
        exact = exact & ~(changed & wanted).any(1)
        own = torch.where(keep, count - torch.arange(start, end, device=keep.device), 0).float()
        from_end = torch.cat((from_end, own), 1).topk(max_det, dim=1).values
    return UnrolledKept(count - from_end.long(), (from_end > 0).sum(1), exact)


def _covered(
    boxes: Tensor,
    labels: Tensor,
    kept: Tensor,
    part: Tensor,
    part_labels: Tensor,
    iou_threshold: Tensor | float,
) -> Tensor:
    """Which boxes of a block overlap a kept one of an earlier block, (B, block) bool; `kept` holds positions, N for none."""
    rows = kept.clamp(max=labels.shape[1] - 1)
    kept_labels = torch.where(kept < labels.shape[1], labels.gather(1, rows), -1)
    return overlapping(
        boxes.gather(1, rows.unsqueeze(2).expand(-1, -1, 4)),
        kept_labels,
        part,
        part_labels,
        iou_threshold,
    ).any(1)


def _rounds(
    boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: Tensor | float, rounds: int
) -> tuple[Tensor, Tensor]:
    """What of a block is kept after so many rounds, and what the last one changed: two (B, block) bool."""
    position = torch.arange(labels.shape[1], device=labels.device)
    matrix = (
        overlapping(boxes, labels, boxes, labels, iou_threshold) & (position[:, None] < position)
    ).float()
    free = valid.float().unsqueeze(1)
    before = keep = free
    for _ in range(rounds):
        before, keep = (
            keep,
            (free - torch.bmm(keep, matrix)).relu(),
        )  # less the number of kept boxes that overlap it: 1 or nothing
    return keep.squeeze(1) > 0, (before != keep).squeeze(1)
