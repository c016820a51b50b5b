"""Matching of detections."""

import numpy as np
import pytest

from tood_deploy.export.compare import Match, map_deviation, match_detections, match_overlapping
from tood_deploy.rows import Rows


def rows(*values: tuple[float, float, int]) -> Rows:
    """Detections of (left side, score, label)."""
    boxes = np.array([[left, 0, left + 10, 10] for left, _, _ in values], np.float32).reshape(-1, 4)
    return Rows(boxes, np.array([v[1] for v in values], np.float32), np.array([v[2] for v in values], np.int32))


def test_equal_sets_match_in_any_order() -> None:
    first, second = rows((0, 0.9, 1), (50, 0.8, 2)), rows((50, 0.8, 2), (0, 0.9, 1))
    assert match_detections(first, second, 1e-5, 0.05) == Match(2, 2, 0, 0.0, 0.0)


@pytest.mark.parametrize("other", [(0.1, 0.9, 1), (0.0, 0.91, 1), (0.0, 0.9, 2)], ids=["box", "score", "label"])
def test_a_difference_in_anything_is_an_exchange(other: tuple[float, float, int]) -> None:
    match = match_detections(rows((0, 0.9, 1)), rows(other), 1e-5, 0.05)
    assert (match.matched, match.added, match.exchanged) == (0, 1, 1)


def test_each_detection_is_used_once() -> None:
    match = match_detections(rows((0, 0.9, 1), (0, 0.9, 1)), rows((0, 0.9, 1)), 1e-5, 0.05)
    assert (match.reference, match.matched, match.added, match.exchanged) == (2, 1, 0, 1)


def test_deviations_are_the_largest() -> None:
    match = match_detections(rows((0, 0.9, 1), (50, 0.8, 1)), rows((0.02, 0.9, 1), (50.04, 0.8, 1)), 1e-5, 0.05)
    assert match.matched == 2
    assert match.box_deviation_px == pytest.approx(0.04, abs=1e-5)


def test_nothing_matches_nothing() -> None:
    assert match_detections(rows(), rows(), 1e-5, 0.05) == Match()
    assert match_detections(rows(), rows((0, 0.5, 0)), 1e-5, 0.05).exchanged == 1
    assert match_detections(rows((0, 0.5, 0)), rows(), 1e-5, 0.05).exchanged == 1


def test_maps_of_other_shape_or_with_nan_are_infinitely_far() -> None:
    zeros = np.zeros((2, 2), np.float32)
    assert map_deviation(zeros, zeros + 1) == 1
    assert map_deviation(zeros, np.zeros((1, 4), np.float32)) == float("inf")
    assert map_deviation(zeros, zeros * np.nan) == float("inf")


class TestOverlapping:
    def test_a_shift_within_the_overlap_matches_and_is_measured(self) -> None:
        match = match_overlapping(rows((0, 0.9, 1), (50, 0.8, 1)), rows((0.5, 0.85, 1), (50, 0.8, 1)), 0.1)
        assert (match.reference, match.matched, match.added) == (2, 2, 0)
        assert match.box_deviation_px == 0.5
        assert abs(match.score_deviation - 0.05) < 1e-6

    def test_a_score_too_far_off_is_an_exchange(self) -> None:
        assert match_overlapping(rows((0, 0.9, 1)), rows((0, 0.7, 1)), 0.1) == Match(1, 0, 1, 0.0, 0.0)

    def test_another_class_or_place_is_an_exchange(self) -> None:
        assert match_overlapping(rows((0, 0.9, 1)), rows((0, 0.9, 2)), 0.1).matched == 0
        assert match_overlapping(rows((0, 0.9, 1)), rows((5, 0.9, 1)), 0.1).matched == 0

    def test_nothing(self) -> None:
        assert match_overlapping(rows(), rows(), 0.1) == Match()
