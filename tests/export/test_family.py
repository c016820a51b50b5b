"""The detectors that TOOD is measured against, through the same export as TOOD itself.

At full size the exported graph is held against MMDetection's own detections; at the size of `tiny`
every precision and runtime is gone through.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from model.test_family import FAMILY, golden_of
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import open_engine
from tood_deploy.export.export import export_onnx
from tood_deploy.export.precision.convert import Int8Options, lower_artefact, quantize_artefact
from tood_deploy.export.precision.half import emulate_low_precision, is_layer, layer_name
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.export.to_openvino import openvino_from_onnx
from tood_deploy.graph_io import HEAD_OUTPUTS, OUTPUTS, graph_feeds, inner_value_names
from tood_deploy.manifest import read_manifest
from tood_deploy.matching import NetDetections, match_boxes
from tood_deploy.model import load_checkpoint, save_checkpoint
from tood_deploy.onnx_file import OnnxArtefact, open_session, read_onnx, with_outputs
from tood_deploy.parity.onnx_reference import OnnxRunner, onnx_reference
from tood_deploy.presets import PRESETS

pytestmark = pytest.mark.slow

Arrays = dict[str, NDArray[Any]]
TINY = ("tiny-atss", "tiny-gfl", "tiny-paa")
CALIBRATED_HW = (96, 128)


def demo_input(given: Arrays) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the golden's demo image, as the reference resized it, as the graph takes it."""
    (height, width), shape = given["img_shape"].tolist(), given["input"].shape[2:]
    padded = np.full((1, *shape, 3), 77, np.uint8)  # what padding holds must not matter
    padded[0, :height, :width] = given["resized_bgr_u8"].transpose(1, 2, 0)[:, :, ::-1]
    return padded, np.array([[height, width]], np.int32)


def assert_equals_golden(outputs: Any, golden: Arrays, scale: NDArray[np.float64]) -> None:
    """Every detection has its partner, wherever it stands: PAA's are ordered by class."""
    count, boxes, scores, labels = (values[0] for values in outputs)
    own = NetDetections(
        (boxes[:count] / scale).astype(np.float32), scores[:count], labels[:count].astype(np.int32)
    )
    expected = NetDetections(
        golden["det_bboxes"], golden["det_scores"], golden["det_labels"].astype(np.int32)
    )
    counts = match_boxes(
        expected, own, min_iou=0, max_score_difference=1e-5, max_box_difference_px=0.05
    ).counts
    assert counts.exchanged <= 1, counts
    assert (np.diff(scores[:count]) <= 0).all()


