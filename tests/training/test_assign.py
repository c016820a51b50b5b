"""Vectorised assignment beside plain loops, and its time and memory at full size."""

import math
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tood_deploy.training.assign import (
    AnchorGrid,
    Assignment,
    assign_atss,
    assign_task_aligned,
    normalised_metrics,
)

STRIDES = (8, 16, 32, 64, 128)


def grid_of(height: int, width: int, **anchors: float) -> AnchorGrid:
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]
    return AnchorGrid.of_maps([torch.zeros(1, 1, *size) for size in sizes], **anchors)


def iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / max(union, 1e-6)


def inside(point: list[float], box: list[float]) -> bool:
    return min(point[0] - box[0], point[1] - box[1], box[2] - point[0], box[3] - point[1]) > 0.01


def resolve(claims: dict[int, list[tuple[float, int]]]) -> dict[int, int]:
    """The box of each anchor: the largest overlap, of equal ones the first."""
    return {
        anchor: min(options, key=lambda option: (-option[0], option[1]))[1]
        for anchor, options in claims.items()
    }


def task_aligned_by_loops(
    scores: Tensor, boxes: Tensor, points: Tensor, gt: Tensor, labels: Tensor, topk: int
) -> dict[int, int]:
    claims: dict[int, list[tuple[float, int]]] = {}
    for g, box in enumerate(gt.tolist()):
        overlaps = [iou(candidate, box) for candidate in boxes.tolist()]
        metrics = [
            score * overlap**6
            for score, overlap in zip(scores[labels[g]].tolist(), overlaps, strict=True)
        ]
        best = sorted(range(len(metrics)), key=lambda a: -metrics[a])[:topk]
        for a in best:
            if metrics[a] > 0 and inside(points[a].tolist(), box):
                claims.setdefault(a, []).append((overlaps[a], g))
    return resolve(claims)


def atss_by_loops(grid: AnchorGrid, gt: Tensor, topk: int, side: float = 8) -> dict[int, int]:
    claims: dict[int, list[tuple[float, int]]] = {}
    for g, box in enumerate(gt.tolist()):
        centre, candidates, start = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], [], 0
        for length in grid.level_lengths:
            level = range(start, start + length)
            candidates += sorted(level, key=lambda a: math.dist(grid.points[a].tolist(), centre))[
                :topk
            ]
            start += length
        overlaps = {}
        for a in candidates:
            (x, y), half = grid.points[a].tolist(), side / 2 * grid.strides[a].item()
            overlaps[a] = iou([x - half, y - half, x + half, y + half], box)
        threshold = statistics.mean(overlaps.values()) + statistics.stdev(overlaps.values())
        for a in candidates:
            if overlaps[a] >= threshold and inside(grid.points[a].tolist(), box):
                claims.setdefault(a, []).append((overlaps[a], g))
    return resolve(claims)


def random_boxes(
    rng: np.random.Generator, count: int, height: int, width: int, smallest: float = 4
) -> Tensor:
    # Odd fractions: no two anchors are at one distance, so that there is one right answer.
    sides = np.exp(rng.uniform(np.log(smallest), np.log(min(height, width) * 0.9), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    return torch.from_numpy(np.concatenate((corner, corner + sides), axis=1).astype(np.float32))


def as_dict(found: Assignment) -> dict[int, int]:
    assert len(set(found.anchors.tolist())) == len(found.anchors)
    return dict(zip(found.anchors.tolist(), found.boxes.tolist(), strict=True))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 20),
    height=st.sampled_from([32, 96, 160]),
    width=st.sampled_from([32, 64, 192]),
)
def test_atss_equals_loops(seed: int, count: int, height: int, width: int) -> None:
    grid = grid_of(height, width)
    gt = random_boxes(np.random.default_rng(seed), count, height, width)
    assert as_dict(assign_atss(grid, (height, width), gt)) == atss_by_loops(grid, gt, 9)


@pytest.mark.parametrize(
    "anchors",
    [{"anchor_side": 4.0}, {"anchor_offset": 0.5}, {"anchor_side": 6.0, "anchor_offset": 0.25}],
)
def test_atss_of_other_anchors(anchors: dict[str, float]) -> None:
    grid = grid_of(160, 192, **anchors)
    first = anchors.get("anchor_offset", 0.0) * 8
    assert grid.points[:2].tolist() == [[first, first], [first + 8, first]]
    for seed in range(5):
        gt = random_boxes(np.random.default_rng(seed), 12, 160, 192)
        assert as_dict(assign_atss(grid, (160, 192), gt)) == atss_by_loops(
            grid, gt, 9, anchors.get("anchor_side", 8.0)
        )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 40), topk=st.sampled_from([1, 13, 1000]))
