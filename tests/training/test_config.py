"""Published recipes, what follows from a user's changes, and the learning rate of every step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tood_deploy.errors import ToodError
from tood_deploy.presets import PRESETS
from tood_deploy.training import AtssLoss, GflLoss, PaaLoss, ToodLoss
from tood_deploy.training.config import RECIPES, Recipe
from tood_deploy.training.learner import learning_rate, make_optimiser, set_learning_rate
from tood_deploy.training.losses import LOSSES, build_loss
from tood_deploy.training.train import choose_recipe


def test_every_preset_of_a_trained_detector_has_a_recipe() -> None:
    trained = ("tood", *LOSSES)
    assert set(RECIPES) == {name for name in PRESETS if PRESETS[name].detector in trained}


@pytest.mark.parametrize("name", ["fcos-r50-1x", "vfnet-r50-1x", "retinanet-r50-1x"])
def test_other_detectors_are_not_trained(name: str) -> None:
    with pytest.raises(ToodError, match=r"no training of .*; choose a preset of tood, atss, gfl"):
        choose_recipe(name, {})
    with pytest.raises(ToodError, match="no training of"):
        build_loss(PRESETS[name], Recipe())


def test_epochs_of_atss_are_of_toods_loss() -> None:
    assert choose_recipe("tiny", {"atss_epochs": 30})[0].atss_epochs == 30
    assert choose_recipe("tiny-atss", {"atss_epochs": 2, "loss": "tood"})[0].loss == "tood"
    with pytest.raises(ToodError, match="atss_epochs is 2, which TOOD's loss alone has"):
        choose_recipe("tiny-atss", {"atss_epochs": 2})


@pytest.mark.parametrize(
    ("name", "loss", "expected"),
    [
        ("tiny", "own", ToodLoss),
        ("tiny", "tood", ToodLoss),
        ("tiny-atss", "own", AtssLoss),
        ("tiny-atss", "tood", ToodLoss),
        ("tiny-gfl", "own", GflLoss),
        ("tiny-paa", "own", PaaLoss),
    ],
)
def test_whose_loss(name: str, loss: Any, expected: type) -> None:
    assert type(build_loss(PRESETS[name], Recipe(loss=loss))) is expected


@pytest.mark.parametrize(
    ("name", "epochs", "drops", "sides"),
    [("r50-1x", 12, (8, 11), None), ("x101-dcn-2x", 24, (16, 22), (480, 800))],
)
def test_published_recipes(
    name: str, epochs: int, drops: tuple[int, ...], sides: tuple[int, int] | None
) -> None:
    recipe = RECIPES[name]
    assert (recipe.epochs, recipe.drops, recipe.short_sides) == (epochs, drops, sides)
    assert (recipe.lr, recipe.batch, recipe.momentum, recipe.weight_decay, recipe.warmup_steps) == (
        0.01,
        16,
        0.9,
        1e-4,
        500,
    )
    assert (
        recipe.clip,
        recipe.ema,
        recipe.precision,
        recipe.frozen_stages,
        recipe.freeze_norm,
    ) == (None, None, "fp32", 1, True)


def test_batch_scales_the_rate_and_says_so() -> None:
    recipe, notes = choose_recipe("r50-1x", {"batch": 64})
    assert recipe.lr == pytest.approx(0.04)
    assert notes == [
        "the learning rate is 0.04, scaled with the batch: 0.01 is for 16 images a step"
    ]
    recipe, notes = choose_recipe("r50-1x", {"batch": 64, "lr": 0.02})
    assert (recipe.lr, notes) == (0.02, [])


def test_epochs_move_the_drops() -> None:
    recipe, notes = choose_recipe("r50-1x", {"epochs": 24})
    assert recipe.drops == (16, 22)
    assert "16, 22" in notes[0]
    assert choose_recipe("r50-1x", {"epochs": 24, "drops": (20,)})[0].drops == (20,)
    assert choose_recipe("r50-1x", {"published": "2x"})[0].drops == (16, 22)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
        ({"lr": -1.0}, "lr is -1.0; expected a number above 0"),
        ({"flip": 2.0}, "flip is 2.0; expected a number from 0 to 1"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"accumulate": 3}, r"batch is 16; expected a multiple of accumulate \(3\)"),
        ({"short_sides": (800, 480)}, "short_sides is"),
        ({"precision": "int8"}, "precision is int8; expected one of fp32, bf16, fp16"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ToodError, match=message):
        replace(Recipe(), **change)


def test_recipe_survives_json() -> None:
    recipe = replace(Recipe(), short_sides=(480, 800), ema=0.99)
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in recipe.to_dict().items()
    }
    assert Recipe.from_dict(values) == recipe


def test_steps_of_the_learning_rate() -> None:
    recipe, steps = Recipe(), 1000
    rates = [learning_rate(recipe, step, steps) for step in range(12 * steps)]
    assert rates[0] == pytest.approx(0.01 * 1e-3)
    assert rates[499] == pytest.approx(0.01)
    assert rates[250] == pytest.approx(0.01 * (1e-3 + 0.999 * 250 / 499))
    assert rates[8 * steps - 1] == pytest.approx(0.01)
    assert rates[8 * steps] == pytest.approx(1e-3)
    assert rates[11 * steps] == pytest.approx(1e-4)
    cosine = [
        learning_rate(replace(recipe, schedule="cosine", warmup_steps=0), step, steps)
        for step in range(12 * steps)
    ]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[6 * steps] == pytest.approx(0.005)
    assert cosine[-1] < 1e-8


def test_frozen_parameters_stay_out_of_the_optimiser() -> None:
    parameters = [
        torch.nn.Parameter(torch.ones(1)),
        torch.nn.Parameter(torch.ones(1), requires_grad=False),
    ]
    for recipe, kind in ((Recipe(), torch.optim.SGD), (RECIPES["tiny"], torch.optim.AdamW)):
        optimiser = make_optimiser(parameters, recipe)
        assert isinstance(optimiser, kind)
        assert optimiser.param_groups[0]["params"] == parameters[:1]
        set_learning_rate(optimiser, 0.5)
        assert optimiser.param_groups[0]["lr"] == 0.5
