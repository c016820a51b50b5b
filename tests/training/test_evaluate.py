"""AP of a network, the report and the plots."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from tood_deploy.model import load_checkpoint
from tood_deploy.presets import Preset
from tood_deploy.training.config import Progress, Recipe
from tood_deploy.training.evaluate import CocoEvaluator
from tood_deploy.training.init import new_model
from tood_deploy.training.logger import Journal, read_log
from tood_deploy.training.records import read_labelled_images
from tood_deploy.training.train import finish_report

WEIGHTS = Path(__file__).resolve().parents[2] / "tood_deploy" / "weights" / "tiny-demo.safetensors"


def test_trained_weights_find_what_is_there(scenes: Path) -> None:
    evaluator = CocoEvaluator(
        read_labelled_images(scenes / "annotations.json", scenes / "images"), batch=4
    )
    found = evaluator(load_checkpoint(WEIGHTS))
    assert evaluator.latest is found
    assert found.metrics["AP"] > 0.6
    assert found.metrics["AP50"] > found.metrics["AP"]
    assert found.precision is not None
    assert found.precision.shape == (10, 101)
    assert found.precision.mean() == pytest.approx(found.metrics["AP"], abs=1e-6)
    assert set(found.class_ap) == {"disc", "square", "triangle", "star", "ring"}
    assert [image.shape for image in found.images] == [(240, 320, 3)] * 4


def test_category_ids_of_any_kind_and_bare_annotations(scenes: Path, tmp_path: Path) -> None:
    content = json.loads((scenes / "annotations.json").read_text())
    plain = CocoEvaluator(read_labelled_images(scenes / "annotations.json", scenes / "images"))(
        load_checkpoint(WEIGHTS)
    )
    content["categories"] = [entry | {"id": entry["id"] * 7} for entry in content["categories"]][
        ::-1
    ]
    content["annotations"] = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"] * 7,
            "bbox": entry["bbox"],
        }
        for entry in content["annotations"]
    ]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    names = ("disc", "square", "triangle", "star", "ring")
    odd = CocoEvaluator(read_labelled_images(tmp_path / "odd.json", scenes / "images", names))(
        load_checkpoint(WEIGHTS)
    )
    assert odd.metrics == plain.metrics


def test_an_unreadable_image_counts_as_missed(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (scenes / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "00002.jpg").write_bytes(b"cut")
    found = CocoEvaluator(read_labelled_images(scenes / "annotations.json", images))(
        load_checkpoint(WEIGHTS)
    )
    whole = CocoEvaluator(read_labelled_images(scenes / "annotations.json", scenes / "images"))(
        load_checkpoint(WEIGHTS)
    )
    assert found.unreadable == ("00002.jpg",)
    assert found.metrics["AP"] < whole.metrics["AP"]


def test_a_network_that_finds_nothing(scenes: Path, small_preset: Preset) -> None:
    evaluator = CocoEvaluator(read_labelled_images(scenes / "annotations.json", scenes / "images"))
    found = evaluator(new_model(small_preset, 0))
    assert found.metrics == dict.fromkeys(found.metrics, 0.0)
    assert len(found.metrics) == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_report_and_plots(scenes: Path, small_preset: Preset, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(read_labelled_images(scenes / "annotations.json", scenes / "images"))
    found = evaluator(load_checkpoint(WEIGHTS))
    history = [
        {"epoch": float(i + 1), "cls": 1.0 / (i + 1), "box": 0.5, **found.metrics, "AP": 0.1 * i}
        for i in range(3)
    ]
    text = finish_report(
        tmp_path, small_preset, Recipe(epochs=3, drops=()), Progress(9, history, 0.2), found
    )
    assert "AP of the best (epoch 3): AP 0.200" in text
    assert "by class: disc" in text
    assert (
        text.splitlines()[-1]
        == f"next: tood-export {tmp_path}/model.safetensors --output {tmp_path}/model.onnx"
    )
    for name in ("learning.png", "precision_recall.png"):
        image = cv2.imread(str(tmp_path / name))
        assert image is not None
        assert len(np.unique(image)) > 50
    assert finish_report(
        tmp_path, small_preset, Recipe(), Progress(9, history, 0.2), found
    ).endswith("go on with --resume")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_journal_writes_tensorboard_and_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = {"step": 2, "cls": 1.0, "box": 2.0, "lr": 0.1, "images_per_s": 3.0}
    with Journal(tmp_path, every=2) as journal:
        journal.step(values | {"step": 1})
        journal.step(values)
        journal.write("epoch", {"step": 2, "epoch": 1, "AP": 0.25})
        journal.images([np.zeros((8, 8, 3), np.uint8)], 2)
    assert [entry["step"] for entry in read_log(tmp_path, "step")] == [2]
    assert "step 2: cls 1.000 box 2.000 lr 0.1 3.0 images/s" in capsys.readouterr().err
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("epoch/AP")[0].value == 0.25
    assert events.Tags()["images"] == ["validation/0"]


def test_journal_without_tensorboard_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with Journal(tmp_path) as journal:
        journal.write("step", {"step": 1})
    assert re.search(
        r"no files for TensorBoard are written: the package tensorboard .*\[train\]",
        capsys.readouterr().err,
    )
    assert read_log(tmp_path, "step")[0]["step"] == 1


def test_a_silent_journal_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal(None) as journal:
        journal.say("hello")
        journal.write("step", SimpleNamespace(step=1).__dict__)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