def test_task_aligned_equals_loops(seed: int, count: int, topk: int) -> None:
    rng = np.random.default_rng(seed)
    grid = grid_of(96, 64)
    scores = torch.from_numpy(rng.uniform(0.01, 1, (3, len(grid.points))).astype(np.float32))
    boxes = random_boxes(rng, len(grid.points), 96, 64)
    gt, labels = random_boxes(rng, count, 96, 64), torch.from_numpy(rng.integers(0, 3, count))
    valid = torch.ones(len(grid.points), dtype=torch.bool)
    found = assign_task_aligned(scores, boxes, grid.points, valid, gt, labels, topk)
    assert as_dict(found) == task_aligned_by_loops(scores, boxes, grid.points, gt, labels, topk)


@pytest.mark.parametrize("size", [(8, 8), (32, 1600), (1600, 32)])
def test_atss_on_levels_of_few_cells(size: tuple[int, int]) -> None:
    grid = grid_of(*size)
    gt = random_boxes(np.random.default_rng(0), 12, *size, smallest=6)
    assert as_dict(assign_atss(grid, size, gt)) == atss_by_loops(grid, gt, 9)


def test_equal_boxes_take_the_first() -> None:
    grid = grid_of(64, 64)
    gt = torch.tensor([[10.0, 10.0, 41.0, 43.0]]).repeat(3, 1)
    assert set(assign_atss(grid, (64, 64), gt).boxes.tolist()) == {0}


def test_nothing_outside_the_image_is_assigned() -> None:
    grid = grid_of(128, 128)
    gt = torch.tensor([[0.0, 0.0, 127.0, 127.0]])
    valid = grid.valid_mask((40, 60))
    assert valid.sum() == 8 * 8 + 4 * 4 + 2 * 2 + 1 + 1
    boxes = gt.repeat(len(grid.points), 1)
    aligned = assign_task_aligned(
        torch.full((1, len(boxes)), 0.5), boxes, grid.points, valid, gt, torch.tensor([0]), topk=500
    )
    assert set(aligned.anchors.tolist()) <= set(valid.nonzero().flatten().tolist())
    assert len(aligned.anchors) > 13
    assert valid[assign_atss(grid, (40, 60), gt).anchors].all()


def test_targets_of_the_score_reach_the_best_overlap() -> None:
    rng = np.random.default_rng(1)
    grid = grid_of(96, 64)
    scores, boxes = (
        torch.rand(2, len(grid.points)),
        random_boxes(rng, len(grid.points), 96, 64, smallest=20),
    )
    gt = random_boxes(rng, 3, 96, 64, smallest=40)
    found = assign_task_aligned(
        scores, boxes, grid.points, grid.valid_mask((96, 64)), gt, torch.tensor([0, 1, 1])
    )
    wanted = normalised_metrics(found, 3)
    for g in set(found.boxes.tolist()):
        assert wanted[found.boxes == g].max().item() == pytest.approx(
            found.ious[found.boxes == g].max().item(), rel=1e-3
        )


def test_500_boxes_at_full_size_take_little_memory() -> None:
    folder = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); import test_assign; "
        "test_assign.print_memory_growth()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(result.stdout) < 300, result.stdout


def crowded(kind: str) -> Callable[[], Assignment]:
    """500 boxes of all sizes in an image of 800 x 1333."""
    rng = np.random.default_rng(0)
    grid = grid_of(800, 1344)
    gt, labels = (
        random_boxes(rng, 500, 800, 1344, smallest=8),
        torch.from_numpy(rng.integers(0, 80, 500)),
    )
    if kind == "atss":
        return lambda: assign_atss(grid, (800, 1333), gt)
    scores = torch.rand(80, len(grid.points))
    reach = torch.rand(len(grid.points), 4) * grid.strides[:, None] * 8
    boxes = torch.cat((grid.points - reach[:, :2], grid.points + reach[:, 2:]), dim=1)
    valid = grid.valid_mask((800, 1333))
    return lambda: assign_task_aligned(scores, boxes, grid.points, valid, gt, labels)


def print_memory_growth() -> None:
    """Print by how many MiB the peak of this process grows: of its own, as a peak never falls."""
    torch.set_num_threads(1)
    both = [crowded(kind) for kind in ("atss", "task-aligned")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for assign in both:
        assign()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
