"""What half precision and 8 bits cost trained networks in COCO AP, on real and on generated images:
no more than is promised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tood_deploy.benchmark.evaluation.evaluate import open_data_set
from tood_deploy.benchmark.precision_search import ApDrop
from tood_deploy.demo.scenes import write_scenes
from tood_deploy.engines.precision_support import saturates_in_onnxruntime
from tood_deploy.export.export import export_onnx
from tood_deploy.export.precision.calibrate import calibrate
from tood_deploy.export.precision.half import lower_precision
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.model import load_checkpoint
from tood_deploy.onnx_file import read_onnx

pytestmark = pytest.mark.slow
WEIGHTS = Path(__file__).resolve().parents[2] / "tood_deploy" / "weights"
IMAGES = 64  # to calibrate on, the fewest that are not warned of
Lowered = Callable[[str], onnx.ModelProto]


@pytest.fixture(scope="module", params=[pytest.param("bccd", marks=pytest.mark.shared), "scenes"])
def drop_and_lowered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ApDrop, Lowered]:
    """Points of AP that a graph loses, and the graph of a trained `tiny` in a precision by its
    name."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bccd":
        root: Path = request.getfixturevalue("shared")
        weights, (annotations, images), calib = _bccd(root)
    else:
        weights, (annotations, images), calib = _scenes(folder)
    export_onnx(load_checkpoint(weights), folder / "model.onnx")
    artefact = read_onnx(folder / "model.onnx")
    values, imgsz = calibrated_values(artefact.model), artefact.manifest.preset.imgsz
    ranges = calibrate(
        artefact.model, values, calib, imgsz, max_images=IMAGES, cache=folder / "cache"
    ).ranges("percentile")

    def lowered(precision: str) -> onnx.ModelProto:
        half: dict[str, Any] = {"fp16": "fp16", "bf16": "bf16"}
        if precision in half:
            return lower_precision(artefact.model, half[precision])[0]
        scheme: Any = precision.removeprefix("int8 ")
        return quantize(artefact.model, ranges, scheme=scheme)

    return ApDrop(open_data_set(annotations, images), artefact), lowered


def _bccd(shared: Path) -> tuple[Path, tuple[Path, Path], Path]:
    data = shared / "data" / "bccd"
    return (
        shared / "reference" / "checkpoints" / "mmdet3_bccd_tiny.pth",
        (data / "val.json", data / "val"),
        data / "train",
    )


def _scenes(folder: Path) -> tuple[Path, tuple[Path, Path], Path]:
    annotations = write_scenes(folder / "val", 100, seed=2)
    write_scenes(folder / "train", IMAGES, seed=3)
    return (
        WEIGHTS / "tiny-demo.safetensors",
        (annotations, annotations.parent / "images"),
        folder / "train" / "images",
    )


@pytest.mark.parametrize(
    ("precision", "most"),
    [("fp16", 0.1), ("bf16", 0.2), ("int8 u8s7", 0.3), ("int8 u8s8", 0.3), ("int8 s8s8", 0.5)],
)
def test_costs_no_more_than_is_promised(
    precision: str,
    most: float,
    drop_and_lowered: tuple[ApDrop, Lowered],
    record_property: Callable[[str, object], None],
) -> None:
    if precision in ("int8 u8s8", "int8 s8s8") and saturates_in_onnxruntime():
        pytest.skip(
            "sums of 8-bit products saturate on this CPU, so that ONNX Runtime gives "
            "other numbers than such a graph stands for"
        )
    drop, lowered = drop_and_lowered
    lost = drop(lowered(precision))
    record_property("ap", f"{drop.reference_ap:.2f} -> {drop.reference_ap - lost:.2f}")
    assert lost <= most
