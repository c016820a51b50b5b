from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_coco import annotation, random_rows, result, truth_of

from tood_deploy.benchmark.evaluation.analysis import (
    BINS,
    IGNORED,
    RIGHT,
    WRONG,
    MistakeFinder,
    Mistakes,
    calibrate,
    f1_curve,
    find_thresholds,
    lower_ious,
    suppress,
)
from tood_deploy.data.coco_metrics import evaluate, match
from tood_deploy.data.results import empty_results, results_from_rows
from tood_deploy.draw import class_colour


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def suppress_slowly(rows: list[dict[str, Any]], threshold: float) -> list[bool]:
    """The definition, box by box."""
    keep = [False] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: -rows[i]["score"]):
        same = [
            j
            for j in range(len(rows))
            if keep[j] and all(rows[i][key] == rows[j][key] for key in ("image_id", "category_id"))
        ]
        keep[i] = all(iou(rows[i]["bbox"], rows[j]["bbox"]) <= threshold for j in same)
    return keep


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_greedy_within_image_and_class(tmp_path: Path, seed: int) -> None:
    annotations, rows = random_rows(seed)
    rows.sort(key=lambda row: row["image_id"])
    results = results_from_rows(rows, truth_of(tmp_path, annotations, images=12))
    masks = suppress(results, [0.3, 0.5, 0.9])
    assert [mask.tolist() for mask in masks] == [
        suppress_slowly(rows, threshold) for threshold in (0.3, 0.5, 0.9)
    ]
    assert not masks[0].all()


def test_nothing_to_suppress(tmp_path: Path) -> None:
    assert [mask.tolist() for mask in suppress(empty_results(), [0.5])] == [[]]
    one = results_from_rows(
        [result(1, 1, (1, 1, 5, 5), 0.5)], truth_of(tmp_path, [annotation(1, 1, (1, 1, 5, 5))])
    )
    assert [mask.tolist() for mask in suppress(one, [0.0])] == [[True]]
    assert suppress(one, []) == []


@pytest.mark.parametrize("seed", range(5))
def test_f1_equals_counting_at_every_score(tmp_path: Path, seed: int) -> None:
    annotations, rows = random_rows(seed)
    truth = truth_of(tmp_path, annotations, images=12)
    results = results_from_rows(rows, truth)
    curve = f1_curve(truth, results, match(truth, results), 1)
    assert curve is not None
    objects = sum(each["category_id"] == 1 and not each["iscrowd"] for each in annotations)
    for score, precision, recall, f1 in zip(
        curve.scores, curve.precision, curve.recall, curve.f1, strict=True
    ):
        fewer = results.pick(results.scores >= score)
        matches = match(truth, fewer)
        counted = (fewer.category_ids[matches.rows] == 1) & ~matches.ignored[:, 0]
        right, total = np.count_nonzero(matches.matched[counted, 0]), np.count_nonzero(counted)
        assert (precision, recall) == pytest.approx((right / total, right / objects))
        assert f1 == pytest.approx(2 * right / (total + objects))


def test_the_best_score_lies_between_the_last_kept_and_the_next(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (0, 0, 10, 10)), annotation(2, 1, (0, 0, 10, 10))])
    rows = [
        result(1, 1, (0, 0, 10, 10), 0.9),
        result(2, 1, (0, 0, 10, 10), 0.6),
        result(3, 1, (0, 0, 10, 10), 0.4),
    ]
    cut = find_thresholds(truth, results_from_rows(rows, truth), 0.05, 0.6).best["cat"]
    assert (cut.conf, cut.iou, cut.f1) == pytest.approx((0.5, 0.6, 1.0))
    lowest = find_thresholds(truth, results_from_rows(rows[:2], truth), 0.05, 0.6).best["cat"]
    assert lowest.conf == pytest.approx(0.325)


def test_a_lower_suppression_threshold_is_found(tmp_path: Path) -> None:
    truth = truth_of(
        tmp_path,
        [
            annotation(1, 1, (0, 0, 20, 20)),
            annotation(2, 2, (0, 0, 20, 20)),
            annotation(2, 2, (8, 0, 20, 20)),
        ],
    )
    rows = [
        result(1, 1, (0, 0, 20, 20), 0.9),
        result(1, 1, (0, 0, 20, 10), 0.8),
    ]  # a double: overlap 0.5
    rows += [
        result(2, 2, (0, 0, 20, 20), 0.9),
        result(2, 2, (8, 0, 20, 20), 0.8),
    ]  # two objects: overlap 0.43
    found = find_thresholds(truth, results_from_rows(rows, truth), 0.05, 0.6)
    assert found.best["cat"].f1 == 1
    assert found.as_run["cat"].f1 == 1  # by dropping the double's score
    assert found.best["dog"].iou == 0.6
    assert found.together is not None
    assert found.together.iou == 0.45
    assert found.together.f1 == 1


