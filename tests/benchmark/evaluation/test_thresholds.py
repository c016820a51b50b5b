"""Thresholds by class, and the guarantee: its bound is tested on simulated and on real images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_coco import annotation, result, truth_of

from tood_deploy.benchmark.evaluation.evaluate import evaluate_results
from tood_deploy.benchmark.evaluation.thresholds import (
    MissedShares,
    Wish,
    guaranteed_threshold,
    hoeffding_bentkus,
    images_needed,
    write_thresholds,
)
from tood_deploy.data.coco import read_annotations
from tood_deploy.data.coco_metrics import match
from tood_deploy.data.image_set import list_image_files
from tood_deploy.data.images import read_image
from tood_deploy.data.results import results_from_rows
from tood_deploy.errors import ToodError
from tood_deploy.inference.thresholds import thresholds_from

ROOT = Path(__file__).resolve().parents[3]


def box(place: int) -> tuple[float, float, float, float]:
    return (10.0 * place, 4.0, 8.0, 8.0)


def evaluation(tmp_path: Path, wish: Wish | None = None) -> Any:
    """Five cats, of which four are found, at 0.9, 0.8, 0.6, 0.2; two false ones at 0.7 and 0.1."""
    truth = truth_of(tmp_path, [annotation(1, 1, box(place)) for place in range(5)])
    scores = {0: 0.9, 1: 0.8, 2: 0.6, 3: 0.2}
    rows = [result(1, 1, box(place), score) for place, score in scores.items()]
    rows += [result(2, 1, box(0), 0.7), result(2, 1, box(1), 0.1)]
    return evaluate_results("x", truth, results_from_rows(rows, truth), conf=0.05, wish=wish)


@pytest.mark.parametrize(
    ("wish", "low", "high", "kept"),
    [
        (None, 0.1, 0.2, True),  # all four, one false: F1 0.8
        (Wish("precision", 0.75), 0.1, 0.2, True),
        (Wish("precision", 0.9), 0.7, 0.8, True),
        (Wish("recall", 0.6), 0.2, 0.6, True),
        (Wish("recall", 0.9), 0.1, 0.2, False),
        (Wish("miss_rate", 0.5), 0.05, 0.05, False),  # one image proves nothing
    ],
)
def test_the_threshold_lies_between_the_right_scores(
    tmp_path: Path, wish: Wish | None, low: float, high: float, kept: bool
) -> None:
    choice = evaluation(tmp_path, wish).chosen.choices["cat"]
    assert low <= choice.conf <= high
    assert choice.kept is kept
    assert bool(choice.remark) is not kept


def test_the_file_is_read_back_and_names_its_data(tmp_path: Path) -> None:
    result = evaluation(tmp_path)
    path = tmp_path / "thresholds.json"
    write_thresholds(path, result.chosen, result.truth, {}, "model.onnx")
    thresholds = thresholds_from(path)
    assert thresholds.classes == {"cat": result.chosen.choices["cat"].conf}
    values = json.loads(path.read_text(encoding="utf-8"))
    assert len(values["data"]["annotations_sha256"]) == 64
    assert values["chosen_for"] == "best F1"


def test_classes_without_objects_are_not_named(tmp_path: Path) -> None:
    assert set(evaluation(tmp_path).chosen.choices) == {"cat"}


def test_too_few_images_are_said(tmp_path: Path) -> None:
    notes = evaluation(tmp_path, Wish("miss_rate", 0.1)).notes
    assert any("at least 29" in note for note in notes)
    assert images_needed(0.1, 0.95) == 29
    assert hoeffding_bentkus(0, 29, 0.1) <= 0.05 < hoeffding_bentkus(0, 28, 0.1)


@pytest.mark.parametrize("risk", [0.0, 0.02, 0.05, 0.1, 0.3, 1.0])
def test_the_p_value_is_one_and_falls_with_images(risk: float) -> None:
    values = [hoeffding_bentkus(risk, count, 0.1) for count in (1, 10, 100, 1000)]
    assert all(0 <= value <= 1 for value in values)
    if risk < 0.1:
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.05
    else:
        assert min(values) > 0.5


@pytest.mark.parametrize(
    ("kind", "value", "confidence"),
    [("precision", 0, 0.95), ("recall", 1.0, 0.95), ("miss_rate", -1, 0.95), ("f1", None, 1.0)],
)
def test_wrong_wishes_are_named(kind: Any, value: float | None, confidence: float) -> None:
    with pytest.raises(ToodError, match="between 0 and 1"):
        Wish(kind, value, confidence)


def shares_of(images: list[np.ndarray]) -> MissedShares:
    """Scores of the objects of every image, -1 where missed."""
    scores = np.concatenate(images)
    weights = np.concatenate([np.full(len(one), 1 / len(one) / len(images)) for one in images])
    order = np.argsort(scores, kind="stable")
    return MissedShares(scores[order], weights[order], len(images))


def failures(population: list[np.ndarray], count: int, bound: float, confidence: float) -> float:
    """Return how often, of 1,000 random calibration sets, the bound does not hold."""
    everything, rng, wrong = shares_of(population), np.random.default_rng(0), 0
    for _ in range(1000):
        drawn = rng.integers(0, len(population), count)
        conf = guaranteed_threshold(shares_of([population[i] for i in drawn]), bound, confidence)
        wrong += conf is not None and everything.at(conf) > bound
    return wrong / 1000


@pytest.mark.parametrize("objects", [1, 6])
def test_the_bound_holds_in_the_promised_share_of_simulated_calibrations(objects: int) -> None:
    rng = np.random.default_rng(1)
    population = [
        np.where(rng.random(count) < 0.03, -1, np.round(rng.beta(4, 2, count), 2))
        for count in rng.integers(1, objects + 1, 2000)
    ]
    for bound, confidence in ((0.1, 0.95), (0.2, 0.8)):
        assert failures(population, 80, bound, confidence) <= 1 - confidence
    # It is no empty promise: thresholds are found, and the best F1's would break it.
    conf = guaranteed_threshold(shares_of(population[:400]), 0.1, 0.95)
    assert conf is not None
    assert 0.1 < conf < 0.6


@pytest.mark.slow
@pytest.mark.shared
def test_the_bound_holds_over_random_splits_of_bccd(shared: Path) -> None:
    """Calibrated on a random half of real images, it holds on the other half in 95% of splits."""
    from tood_deploy import Detector

    folder = shared / "data" / "bccd"
    scores: dict[int, list[np.ndarray]] = {}
    with Detector(
        ROOT / "tood_deploy" / "weights" / "tiny-bccd.safetensors", conf=0.05
    ) as detector:
        for part in ("train", "val"):
            truth = read_annotations(folder / f"{part}.json").first(130)
            ids = {name: key for key, name in truth.categories.items()}
            rows = []
            for key, path in list_image_files(truth, folder / part).items():
                found = detector(read_image(path))
                rows += found.to_coco(key, [ids[name] for name in detector.class_names])
            matches = match(truth, results_from_rows(rows, truth))
            for key, category in ((k, c) for k in truth.images for c in truth.categories):
                chosen = truth.boxes.image_ids == key
                chosen &= (truth.boxes.category_ids == category) & ~matches.truth_ignored
                if chosen.any():
                    scores.setdefault(category, []).append(matches.truth_scores[chosen])
    rng = np.random.default_rng(0)
    for images in scores.values():
        assert len(images) >= 2 * images_needed(0.2, 0.95)
        wrong = 0
        for _ in range(1000):
            order, half = rng.permutation(len(images)), len(images) // 2
            conf = guaranteed_threshold(shares_of([images[i] for i in order[:half]]), 0.2, 0.95)
            rest = shares_of([images[i] for i in order[half:]])
            wrong += conf is not None and rest.at(conf) > 0.2
        assert wrong <= 50
