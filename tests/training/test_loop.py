"""Nothing lost: a run that is broken off goes on exactly, and no checkpoint is ever unreadable."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tood_deploy.errors import CheckFailed, CheckpointError, OutputError, ToodError
from tood_deploy.model import DenseDetector, load_checkpoint
from tood_deploy.presets import PRESETS, Preset
from tood_deploy.reporter import Reporter
from tood_deploy.training import checkpoints
from tood_deploy.training import learner as step
from tood_deploy.training.checkpoints import read_training_state
from tood_deploy.training.config import LOSS_TERMS, RECIPES, Recipe
from tood_deploy.training.init import new_model
from tood_deploy.training.logger import Journal, read_log
from tood_deploy.training.loop import StopFlag

Fit = Callable[..., Any]
STEPS = 3  # an epoch


def assert_same(first: Path, second: Path) -> None:
    """Weights, average, optimiser: bit by bit."""
    a, b = (read_training_state(path) for path in (first, second))
    for key in a["state_dict"]:
        assert torch.equal(a["state_dict"][key], b["state_dict"][key]), key
    for key in a["training"]["model"]:
        assert torch.equal(a["training"]["model"][key], b["training"]["model"][key]), key
    for number, state in a["training"]["optimiser"]["state"].items():
        assert torch.equal(state["exp_avg"], b["training"]["optimiser"]["state"][number]["exp_avg"])
    assert a["training"]["step"] == b["training"]["step"]


@pytest.fixture(scope="module")
def straight(run_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing broke off. Nothing may change it."""
    output = tmp_path_factory.mktemp("run") / "straight"
    assert run_fit(output).step == 4 * STEPS
    return output


