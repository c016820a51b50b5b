"""Suppress overlapping boxes exactly as the greedy loop does, but as a fixed point, in blocks.

Sorted boxes, scores and labels in, the positions of kept boxes out. Batched, of static shapes, of
standard operators only. Knows nothing of heads and levels.

Greedy suppression keeps a box exactly if no kept box before it overlaps it. With S[i, j] = "i comes
before j, same class, IoU above the threshold", its result is the one solution of keep = valid and
not (keep @ S). Iterating from keep = valid settles at least one more box a round, so what no longer
changes is greedy suppression's own result.

`nms` iterates until nothing changes, in blocks of `BLOCK` boxes that keep the matrix small: a block
is first checked against the boxes kept already, and no block is looked at once enough are kept.
`nms_unrolled` takes a fixed number of rounds instead of a loop, and says whether they were enough.
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
    """Suppress greedily, class by class, and stop at `max_det` boxes.

    Args:
        boxes: (B, N, 4) xyxy, in any one frame, in order of falling score.
        scores: (B, N); 0 marks a row that holds no box, and all after it.
        labels: (B, N) int64, >= 0.
        iou_threshold: of two boxes of a class that overlap by more, the later goes.
        max_det: at most this many are kept.

    Returns:
        The positions of kept boxes (B, max_det) int64, best first, N past the last; and how many
        there are (B,) int64.
    """
    batch, count = scores.shape
    blocks = -(-count // BLOCK)
    # At least one row beyond all boxes, for empty places to point to.
    spare = blocks * BLOCK + 1 - count
    boxes, scores = F.pad(boxes, (0, 0, 0, spare)), F.pad(scores, (0, spare))
    labels = F.pad(labels, (0, spare), value=-1)

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
        keep = _fixed_point(valid, _suppresses(block_boxes, block_labels, iou_threshold))
        # Kept boxes go behind those of earlier blocks, all others to a place that is then cut off.
        place = kept_count[:, None] + keep.long().cumsum(1) - 1
        place = torch.where(keep & (place < max_det), place, max_det)
        # At least as wide as a block: TensorRT takes no scatter of more places than there is room.
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
    """Return which boxes are of one class and overlap.

    Args:
        first: (B, N, 4) xyxy.
        first_labels: (B, N).
        second: (B, M, 4) xyxy, in the frame of `first`.
        second_labels: (B, M).
        iou_threshold: overlap that must be exceeded.

    Returns:
        (B, N, M) bool.
    """
    return (box_iou(first, second) > iou_threshold) & (
        first_labels.unsqueeze(2) == second_labels.unsqueeze(1)
    )


def _suppresses(boxes: Tensor, labels: Tensor, iou_threshold: Tensor | float) -> Tensor:
    """Return S[i, j], (B, N, N) bool: box i comes before j, is of its class, and overlaps it.

    Args:
        boxes: (B, N, 4) xyxy, best first.
        labels: (B, N).
        iou_threshold: overlap that must be exceeded.
    """
    position = torch.arange(labels.shape[1], device=labels.device)
    overlaps = overlapping(boxes, labels, boxes, labels, iou_threshold)
    return overlaps & (position[:, None] < position)


def _fixed_point(valid: Tensor, suppresses: Tensor) -> Tensor:
    """Return the one solution (B, N) of keep = valid and not (keep @ suppresses).

    Args:
        valid: (B, N) bool.
        suppresses: (B, N, N) bool, strictly upper triangular.
    """
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
    """Repeat a step while a condition holds: one Loop in an exported graph, else a plain loop.

    Args:
        condition: of the state's tensors, a scalar bool tensor.
        step: of the state's tensors, the next state.
        state: tensors to begin with.
    """
    if torch.compiler.is_exporting():
        return torch.while_loop(condition, step, state)
    while condition(*state):
        state = step(*state)
    return state


UNROLLED_BLOCK = 1280  # three of them hold all candidates
HALF_COUNTS = 2048  # up to here float16 holds every whole number
# Candidates that held the best 100 detections of every measured image (docs/tensorrt.md).
BEST, BEST_HOLDS = 1024, 100
ROUNDS = 16  # measured images needed 12 at most (docs/tensorrt.md)


class UnrolledKept(NamedTuple):
    """The boxes that `nms_unrolled` keeps.

    Attributes:
        kept: (B, max_det) int64 positions, best first, N past the last.
        num_dets: (B,) int64, how many these are.
        exact: (B,) bool, whether `nms` keeps the same for sure.
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
    mask_type: torch.dtype = torch.float32,
    best: int | None = None,
) -> UnrolledKept:
    """Suppress greedily, class by class, in a fixed number of rounds: no loop on the data.

    Args:
        boxes: (B, N, 4) xyxy, in any one frame, in order of falling score.
        scores: (B, N); 0 marks a row that holds no box, and all after it.
        labels: (B, N) int64, >= 0.
        iou_threshold: of two boxes of a class that overlap by more, the later goes.
        max_det: at most this many are kept.
        block: rows that are looked at together.
        rounds: of each block; every one settles at least one more box, in practice a large part of
            those that are left.
        mask_type: of the masks. float16 reads and writes half as much and is as exact, as it holds
            every count of boxes up to 2048.
        best: rows that are looked at, all where not given. An image that would need more is not
            exact.
    """
    if mask_type == torch.float16 and block > HALF_COUNTS:
        raise ValueError(f"blocks of {block} boxes; float16 counts {HALF_COUNTS} exactly")
    batch, count = scores.shape
    last = min(best or count, count)
    # Kept positions, counted from the end, so that the largest come first; 0 for none. Floats hold
    # them exactly, and every runtime has a TopK of floats.
    from_end = torch.zeros(batch, max_det, device=scores.device)
    exact = torch.ones(batch, dtype=torch.bool, device=scores.device)
    for start in range(0, last, block):
        end = min(start + block, last)
        part, part_labels = boxes[:, start:end], labels[:, start:end]
        valid = scores[:, start:end] > 0
        if start:
            kept = count - from_end.long()
            valid = valid & ~_covered(boxes, labels, kept, part, part_labels, iou_threshold)
        keep, changed = _rounds(part, part_labels, valid, iou_threshold, rounds, mask_type)
        place = (from_end > 0).sum(1, keepdim=True) + keep.long().cumsum(1)
        # Boxes behind the last one that is kept need not have settled.
        counts = place - keep.long() < max_det
        exact = exact & ~(changed & counts).any(1)
        own = torch.where(keep, count - torch.arange(start, end, device=keep.device), 0).float()
        from_end = torch.cat((from_end, own), 1).topk(max_det, dim=1).values
    num_dets = (from_end > 0).sum(1)
    if last < count:
        exact = exact & ((num_dets >= max_det) | (scores[:, last] <= 0))
    return UnrolledKept(count - from_end.long(), num_dets, exact)


