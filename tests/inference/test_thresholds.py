import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.thresholds import ClassThresholds, class_scores, thresholds_from

NAMES = ("person", "car", "traffic light")


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        (0.4, (0.4, {})),
        (0, (0, {})),
        ("0.4", (0.4, {})),
        ("0.3,person=0.5,car=0.2", (0.3, {"person": 0.5, "car": 0.2})),
        ("person=0.5, traffic light=1", (0.3, {"person": 0.5, "traffic light": 1})),
        ({"car": 0.2}, (0.3, {"car": 0.2})),
        (np.float32(0.5), (0.5, {})),
    ],
)
def test_what_a_user_may_give(conf: Any, expected: tuple[float, dict[str, float]]) -> None:
    thresholds = thresholds_from(conf)
    assert (thresholds.default, thresholds.classes) == expected


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path, thresholds = tmp_path / "t.json", ClassThresholds(0.2, {"car": 0.7})
    path.write_text(json.dumps(thresholds.values() | {"chosen_for": "best F1"}), encoding="utf-8")
    assert thresholds_from(path) == thresholds_from(str(path)) == thresholds


@pytest.mark.parametrize(
    ("conf", "named"),
    [
        (1.5, "1.5"),
        (float("nan"), "nan"),
        ("high", "'high'"),
        ("", "''"),
        ("0.3,0.4", "twice"),
        ("car=0.3,car=0.4", "car"),
        ("car=", "'car='"),
        ({"car": -1}, "-1"),
    ],
)
def test_wrong_values_are_named(conf: Any, named: str) -> None:
    with pytest.raises(ToodError, match=named):
        thresholds_from(conf)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"car": 0.5}', '{"classes": {"car": "x"}}', '{"classes": {"car": 7}}']
)
def test_a_file_that_holds_none_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"t\.json"):
        thresholds_from(path)
    with pytest.raises(InputError, match=r"no\.json"):
        thresholds_from("no.json")


def test_scores_by_class() -> None:
    assert class_scores(ClassThresholds(0.3), NAMES) is None
    scores = class_scores(ClassThresholds(0.3, {"car": 0.5}), NAMES)
    np.testing.assert_array_equal(scores, np.array([0.3, 0.5, 0.3], np.float32))
    scores = class_scores(ClassThresholds(0.3), NAMES, only=["car", "person"])
    np.testing.assert_array_equal(scores, np.array([0.3, 0.3, np.inf], np.float32))
    scores = class_scores(ClassThresholds(0.3), NAMES, exclude=["car"])
    np.testing.assert_array_equal(scores, np.array([0.3, np.inf, 0.3], np.float32))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"only": ["persn"]}, "did you mean 'person'"),
        ({"exclude": ["zebra"]}, "traffic light"),
        ({"only": []}, "no class"),
        ({"exclude": NAMES}, "no class"),
        ({"only": ["car"], "exclude": ["person"]}, "one of them"),
    ],
)
def test_classes_that_are_not_there_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ToodError, match=named):
        class_scores(ClassThresholds(), NAMES, **options)
    with pytest.raises(ToodError, match="did you mean 'car'"):
        class_scores(ClassThresholds(0.3, {"cra": 0.5}), NAMES)
