"""Test that the client of docs/onnx-contract.md gets what `Detector` gets."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tood_deploy import Detector

PAGE = Path(__file__).resolve().parents[1] / "docs" / "onnx-contract.md"
SIZES_HW = (
    (333, 500),
    (61, 47),
    (240, 320),
)  # rounding in both directions, upright and enlarged, as it is


@pytest.fixture(scope="module")
def example() -> str:
    """The page's only Python block."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


def test_the_example_needs_two_libraries(example: str) -> None:
    assert set(re.findall(r"^(?:import|from) (\w+)", example, flags=re.MULTILINE)) == {
        "json",
        "pathlib",
        "cv2",
        "numpy",
        "onnxruntime",
    }


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_the_example_gives_the_detectors_boxes(
    size_hw: tuple[int, int],
    example: str,
    tiny_artefact: Path,
    synth_picture: Callable[[int, int], NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(tiny_artefact, tmp_path / "model.onnx")
    shutil.copy(tiny_artefact.with_suffix(".json"), tmp_path / "model.json")
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("street.jpg", synth_picture(*size_hw))
    variables: dict[str, Any] = {}
    low = example.replace("np.array(0.3,", "np.array(0.02,")  # stand-in weights score low
    exec(compile(low, str(PAGE), "exec"), variables)

    image_bgr = cv2.imread("street.jpg")
    assert image_bgr is not None
    with Detector("model.onnx", conf=0.02, iou=0.6) as detector:
        expected = detector(image_bgr)
    count = variables["count"]
    assert count == len(expected) > 0
    np.testing.assert_array_equal(variables["labels"][0, :count], expected.class_ids)
    np.testing.assert_array_equal(variables["scores"][0, :count], expected.scores)
    boxes = variables["boxes"][0, :count] * variables["back"]
    np.testing.assert_allclose(boxes, expected.boxes, rtol=1e-6, atol=1e-4)
    lines = capsys.readouterr().out.splitlines()
    names = [line.rpartition(" at ")[0].rpartition(" ")[0] for line in lines]
    assert names == expected.names()
