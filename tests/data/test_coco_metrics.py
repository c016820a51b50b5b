import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_coco import annotation, coco, random_rows, result, truth_of, write_json
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tood_deploy.data import coco_metrics as coco_ap
from tood_deploy.data.coco import read_annotations
from tood_deploy.data.coco_metrics import NUMBERS, evaluate, match
from tood_deploy.data.results import empty_results, read_results, results_from_rows
from tood_deploy.errors import ToodError


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "chunk"), [("coco_mini_val_jitter", 250), ("cocoapi_val2014_fake100", 7)]
)
def test_equals_the_recorded_numbers(
    shared: Path, case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_ap, "CHUNK_IMAGES", chunk)
    folder = shared / "data" / "eval_cases" / case
    truth = read_annotations(folder / "gt.json")
    metrics = evaluate(truth, read_results(folder / "dt_bbox.json", truth))
    expected = json.loads((folder / "expected.json").read_text())["bbox"]
    assert metrics.numbers == pytest.approx(expected["pycocotools_full_precision"], abs=1e-9)
    assert metrics.class_ap == pytest.approx(expected["per_class_AP"], abs=1e-9)


@pytest.mark.parametrize(("seed", "chunk"), [(0, 1), (1, 5), (2, 100), (3, 5)])
def test_equals_pycocotools_used_as_its_manual_says(
    tmp_path: Path, seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_ap, "CHUNK_IMAGES", chunk)
    annotations, rows = random_rows(seed)
    path = write_json(tmp_path / "truth.json", coco(annotations, images=12))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        found: Any = [dict(row) for row in rows]
        reference = COCOeval(truth, truth.loadRes(found), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    metrics = evaluate(path, rows)
    assert list(metrics.numbers.values()) == reference.stats.tolist()
    np.testing.assert_array_equal(metrics.precision, reference.eval["precision"][..., -1])


@pytest.mark.parametrize("count", [100, 150, 1000])
def test_more_detections_than_coco_counts(tmp_path: Path, count: int) -> None:
    boxes = [(3 * (i % 20), 3 * (i // 20), 2, 2) for i in range(200)]
    objects = [annotation(1, 1, box) for box in boxes]
    rows = [result(1, 1, box, 1 - i / 1000) for i, box in enumerate(boxes)]
    truth = truth_of(tmp_path, objects)
    standard, metrics = evaluate(truth, rows), evaluate(truth, rows, count)
    assert (standard.numbers["AR100"], standard.counted["AR"]) == (0.5, 0.5)
    assert metrics.numbers == standard.numbers
    np.testing.assert_array_equal(metrics.precision, standard.precision)
    assert metrics.counted["AR"] == pytest.approx(min(count, 200) / 200)
    assert metrics.counted["ARs"] == metrics.counted["AR"]
    assert len(metrics.matches.rows) == min(count, 200)
    # Precision is 1 up to the recall reached, of 101 recalls.
    assert metrics.counted["AP"] == pytest.approx(1 if count > 199 else (count // 2 + 1) / 101)


def test_counted_numbers_of_as_many_detections_are_cocos(tmp_path: Path) -> None:
    annotations, rows = random_rows(3)
    metrics = evaluate(truth_of(tmp_path, annotations, images=12), rows)
    expected = {name.replace("AR100", "AR"): value for name, value in metrics.numbers.items()}
    assert metrics.counted == pytest.approx({name: expected[name] for name in metrics.counted})
    with pytest.raises(ToodError, match="99"):
        evaluate(truth_of(tmp_path, annotations, images=12), rows, 99)


def test_perfect_detections(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (5, 5, 20, 20)), annotation(2, 2, (5, 5, 40, 40))])
    metrics = evaluate(
        truth, [result(1, 1, (5, 5, 20, 20), 0.9), result(2, 2, (5, 5, 40, 40), 0.8)]
    )
    expected = {name: -1 if name in ("APl", "ARl") else pytest.approx(1) for name in NUMBERS}
    assert metrics.numbers == expected
    assert metrics.class_ap == pytest.approx({"cat": 1, "dog": 1})


def test_no_detections_is_zero_and_no_objects_is_absent(tmp_path: Path) -> None:
    metrics = evaluate(truth_of(tmp_path, [annotation(1, 1, (5, 5, 20, 20))]), empty_results())
    assert metrics.numbers["AP"] == metrics.numbers["AR100"] == 0
    assert metrics.numbers["APm"] == -1
    assert metrics.class_ap == {"cat": 0}
    assert metrics.ap_of(1) == -1
    assert np.isnan(metrics.curve(k=1)).all()
    assert (metrics.curve(0.5) == 0).all()


def test_an_object_with_id_zero_can_be_found(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (5, 5, 20, 20), id=0)])
    assert evaluate(truth, [result(1, 1, (5, 5, 20, 20), 0.9)]).numbers["AP"] == pytest.approx(1)


def test_ap_at_one_overlap_and_size(tmp_path: Path) -> None:
    annotations, rows = random_rows(7)
    metrics = evaluate(truth_of(tmp_path, annotations, images=12), rows)
    found = metrics.ap_at(0.5), metrics.ap_at(0.75), metrics.ap_at(area="small"), metrics.ap_at()
    assert found == tuple(metrics.numbers[name] for name in ("AP50", "AP75", "APs", "AP"))
    assert metrics.curve(0.5, 0).mean() == pytest.approx(metrics.ap_of(0, 0.5))
    assert metrics.curve().mean() == pytest.approx(metrics.numbers["AP"])


def test_matches_tell_found_false_missed_and_ignored(tmp_path: Path) -> None:
    objects = [
        annotation(2, 1, (0, 0, 10, 10)),
        annotation(2, 1, (30, 0, 10, 10)),
        annotation(3, 1, (0, 0, 40, 40), iscrowd=1),
    ]
    rows = [
        result(3, 1, (0, 0, 10, 10), 0.9),
        result(2, 1, (0, 0, 10, 6), 0.7),
        result(2, 1, (50, 30, 5, 5), 0.4),
    ]
    truth = truth_of(tmp_path, objects)
    results = results_from_rows(rows, truth)
    assert results.image_ids.tolist() == [2, 2, 3]
    matches = evaluate(truth, results).matches
    assert matches.rows.tolist() == [0, 1, 2]
    assert matches.matched[:, 0].tolist() == [True, False, True]
    assert matches.matched[:, 3].tolist() == [
        False,
        False,
        True,
    ]  # overlap 0.65 is more than 0.60, what is seen of the crowd counts in full
    assert matches.ignored[:, 0].tolist() == [False, False, True]
    assert matches.truth_scores.tolist() == [0.7, -1, 0.9]
    assert matches.truth_ignored.tolist() == [False, False, True]


def test_match_is_the_first_overlap_of_evaluate(tmp_path: Path) -> None:
    annotations, rows = random_rows(3)
    truth = truth_of(tmp_path, annotations, images=12)
    results = results_from_rows(rows, truth)
    alone, full = match(truth, results), evaluate(truth, results).matches
    assert (alone.rows == full.rows).all()
    assert (alone.matched[:, 0] == full.matched[:, 0]).all()
    assert (alone.truth_scores == full.truth_scores).all()
    assert alone.matched.any()
    assert not alone.matched.all()


def test_matches_do_not_depend_on_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations, rows = random_rows(5)
    truth = truth_of(tmp_path, annotations, images=12)
    results = results_from_rows(rows, truth)
    at_once = match(truth, results)
    monkeypatch.setattr(coco_ap, "CHUNK_IMAGES", 1)
    one_by_one = match(truth, results)
    order, other = np.argsort(at_once.rows), np.argsort(one_by_one.rows)
    assert one_by_one.rows[other].tolist() == list(range(len(results)))
    assert (at_once.matched[order] == one_by_one.matched[other]).all()
    assert (at_once.truth_scores == one_by_one.truth_scores).all()
    assert (at_once.truth_ignored == one_by_one.truth_ignored).all()