def test_classes_without_objects_or_right_detections_have_no_threshold(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (0, 0, 20, 20))])
    found = find_thresholds(
        truth,
        results_from_rows(
            [result(1, 1, (40, 30, 5, 5), 0.9), result(1, 2, (0, 0, 5, 5), 0.9)], truth
        ),
    )
    assert (found.best, found.as_run, found.together) == ({}, {}, None)
    assert list(found.curves) == ["cat"]
    nothing = find_thresholds(truth, empty_results())
    assert nothing.together is None
    assert len(nothing.curves["cat"].f1) == 0


def test_only_lower_thresholds_are_tried() -> None:
    assert lower_ious(0.6) == [0.3, 0.35, 0.4, 0.45, 0.5, 0.55]
    assert lower_ious(0.3) == []
    assert lower_ious(None)[-1] == 0.7


def test_shares_and_errors(tmp_path: Path) -> None:
    truth = truth_of(
        tmp_path,
        [
            annotation(1, 1, (0, 0, 20, 20)),
            annotation(2, 1, (0, 0, 20, 20)),
            annotation(3, 1, (0, 0, 40, 40), iscrowd=1),
        ],
    )
    rows = [
        result(1, 1, (0, 0, 20, 12), 0.72),
        result(2, 1, (0, 0, 20, 20), 1.0),
        result(2, 1, (30, 30, 9, 9), 0.74),
    ]
    rows.append(result(3, 1, (0, 0, 20, 20), 0.72))  # on a crowd: counts for nothing
    results = results_from_rows(rows, truth)
    found = calibrate(results, evaluate(truth, results).matches)
    assert found is not None
    assert found.counts.tolist() == [0] * 14 + [2] + [0] * 4 + [1]
    assert found.scores[[14, 19]].tolist() == pytest.approx([0.73, 1.0])
    assert found.right50[[14, 19]].tolist() == [0.5, 1.0]
    assert found.right75[[14, 19]].tolist() == [0.0, 1.0]
    assert np.isnan(found.right50).sum() == BINS - 2
    assert found.error50 == pytest.approx(2 / 3 * 0.23)
    assert found.error75 == pytest.approx(2 / 3 * 0.73)


def test_nothing_detected(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (0, 0, 20, 20))])
    found = calibrate(empty_results(), evaluate(truth, empty_results()).matches)
    assert found is not None
    assert (found.counts.sum(), found.error50) == (0, 0)


@pytest.mark.parametrize("score", [-0.1, 1.1])
def test_scores_that_are_no_probabilities(tmp_path: Path, score: float) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (0, 0, 20, 20))])
    results = results_from_rows([result(1, 1, (0, 0, 20, 20), score)], truth)
    assert calibrate(results, evaluate(truth, results).matches) is None


def finder(folder: Path) -> MistakeFinder:
    objects = [
        annotation(1, 1, (10, 10, 20, 20)),
        annotation(1, 2, (40, 20, 20, 20)),
        annotation(3, 1, (2, 20, 24, 24), iscrowd=1),
    ]
    rows = [
        result(1, 1, (10, 10, 20, 20), 0.9),
        result(1, 2, (40, 20, 20, 20), 0.4),
        result(2, 2, (5, 25, 20, 20), 0.8),
    ]
    rows += [result(3, 1, (2, 20, 24, 24), 0.9), result(2, 1, (30, 25, 10, 10), 0.3)]
    truth = truth_of(folder, objects)
    results = results_from_rows(rows, truth)
    return MistakeFinder(truth, results, evaluate(truth, results).matches, {1: 0.5, 2: 0.5})


def has_colour(image: np.ndarray, kind: int) -> bool:
    return bool((image == class_colour(kind)).all(axis=2).any())


def test_mistakes_of_every_image(tmp_path: Path) -> None:
    assert finder(tmp_path).all() == [Mistakes(1, 1, 0), Mistakes(2, 0, 1), Mistakes(3, 0, 0)]


def test_drawn_beside_one_another(tmp_path: Path) -> None:
    image = np.full((48, 64, 3), 90, np.uint8)
    expected = {1: ((RIGHT, WRONG), (RIGHT,)), 2: ((), (WRONG,)), 3: ((IGNORED,), (IGNORED,))}
    for image_id, sides in expected.items():
        for side, kinds in zip(finder(tmp_path).draw(image_id, image), sides, strict=True):
            assert {kind for kind in (RIGHT, WRONG, IGNORED) if has_colour(side, kind)} == set(
                kinds
            )
            assert side.shape == image.shape
    assert (image == 90).all()
