"""What tests of the examples share: a trained model, images of many sizes, and our detections."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import pytest

from tood_deploy import Detector
from tood_deploy.demo.scenes import make_scene
from tood_deploy.export.export import export_onnx
from tood_deploy.inference.text_sinks import frame_record
from tood_deploy.model import load_checkpoint

WEIGHTS = Path(__file__).resolve().parents[2] / "tood_deploy" / "weights" / "tiny-demo.safetensors"
CONF = 0.1
# Enlarged, as it is, halved exactly (which OpenCV does by another rule), shrunk, odd and upright.
SIZES_HW = [
    *((160, 170), (240, 320), (480, 640), (720, 1280), (333, 500)),
    *((500, 333), (241, 319), (1080, 1000), (170, 900), (400, 401)),
]


@pytest.fixture(scope="session")
def demo_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights, trained on generated images, exported."""
    path = tmp_path_factory.mktemp("demo") / "demo.onnx"
    export_onnx(load_checkpoint(WEIGHTS), path)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty PNG files: decoders of JPEG differ by a grey level here and there."""
    folder = tmp_path_factory.mktemp("scenes")
    paths = [folder / f"{seed:02}.png" for seed in range(2 * len(SIZES_HW))]
    for seed, path in enumerate(paths):
        scene = make_scene(seed, SIZES_HW[seed % len(SIZES_HW)])
        assert cv2.imwrite(str(path), scene.image_bgr)
    return paths


@pytest.fixture(scope="session")
def expected_lines(demo_artefact: Path, scenes: list[Path]) -> dict[str, dict[str, Any]]:
    """What `tood-infer --jsonl` says of every scene, by its path."""
    with Detector(demo_artefact, conf=CONF) as detector:
        results = list(detector.stream(scenes))
    return {frame.name: frame_record(frame, detections, False) for frame, detections in results}


def skip_or_fail(variable: str, reason: str) -> None:
    """Skip for a reason, or fail where the environment says that nothing is missing here."""
    if os.environ.get(variable):
        pytest.fail(f"{variable} is set, but {reason}")
    pytest.skip(reason)
