from pathlib import Path

import numpy as np
from benchmark.truths import annotation, result, truth_of

from tood_deploy.benchmark.evaluation.analysis import IGNORED, RIGHT, WRONG, MistakeFinder, Mistakes
from tood_deploy.benchmark.evaluation.coco_metrics import evaluate
from tood_deploy.data.results import results_from_rows
from tood_deploy.draw import class_colour


def finder(folder: Path) -> MistakeFinder:
    objects = [
        annotation(1, 1, (10, 10, 20, 20)),
        annotation(1, 2, (40, 20, 20, 20)),
        annotation(3, 1, (2, 20, 24, 24), iscrowd=1),
    ]
    rows = [
        result(1, 1, (10, 10, 20, 20), 0.9),
        result(1, 2, (40, 20, 20, 20), 0.4),
        result(2, 2, (5, 25, 20, 20), 0.8),
    ]
    rows += [result(3, 1, (2, 20, 24, 24), 0.9), result(2, 1, (30, 25, 10, 10), 0.3)]
    truth = truth_of(folder, objects)
    results = results_from_rows(rows, truth)
    return MistakeFinder(truth, results, evaluate(truth, results).matches, {1: 0.5, 2: 0.5})


def has_colour(image: np.ndarray, kind: int) -> bool:
    return bool((image == class_colour(kind)).all(axis=2).any())


def test_mistakes_of_every_image(tmp_path: Path) -> None:
    assert finder(tmp_path).all() == [Mistakes(1, 1, 0), Mistakes(2, 0, 1), Mistakes(3, 0, 0)]


def test_drawn_beside_one_another(tmp_path: Path) -> None:
    image = np.full((48, 64, 3), 90, np.uint8)
    expected = {1: ((RIGHT, WRONG), (RIGHT,)), 2: ((), (WRONG,)), 3: ((IGNORED,), (IGNORED,))}
    for image_id, sides in expected.items():
        for side, kinds in zip(finder(tmp_path).draw(image_id, image), sides, strict=True):
            assert {kind for kind in (RIGHT, WRONG, IGNORED) if has_colour(side, kind)} == set(
                kinds
            )
            assert side.shape == image.shape
    assert (image == 90).all()
