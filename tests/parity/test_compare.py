"""Matching of detections."""

import numpy as np
import pytest

from tood_deploy.matching import Match, Rows, match_detections, match_overlapping


def rows(*values: tuple[float, float, int]) -> Rows:
    """Detections of (left side, score, label)."""
    boxes = np.array([[left, 0, left + 10, 10] for left, _, _ in values], np.float32).reshape(-1, 4)
    return Rows(
        boxes,
        np.array([v[1] for v in values], np.float32),
        np.array([v[2] for v in values], np.int32),
    )


def test_equal_sets_match_in_any_order() -> None:
    first, second = rows((0, 0.9, 1), (50, 0.8, 2)), rows((50, 0.8, 2), (0, 0.9, 1))
    assert match_detections(first, second, 1e-5, 0.05) == Match(2, 2, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    "other", [(0.1, 0.9, 1), (0.0, 0.91, 1), (0.0, 0.9, 2)], ids=["box", "score", "label"]
)
def test_a_difference_in_anything_is_an_exchange(other: tuple[float, float, int]) -> None:
    match = match_detections(rows((0, 0.9, 1)), rows(other), 1e-5, 0.05)
    assert (match.matched, match.added, match.exchanged) == (0, 1, 1)


def test_each_detection_is_used_once() -> None:
    match = match_detections(rows((0, 0.9, 1), (0, 0.9, 1)), rows((0, 0.9, 1)), 1e-5, 0.05)
    assert (match.reference, match.matched, match.added, match.exchanged) == (2, 1, 0, 1)


def test_deviations_are_the_largest() -> None:
    match = match_detections(
        rows((0, 0.9, 1), (50, 0.8, 1)), rows((0.02, 0.9, 1), (50.04, 0.8, 1)), 1e-5, 0.05
    )
    assert match.matched == 2
    assert match.box_deviation_px == pytest.approx(0.04, abs=1e-5)


def test_nothing_matches_nothing() -> None:
    assert match_detections(rows(), rows(), 1e-5, 0.05) == Match()
    assert match_detections(rows(), rows((0, 0.5, 0)), 1e-5, 0.05).exchanged == 1
    assert match_detections(rows((0, 0.5, 0)), rows(), 1e-5, 0.05).exchanged == 1


class TestOverlapping:
    def test_a_shift_within_the_overlap_matches(self) -> None:
        pairs, overlaps = match_overlapping(
            rows((0, 0.9, 1), (50, 0.8, 1)), rows((0.5, 0.85, 1), (50, 0.8, 1)), 0.1
        )
        assert pairs.tolist() == [[1, 1], [0, 0]] or pairs.tolist() == [[0, 0], [1, 1]]
        assert sorted(overlaps.tolist()) == pytest.approx([9.5 / 10.5, 1])

    def test_less_overlap_than_is_asked_for_is_no_pair(self) -> None:
        assert len(match_overlapping(rows((0, 0.9, 1)), rows((0.5, 0.9, 1)), 0.1, 0.95)[0]) == 0

    @pytest.mark.parametrize(
        "other", [(0, 0.7, 1), (0, 0.9, 2), (5, 0.9, 1)], ids=["score", "class", "place"]
    )
    def test_another_score_class_or_place_is_no_pair(self, other: tuple[float, float, int]) -> None:
        assert len(match_overlapping(rows((0, 0.9, 1)), rows(other), 0.1)[0]) == 0

    def test_nothing(self) -> None:
        assert match_overlapping(rows(), rows(), 0.1)[0].shape == (0, 2)