def test_two_epochs_and_two_more_equal_four(run_fit: Fit, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    assert len(run_fit(output, stop_after=2).history) == 2
    assert not (output / "model.safetensors").exists()
    assert len(run_fit(output, resume=True).history) == 4
    assert_same(straight / "last.pth", output / "last.pth")


@pytest.mark.parametrize(
    ("detector", "loss", "terms"),
    [
        ("atss", "own", {"cls", "box", "centerness"}),
        ("gfl", "own", {"cls", "box", "distribution"}),
        ("paa", "own", {"cls", "box", "overlap"}),
        ("atss", "tood", {"cls", "box"}),
    ],
)
def test_other_detectors_learn_and_resume_exactly(
    run_fit: Fit,
    short_recipe: Recipe,
    small_presets: dict[str, Preset],
    tmp_path: Path,
    detector: str,
    loss: Any,
    terms: set[str],
) -> None:
    recipe = replace(short_recipe, epochs=3, loss=loss, atss_epochs=1)
    preset, (straight, resumed) = small_presets[detector], (tmp_path / "a", tmp_path / "b")
    history = run_fit(straight, recipe, preset=preset).history
    assert set(LOSS_TERMS) & set(history[0]) == terms
    assert history[-1]["box"] < history[0]["box"]
    run_fit(resumed, recipe, preset=preset, stop_after=1)
    run_fit(resumed, recipe, preset=preset, resume=True)
    assert_same(straight / "last.pth", resumed / "last.pth")
    assert load_checkpoint(straight / "model.safetensors").preset.detector == detector


def test_another_detectors_run_is_refused(
    run_fit: Fit, small_presets: dict[str, Preset], tmp_path: Path
) -> None:
    run_fit(tmp_path / "run", preset=small_presets["atss"], stop_after=1)
    with pytest.raises(CheckpointError, match="use the same preset"):
        run_fit(tmp_path / "run", preset=small_presets["paa"], resume=True)
    with pytest.raises(CheckpointError, match="use the same preset"):
        run_fit(tmp_path / "run", preset=small_presets["gfl"], resume=True)


def test_ctrl_c_in_the_middle_of_an_epoch(
    run_fit: Fit, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, learn, calls = tmp_path / "resumed", step.Learner.step, []

    def learn_and_interrupt(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == STEPS + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(*arguments)

    monkeypatch.setattr(step.Learner, "step", learn_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_fit(output)
    assert read_training_state(output / "last.pth")["training"]["step"] == STEPS + 2
    run_fit(output, resume=True)
    assert_same(straight / "last.pth", output / "last.pth")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_from_a_checkpoint_within_an_epoch(
    run_fit: Fit, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "resumed"
    monkeypatch.setattr("tood_deploy.training.loop._Run.close_epoch", _lose_power)
    with pytest.raises(SystemExit):
        run_fit(output, save_every=2)
    monkeypatch.undo()
    assert read_training_state(output / "last.pth")["training"]["step"] == 2
    run_fit(output, save_every=2, resume=True)
    assert_same(straight / "last.pth", output / "last.pth")


def _lose_power(*_: Any) -> None:
    raise SystemExit


def test_a_finished_run_is_left_alone(run_fit: Fit, straight: Path) -> None:
    before = (straight / "last.pth").read_bytes()
    assert run_fit(straight, resume=True).step == 4 * STEPS
    assert (straight / "last.pth").read_bytes() == before


def test_a_run_is_not_overwritten(run_fit: Fit, straight: Path) -> None:
    with pytest.raises(ToodError, match="holds a run already; add --resume"):
        run_fit(straight)


def test_what_a_run_leaves(straight: Path) -> None:
    assert sorted(path.name for path in straight.iterdir()) == ["last.pth", "model.safetensors"]
    last, final = (
        load_checkpoint(straight / "last.pth"),
        load_checkpoint(straight / "model.safetensors"),
    )
    assert last.preset == final.preset
    assert final.preset.class_names[0] == "disc"
    for key, value in last.state_dict().items():
        assert torch.equal(value, final.state_dict()[key]), key


def test_best_is_kept(run_fit: Fit, short_recipe: Recipe, tmp_path: Path) -> None:
    aps = iter([0.2, 0.5, 0.3, 0.4])
    weights = []

    def evaluate(model: DenseDetector) -> SimpleNamespace:
        assert not model.training
        weights.append(model.state_dict()["bbox_head.tood_reg.weight"].clone())
        return SimpleNamespace(metrics={"AP": next(aps)}, images=[])

    progress = run_fit(tmp_path / "run", evaluate=evaluate)
    assert progress.best_ap == 0.5
    best, final = (
        load_checkpoint(tmp_path / "run" / name).state_dict()
        for name in ("best.pth", "model.safetensors")
    )
    for found in (best, final):
        assert torch.equal(found["bbox_head.tood_reg.weight"], weights[1])


def test_evaluation_may_be_rarer_but_comes_last(run_fit: Fit, tmp_path: Path) -> None:
    epochs: list[int] = []

    def evaluate(_: DenseDetector) -> SimpleNamespace:
        epochs.append(1)
        return SimpleNamespace(metrics={"AP": 0.1}, images=[])

    progress = run_fit(tmp_path / "run", evaluate=evaluate, evaluate_every=3)
    assert ["AP" in row for row in progress.history] == [False, False, True, True]
    assert len(epochs) == 2


def test_the_log_of_a_resumed_run_has_every_step_once(
    run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("tood_deploy.training.loop._Run.close_epoch", _lose_power)
    with pytest.raises(SystemExit):
        run_fit(output, save_every=2, journal=Journal(output, Reporter.silent(), every=1))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (output / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # cut by the kill
    run_fit(output, resume=True, journal=Journal(output, Reporter.silent(), every=1))
    assert [entry["step"] for entry in read_log(output, "step")] == list(range(1, 4 * STEPS + 1))
    assert [entry["epoch"] for entry in read_log(output, "epoch")] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_stops(
    run_fit: Fit, short_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, learn, calls = tmp_path / "run", step.Learner.step, []

    def learn_and_break(learner: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == STEPS + 2:
            with torch.no_grad():
                learner.model.bbox_head.tood_cls.bias.fill_(float("nan"))
        return learn(learner, *arguments)

    monkeypatch.setattr(step.Learner, "step", learn_and_break)
    with pytest.raises(CheckFailed, match=r"step 5: the loss is nan .* images \d+, .*last\.pth"):
        run_fit(output)
    assert all(
        value.isfinite().all()
        for value in load_checkpoint(output / "last.pth").state_dict().values()
    )


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(
    run_fit: Fit, short_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(short_recipe, lr=1e30, warmup_steps=0, clip=None, optimiser="sgd", ema=None)
    with pytest.raises(CheckFailed, match="no checkpoint was written yet; try a smaller --lr"):
        run_fit(tmp_path / "run", recipe)


def test_full_disk(
    run_fit: Fit, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    output = tmp_path / "run"
    run_fit(output, stop_after=1)
    before = (output / "last.pth").read_bytes()
    with full_disk(100_000), pytest.raises(OutputError, match=r"the older last\.pth is intact"):
        run_fit(output, resume=True)
    assert (output / "last.pth").read_bytes() == before
    assert [path.name for path in output.iterdir()] == ["last.pth"]


def test_leftovers_of_a_kill_are_removed(run_fit: Fit, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / ".tood-0123456789abcdef.pth").write_text("half a checkpoint")
    (output / "notes.txt").write_text("mine")
    run_fit(output, stop_after=1)
    assert sorted(path.name for path in output.iterdir()) == ["last.pth", "notes.txt"]


def test_other_data_or_network_is_refused(
    run_fit: Fit, short_recipe: Recipe, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run_fit(output, stop_after=1)
    with pytest.raises(
        CheckpointError, match="its epochs have 3 steps, with this data and batch they have 5"
    ):
        run_fit(output, replace(short_recipe, batch=2), resume=True)
    content = read_training_state(output / "last.pth")
    content["tood_deploy"] = content["tood_deploy"].replace('"disc"', '"cat"')
    torch.save(content, output / "last.pth")
    with pytest.raises(CheckpointError, match="was trained on other classes; expected disc"):
        run_fit(output, resume=True)


@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_a_damaged_checkpoint_is_named(run_fit: Fit, tmp_path: Path, content: bytes | None) -> None:
    last = tmp_path / "run" / "last.pth"
    last.parent.mkdir()
    if content is None:
        torch.save({"state_dict": {}}, last)
    else:
        last.write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=r"last.pth: (cannot be read|holds no state of a training|is empty|is text)",
    ):
        run_fit(tmp_path / "run", resume=True)


def test_changed_options_are_said(
    run_fit: Fit, short_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    run_fit(output, stop_after=1)
    run_fit(
        output,
        replace(short_recipe, clip=1.0),
        resume=True,
        stop_after=2,
        journal=Journal(output, Reporter()),
    )
    assert "note: clip is 1.0 from here on, it was 35.0" in capsys.readouterr().err


def test_a_second_signal_interrupts_at_once() -> None:
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.raised
        os.kill(os.getpid(), signal.SIGTERM)  # the same once more: from the terminal, say
        flag._raised_s -= 60
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_old_checkpoint_stays_until_the_new_one_is_written(
    tmp_path: Path, small_preset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    checkpoints.write_training_checkpoint(path, small_preset, {"a": torch.ones(1)}, {"step": 1})

    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match=r"the older last\.pth is intact"):
        checkpoints.write_training_checkpoint(
            path, small_preset, {"a": torch.zeros(1)}, {"step": 2}
        )
    monkeypatch.undo()
    assert read_training_state(path)["training"]["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def _written(path: Path) -> int:
    """When, in nanoseconds; 0 before the first time."""
    return path.stat().st_mtime_ns if path.is_file() else 0


KILLED = """
import sys
from pathlib import Path
import cv2, torch
torch.set_num_threads(1)
cv2.setNumThreads(1)
from tood_deploy.presets import Preset
from tood_deploy.training.records import read_labelled_images
from tood_deploy.training.data import Augment
from tood_deploy.training.data import TrainingData
from tood_deploy.training.loop import fit
from tood_deploy.training.config import RunOptions
from tood_deploy.training.init import new_model
from tood_deploy.training.config import Recipe
import json, os
preset, recipe, scenes, output = (json.loads(text) for text in sys.argv[1:])
preset, recipe, scenes = Preset.from_dict(preset), Recipe.from_dict(recipe), Path(scenes)
records = read_labelled_images(scenes / "annotations.json", scenes / "images").for_training()
print("ready", flush=True)
for line in sys.stdin:  # each line asks for one more life of the run
    child = os.fork()
    if child == 0:
        data = TrainingData(records, Augment(preset.imgsz, recipe.short_sides), recipe.seed)
        options = RunOptions(Path(output), save_every=1, resume=True)
        fit(new_model(preset, recipe.seed), data, recipe, options)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_kill_at_twenty_random_moments(
    scenes: Path, small_preset: Any, short_recipe: Recipe, run_fit: Fit, tmp_path: Path
) -> None:
    """With a checkpoint at every step, many of the kills hit one that is being written."""
    recipe, chance = (
        replace(short_recipe, epochs=400, drops=(), flip_vertical=0.0),
        random.Random(0),
    )
    output, arguments = (
        tmp_path / "run",
        [json.dumps(small_preset.to_dict()), json.dumps(recipe.to_dict()), json.dumps(str(scenes))],
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments, json.dumps(str(output))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    steps, interrupted_writes = [0], 0
    with driver.stdin, driver.stdout:
        assert driver.stdout.readline() == "ready\n"
        for life in range(20):
            before = _written(output / "last.pth")
            driver.stdin.write("\n")
            driver.stdin.flush()
            child = int(driver.stdout.readline())
            # However busy the machine is, three of four lives get as far as a step, and one of four
            # is met while it writes.
            deadline = time.monotonic() + 60
            while (
                life % 4 and _written(output / "last.pth") == before and time.monotonic() < deadline
            ):
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.2))
            while (
                life % 4 == 1 and not list(output.glob(".tood-*")) and time.monotonic() < deadline
            ):
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)
            assert int(driver.stdout.readline()) == signal.SIGKILL
            interrupted_writes += len(list(output.glob(".tood-*")))
            if (output / "last.pth").is_file():
                steps.append(read_training_state(output / "last.pth")["training"]["step"])
    driver.wait()
    assert steps == sorted(steps)
    assert steps[-1] >= 10
    assert interrupted_writes > 0
    progress = run_fit(output, recipe, resume=True, stop_after=steps[-1] // STEPS + 1)
    assert progress.step >= steps[-1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_learn_and_resume(
    run_fit: Fit, short_recipe: Recipe, tmp_path: Path, precision: Any
) -> None:
    recipe = replace(
        short_recipe, precision=precision, accumulate=2, optimiser="sgd", schedule="cosine"
    )
    run_fit(tmp_path / "run", recipe, stop_after=1)
    progress = run_fit(tmp_path / "run", recipe, resume=True, stop_after=2)
    assert progress.step == 2 * STEPS
    assert progress.history[1]["cls"] < progress.history[0]["cls"]
    assert read_training_state(tmp_path / "run" / "last.pth")["training"]["scaler"].get(
        "scale", 0.0
    ) == (65536.0 if precision == "fp16" else 0.0)


def test_on_a_cpu_the_backbone_computes_in_channels_last() -> None:
    model = new_model(PRESETS["tiny"], 0)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    layouts = []
    with torch.inference_mode():
        expected = model.eval().backbone(images)
        learner = step.Learner(model, RECIPES["tiny"], torch.device("cpu"))
        model.backbone.get_submodule("layer1").register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        maps = learner.model.eval().backbone(images)
    assert layouts == [True]
    assert all(values.is_contiguous() for values in maps)
    for values, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)
