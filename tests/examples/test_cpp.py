"""Build examples/cpp, and compare what it finds with what Python finds.

Needs CMake, a compiler and OpenCV's headers. Where TOOD_EXPECT_CPP is set these are not missing.
ONNX Runtime's part is built where ONNXRUNTIME_INCLUDE_DIR and ONNXRUNTIME_LIBRARY name its headers
and its library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from examples.conftest import CONF, skip_or_fail
from same_detections import assert_same_detections

pytestmark = pytest.mark.slow
SOURCES = Path(__file__).resolve().parents[2] / "examples" / "cpp"
ONNXRUNTIME = ("ONNXRUNTIME_INCLUDE_DIR", "ONNXRUNTIME_LIBRARY")
RUNTIMES = ["openvino", *(["onnxruntime"] if all(map(os.environ.get, ONNXRUNTIME)) else [])]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def tood(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A function that runs the program, built with OpenVINO from the Python package."""
    openvino = pytest.importorskip("openvino")
    for program in ("cmake", "g++"):
        if shutil.which(program) is None:
            skip_or_fail("TOOD_EXPECT_CPP", f"{program} is not installed")
    if not Path("/usr/include/opencv4").is_dir():
        skip_or_fail(
            "TOOD_EXPECT_CPP", "OpenCV's headers are absent: apt-get install libopencv-dev"
        )
    folder = tmp_path_factory.mktemp("cpp")
    places = [f"-DOpenVINO_DIR={Path(openvino.__path__[0]) / 'cmake'}"]
    places += [f"-D{name}={os.environ[name]}" for name in ONNXRUNTIME if os.environ.get(name)]
    for command in (["-S", SOURCES, "-B", folder, *places], ["--build", folder, "--parallel", "2"]):
        built = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
        assert "warning" not in built.stderr

    def run(*words: str | Path | float) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "tood"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    return run


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_detections_are_pythons(
    runtime: str,
    tood: Run,
    demo_artefact: Path,
    scenes: list[Path],
    expected_lines: dict[str, dict[str, Any]],
) -> None:
    ran = tood(demo_artefact, *scenes, "--conf", CONF, "--runtime", runtime)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = list(map(json.loads, ran.stdout.splitlines()))
    assert [line["source"] for line in lines] == list(map(str, scenes))
    for line in lines:
        expected = expected_lines[line["source"]]
        assert line.keys() == expected.keys()
        assert (line["height"], line["width"]) == (expected["height"], expected["width"])
        assert_same_detections(expected["detections"], line["detections"], 1e-4, 0.05)
    assert sum(len(line["detections"]) for line in lines) > 40


@pytest.mark.parametrize(
    "changes",
    [
        {"resize": "stretch", "imgsz": [200, 330]},
        {"canvas_hw": [320, 320]},
        {"canvas_hw": [192, 192]},  # less than images are scaled to: they are shrunk to fit
        {"pad_divisor": 64},
        {"scale_factor": [0.5, 0.4]},
    ],
    ids=str,
)
def test_other_sizings_are_pythons(
    changes: dict[str, Any], tood: Run, demo_artefact: Path, scenes: list[Path], tmp_path: Path
) -> None:
    from tood_deploy import Detector
    from tood_deploy.inference.text_sinks import frame_record

    artefact = tmp_path / "other.onnx"
    shutil.copy(demo_artefact, artefact)
    manifest = json.loads(demo_artefact.with_suffix(".json").read_text(encoding="utf-8"))
    manifest["preset"] |= changes
    artefact.with_suffix(".json").write_text(json.dumps(manifest), encoding="utf-8")
    ran = tood(artefact, *scenes[:10], "--conf", CONF)
    with Detector(artefact, conf=CONF, self_test=False) as detector:
        for line, (frame, detections) in zip(
            map(json.loads, ran.stdout.splitlines()), detector.stream(scenes[:10]), strict=True
        ):
            expected = frame_record(frame, detections, False)["detections"]
            assert_same_detections(expected, line["detections"], 1e-4, 0.05)


def test_draws_and_names_what_cannot_be_read(
    tood: Run, demo_artefact: Path, scenes: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(scenes[0].read_bytes()[:60])
    ran = tood(demo_artefact, tmp_path / "cut.png", scenes[1], "--draw", tmp_path / "drawn")
    assert ran.returncode == 1
    assert "cut.png" in ran.stderr
    assert len(ran.stdout.splitlines()) == 1
    drawn, image = (cv2.imread(str(path)) for path in (tmp_path / "drawn" / "01.png", scenes[1]))
    assert drawn is not None
    assert image is not None
    assert drawn.shape == image.shape
    assert np.any(drawn != image)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["MODEL"], "images"),
        (["MODEL", "a.png", "--conf", "1.5"], "1.5"),
        (["MODEL", "a.png", "--conf", "nan"], "nan"),
        (["MODEL", "a.png", "--cnof", "0.5"], "--cnof"),
        (["MODEL", "a.png", "--runtime", "tensorrt"], "tensorrt"),
        (["absent.onnx", "a.png"], "absent.json"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], named: str, tood: Run, demo_artefact: Path
) -> None:
    ran = tood(*(demo_artefact if word == "MODEL" else word for word in words))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert named in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_damaged_manifest_is_named(tood: Run, demo_artefact: Path, tmp_path: Path) -> None:
    shutil.copy(demo_artefact, tmp_path / "model.onnx")
    (tmp_path / "model.json").write_text('{"preset": {}}')
    ran = tood(tmp_path / "model.onnx", "a.png")
    assert ran.returncode == 2
    assert "model.json" in ran.stderr
