"""Two genuine trained checkpoints, from the file to COCO AP, against the detections their own code gave on 72 real images."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tood_deploy import Detector
from tood_deploy.export.export import export_onnx
from tood_deploy.model import load_checkpoint

pytestmark = [pytest.mark.shared, pytest.mark.slow]
RECORDED_AP = {"mmdet3_bccd_tiny": 0.536563, "authors_bccd_tiny": 0.536936}
IMGSZ = (240, 320)


@pytest.fixture(scope="module", params=RECORDED_AP)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def artefact(name: str, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(name) / f"{name}.onnx"
    export_onnx(load_checkpoint(shared / "reference" / "checkpoints" / f"{name}.pth"), path)
    return path


@pytest.fixture(scope="module")
def truth(shared: Path) -> COCO:
    return COCO(str(shared / "data" / "bccd" / "val.json"))


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_equals_its_own_code(
    runtime: str, name: str, artefact: Path, truth: COCO, shared: Path
) -> None:
    model = artefact if runtime == "onnx" else shared / "reference" / "checkpoints" / f"{name}.pth"
    recorded = json.loads((shared / "reference" / "checkpoints" / f"{name}.bbox.json").read_text())
    categories, found = sorted(truth.cats), []
    with Detector(model, conf=0.05, iou=0.6, imgsz=IMGSZ) as detector:
        for image_id, image in truth.imgs.items():
            source_image = cv2.imread(str(shared / "data" / "bccd" / "val" / image["file_name"]))
            assert source_image is not None
            found += detector(np.asarray(source_image, np.uint8)).to_coco(image_id, categories)
    assert share_matched(recorded, found) >= 0.995
    assert average_precision(truth, found) == pytest.approx(RECORDED_AP[name], abs=0.0005)


def share_matched(recorded: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
    """Of the recorded detections, those found with the same class, IoU above 0.99 and a score within 1e-4, each used once."""
    free: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        free[row["image_id"], row["category_id"]].append(row)
    matched = 0
    for row in recorded:
        candidates = free[row["image_id"], row["category_id"]]
        for other in candidates:
            if (
                abs(other["score"] - row["score"]) <= 1e-4
                and overlap(other["bbox"], row["bbox"]) > 0.99
            ):
                candidates.remove(other)
                matched += 1
                break
    return matched / len(recorded)


def overlap(first: list[float], second: list[float]) -> float:
    """IoU of two boxes x, y, width, height."""
    sides = [
        min(first[i] + first[i + 2], second[i] + second[i + 2]) - max(first[i], second[i])
        for i in (0, 1)
    ]
    shared_area = max(0.0, sides[0]) * max(0.0, sides[1])
    return shared_area / (first[2] * first[3] + second[2] * second[3] - shared_area)


def average_precision(truth: COCO, found: list[dict[str, Any]]) -> float:
    results: Any = found  # the stub knows file names alone
    scoring = COCOeval(truth, truth.loadRes(results), "bbox")
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    return float(scoring.stats[0])
