"""Suppression against a plain greedy loop, on everything that could break a fixed point in blocks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tood_deploy.model.boxes import box_iou
from tood_deploy.model.nms import BLOCK, nms


def greedy(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float, max_det: int
) -> list[int]:
    """The textbook loop, on one image's boxes in order of score."""
    overlap = box_iou(boxes, boxes) > threshold
    kept: list[int] = []
    for i in range(len(scores)):
        if (
            scores[i] > 0
            and len(kept) < max_det
            and not any(overlap[j, i] and labels[j] == labels[i] for j in kept)
        ):
            kept.append(i)
    return kept


def assert_equals_greedy(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float, max_det: int
) -> None:
    kept, counts = nms(boxes, scores, labels, threshold, max_det)
    for image in range(len(boxes)):
        expected = greedy(boxes[image], scores[image], labels[image], threshold, max_det)
        assert counts[image].item() == len(expected)
        assert kept[image].tolist() == expected + [scores.shape[1]] * (max_det - len(expected))


def make(
    seed: int, batch: int, count: int, classes: int, spread: float, empty: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes on a coarse grid (so many are equal, touching or nested), coarse scores (so many tie), sorted."""
    rng = np.random.default_rng(seed)
    corner = np.round(rng.random((batch, count, 2)) * spread)
    boxes = np.concatenate([corner, corner + np.round(rng.random((batch, count, 2)) * 10)], axis=2)
    scores = -np.sort(-np.round(rng.random((batch, count)), 2), axis=1)
    scores[:, int(count * (1 - empty)) :] = 0
    labels = rng.integers(0, classes, (batch, count))
    return (
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    count=st.sampled_from([1, 2, 7, 60, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]),
    classes=st.sampled_from([1, 2, 80]),
    spread=st.sampled_from([0.0, 5.0, 30.0, 300.0]),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]),
    max_det=st.sampled_from([1, 5, 100, 700]),
    empty=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equals_greedy(
    seed: int,
    batch: int,
    count: int,
    classes: int,
    spread: float,
    threshold: float,
    max_det: int,
    empty: float,
) -> None:
    assert_equals_greedy(*make(seed, batch, count, classes, spread, empty), threshold, max_det)


def test_equals_greedy_on_thousands() -> None:
    assert_equals_greedy(*make(3, 1, 3840, 3, 150.0), 0.5, 100)


def test_chain_in_which_each_box_covers_the_next() -> None:
    """A chain as long as a block needs as many rounds; every second box stays."""
    left = torch.arange(2 * BLOCK, dtype=torch.float32)
    boxes = torch.stack((left, torch.zeros_like(left), left + 2, torch.ones_like(left)), 1)[None]
    scores = torch.linspace(1, 0.1, 2 * BLOCK)[None]
    labels = torch.zeros(1, 2 * BLOCK, dtype=torch.int64)
    kept, counts = nms(boxes, scores, labels, 0.3, 2 * BLOCK)  # neighbours overlap by a third
    assert counts.item() == BLOCK
    assert kept[0, :BLOCK].tolist() == list(range(0, 2 * BLOCK, 2))


def test_equal_boxes_keep_one_a_class() -> None:
    boxes = torch.tensor([0.0, 0, 4, 4]).expand(1, 300, 4)
    labels = (torch.arange(300) % 3)[None]
    kept, counts = nms(boxes, torch.full((1, 300), 0.5), labels, 0.6, 100)
    assert counts.item() == 3
    assert kept[0, :3].tolist() == [0, 1, 2]


def test_boxes_without_area_suppress_nothing() -> None:
    boxes = torch.tensor([[[3.0, 3, 3, 3]] * 4])
    assert (
        nms(boxes, torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int64), 0.6, 10)[1].item() == 4
    )


def test_nothing_to_keep() -> None:
    kept, counts = nms(
        torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64), 0.6, 3
    )
    assert counts.tolist() == [0, 0]
    assert (kept == 5).all()


@pytest.mark.shared
def test_equals_the_reference(goldens: Callable[[str], dict[str, NDArray[Any]]]) -> None:
    units = goldens("units")
    order = np.argsort(-units["nms_scores"], kind="stable")
    boxes, scores, labels = (
        torch.tensor(units[f"nms_{key}"][order])[None] for key in ("boxes", "scores", "labels")
    )
    kept, counts = nms(boxes, scores, labels, 0.6, len(order))
    assert set(order[kept[0, : int(counts)].numpy()]) == set(units["nms_keep"].tolist())
