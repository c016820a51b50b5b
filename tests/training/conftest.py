"""A data set and a network so small that a step takes some hundredths of a second."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tood_deploy.demo.scenes import SCENE_CLASSES, write_scenes
from tood_deploy.presets import PRESETS, Preset
from tood_deploy.training.config import RECIPES, Progress, Recipe, RunOptions
from tood_deploy.training.data import Augment, TrainingData
from tood_deploy.training.init import new_model
from tood_deploy.training.loop import fit
from tood_deploy.training.records import read_labelled_images

Fit = Callable[..., Progress]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten generated images: a folder with annotations.json and images/."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), 10, seed=3).parent


def shrink(name: str) -> Preset:
    """Return a preset with few channels, for small images."""
    return replace(
        PRESETS[name],
        base_channels=8,
        channels=64,
        tower_stages=2,
        imgsz=(64, 96),
        class_names=SCENE_CLASSES,
    )


@pytest.fixture(scope="session")
def small_preset() -> Preset:
    return shrink("tiny")


@pytest.fixture(scope="session")
def small_presets() -> dict[str, Preset]:
    """All that can be trained, by detector."""
    names = {"tood": "tiny", "atss": "tiny-atss", "gfl": "tiny-gfl", "paa": "tiny-paa"}
    return {detector: shrink(name) for detector, name in names.items()}


@pytest.fixture(scope="session")
def short_recipe() -> Recipe:
    """Two steps of four and one of two an epoch; both assignments, both mirrors, an average."""
    recipe = RECIPES["tiny"]
    return replace(
        recipe,
        epochs=4,
        batch=4,
        warmup_steps=5,
        drops=(3,),
        atss_epochs=2,
        short_sides=(48, 64),
        flip_vertical=0.5,
        ema=0.9,
    )


@pytest.fixture(scope="session")
def run_fit(scenes: Path, small_preset: Preset, short_recipe: Recipe) -> Fit:
    """A function: trains in a folder, with changes to the recipe and the options."""

    def run(
        output: Path,
        recipe: Recipe | None = None,
        evaluate: Any = None,
        journal: Any = None,
        preset: Preset = small_preset,
        **options: Any,
    ) -> Progress:
        torch.set_num_threads(1)  # as `_one_thread`, also in fixtures of wider scope
        recipe = recipe or short_recipe
        annotations = read_labelled_images(scenes / "annotations.json", scenes / "images")
        data = TrainingData(
            annotations.for_training(),
            Augment(
                preset.imgsz, recipe.short_sides, recipe.flip, recipe.flip_vertical, recipe.colour
            ),
            recipe.seed,
        )
        model = new_model(preset, recipe.seed)
        return fit(
            model, data, recipe, RunOptions(output, **options), evaluate=evaluate, journal=journal
        )

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """On maps this small a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
