from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_coco import annotation, result, truth_of, write_json

from tood_deploy.data.coco import Annotations
from tood_deploy.data.results import empty_results, read_results, results_from_rows, write_results
from tood_deploy.errors import InputError

GOOD = result(1, 1, (1, 2, 3, 4), 0.5)


@pytest.fixture
def truth(tmp_path: Path) -> Annotations:
    return truth_of(tmp_path, [annotation(1, 1, (1, 2, 3, 4))])


def test_order_within_an_image_stays(truth: Annotations) -> None:
    results = results_from_rows(
        [
            result(2, 1, (1, 1, 1, 1), 0.1),
            result(1, 2, (2, 2, 2, 2), 0.2),
            result(2, 2, (3, 3, 3, 3), 0.3),
        ],
        truth,
    )
    assert results.scores.tolist() == [0.2, 0.1, 0.3]
    assert results.category_ids.tolist() == [2, 1, 2]


def test_a_file_is_read_as_it_was_written(tmp_path: Path, truth: Annotations) -> None:
    results = results_from_rows([result(2, 1, (0.1, 1 / 3, 5, 6), 1 / 7), GOOD], truth)
    write_results(tmp_path / "results.json", results)
    again = read_results(tmp_path / "results.json", truth)
    assert (again.boxes_xywh == results.boxes_xywh).all()
    assert (again.scores == results.scores).all()
    assert (tmp_path / "results.json").read_text().count("\n") == 4


def test_no_results_at_all(tmp_path: Path, truth: Annotations) -> None:
    write_results(tmp_path / "results.json", empty_results())
    with pytest.raises(
        InputError, match=r"results\.json: the list is empty.*expected COCO results"
    ):
        read_results(tmp_path / "results.json", truth)
    assert len(results_from_rows([], truth)) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": []}, "found an object with images"),
        ("text", "found a str"),
        ([1], "row 0 is 1"),
        ([GOOD, {"image_id": 1}], "row 1 is"),
        (
            [result(1, 1, (1, 2, 3), 0.5)],
            r"row 0 is .*expected image_id, category_id, bbox \(x, y, width, height\) and score",
        ),
        ([GOOD | {"score": "high"}], "not a number"),
        ([GOOD | {"score": 10**400}], "not a number"),
        ([GOOD | {"image_id": [1]}, GOOD | {"image_id": [1]}], "not a number"),
        ([GOOD | {"category_id": [[1]]}], "not a number"),
        (
            [GOOD, result(1, 1, (1, 2, 3, 4), float("nan"))],
            "1 of 2 detections hold NaN or infinite values, the first is row 1",
        ),
        ([result(1, 1, (1, 2, 3, float("inf")), 0.5)], "NaN or infinite"),
        ([GOOD | {"bbox": [1, 2, 3, None]}], "NaN or infinite"),
        ([result(9, 1, (1, 2, 3, 4), 0.5)], "image id 9"),
        ([GOOD, result(1, 9, (1, 2, 3, 4), 0.5)], r"category id 9 \(row 1"),
        ([GOOD | {"image_id": "one"}], "not a number"),
    ],
)
def test_what_are_no_results_is_refused(
    tmp_path: Path, truth: Annotations, content: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_results(write_json(tmp_path / "results.json", content), truth)


def test_boxes_of_some_images(truth: Annotations) -> None:
    results = results_from_rows(
        [result(image, 1, (image, 1, 1, 1), 0.5) for image in (3, 1, 3, 2)], truth
    )
    assert results.pick(results.span(3, 3)).boxes_xywh[:, 0].tolist() == [3, 3]
    assert len(results.pick(np.array([True, False, False, True]))) == 2


@pytest.mark.parametrize("change", [{"image_id": "1"}, {"category_id": "1"}, {"image_id": 1.0}])
def test_ids_of_digits_count_as_numbers(
    tmp_path: Path, truth: Annotations, change: dict[str, Any]
) -> None:
    results = read_results(write_json(tmp_path / "results.json", [GOOD, GOOD | change]), truth)
    assert results.image_ids.tolist() == [GOOD["image_id"]] * 2
    assert results.category_ids.tolist() == [GOOD["category_id"]] * 2
