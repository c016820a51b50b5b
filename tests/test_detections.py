import sys
import types
from typing import Any

import numpy as np
import pytest

from tood_deploy import Detections, ToodError


@pytest.fixture
def found() -> Detections:
    return Detections(
        np.array([[10, 20, 30, 60], [0, 0, 5, 5], [-4.5, 1, 2, 3]], np.float32),
        np.array([0.9, 0.5, 0.25], np.float32),
        np.array([1, 0, 2], np.int32),
        ("cat", "dog"),
    )


def test_length_and_names(found: Detections) -> None:
    assert len(found) == 3
    assert found.names() == ["dog", "cat", "2"]  # a class without a name is its number


@pytest.mark.parametrize(
    ("index", "scores"),
    [(0, [0.9]), (-1, [0.25]), (slice(1, None), [0.5, 0.25]), (slice(5, 9), [])],
)
def test_slicing_gives_detections(
    found: Detections, index: int | slice, scores: list[float]
) -> None:
    part = found[index]
    assert part.scores.tolist() == pytest.approx(scores)
    assert part.boxes.shape == (len(scores), 4)
    assert part.class_names == ("cat", "dog")


def test_masks_and_positions_choose(found: Detections) -> None:
    assert found[found.scores > 0.4].class_ids.tolist() == [1, 0]
    assert found[np.array([2, 0])].class_ids.tolist() == [2, 1]
    assert len(found[np.array([], int)]) == 0


def test_a_position_that_is_not_there_is_an_error(found: Detections) -> None:
    with pytest.raises(IndexError):
        found[3]


def test_filtering(found: Detections) -> None:
    assert found.filter(0.5).scores.tolist() == [pytest.approx(0.9)]  # above, not at
    assert found.filter(class_ids=[0, 2]).class_ids.tolist() == [0, 2]
    assert len(found.filter(0.99, [1])) == 0


def test_coco_rows(found: Detections) -> None:
    rows = found.to_coco(7)
    assert rows[0] == {
        "image_id": 7,
        "category_id": 2,
        "bbox": [10.0, 20.0, 20.0, 40.0],
        "score": pytest.approx(0.9),
    }
    assert [row["category_id"] for row in found.to_coco(7, category_ids=[18, 17, 90])] == [
        17,
        18,
        90,
    ]
    assert all(type(value) is float for row in rows for value in row["bbox"])


def test_empty() -> None:
    nothing = Detections.empty(("cat",))
    assert len(nothing) == 0
    assert nothing.to_coco(1) == []
    assert nothing.names() == []
    assert (nothing.plot(np.full((8, 8, 3), 9, np.uint8)) == 9).all()


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ToodError, match=r"expected \(D, 4\)"):
        Detections(np.zeros((2, 4), np.float32), np.zeros(3, np.float32), np.zeros(3, np.int32))


def test_supervision_absent(found: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ToodError, match="pip install supervision"):
        found.to_supervision()


def test_supervision_present(found: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("supervision")
    module.Detections = lambda **values: values
    monkeypatch.setitem(sys.modules, "supervision", module)
    values: Any = found.to_supervision()
    assert values["xyxy"] is found.boxes
    assert values["class_id"].tolist() == [1, 0, 2]
    assert values["data"]["class_name"].tolist() == ["dog", "cat", "2"]


def test_plot_draws_a_copy(found: Detections) -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    drawn = found.plot(image)
    assert not image.any()
    assert drawn.any()
