"""Two genuine trained checkpoints, from the file to COCO AP, on 72 real images.

Against the detections that their own code gave there.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tood_deploy import Detector
from tood_deploy.engines.torch_fast import BF16_CPU
from tood_deploy.export.export import export_onnx
from tood_deploy.matching import NetDetections, match_boxes
from tood_deploy.model import load_checkpoint
from tood_deploy.parity import verify
from tood_deploy.parity.tolerances import DETECTION_LIMITS

pytestmark = [pytest.mark.shared, pytest.mark.slow]
RECORDED_AP = {"mmdet3_bccd_tiny": 0.536563, "authors_bccd_tiny": 0.536936}
IMGSZ = (240, 320)
HAS_BF16 = any(map(torch.cpu.get_capabilities().get, BF16_CPU))


@pytest.fixture(scope="module", params=RECORDED_AP)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def artefact(
    name: str,
    shared: Path,
    small_verification: dict[str, tuple[int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp(name) / f"{name}.onnx"
    with pytest.MonkeyPatch.context() as patch:  # verified as users' are
        patch.setattr(verify, "SIZES_HW", small_verification)
        export_onnx(load_checkpoint(shared / "reference" / "checkpoints" / f"{name}.pth"), path)
    return path


@pytest.fixture(scope="module")
def truth(shared: Path) -> COCO:
    return COCO(str(shared / "data" / "bccd" / "val.json"))


@pytest.mark.parametrize(
    ("runtime", "options", "matched", "ap_tolerance"),
    [
        ("torch", {}, 0.995, 0.0005),
        ("torch", {"runtime": "torch"}, 0.995, 0.0005),
        ("onnx", {}, 0.995, 0.0005),
        pytest.param(
            "torch",
            {"precision": "bf16"},
            0.0,  # box by box it rounds elsewhere; AP says what a user sees
            DETECTION_LIMITS["bf16"].ap_drop / 100,
            marks=pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16"),
        ),
    ],
)
def test_equals_its_own_code(
    runtime: str,
    options: dict[str, Any],
    matched: float,
    ap_tolerance: float,
    name: str,
    artefact: Path,
    truth: COCO,
    shared: Path,
) -> None:
    folder = shared / "reference" / "checkpoints"
    model = artefact if runtime == "onnx" else folder / f"{name}.pth"
    recorded = json.loads((folder / f"{name}.bbox.json").read_text())
    categories = sorted(truth.cats)
    results: list[dict[str, Any]] = []
    with Detector(model, conf=0.05, iou=0.6, imgsz=IMGSZ, **options) as detector:
        for image_id, image in truth.imgs.items():
            pixels = cv2.imread(str(shared / "data" / "bccd" / "val" / image["file_name"]))
            assert pixels is not None
            results += detector(np.asarray(pixels, np.uint8)).to_coco(image_id, categories)
    assert share_matched(recorded, results) >= matched
    assert average_precision(truth, results) == pytest.approx(RECORDED_AP[name], abs=ap_tolerance)


def share_matched(recorded: list[dict[str, Any]], results: list[dict[str, Any]]) -> float:
    """Return the share of recorded detections with a partner: same class, IoU, score, used once."""
    before, after = by_image(recorded), by_image(results)
    counts = [
        match_boxes(detections, after[image], min_iou=0.99, max_score_difference=1e-4).counts
        for image, detections in before.items()
    ]
    return sum(count.matched for count in counts) / len(recorded)


def by_image(rows: list[dict[str, Any]]) -> dict[int, NetDetections]:
    """Return the detections of every image from COCO results, best first."""
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row["score"]):
        grouped[row["image_id"]].append(row)
    detections = {}
    for image, rows_of_image in grouped.items():
        boxes = np.array([row["bbox"] for row in rows_of_image], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([row["score"] for row in rows_of_image], np.float32)
        labels = np.array([row["category_id"] for row in rows_of_image], np.int32)
        detections[image] = NetDetections(boxes, scores, labels)
    return detections


def average_precision(truth: COCO, results: Any) -> float:
    """Return the COCO AP of results, which `loadRes` takes as such too, whatever its stub says."""
    scoring = COCOeval(truth, truth.loadRes(results), "bbox")
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    return float(scoring.stats[0])
