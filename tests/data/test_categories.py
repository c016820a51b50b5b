from pathlib import Path
from typing import Any

import pytest
from data.small_coco import annotation, truth_of, write_json

from tood_deploy.data.categories import map_categories
from tood_deploy.data.coco import Annotations
from tood_deploy.errors import ToodError


@pytest.fixture
def truth(tmp_path: Path) -> Annotations:
    return truth_of(tmp_path, [annotation(1, 1, (1, 2, 3, 4))], names=("cat", "dog", "cow"))


def test_names_decide_not_the_order(truth: Annotations) -> None:
    assert map_categories(["dog", "cow", "cat"], truth) == [2, 3, 1]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["cat", "dog"],
            "3 categories are not the model's 2 classes: "
            "only the annotations have cow. .*--mapping",
        ),
        (["cat", "dog", "cow", "hen"], "only the model has hen"),
        (["0", "1", "2"], "only the model has 0, 1, 2; only the annotations have cat, dog, cow"),
        ([str(i) for i in range(80)], "0, 1, 2, 3, 4 and 75 more"),
    ],
)
def test_other_classes_are_refused(truth: Annotations, names: list[str], words: str) -> None:
    with pytest.raises(ToodError, match=words):
        map_categories(names, truth)


def test_a_mapping_renames_leaves_out_and_joins(tmp_path: Path, truth: Annotations) -> None:
    mapping = write_json(tmp_path / "mapping.json", {"0": "dog", "kitten": "cat", "truck": None})
    assert map_categories(["0", "kitten", "cat", "truck"], truth, mapping) == [2, 1, 1, None]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "not a mapping"),
        ({"0": 1}, "not a mapping"),
        ({"hen": "cat"}, "the model has no class 'hen'; it has 0, 1"),
        ({"0": "hen"}, "no category 'hen'; they have cat, dog, cow"),
        ({"0": "cat"}, "only the model has 1"),
        ({"0": None, "1": None}, "leaves out every class"),
    ],
)
def test_a_wrong_mapping_is_refused(
    tmp_path: Path, truth: Annotations, content: Any, words: str
) -> None:
    with pytest.raises(ToodError, match=words):
        map_categories(["0", "1"], truth, write_json(tmp_path / "mapping.json", content))
