"""AP of a network, the report and the plots."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tood_deploy.model import load_checkpoint
from tood_deploy.presets import Preset
from tood_deploy.training.config import Progress, Recipe
from tood_deploy.training.evaluate import CocoEvaluator
from tood_deploy.training.init import new_model
from tood_deploy.training.records import read_labelled_images
from tood_deploy.training.report import plot_learning, plot_precision_recall
from tood_deploy.training.train import summarise

WEIGHTS = Path(__file__).resolve().parents[2] / "tood_deploy" / "weights" / "tiny-demo.safetensors"


@pytest.fixture(scope="module")
def evaluator(scenes: Path) -> CocoEvaluator:
    """One that has evaluated the trained weights."""
    images = read_labelled_images(scenes / "annotations.json", scenes / "images")
    evaluator = CocoEvaluator(images, batch=4)
    assert evaluator(load_checkpoint(WEIGHTS)) is evaluator.latest
    return evaluator


def test_trained_weights_find_what_is_there(evaluator: CocoEvaluator) -> None:
    found = evaluator.latest
    assert found is not None
    assert found.metrics["AP"] > 0.6
    assert found.metrics["AP50"] > found.metrics["AP"]
    assert found.precision is not None
    assert found.precision.shape == (10, 101)
    assert found.precision.mean() == pytest.approx(found.metrics["AP"], abs=1e-6)
    assert set(found.class_ap) == {"disc", "square", "triangle", "star", "ring"}
    assert [image.shape for image in found.images] == [(240, 320, 3)] * 4


def test_category_ids_of_any_kind_and_bare_annotations(
    scenes: Path, tmp_path: Path, evaluator: CocoEvaluator
) -> None:
    content = json.loads((scenes / "annotations.json").read_text())
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
    images = read_labelled_images(tmp_path / "odd.json", scenes / "images", names)
    odd = CocoEvaluator(images, batch=4)(load_checkpoint(WEIGHTS))
    assert evaluator.latest is not None
    assert odd.metrics == evaluator.latest.metrics


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
    progress = Progress(9, history, 0.2)
    text = summarise(tmp_path, small_preset, Recipe(epochs=3, drops=()), progress, found)
    assert "AP of the best (epoch 3): AP 0.200" in text
    assert "by class: disc" in text
    assert (
        text.splitlines()[-1]
        == f"next: tood-export {tmp_path}/model.safetensors --output {tmp_path}/model.onnx"
    )
    plot_learning(history, tmp_path / "learning.png")
    assert found.precision is not None
    plot_precision_recall(found.precision, tmp_path / "precision_recall.png")
    for name in ("learning.png", "precision_recall.png"):
        image = cv2.imread(str(tmp_path / name))
        assert image is not None
        assert len(np.unique(image)) > 50
    unfinished = summarise(tmp_path, small_preset, Recipe(), progress, found)
    assert unfinished.endswith("go on with --resume")