# What is gone through at the size of `tiny`, and held against the network, is not exported at full
# size by continuous integration.
LARGE = [f"{name.removeprefix('tiny-')}-r50-1x" for name in TINY]


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.large] * (name in LARGE)) for name in FAMILY]
)
def test_the_graph_gives_the_references_detections(
    name: str,
    goldens: Callable[[str], Arrays],
    seeded_model: Callable[..., Any],
    shared: Path,
    tmp_path: Path,
) -> None:
    golden, given = golden_of(shared, name, "demo__320"), goldens("input__demo__320")
    scale = np.tile(given["scale_factor"], 2)
    model = seeded_model(name).eval()
    graph = onnx_from_model(model, deform="gather")
    thresholds = golden["score_thr"].item(), PRESETS[name].iou_threshold
    feeds = graph_feeds(*demo_input(given), *thresholds)
    session = open_session(graph.SerializeToString())
    assert_equals_golden(session.run(list(OUTPUTS), feeds), golden, scale)
    onnx.save(graph, tmp_path / "a.onnx")
    import openvino

    compiled = openvino.Core().compile_model(
        tmp_path / "a.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    results = compiled(feeds)
    assert_equals_golden([results[key] for key in OUTPUTS], golden, scale)
    assert eight_bit_share(graph) >= 0.97


@pytest.mark.shared
@pytest.mark.large
def test_star_convolutions_as_onnxs_operator(
    goldens: Callable[[str], Arrays], seeded_model: Callable[..., Any], shared: Path
) -> None:
    golden, given = golden_of(shared, "vfnet-r50-1x", "demo__320"), goldens("input__demo__320")
    graph = onnx_from_model(seeded_model("vfnet-r50-1x").eval(), deform="op")
    assert Counter(node.op_type for node in graph.graph.node)["DeformConv"] == 10
    feeds = graph_feeds(*demo_input(given), golden["score_thr"].item(), 0.6)
    outputs = open_session(graph.SerializeToString()).run(list(OUTPUTS), feeds)
    assert_equals_golden(outputs, golden, np.tile(given["scale_factor"], 2))


def eight_bit_share(graph: onnx.ModelProto) -> float:
    """Return the share of multiply-adds that becomes 8-bit, of layers with constant weights."""
    ranges = dict.fromkeys(calibrated_values(graph), (-1.0, 1.0))
    layers = [node for node in ir.from_proto(graph).graph if is_layer(node)]
    names = [str(node.outputs[0].name) for node in layers]
    images, valid_hw = np.zeros((1, 128, 160, 3), np.uint8), np.array([[128, 160]], np.int32)
    session = open_session(with_outputs(graph, names).SerializeToString())
    outputs: Any = session.run(names, graph_feeds(images, valid_hw, 0.05, 0.6))
    lowered = {
        node.outputs[0].name
        for node in ir.from_proto(quantize(graph, ranges, scheme="u8s8")).graph
        if is_layer(node) and (made_by := node.inputs[1] and node.inputs[1].producer())
        if made_by.op_type == "DequantizeLinear"
    }
    total = eight_bit = 0
    for node, output in zip(layers, outputs, strict=True):
        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        cells = output.shape[2:] if node.op_type == "Conv" else output.shape[:-1]
        work = int(np.prod(weight.shape.numpy())) * int(np.prod(cells))
        total += work
        eight_bit += work if node.outputs[0].name in lowered else 0
    return eight_bit / total


def test_small_probabilities_are_as_exact_as_float32(
    seeded_model: Callable[..., Any], tmp_path: Path
) -> None:
    """ONNX Runtime's Sigmoid is not, and levels on which nothing is seen would fail the export."""
    model = seeded_model("tiny-gfl", imgsz=CALIBRATED_HW)
    with torch.no_grad():
        model.bbox_head.gfl_cls.bias -= 8.0
    save_checkpoint(model, tmp_path / "quiet.safetensors")
    export_onnx(load_checkpoint(tmp_path / "quiet.safetensors"), tmp_path / "quiet.onnx")


@pytest.fixture(scope="module", params=TINY)
def artefact(
    request: pytest.FixtureRequest,
    seeded_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> OnnxArtefact:
    """Export a small detector; that includes proving it equal to its network."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = folder / f"{request.param}.safetensors"
    save_checkpoint(seeded_model(request.param, imgsz=CALIBRATED_HW), checkpoint)
    export_onnx(load_checkpoint(checkpoint), folder / "model.onnx")
    return read_onnx(folder / "model.onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), synthetic_image(*CALIBRATED_HW, seed))
    return folder


def test_the_manifest_has_the_detector_and_its_defaults(artefact: OnnxArtefact) -> None:
    manifest = read_manifest(artefact.path)
    assert manifest is not None
    preset = manifest.preset
    assert f"tiny-{preset.detector}" == preset.name
    assert preset.iou_threshold == 0.6
    assert preset.score_voting == (preset.detector == "paa")
    assert with_outputs(artefact.model, inner_value_names(preset))


def test_openvino(artefact: OnnxArtefact, tmp_path: Path) -> None:
    openvino_from_onnx(artefact, tmp_path / "a.xml", reference=onnx_reference(artefact))
    image, valid_hw = synthetic_image(*CALIBRATED_HW, 5)[None], np.array([CALIBRATED_HW], np.int32)
    with open_engine(tmp_path / "a.xml") as first, open_engine(artefact.path) as second:
        ours, theirs = (engine.infer(image, valid_hw, 0.05, 0.6) for engine in (first, second))
    np.testing.assert_array_equal(ours.num_dets, theirs.num_dets)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


def head_of(model: onnx.ModelProto) -> list[NDArray[np.float32]]:
    image, valid_hw = synthetic_image(*CALIBRATED_HW, 5)[None], np.array([CALIBRATED_HW], np.int32)
    outputs = OnnxRunner(model, maps=False, further=HEAD_OUTPUTS)(image, valid_hw, 0.05, 0.6)
    return [values.astype(np.float32) for values in outputs[len(OUTPUTS) :]]


@pytest.mark.parametrize(("precision", "scores"), [("fp16", 0.01), ("bf16", 0.06)])
def test_half_precision(artefact: OnnxArtefact, precision: Any, scores: float) -> None:
    half = lower_artefact(artefact, precision)
    assert half.model.ByteSize() < 0.6 * artefact.model.ByteSize()
    exact, rounded = head_of(artefact.model), head_of(emulate_low_precision(half.model))
    for before, after in zip(exact[:5], rounded[:5], strict=True):
        assert 0 < np.abs(before - after).max() < scores


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
def test_int8(artefact: OnnxArtefact, scheme: Any, images: Path) -> None:
    quantized = quantize_artefact(artefact, images, Int8Options(scheme=scheme, method="minmax"))
    exact, rounded = head_of(artefact.model), head_of(quantized.model)
    for before, after in zip(exact[:5], rounded[:5], strict=True):
        assert np.abs(before - after).max() < 0.3
    kept = {
        layer_name(node)
        for node in ir.from_proto(quantized.model).graph
        if is_layer(node) and node.inputs[1] is not None and node.inputs[1].is_initializer()
    }
    predictors = {"gfl": {"gfl_cls"}}.get(
        artefact.manifest.preset.detector, {"atss_cls", "atss_reg", "atss_centerness"}
    )
    assert kept == {f"bbox_head.{name}" for name in predictors}
