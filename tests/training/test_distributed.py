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
    network = new_model(preset, recipe.seed)
    if preset.detector == "gfl":  # sure enough that its averages are not raised to 1
        torch.nn.init.constant_(network.bbox_head.gfl_cls.bias, 3.0)
    fit(network, data, recipe, RunOptions(output), journal=journal)
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
@pytest.mark.parametrize(
    ("detector", "accumulate"), [("tood", 1), ("tood", 2), ("atss", 1), ("gfl", 1)]
)
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
        assert_same_weights(tmp_path / "1", tmp_path / "2")
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
def test_two_workers_of_paa_learn_as_one_that_accumulates(
    scenes: Path, small_presets: dict[str, Preset], short_recipe: Recipe, tmp_path: Path
) -> None:
    # PAA's averages are those of a worker's own images, as in the reference: so one worker learns
    # the same where it takes each half of the batch apart.
    recipe = replace(
        short_recipe, epochs=2, freeze_norm=True, short_sides=None, optimiser="sgd", lr=1e-3
    )
    for workers, accumulate in ((1, 2), (2, 1)):
        halves = replace(recipe, accumulate=accumulate)
        train(workers, tmp_path / str(workers), small_presets["paa"], halves, scenes)
    assert len(read_log(tmp_path / "2", "step")) == 6
    assert_same_weights(tmp_path / "1", tmp_path / "2")


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = (
        read_training_state(folder / "last.pth")["state_dict"] for folder in (first, second)
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=key)


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
