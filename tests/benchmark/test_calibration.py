from pathlib import Path

import numpy as np
import pytest
from benchmark.truths import annotation, result, truth_of

from tood_deploy.benchmark.evaluation.analysis import BINS, calibrate
from tood_deploy.benchmark.evaluation.coco_metrics import evaluate
from tood_deploy.data.results import empty_results, results_from_rows


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
