"""What the tests of precisions share: the graph of the exported `tiny`, and calibrated ranges of
its values."""

from pathlib import Path

import cv2
import onnx
import pytest

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.export.precision.calibrate import calibrate
from tood_deploy.export.precision.quantize import Ranges, calibrated_values

CALIBRATED_HW = (96, 128)


@pytest.fixture(scope="package")
def model(tiny_artefact: Path) -> onnx.ModelProto:
    """The exported network. Copy it before changing it."""
    return onnx.load(tiny_artefact)


@pytest.fixture(scope="package")
def ranges(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Ranges:
    """Of every value that may be quantised, over three images of `CALIBRATED_HW`."""
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        cv2.imwrite(str(folder / f"{seed}.png"), synthetic_image(*CALIBRATED_HW, seed))
    return calibrate(
        model, calibrated_values(model), folder, CALIBRATED_HW, cache=folder / "cache"
    ).ranges("minmax")
