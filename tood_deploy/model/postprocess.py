"""Turn the head's maps into detections, in each detector's own order of operations.

Probabilities and boxes of every level in, candidates and then detections in pixels of the network
input out. One implementation for eager runs, export and evaluation; all shapes but batch, height
and width are static. Knows neither network nor image (reference/SPEC.md section 4,
reference/SPEC_FAMILY.md section 0).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.model.boxes import box_iou
from tood_deploy.model.head import HeadOutput
from tood_deploy.model.nms import best_for, nms, nms_unrolled
from tood_deploy.presets import (
    MAX_CANDIDATES,
    MIN_VOTES,
    MIN_VOTING_IOU,
    STRIDES,
    VOTING_SIGMA,
    Convention,
    Preset,
)

CANDIDATES_PER_LEVEL = 1000
MAX_DET = 100


class Rules(NamedTuple):
    """How candidates are selected.

    Attributes:
        limits_pairs: keep the best (anchor, class) pairs of each level; else all pairs of the best
            anchors.
        clips: clamp boxes to the image.
        drops_empty: drop boxes without area.
    """

    limits_pairs: bool = True
    clips: bool = False
    drops_empty: bool = True


OF_CONVENTION: dict[Convention, Rules] = {
    "mmdet": Rules(),
    "authors": Rules(limits_pairs=False, clips=True, drops_empty=False),
}


def rules_of(preset: Preset) -> Rules:
    """Return the rules of a detector.

    MMDetection clips no boxes of TOOD, and those of all others. PAA keeps whole anchors, as TOOD's
    authors do.
    """
    if preset.detector == "tood":
        return OF_CONVENTION[preset.convention]
    whole = preset.detector == "paa"
    return Rules(limits_pairs=not whole, clips=True, drops_empty=not whole)


class Candidates(NamedTuple):
    """The input of suppression, in order of falling score.

    Attributes:
        boxes_net: (B, N, 4) xyxy, pixels of the network input.
        scores: (B, N); 0 where there is no candidate.
        labels: (B, N) int64.
    """

    boxes_net: Tensor
    scores: Tensor
    labels: Tensor


class BatchResult(NamedTuple):
    """Detections of a batch, best first; rows past `num_dets` are zero.

    Attributes:
        num_dets: (B,) int32.
        boxes_net: (B, D, 4) float32 xyxy, pixels of the network input.
        scores: (B, D) float32.
        labels: (B, D) int32.
    """

    num_dets: Tensor
    boxes_net: Tensor
    scores: Tensor
    labels: Tensor


def suppress(
    candidates: Candidates, iou_threshold: Tensor | float, max_det: int = MAX_DET
) -> BatchResult:
    """Suppress candidates class by class, exactly.

    Args:
        candidates: best first.
        iou_threshold: of two boxes of a class that overlap by more, the one with the lower score
            goes.
        max_det: D, detections of an image at most.
    """
    return _take_kept(candidates, *nms(*candidates, iou_threshold, max_det))


def suppress_unrolled(
    candidates: Candidates, iou_threshold: Tensor | float, max_det: int = MAX_DET
) -> tuple[BatchResult, Tensor]:
    """Suppress in a fixed number of rounds, without a loop on the data.

    Up to 100 detections are looked for among the best 1024 candidates alone.

    Args:
        candidates, iou_threshold, max_det: as of `suppress`.

    Returns:
        The detections, and whether each image's are those of `suppress`, (B,) bool.
    """
    result = nms_unrolled(*candidates, iou_threshold, max_det, best=best_for(max_det))
    return _take_kept(candidates, result.kept, result.num_dets), result.exact


def _take_kept(candidates: Candidates, kept: Tensor, num_dets: Tensor) -> BatchResult:
    """Gather kept candidates into rows of detections.

    Args:
        candidates: N of each image.
        kept: (B, D) their positions, N for none.
        num_dets: (B,) how many of the positions count.
    """
    rows = kept.clamp(max=candidates.scores.shape[1] - 1)
    real = torch.arange(kept.shape[1], device=kept.device) < num_dets[:, None]
    boxes = candidates.boxes_net.gather(1, rows.unsqueeze(2).expand(-1, -1, 4)) * real.unsqueeze(2)
    return BatchResult(
        num_dets.int(),
        boxes,
        candidates.scores.gather(1, rows) * real,
        (candidates.labels.gather(1, rows) * real).int(),
    )


def vote(detections: BatchResult, candidates: Candidates) -> BatchResult:
    """Move every kept box to the weighted mean of the candidates of its class around it.

    PAA's score voting (reference/SPEC_FAMILY.md section 3); scores stay.

    Args:
        detections: what suppression kept of the candidates.
        candidates: its whole input.
    """
    kept = detections.boxes_net
    iou = box_iou(kept, candidates.boxes_net)
    same = detections.labels.unsqueeze(2) == candidates.labels.unsqueeze(1)
    closeness = (-((1 - iou) ** 2) / VOTING_SIGMA).exp()
    weights = closeness * candidates.scores.unsqueeze(1)
    weights = torch.where(same & (iou > MIN_VOTING_IOU), weights, 0.0)
    total = weights.sum(2, keepdim=True)
    mean = torch.bmm(weights, candidates.boxes_net) / total.clamp(min=MIN_VOTES)
    # A box of no width or height overlaps nothing, not even itself: it stays where it is.
    voted = (total > MIN_VOTES) & (detections.scores.unsqueeze(2) > 0)
    return detections._replace(boxes_net=torch.where(voted, mean, kept))


def select_candidates(
    out: HeadOutput,
    valid_hw: Tensor,
    score_threshold: Tensor | float,
    *,
    rules: Rules = OF_CONVENTION["mmdet"],
    per_level: int = CANDIDATES_PER_LEVEL,
    ranking: Sequence[Tensor] = (),
) -> Candidates:
    """Select the candidates of all levels, best first, at most `MAX_CANDIDATES`.

    Args:
        out: the head's maps, levels of stride 8 to 128.
        valid_hw: (B, 2) rows and columns of each input that hold real pixels.
        score_threshold: candidates have a score above it; others stay, with a score of 0.
        rules: of the detector.
        per_level: the published `nms_pre`.
        ranking: (B, K, h, w) probabilities of every level that are limited, and held against the
            threshold, in place of the scores.
    """
    pairs = per_level if rules.limits_pairs else MAX_CANDIDATES
    maps = zip(out.scores, ranking or out.scores, out.boxes_strides, STRIDES, strict=True)
    levels = [
        _select_level(scores, ranks, boxes * stride, per_level, pairs)
        for scores, ranks, boxes, stride in maps
    ]
    boxes, scores, labels, *ranks = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    scores = scores * ((ranks[0] if ranking else scores) > score_threshold)
    if rules.clips:
        height, width = valid_hw.to(boxes.dtype).unsqueeze(1).unbind(2)
        boxes = boxes.clamp(min=0)
        boxes = torch.minimum(boxes, torch.stack((width, height, width, height), dim=2))
    if rules.drops_empty:
        scores = scores * ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1]))
    scores, order = scores.topk(min(MAX_CANDIDATES, scores.shape[1]), dim=1)
    boxes = boxes.gather(1, order.unsqueeze(2).expand(-1, -1, 4))
    return Candidates(boxes, scores, labels.gather(1, order))


def _select_level(
    scores: Tensor, ranks: Tensor, boxes: Tensor, per_level: int, pairs: int
) -> tuple[Tensor, ...]:
    """Select the best (anchor, class) pairs of one level.

    A pair among the best `per_level` belongs to one of the `per_level` best anchors, so anchors are
    thinned first.

    Args:
        scores: (B, K, h, w).
        ranks: (B, K, h, w) by which pairs are the best; the same tensor where scores are.
        boxes: (B, 4, h, w) xyxy, in any one frame.
        per_level: anchors kept. A level that has fewer is filled up with pairs of score 0, so that
            counts do not depend on sizes.
        pairs: P, pairs kept.

    Returns:
        Boxes (B, P, 4), scores (B, P), labels (B, P), and ranks (B, P) unless scores are.
    """
    classes, own_ranks = scores.shape[1], ranks is not scores
    ranks, boxes = ranks.flatten(2), boxes.flatten(2)
    best = F.pad(ranks.amax(dim=1), (0, per_level))
    anchors = best.topk(per_level, dim=1).indices
    real = anchors < ranks.shape[2]
    anchors = torch.where(real, anchors, 0)
    rows = anchors.unsqueeze(1).expand(-1, classes, -1)
    thinned = ranks.gather(2, rows) * real.unsqueeze(1)
    pair_ranks, pair = thinned.flatten(1).topk(min(pairs, classes * per_level), dim=1)
    labels = torch.div(pair, per_level, rounding_mode="floor")
    anchor = anchors.gather(1, pair - labels * per_level)
    pair_boxes = boxes.gather(2, anchor.unsqueeze(1).expand(-1, 4, -1)).transpose(1, 2)
    if not own_ranks:
        return pair_boxes, pair_ranks, labels
    pair_scores = scores.flatten(2).gather(2, rows).flatten(1).gather(1, pair)
    return pair_boxes, pair_scores, labels, pair_ranks
