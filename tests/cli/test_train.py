"""The command: a whole small training, its messages, its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tood_deploy.cli.train import main
from tood_deploy.demo.scenes import write_scenes
from tood_deploy.model import load_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]
FAST = ["--imgsz", "64", "96", "--batch", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 8, seed=5).parent


@pytest.fixture(scope="module")
def data(scenes: Path) -> list[str]:
    return [
        "--train-json",
        str(scenes / "annotations.json"),
        "--train-images",
        str(scenes / "images"),
    ]


@pytest.fixture(scope="module")
def validation(scenes: Path) -> list[str]:
    return ["--val-json", str(scenes / "annotations.json"), "--val-images", str(scenes / "images")]


def test_training_and_going_on(
    data: list[str], validation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "tiny",
        *data,
        *validation,
        *FAST,
        "--epochs",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--stop-after", "1"]) == 0
    first = capsys.readouterr()
    assert "tiny: 5 classes (disc, square, triangle, star, ...), 8 images" in first.err
    assert (
        "the learning rate is 0.0005, scaled with the batch: 0.001 is for 8 images a step"
        in first.err
    )
    assert "the learning rate drops after epochs 1, 2, in step with --epochs" in first.err
    assert "all weights are random" in first.err
    assert "1 of 2 epochs done, 2 steps" in first.out
    assert first.out.endswith("go on with --resume\n")
    assert main(command) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    second = capsys.readouterr()
    assert "epoch 2, step 2" in second.err
    assert "2 of 2 epochs done, 4 steps" in second.out
    assert (
        f"next: tood-export {tmp_path}/run/model.safetensors --output {tmp_path}/run/model.onnx"
        in second.out
    )
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best.pth", "last.pth", "log.jsonl", "model.safetensors", "learning.png"} <= made
    preset = load_checkpoint(tmp_path / "run" / "best.pth").preset
    assert (preset.imgsz, preset.class_names[0]) == ((64, 96), "disc")


def test_fine_tuning_says_what_starts_anew(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (
        Path(__file__).resolve().parents[2] / "tood_deploy" / "weights" / "tiny-demo.safetensors"
    )
    command = [
        "tiny",
        *data,
        *FAST,
        "--classes",
        "star,disc",
        "--epochs",
        "1",
        "--checkpoint",
        str(weights),
        "--output",
        str(tmp_path / "run"),
    ]
    assert (
        main(
            [*command, "--ema", "--precision", "bf16", "--schedule", "cosine", "--accumulate", "2"]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "but for the class layer, which starts anew: 5 classes there, 2 here" in said
    assert "category not listed, left out" in said
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").preset.class_names == (
        "star",
        "disc",
    )


def test_check_data_reports_and_trains_nothing(
    data: list[str],
    validation: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tiny", *data, *validation, "--check-data"]) == 0
    said = capsys.readouterr().out
    for text in ("training:", "validation:", "box side in pixels", "triangle", "320 x 240"):
        assert text in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no training data; give --train-json FILE --train-images DIR, or --coco DIR"),
        (["--coco", "nowhere"], "instances_train2017.json: cannot be read"),
        (["--coco", "nowhere", "--train-json", "a.json"], "give one or the other"),
        (["DATA", "--val-json", "a.json"], "validation data needs both"),
        (["DATA", "--lr", "0"], "lr is 0.0; expected a number above 0"),
        (["DATA", "--save-every", "0"], "--save-every is 0; expected a whole number of at least 1"),
        (["DATA", "--threads", "0"], "threads is 0"),
        (["DATA", "--checkpoint", "a.pth", "--from-scratch"], "exclude one another"),
        (["DATA", "--checkpoint", "missing.pth"], "missing.pth: no such file"),
        (["DATA", "--imgsz", "0", "5"], "imgsz is 0 5"),
        (["DATA", "--classes", "cat"], "has no category cat"),
        (["DATA", "--output", "/proc/run"], "cannot be written"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    message: str,
    data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        part for argument in arguments for part in (data if argument == "DATA" else [argument])
    ]
    assert main(["tiny", *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fcos-r50-1x"], "fcos-r50-1x: there is no training of fcos; choose a preset of tood, "),
        (["retinanet-r50-1x"], "there is no training of retinanet"),
        (["vfnet-r50-1x"], "there is no training of vfnet"),
        (["tiny-gfl", "--atss-epochs", "2"], "leave it out, or give --loss tood"),
    ],
)
def test_what_is_not_trained_is_one_line(
    command: list[str], message: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *data]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_another_detector_is_trained_and_tuned(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["tiny-paa", *data, *FAST, "--epochs", "1", "--output", str(first)]) == 0
    tuned = ["--checkpoint", str(first / "model.safetensors"), "--classes", "star,disc"]
    command = ["tiny-paa", *data, *FAST, *tuned, "--epochs", "1", "--loss", "tood"]
    assert main([*command, "--output", str(second)]) == 0
    said = capsys.readouterr().err
    assert "but for the class layer, which starts anew: 5 classes there, 2 here" in said
    assert "the loss is TOOD's, not the detector's own" in said
    preset = load_checkpoint(second / "model.safetensors").preset
    assert (preset.detector, preset.class_names) == ("paa", ("star", "disc"))


def test_random_frozen_layers_are_refused(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["r50-1x", *data, "--from-scratch", "--output", str(tmp_path / "run")]) == 2
    assert (
        "would keep random ones; add --frozen-stages -1 --no-freeze-norm" in capsys.readouterr().err
    )


def test_a_gpu_that_is_not_there(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tiny", *data, "--device", "cuda", "--output", str(tmp_path / "run")]) == 2
    assert "sees 0" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(data: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "tood_deploy.cli.train",
        "tiny",
        *data,
        *FAST,
        "--epochs",
        "500",
        "--output",
        str(output),
        "--workers",
        "1",
    ]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [*command, "--save-every", "1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (output / "last.pth").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loading processes as well
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "all is saved in" in said
    assert "Traceback" not in said
    assert load_checkpoint(output / "last.pth").preset.num_classes == 5
    assert not list(output.glob(".tood-*"))


def test_the_log_is_json_lines(data: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(["tiny", *data, *FAST, "--epochs", "1", "--output", str(output), "--quiet"]) == 0
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["epoch"]
    assert {"cls", "box", "grad_norm", "seconds", "data_seconds", "images_per_s", "lr"} <= set(
        entries[0]
    )
