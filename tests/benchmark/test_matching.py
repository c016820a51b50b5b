import numpy as np

from tood_deploy.matching import NetDetections
from tood_deploy.parity.deviation import RowDeviation


def rows(
    *boxes: tuple[float, float, float, float, int], scores: list[float] | None = None
) -> NetDetections:
    table = np.array(boxes, np.float32).reshape(-1, 5)
    given_scores = np.linspace(0.9, 0.1, len(table)) if scores is None else np.array(scores)
    return NetDetections(
        table[:, :4], given_scores.astype(np.float32), table[:, 4].astype(np.int32)
    )


A, B, C = (0, 0, 10, 10, 0), (50, 50, 70, 80, 0), (0, 0, 10, 10, 1)


def test_lost_and_added_boxes_and_shifts() -> None:
    found = RowDeviation()
    found.add(rows(A, B, scores=[0.9, 0.5]), rows((0, 0, 10, 10.5, 0), C, scores=[0.8, 0.4]))
    assert (found.reference, found.matched, found.lost, found.added) == (2, 1, 1, 1)
    assert found.matched_share == 1 / 3
    assert found.box_px.worst == 0.5
    assert abs(found.score.worst - 0.1) < 1e-6


def test_no_boxes_at_all_is_full_agreement() -> None:
    found = RowDeviation()
    found.add(rows(), rows())
    assert found.matched_share == 1


def test_boxes_that_are_not_numbers_are_counted() -> None:
    found = RowDeviation()
    found.add(rows(A, B), rows((0, 0, float("nan"), 10, 0), B))
    assert found.not_numbers == 1
    assert (found.matched, found.lost, found.added) == (1, 1, 1)
