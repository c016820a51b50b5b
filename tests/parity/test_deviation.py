import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tood_deploy.matching import NetDetections
from tood_deploy.parity.deviation import BoxDeviation, Deviation


def deviation(
    reference: list[float], found: list[float], tolerance: float = 0.0, relative: bool = False
) -> Deviation:
    result = Deviation(tolerance, relative)
    result.add(np.array(reference, np.float32), np.array(found, np.float32))
    return result


def test_measures_by_hand() -> None:
    found = deviation([3, 4, 0, 0], [3, 4.5, 0, -0.25], tolerance=0.3)
    assert found.worst == 0.5
    assert found.outside_share == 0.25
    assert found.relative_l2 == pytest.approx((0.5**2 + 0.25**2) ** 0.5 / 5)
    assert found.elements == 4


def test_equal_arrays_do_not_deviate() -> None:
    found = deviation([1, 2], [1, 2])
    assert (found.worst, found.p99, found.relative_l2, found.outside_share) == (0, 0, 0, 0)


def test_a_relative_tolerance_is_in_units_of_the_reference() -> None:
    assert deviation([10, -10], [10.5, -10], tolerance=0.1, relative=True).outside == 0
    assert deviation([10, -10], [11.5, -10], tolerance=0.1, relative=True).outside == 1


def test_what_is_not_a_number_is_counted_and_makes_the_worst() -> None:
    found = deviation([1, 2, 3], [1, float("nan"), float("inf")], tolerance=1)
    assert found.not_numbers == 2
    assert found.outside == 2
    assert found.worst == found.relative_l2 == float("inf")
    assert found.to_dict()["not_numbers"] == 2


def test_an_infinity_on_both_sides_is_no_deviation() -> None:
    assert deviation([float("inf")], [float("inf")]).not_numbers == 0


def test_another_shape_leaves_nothing_to_compare() -> None:
    found = Deviation()
    found.add(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))
    assert found.not_numbers == 6


def test_nothing_at_all() -> None:
    found = deviation([], [])
    assert (found.worst, found.p99, found.relative_l2, found.outside_share) == (0, 0, 0, 0)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_the_quantile_is_within_a_bin_of_the_exact_one(differences: list[float]) -> None:
    found = deviation([0.0] * len(differences), differences)
    ordered = np.sort(np.array(differences, np.float32))
    exact = float(ordered[int(np.ceil(0.99 * len(ordered))) - 1])
    assert exact * 0.94 <= found.p99 * 1.0001
    assert found.p99 <= exact * 1.0601


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40))
def test_parts_add_up_to_the_whole(values: list[float]) -> None:
    half = len(values) // 2
    zeros = [0.0] * len(values)
    whole, parts = (
        deviation(zeros, values, 1.0),
        deviation(zeros[:half], values[:half], 1.0) + deviation(zeros[half:], values[half:], 1.0),
    )
    assert whole.worst == parts.worst
    assert whole.outside == parts.outside
    assert whole.p99 == parts.p99
    assert whole.squares == pytest.approx(parts.squares)


def boxes(*values: tuple[float, float, float, float, float, int]) -> NetDetections:
    """Detections of xyxy, score and label."""
    table = np.array(values, np.float32).reshape(-1, 6)
    return NetDetections(table[:, :4], table[:, 4], table[:, 5].astype(np.int32))


class TestBoxes:
    def test_lost_and_added_boxes_and_shifts(self) -> None:
        found = BoxDeviation()
        reference = boxes((0, 0, 10, 10, 0.9, 0), (50, 50, 70, 80, 0.5, 0))
        found.add(reference, boxes((0, 0, 10, 10.5, 0.8, 0), (0, 0, 10, 10, 0.4, 1)))
        counts = found.counts
        assert (counts.reference, counts.matched, found.lost, counts.added) == (2, 1, 1, 1)
        assert counts.matched_share == 1 / 3
        assert found.box_px.worst == 0.5
        assert found.score.worst == pytest.approx(0.1, abs=1e-6)

    def test_no_boxes_at_all_is_full_agreement(self) -> None:
        found = BoxDeviation()
        found.add(boxes(), boxes())
        assert found.counts.matched_share == 1

    def test_boxes_that_are_not_numbers_are_counted(self) -> None:
        found = BoxDeviation()
        good = (50, 50, 70, 80, 0.5, 0)
        found.add(
            boxes((0, 0, 10, 10, 0.9, 0), good), boxes((0, 0, float("nan"), 10, 0.9, 0), good)
        )
        assert found.not_numbers == 1
        assert (found.counts.matched, found.lost, found.counts.added) == (1, 1, 1)
