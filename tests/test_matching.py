"""Matching of detections: by overlap alone, and within tolerances of scores and coordinates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tood_deploy.matching import (
    MIN_IOU,
    BoxMatches,
    MatchCounts,
    NetDetections,
    match_boxes,
    split_batch,
)

Box = tuple[float, float, float, float, int]
A, B, C = (0, 0, 10, 10, 0), (50, 50, 70, 80, 0), (0, 0, 10, 10, 1)
POINT = (5, 5, 5, 5, 0)


def rows(*boxes: Box, scores: list[float] | None = None) -> NetDetections:
    """Detections of xyxy boxes and labels, with falling scores where none are given."""
    table = np.array(boxes, np.float32).reshape(-1, 5)
    given_scores = np.linspace(0.9, 0.1, len(table)) if scores is None else np.array(scores)
    return NetDetections(
        table[:, :4], given_scores.astype(np.float32), table[:, 4].astype(np.int32)
    )


def squares(*values: tuple[float, float, int]) -> NetDetections:
    """Detections of (left side, score, label), 10 pixels wide and high."""
    boxes = [(left, 0, left + 10, 10, label) for left, _, label in values]
    return rows(*boxes, scores=[score for _, score, _ in values])


def strict(first: NetDetections, second: NetDetections) -> BoxMatches:
    return match_boxes(
        first, second, min_iou=0, max_score_difference=1e-5, max_box_difference_px=0.05
    )


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ((A, B), (A, B), [[0, 0], [1, 1]]),
        ((A, B, C), (B, C, A), [[0, 2], [1, 0], [2, 1]]),
        ((A,), (C,), []),
        ((A,), ((5, 0, 15, 10, 0),), []),
        ((A, A), (B, A), [[1, 1]]),
        ((A, A), (A,), [[0, 0]]),
        ((POINT,), (POINT,), [[0, 0]]),
        ((POINT,), (A,), []),
        ((), (), []),
        ((A,), (), []),
        ((), (A,), []),
        ((A, B), ((0, 0, float("nan"), 10, 0), B), [[1, 1]]),
    ],
)
def test_pairs_by_overlap(
    first: tuple[Box, ...], second: tuple[Box, ...], pairs: list[list[int]]
) -> None:
    matches = match_boxes(rows(*first), rows(*second))
    assert matches.pairs.shape == (len(pairs), 2)
    assert sorted(matches.pairs.tolist()) == pairs
    assert matches.counts.matched == len(pairs)


def test_the_best_overlap_is_taken() -> None:
    near, nearer = (1, 0, 11, 10, 0), (0.5, 0, 10.5, 10, 0)
    assert match_boxes(rows(B, A), rows(near, nearer)).pairs.tolist() == [[1, 1]]


class TestTolerances:
    def test_equal_sets_match_in_any_order(self) -> None:
        first, second = squares((0, 0.9, 1), (50, 0.8, 2)), squares((50, 0.8, 2), (0, 0.9, 1))
        assert strict(first, second).counts == MatchCounts(2, 2, 0, 0.0, 0.0)

    @pytest.mark.parametrize("other", [(0.1, 0.9, 1), (0.0, 0.91, 1), (0.0, 0.9, 2)])
    def test_a_difference_in_anything_is_an_exchange(self, other: tuple[float, float, int]) -> None:
        counts = strict(squares((0, 0.9, 1)), squares(other)).counts
        assert (counts.matched, counts.added, counts.exchanged) == (0, 1, 1)

    def test_a_detection_is_used_once(self) -> None:
        counts = strict(squares((0, 0.9, 1), (0, 0.9, 1)), squares((0, 0.9, 1))).counts
        assert counts == MatchCounts(2, 1, 0)
        assert counts.exchanged == 1
        assert counts.matched_share == 0.5

    def test_boxes_without_area_match_within_the_tolerance(self) -> None:
        assert strict(rows(POINT), rows((5.01, 5, 5.01, 5, 0))).counts.matched == 1

    def test_deviations_are_the_largest(self) -> None:
        counts = strict(
            squares((0, 0.9, 1), (50, 0.8, 1)), squares((0.02, 0.9, 1), (50.04, 0.8, 1))
        ).counts
        assert counts.matched == 2
        assert counts.box_deviation_px == pytest.approx(0.04, abs=1e-5)

    def test_overlaps_come_with_the_pairs(self) -> None:
        matches = match_boxes(
            squares((0, 0.9, 1), (50, 0.8, 1)),
            squares((0.5, 0.85, 1), (50, 0.8, 1)),
            max_score_difference=0.1,
        )
        assert matches.iou.tolist() == pytest.approx([9.5 / 10.5, 1])

    @pytest.mark.parametrize("other", [(0, 0.7, 1), (0, 0.9, 2), (5, 0.9, 1), (0.5, 0.9, 1)])
    def test_too_far_apart(self, other: tuple[float, float, int]) -> None:
        limits = {"max_score_difference": 0.1, "min_iou": 0.96}
        assert match_boxes(squares((0, 0.9, 1)), squares(other), **limits).counts.matched == 0


def test_counts_add_up() -> None:
    assert MatchCounts(3, 2, 1, 0.1, 1.0) + MatchCounts(1, 1, 0, 0.2, 0.5) == MatchCounts(
        4, 3, 1, 0.2, 1.0
    )
    assert MatchCounts().matched_share == 1


def test_a_batch_is_split_where_the_detections_end() -> None:
    boxes = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    first, second = split_batch(
        (np.array([2, 0]), boxes, boxes[..., 0], np.arange(6).reshape(2, 3))
    )
    assert first.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert first.labels.tolist() == [0, 1]
    assert len(second) == 0


@given(
    st.lists(
        st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2, st.integers(0, 2)),
        max_size=12,
    ),
    st.randoms(),
)
def test_a_shuffled_list_pairs_completely(
    boxes: list[tuple[int, int, int, int, int]], random: object
) -> None:
    xyxy = [(x, y, x + w, y + h, label) for x, y, w, h, label in boxes]
    shuffled = list(xyxy)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    reference, other = rows(*xyxy), rows(*shuffled)
    pairs = match_boxes(reference, other).pairs
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert (reference.labels[pairs[:, 0]] == other.labels[pairs[:, 1]]).all()
    distinct = all(
        iou(a, b) < MIN_IOU for i, a in enumerate(xyxy) for b in xyxy[:i] if a[4] == b[4]
    )
    if distinct:
        assert len(pairs) == len(boxes)


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The overlap by a plain formula."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0, width) * max(0, height)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)
