"""Task alignment: the measures against plain loops, and the section of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from data.small_coco import annotation, coco, result, truth_of, write_json
from inference.fakes import write_image

from tood_deploy.benchmark.evaluation import alignment
from tood_deploy.benchmark.evaluation.alignment import (
    assign,
    choose_images,
    maps_of,
    measure_alignment,
    rank_correlation,
    true_positives,
)
from tood_deploy.benchmark.evaluation.alignment_report import alignment_table
from tood_deploy.benchmark.evaluation.evaluate import evaluate_results
from tood_deploy.cli.eval import main
from tood_deploy.data.image_set import list_image_files
from tood_deploy.data.results import empty_results, results_from_rows
from tood_deploy.errors import InputError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Prepared
from tood_deploy.manifest import Manifest
from tood_deploy.model import build_model, save_checkpoint
from tood_deploy.preprocess import ImageTransform
from tood_deploy.presets import PRESETS, STRIDES, Preset
from tood_deploy.reporter import Reporter

CLASSES = ("cat", "dog")
NET_HW, VALID_HW, IMAGE_HW = (64, 96), (60, 80), (120, 160)
RETINANET = replace(
    PRESETS["retinanet-r50-1x"], depth=18, base_channels=32, channels=64, imgsz=(48, 64)
)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.prod(sides.clip(0)))
    areas = [float(np.prod(box[2:] - box[:2])) for box in (first, second)]
    return shared / (sum(areas) - shared)


def random_predictions(anchors: int) -> alignment._Predictions:
    """Boxes around every location of a network input of 64 x 96 pixels."""
    rng = np.random.default_rng(3)
    shapes = [(-(-NET_HW[0] // s), -(-NET_HW[1] // s), anchors) for s in STRIDES]
    centres = [alignment._cell_centres(*pair) for pair in zip(shapes, STRIDES, strict=True)]
    centres = np.concatenate(centres)
    reach = rng.uniform(1, 40, (len(centres), 4)).astype(np.float32)
    boxes = np.concatenate([centres - reach[:, :2], centres + reach[:, 2:]], axis=1)
    scores = rng.uniform(0, 1, (len(centres), 2)).astype(np.float32)
    return alignment._Predictions(boxes, scores, centres, shapes)


OBJECTS = np.array([(10, 10, 40, 40), (30, 20, 70, 55), (200, 200, 210, 210)], np.float32)
CATEGORIES = np.array([0, 1, 1])


def test_every_prediction_is_of_the_object_that_it_overlaps_most() -> None:
    predictions = random_predictions(1)
    assigned = assign(predictions, OBJECTS, CATEGORIES)
    for i, box in enumerate(predictions.boxes):
        overlaps = [iou(box, own) for own in OBJECTS]
        assert assigned.overlaps[i] == pytest.approx(max(overlaps), abs=1e-6)
        if max(overlaps) > 0:
            assert assigned.objects[i] == np.argmax(overlaps)
            assert assigned.scores[i] == predictions.scores[i, CATEGORIES[np.argmax(overlaps)]]
        else:
            assert assigned.scores[i] == predictions.scores[i].max()


@pytest.mark.parametrize("anchors", [1, 3])
def test_maps_show_the_level_and_the_anchor_with_the_highest_product(anchors: int) -> None:
    predictions = random_predictions(anchors)
    assigned = assign(predictions, OBJECTS, CATEGORIES)
    prepared = Prepared(
        np.zeros((*NET_HW, 3), np.uint8), ImageTransform(IMAGE_HW, VALID_HW, NET_HW)
    )
    maps = maps_of(7, prepared, predictions, assigned, OBJECTS)
    assert maps.scores.shape == maps.overlaps.shape == VALID_HW
    products = assigned.scores * assigned.overlaps
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in predictions.shapes)])
    for y, x in ((0, 0), (59, 79), (30, 40), (17, 63)):
        own: list[int] = []
        for shape, start, stride in zip(predictions.shapes, starts, STRIDES, strict=False):
            cell = start + (y // stride * shape[1] + x // stride) * anchors
            own += range(cell, cell + anchors)
        best = max(own, key=lambda i: products[i] + 1e-4 * assigned.scores[i])
        assert maps.scores[y, x] == assigned.scores[best]
        assert maps.overlaps[y, x] == assigned.overlaps[best]
    # The image is twice as large as the resized one; nothing overlaps the last object.
    np.testing.assert_array_equal(maps.objects, OBJECTS * 2)
    assert np.isnan(maps.surest.centres[2]).all()
    first = np.flatnonzero((assigned.objects == 0) & (assigned.overlaps > 0))
    surest, tightest = (first[v[first].argmax()] for v in (assigned.scores, assigned.overlaps))
    np.testing.assert_array_equal(maps.surest.boxes[0], predictions.boxes[surest] * 2)
    np.testing.assert_array_equal(maps.tightest.centres[0], predictions.centres[tightest] * 2)


def test_an_image_without_objects_has_maps() -> None:
    predictions = random_predictions(1)
    assigned = assign(predictions, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert (assigned.overlaps == 0).all()
    np.testing.assert_array_equal(assigned.scores, predictions.scores.max(1))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.6, 0.7, 0.71], 1.0),
        ([0.1, 0.5, 0.9], [0.9, 0.8, 0.6], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * (1 + 1) / (4 * 15)
        ([0.1, 0.5], [0.6, 0.7], None),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], None),
    ],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float | None) -> None:
    value = rank_correlation(np.array(first), np.array(second))
    assert np.isnan(value) if expected is None else value == pytest.approx(expected)


def test_true_positives_have_the_overlap_with_an_object_of_their_class(tmp_path: Path) -> None:
    objects = [
        annotation(1, 1, (0, 0, 20, 20)),
        annotation(1, 2, (0, 0, 16, 20)),
        annotation(2, 1, (10, 10, 20, 20)),
        annotation(2, 1, (10, 10, 16, 20), iscrowd=1),
    ]
    rows = [
        result(2, 1, (10, 10, 16, 20), 0.9),
        result(1, 1, (0, 0, 16, 20), 0.8),
        result(1, 1, (40, 30, 10, 10), 0.7),
    ]
    truth = truth_of(tmp_path, objects)
    right = true_positives(evaluate_results("x", truth, results_from_rows(rows, truth)))
    np.testing.assert_array_equal(right.scores, [0.8, 0.9])
    np.testing.assert_allclose(right.overlaps, [0.8, 0.8], rtol=1e-6)


def test_images_are_chosen_by_name_or_evenly(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(i, 1, (1, 1, 9, 9)) for i in range(2, 12)], images=12)
    assert choose_images(truth, []) == [2, 5, 8, 11]
    assert choose_images(truth, ["3.png", "1.png"]) == [3, 1]
    with pytest.raises(InputError, match=r"no images of the name 99\.png"):
        choose_images(truth, ["99.png"])


@pytest.mark.parametrize(
    "preset", ["tiny", "tiny-gfl", RETINANET], ids=["tood", "gfl", "retinanet"]
)
def test_networks_are_measured(tmp_path: Path, preset: str | Preset) -> None:
    own = replace(PRESETS[preset] if isinstance(preset, str) else preset, class_names=CLASSES)
    torch.manual_seed(0)
    objects = [annotation(1, 1, (5, 5, 30, 30)), annotation(2, 2, (10, 10, 20, 20), iscrowd=1)]
    truth = truth_of(tmp_path, objects)
    for image in truth.images.values():
        write_image(tmp_path / "p" / image.file_name)
    files = list_image_files(truth, tmp_path / "p")
    evaluation = evaluate_results("x", truth, empty_results(), files=files)
    save_checkpoint(build_model(own), tmp_path / "x.safetensors")
    with Detector(tmp_path / "x.safetensors", imgsz=(48, 64)) as detector:
        measured = measure_alignment(detector, evaluation, ["1.png"], Reporter.silent())
    assert measured.together.objects == measured.classes["cat"].objects == 1
    assert measured.together.true_positives == 0
    assert 0 < measured.classes["cat"].tight_iou < 1
    assert -1 <= measured.classes["cat"].surest_correlation <= 1
    assert np.isnan(measured.classes["dog"].surest_correlation)
    assert [maps.scores.shape for maps in measured.drawn] == [(48, 64)]
    assert 0 < measured.drawn[0].overlaps.max() <= 1
    assert len(alignment_table(measured).rows) == 3


class TestTheCommand:
    @pytest.fixture(autouse=True)
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for i in range(1, 4):
            write_image(Path("images") / f"{i}.png")
        write_json(Path("truth.json"), coco([annotation(1, 1, (5, 5, 30, 30))], names=CLASSES))

    def run(self, model: str, *words: str) -> int:
        given = [model, "--annotations", "truth.json", "--images", "images", "--imgsz", "48", "64"]
        return main([*given, "--output", "out", *words])

    def test_the_report_has_a_section(self, capfd: pytest.CaptureFixture[str]) -> None:
        torch.manual_seed(0)
        own = replace(PRESETS["tiny-atss"], class_names=CLASSES)
        save_checkpoint(build_model(own), Path("x.safetensors"))
        assert self.run("x.safetensors", "--alignment") == 0
        assert "rank correlation" in capfd.readouterr().out
        values = json.loads(Path("out/report.json").read_text())["alignment"]
        assert values["images"] == ["1.png"]
        assert values["classes"]["cat"]["objects"] == 1
        assert values["together"]["correlation"] is None
        html = Path("out/report.html").read_text()
        assert html.count("1.png: score") == 2  # the map, and the product
        assert "## Task alignment" in Path("out/report.md").read_text()

    def test_an_artefact_names_its_checkpoint(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("x.onnx").touch()
        manifest = Manifest(PRESETS["tiny"], checkpoint_sha256="ab" * 32)
        Path("x.json").write_text(manifest.to_json())
        assert self.run("x.onnx", "--alignment") == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "ab" * 32 in err

    @pytest.mark.parametrize(
        ("words", "said"),
        [(["--alignment", "9.png"], "9.png"), (["--alignment", "--slice", "32"], "--slice")],
    )
    def test_it_is_refused_before_the_long_run(
        self, words: list[str], said: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run("absent.pth", *words) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert said in err
