"""Find the detections of an image whose suppression needed more than an engine looks at.

Candidates of a batch in, its detections completed out: by the plain loop, on the CPU. Knows no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections
from tood_deploy.presets import MIN_VOTES, MIN_VOTING_IOU, VOTING_SIGMA


class BatchCandidates(NamedTuple):
    """The input of suppression, in order of falling score.

    Attributes:
        boxes_net: (B, N, 4) float32 xyxy, pixels of the network input.
        scores: (B, N) float32; 0 where there is no candidate.
        labels: (B, N) int64.
    """

    boxes_net: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def finish_exactly(
    detections: BatchDetections, candidates: BatchCandidates, iou_threshold: float, *, voting: bool
) -> BatchDetections:
    """Return the detections of a batch, with those of its images that have a count of -1.

    Args:
        detections: of the batch; other images stay as they are.
        candidates: of the batch.
        iou_threshold: of two boxes of a class that overlap by more, the one with the lower score
            goes.
        voting: whether candidates vote on the boxes that are kept, as PAA's do.
    """
    num_dets, boxes_net = detections.num_dets.copy(), detections.boxes_net.copy()
    scores, labels = detections.scores.copy(), detections.labels.copy()
    for image in np.flatnonzero(num_dets < 0):
        own = BatchCandidates(*(part[image] for part in candidates))
        kept = suppress_greedily(own, iou_threshold, scores.shape[1])
        rows = slice(len(kept))
        num_dets[image] = len(kept)
        boxes_net[image, rows] = vote(own, kept) if voting else own.boxes_net[kept]
        scores[image, rows] = own.scores[kept]
        labels[image, rows] = own.labels[kept]
    return BatchDetections(num_dets, boxes_net, scores, labels)


def suppress_greedily(
    candidates: BatchCandidates, iou_threshold: float, max_det: int
) -> NDArray[np.int64]:
    """Return the positions of the candidates of one image that are kept, best first.

    Args:
        candidates: of the image, (N, ...).
        iou_threshold: as of `finish_exactly`.
        max_det: at most this many.
    """
    boxes, scores, labels = candidates
    left = scores > 0
    kept: list[int] = []
    while len(kept) < max_det and left.any():
        first = int(left.argmax())
        kept.append(first)
        covered = box_iou(boxes[first : first + 1], boxes)[0] > np.float32(iou_threshold)
        left &= ~(covered & (labels == labels[first]))
        left[first] = False  # a box of no area does not even cover itself
    return np.array(kept, np.int64)


def vote(candidates: BatchCandidates, kept: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return kept boxes (D, 4), moved to the weighted mean of those of their class around them.

    PAA's score voting, as the network has it for all other images (reference/SPEC_FAMILY.md section
    3).
    """
    boxes, scores, labels = candidates
    iou = box_iou(boxes[kept], boxes)
    weights = np.exp(-((1 - iou) ** 2) / np.float32(VOTING_SIGMA)) * scores
    votes = (iou > MIN_VOTING_IOU) & (labels[kept, None] == labels)
    weights = np.where(votes, weights, np.float32(0))
    total = weights.sum(1, keepdims=True)
    mean = weights @ boxes / total.clip(MIN_VOTES)
    return np.where(total > MIN_VOTES, mean, boxes[kept])


def box_iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the overlap of every pair, as the network computes it.

    Args:
        first: (N, 4) xyxy.
        second: (M, 4) xyxy, in the same frame.

    Returns:
        (N, M); NaN between boxes without any area.
    """
    one, other = first[:, None], second[None]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    overlap = sides.clip(0).prod(2)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(2) for boxes in (one, other)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return overlap / (areas[0] + areas[1] - overlap)
