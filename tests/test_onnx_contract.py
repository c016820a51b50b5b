"""Test that examples/python_onnxruntime.py, which the contract shows, gets what `Detector` gets."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tood_deploy import Detector

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "python_onnxruntime.py"
SIZES_HW = (
    (333, 500),
    (61, 47),
    (240, 320),
)  # rounding in both directions, upright and enlarged, as it is


def test_the_contract_shows_it() -> None:
    page = (ROOT / "docs" / "onnx-contract.md").read_text(encoding="utf-8")
    assert f'--8<-- "{EXAMPLE.relative_to(ROOT)}"' in page


def test_it_needs_two_libraries() -> None:
    code = EXAMPLE.read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:import|from) (\w+)", code, flags=re.MULTILINE)) == {
        "json",
        "sys",
        "pathlib",
        "cv2",
        "numpy",
        "onnxruntime",
    }


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_the_example_gives_the_detectors_boxes(
    size_hw: tuple[int, int],
    tiny_artefact: Path,
    synth_image_bgr: Callable[[int, int], NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = str(tmp_path / "street.jpg")
    cv2.imwrite(image, synth_image_bgr(*size_hw))
    # Stand-in weights score low.
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tiny_artefact), image, "0.02"])
    variables = runpy.run_path(str(EXAMPLE))

    image_bgr = cv2.imread(image)
    assert image_bgr is not None
    with Detector(tiny_artefact, conf=0.02, iou=0.6) as detector:
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


def test_what_is_no_image_is_named(
    tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tiny_artefact), "absent.png", "0.3"])
    with pytest.raises(SystemExit, match=r"absent\.png"):
        runpy.run_path(str(EXAMPLE))