def best_for(max_det: int) -> int | None:
    """Return how many candidates hold this many detections of nearly all images; None for all."""
    return BEST if max_det <= BEST_HOLDS else None


def _covered(
    boxes: Tensor,
    labels: Tensor,
    kept: Tensor,
    part: Tensor,
    part_labels: Tensor,
    iou_threshold: Tensor | float,
) -> Tensor:
    """Return which boxes of a block overlap a kept box of an earlier block, (B, P) bool.

    Args:
        boxes: (B, N, 4) xyxy, all.
        labels: (B, N) of all boxes.
        kept: (B, max_det) positions of kept boxes, N for none.
        part: (B, P, 4) the block's boxes.
        part_labels: (B, P) their labels.
        iou_threshold: overlap that must be exceeded.
    """
    rows = kept.clamp(max=labels.shape[1] - 1)
    kept_labels = torch.where(kept < labels.shape[1], labels.gather(1, rows), -1)
    kept_boxes = boxes.gather(1, rows.unsqueeze(2).expand(-1, -1, 4))
    return overlapping(kept_boxes, kept_labels, part, part_labels, iou_threshold).any(1)


def _rounds(
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    iou_threshold: Tensor | float,
    rounds: int,
    mask_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return which boxes of a block are kept after some rounds, and which the last one changed.

    Args:
        boxes: (B, P, 4) xyxy, best first.
        labels: (B, P).
        valid: (B, P) bool; other boxes are never kept.
        iou_threshold: overlap that must be exceeded.
        rounds: how many.
        mask_type: of the masks, 0 and 1.

    Returns:
        Two (B, P) bool.
    """
    matrix = _suppresses(boxes, labels, iou_threshold).to(mask_type)
    free = valid.to(mask_type).unsqueeze(1)
    before = keep = free
    for _ in range(rounds):
        # 1, less the number of kept boxes that overlap it, is above 0 only without any.
        before, keep = keep, (free - torch.bmm(keep, matrix)).relu()
    return keep.squeeze(1) > 0, (before != keep).squeeze(1)
