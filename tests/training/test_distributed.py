"""Two gloo processes of batch 2 learn what one of batch 4 learns; evaluation counts images once."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tood_deploy.errors import DeviceError
from tood_deploy.presets import Preset
from tood_deploy.training.checkpoints import read_training_state
from tood_deploy.training.config import LOSS_TERMS, Recipe
from tood_deploy.training.distributed import (
    any_rank,
    gather_objects,
    mean_over_ranks,
    process_group,
    rank,
    world_size,
)
from tood_deploy.training.logger import read_log

ROOT = Path(__file__).resolve().parents[2]
DEMO_WEIGHTS = ROOT / "tood_deploy" / "weights" / "tiny-demo.safetensors"

WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tood_deploy.model import load_checkpoint
from tood_deploy.presets import Preset
from tood_deploy.training.records import read_labelled_images
from tood_deploy.training.data import Augment
from tood_deploy.training.data import TrainingData
from tood_deploy.training.distributed import process_group, rank
from tood_deploy.training.evaluate import CocoEvaluator
from tood_deploy.training.logger import Journal
from tood_deploy.reporter import Reporter
from tood_deploy.training.loop import fit
from tood_deploy.training.config import RunOptions
from tood_deploy.training.init import new_model
from tood_deploy.training.config import Recipe
preset, recipe, scenes, output, weights = (json.loads(text) for text in sys.argv[1:])
preset, recipe = Preset.from_dict(preset), Recipe.from_dict(recipe)
scenes, output = Path(scenes), Path(output)
with process_group("cpu") as device:
    annotations = read_labelled_images(scenes / "annotations.json", scenes / "images")
    data = TrainingData(annotations.for_training(), Augment(preset.imgsz), recipe.seed)
    journal = Journal(None if rank() else output, Reporter.silent(), every=1)
    fit(new_model(preset, recipe.seed), data, recipe, RunOptions(output), journal=journal)
    found = CocoEvaluator(annotations, device, batch=3)(load_checkpoint(weights))
    (output / f"evaluation{rank()}.json").write_text(json.dumps(found.metrics))
"""


def train(workers: int, output: Path, preset: Preset, recipe: Recipe, scenes: Path) -> None:
    """Trains and evaluates in as many processes, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = (preset.to_dict(), recipe.to_dict(), str(scenes), str(output), str(DEMO_WEIGHTS))
    command = [sys.executable, "-c", WORKER, *(json.dumps(value) for value in values)]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(workers),
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(workers)
    ]
    assert [process.wait(timeout=240) for process in started] == [0] * workers


@pytest.mark.slow
@pytest.mark.parametrize(("detector", "accumulate"), [("tood", 1), ("tood", 2), ("atss", 1)])
def test_two_workers_learn_as_one(
    scenes: Path,
    small_presets: dict[str, Preset],
    short_recipe: Recipe,
    tmp_path: Path,
    detector: str,
    accumulate: int,
) -> None:
    # One size of images and fixed statistics: what a worker sees of its own half alone cannot
    # matter.
    batch = 4 * accumulate
    recipe = replace(
        short_recipe,
        epochs=3,
        batch=batch,
        freeze_norm=True,
        short_sides=None,
        accumulate=accumulate,
        optimiser="sgd",
        lr=1e-3,
    )
    for workers in (1, 2):
        train(workers, tmp_path / str(workers), small_presets[detector], recipe, scenes)
    one, two = (read_log(tmp_path / str(workers), "step") for workers in (1, 2))
    assert len(one) == 3 * (3 if accumulate == 1 else 2)
    if accumulate == 1:
        for first, second in zip(one, two, strict=True):
            for name in ({*LOSS_TERMS} & {*first}) | {"grad_norm"}:
                assert second[name] == pytest.approx(first[name], rel=1e-5), (first["step"], name)
        weights = [
            read_training_state(tmp_path / str(workers) / "last.pth")["state_dict"]
            for workers in (1, 2)
        ]
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert sorted(path.name for path in (tmp_path / "2").glob("*.*")) == [
        "evaluation0.json",
        "evaluation1.json",
        "last.pth",
        "log.jsonl",
        "model.safetensors",
    ]
    alone, main, other = (
        json.loads((tmp_path / path).read_text())
        for path in ("1/evaluation0.json", "2/evaluation0.json", "2/evaluation1.json")
    )
    assert alone["AP"] > 0.6
    assert main == alone
    assert other == {}


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["gfl", "paa"])
def test_two_workers_of_other_detectors_learn(
    scenes: Path,
    small_presets: dict[str, Preset],
    short_recipe: Recipe,
    tmp_path: Path,
    detector: str,
) -> None:
    # Not exactly as one does, as in the reference: PAA's averages are those of a worker's own
    # images, and GFL's are raised to 1 as long as no class is certain.
    recipe = replace(short_recipe, epochs=2, short_sides=None, ema=None)
    train(2, tmp_path, small_presets[detector], recipe, scenes)
    steps = read_log(tmp_path, "step")
    assert [entry["step"] for entry in steps] == list(range(1, 7))
    assert all(entry["cls"] > 0 and entry["box"] > 0 for entry in steps)
    state = read_training_state(tmp_path / "last.pth")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_one_process_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as device:
        assert (rank(), world_size(), device.type) == (0, 1, "cpu")
        assert gather_objects("a") == ["a"]
        assert mean_over_ranks(torch.tensor([2.0, 4.0])).tolist() == [2.0, 4.0]
        assert any_rank(True, device)
        assert not any_rank(False, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DeviceError, match="sees 0"), process_group("cuda"):
        pass
