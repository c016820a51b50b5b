"""Which of several networks in a file is meant."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tood_deploy.errors import CheckpointError
from tood_deploy.model.checkpoint_file import LANDMARK, choose_weights

FILE = Path("a.pth")


def network(number: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{LANDMARK}": torch.tensor(number),
        f"{prefix}bbox_head.tood_cls.bias": torch.tensor(-number),
    }


def chosen(content: Any, key: str | None = None) -> float:
    found = choose_weights(content, FILE, key)
    assert found.keys() == network(0).keys()
    return float(found[LANDMARK])


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "module.module.",
        "_orig_mod.",
        "model.",
        "detector.",
        "student.",
        "module._orig_mod.",
        "ema.x.",
    ],
)
def test_one_network_is_found_behind_any_prefix(prefix: str) -> None:
    assert chosen(network(1, prefix)) == 1
    assert chosen({"state_dict": network(1, prefix), "meta": {}, "optimizer": {"state": {}}}) == 1
    assert (
        chosen(
            {"model": network(1, prefix) | {"criterion.weight": torch.zeros(2)}}
            if prefix
            else {"model": network(1)}
        )
        == 1
    )
    assert chosen({"checkpoint": {"net": network(1, prefix)}}) == 1


def test_the_usual_place_comes_first() -> None:
    content = {
        "state_dict": network(1),
        "ema_state_dict": network(2, "module.") | {"steps": torch.tensor(5)},
        "training": {"model": network(3)},
    }
    assert chosen(content) == 1
    assert [
        float(choose_weights(content, FILE, key)[LANDMARK])
        for key in ("ema", "ema_state_dict", "training.model", "state_dict")
    ] == [2, 2, 3, 1]


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"model": network(1), "model_ema": network(2)}, {"model": 1, "model_ema": 2, "ema": 2}),
        (
            {"state_dict": network(1, "student.") | network(2, "teacher.")},
            {"student": 1, "teacher": 2, "state_dict:teacher": 2, "teacher.": 2},
        ),
        (network(1, "student.") | network(2, "teacher."), {"student": 1, "teacher": 2}),
        ({"state_dict": network(1) | network(2, "ema_model.")}, {"ema_model": 2, "ema": 2}),
        ({"a": network(1, "module."), "b": network(2, "module.")}, {"a": 1, "b": 2, "a:module": 1}),
    ],
)
def test_several_are_listed_and_told_apart(content: Any, keys: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"2 networks.*--weights-key") as caught:
        choose_weights(content, FILE, None)
    listed = str(caught.value).rsplit(": ", 1)[1].split(", ")
    for name in listed:
        choose_weights(content, FILE, name)
    for key, number in keys.items():
        assert chosen(content, key) == number, key


def test_of_nested_networks_each_has_its_own_tensors() -> None:
    content = {"state_dict": network(1) | network(2, "teacher.")}
    assert chosen(content, "teacher") == 2
    assert chosen(content, "state_dict") == 1


@pytest.mark.parametrize(
    ("content", "key", "match"),
    [
        (
            {"model": network(1), "ema": network(2)},
            "teacher",
            "names none of the networks.*model, ema",
        ),
        (
            {"state_dict": network(1, "student.") | network(2, "teacher.")},
            "state_dict",
            "names several.*student, teacher",
        ),
        (network(1), "ema", "no name of its own"),
        ({"meta": {}}, None, "no weights, only meta"),
    ],
)
def test_refusals(content: Any, key: str | None, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        choose_weights(content, FILE, key)


def test_what_is_no_detector_is_given_as_it_is() -> None:
    assert choose_weights({"state_dict": {"conv1.weight": torch.zeros(1)}}, FILE, None).keys() == {
        "conv1.weight"
    }
    assert choose_weights({"conv1.weight": torch.zeros(1)}, FILE, None).keys() == {"conv1.weight"}
