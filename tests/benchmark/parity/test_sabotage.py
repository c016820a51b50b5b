"""Artefacts that are broken on purpose: parity catches every one and names the guilty stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_edits import edit_weight, maker

from tood_deploy.benchmark.parity.compare import Result, Settings, compare
from tood_deploy.benchmark.parity.stage_runners import ComparedModel, open_compared
from tood_deploy.data.coco import read_annotations
from tood_deploy.data.coco_metrics import Scoring
from tood_deploy.data.image_set import ImageSet, open_image_set
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import Manifest
from tood_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from tood_deploy.model.detector import build_model
from tood_deploy.onnx_file import artefact_in_memory, write_onnx

pytestmark = pytest.mark.slow

IMGSZ = (240, 320)
TRAINED = Path("reference/checkpoints/mmdet3_bccd_tiny.pth")
HEAD, PYRAMID, BACKBONE = (
    "detector.model.bbox_head",
    "detector.model.neck",
    "detector.model.backbone",
)
Sabotage = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, seeded_fill: Callable) -> ComparedModel:
    """The trained checkpoint where it is there, else `tiny` with stand-in weights."""
    from conftest import SHARED

    checkpoint = SHARED / TRAINED
    if not checkpoint.is_file():
        model = build_model("tiny")
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(
            {key: torch.from_numpy(value) for key, value in seeded_fill(shapes).items()}
        )
        with torch.no_grad():
            for layer in ("tood_cls", "cls_prob_module.2"):
                model.get_parameter(f"bbox_head.{layer}.bias").add_(
                    2
                )  # so that scores go beyond the threshold
        checkpoint = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
        save_checkpoint(model, checkpoint)
    return open_compared(str(checkpoint), device="cpu", threads=2, stages=True)


@pytest.fixture(scope="module")
def exported(reference: ComparedModel) -> onnx.ModelProto:
    return onnx_from_model(load_checkpoint(reference.name))


@pytest.fixture(scope="module")
def scoring(
    reference: ComparedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ImageSet, Scoring]:
    """Synthetic images; the truth is what the reference finds in them with a score above 0.1."""
    images, names = open_image_set(None, None, IMGSZ, 3), reference.manifest.preset.class_names
    detector = Detector(reference.engine, conf=0.1, imgsz=IMGSZ)
    rows = [row for image in images for row in detector(image.read()).to_coco(image.image_id)]
    assert rows
    truth = {
        "images": [{"id": image.image_id, "file_name": image.name} for image in images],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
    }
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    path.write_text(json.dumps(truth))
    return replace(images, truth=read_annotations(path)), Scoring.of(
        read_annotations(path), names, None
    )


@pytest.fixture
def judge(
    reference: ComparedModel,
    exported: onnx.ModelProto,
    scoring: tuple[ImageSet, Scoring],
    tmp_path: Path,
) -> Callable[..., Result]:
    """Breaks a copy of the artefact and compares it with the reference."""

    def run(sabotage: Sabotage) -> Result:
        broken = onnx.ModelProto()
        broken.CopyFrom(exported)
        sabotage(broken)
        path = tmp_path / "broken.onnx"
        manifest = Manifest(reference.manifest.preset)
        write_onnx(artefact_in_memory(path, broken, manifest), path)
        artefact = open_compared(
            str(tmp_path / "broken.onnx"), device="cpu", threads=2, stages=None
        )
        return compare(reference, [artefact], scoring[0], Settings(IMGSZ), scoring=scoring[1])[0]

    return run


def insert_after(
    model: onnx.ModelProto, name: str, *operators: tuple[str, list[str], dict]
) -> None:
    """Sends a value through further nodes before anyone reads it.

    An operator is its type, its other inputs and its attributes.
    """
    nodes, made, before = [], name, f"{name}_before"
    for number, (kind, others, attributes) in enumerate(operators):
        output = name if number == len(operators) - 1 else f"{name}_{number}"
        nodes.append(
            onnx.helper.make_node(
                kind, [before if number == 0 else made, *others], [output], **attributes
            )
        )
        made = output
    for position, node in enumerate(model.graph.node):
        if name in node.output:
            node.output[list(node.output).index(name)] = before
            for offset, added in enumerate(nodes, 1):
                model.graph.node.insert(position + offset, added)
            return
    raise AssertionError(name)


def wrong_mean(model: onnx.ModelProto) -> None:
    edit_weight(model, "detector.mean", lambda mean: mean.__setitem__(0, 103.53))


def blue_for_red(model: onnx.ModelProto) -> None:
    first = next(
        node for node in model.graph.node if node.op_type == "Cast" and "images" in node.input
    )
    model.graph.initializer.append(
        numpy_helper.from_array(np.array([2, 1, 0], np.int64), "swapped")
    )
    insert_after(model, first.output[0], ("Gather", ["swapped"], {"axis": 3}))


def half_pixel_shift(model: onnx.ModelProto) -> None:
    """The alignment's offsets, in cells, all half a cell larger."""
    edit_weight(model, f"{HEAD}.reg_offset_module.last.bias", lambda bias: bias.__iadd__(0.5))


def suppress_at_half(model: onnx.ModelProto) -> None:
    """Whatever threshold is asked for, the loop of suppression reads 0.5."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    for node in model.graph.node:
        rename_input(node, "iou_threshold", "half")


def rename_input(node: onnx.NodeProto, old: str, new: str) -> None:
    for position, name in enumerate(node.input):
        if name == old:
            node.input[position] = new
    for attribute in node.attribute:
        for inner in attribute.g.node:
            rename_input(inner, old, new)


def decode_in_half_precision(model: onnx.ModelProto) -> None:
    """The decoded boxes of every level, before they are aligned, through float16."""
    casts = (
        ("Cast", [], {"to": onnx.TensorProto.FLOAT16}),
        ("Cast", [], {"to": onnx.TensorProto.FLOAT}),
    )
    for level in range(3, 8):
        insert_after(model, maker(model, f"head_boxes_p{level}").input[1], *casts)


def zero_backbone_channel(model: onnx.ModelProto) -> None:
    edit_weight(model, f"{BACKBONE}.layer3.0.conv2.weight", lambda weight: weight.__setitem__(7, 0))


def zero_pyramid_channel(model: onnx.ModelProto) -> None:
    edit_weight(
        model, f"{PYRAMID}.fpn_convs.1.conv.weight", lambda weight: weight.__setitem__(3, 0)
    )


def zero_head_channel(model: onnx.ModelProto) -> None:
    edit_weight(
        model, f"{HEAD}.tood_cls.weight", lambda weight: weight.__setitem__((slice(None), 5), 0)
    )


def test_a_sound_artefact_passes(judge: Callable[..., Result]) -> None:
    result = judge(lambda model: None)
    assert [str(failure) for failure in result.failures] == []
    assert result.comparison.deployed.rows["detections"].counts.reference > 20
    assert result.comparison.alone is not None
    assert result.ap_drop == pytest.approx(0, abs=0.1)
    assert set(result.part_costs) == {"pre-processing", "network", "post-processing"}


def test_a_float32_xml_is_judged_by_its_maps(
    reference: ComparedModel, exported: onnx.ModelProto, tmp_path: Path
) -> None:
    """OpenVINO gives no stages, so nothing but a map shows a fault that moves no detection."""
    pytest.importorskip("openvino")
    from tood_deploy.engines.openvino_runtime import PLACE, load_openvino, read_model, shared_core

    images = open_image_set(None, None, IMGSZ, 1)
    results = []
    for name in ("sound", "broken"):
        graph = onnx.ModelProto()
        graph.CopyFrom(exported)
        if name == "broken":
            weaken_one_weight(graph)
        manifest = Manifest(reference.manifest.preset)
        path = tmp_path / f"{name}.onnx"
        write_onnx(artefact_in_memory(path, graph, manifest), path)
        model = read_model(shared_core(), tmp_path / f"{name}.onnx")
        model.set_rt_info(manifest.to_json(), PLACE)
        path = tmp_path / f"{name}.xml"
        load_openvino().save_model(model, path, compress_to_fp16=False)
        options = {"self_test": False, "verify": "off"}
        artefact = open_compared(
            str(path), device="cpu", threads=2, stages=None, artefact_options=options
        )
        results += compare(reference, [artefact], images, Settings(IMGSZ))
    assert [str(failure) for failure in results[0].failures] == []
    assert results[1].guilty == "head"
    assert "head_" in str(results[1].failures[0])


def weaken_one_weight(model: onnx.ModelProto) -> None:
    def edit(weight: np.ndarray) -> None:
        weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= 0.99

    edit_weight(model, f"{HEAD}.inter_convs.3.conv.weight", edit)


@pytest.mark.parametrize(
    ("sabotage", "stage", "part"),
    [
        (wrong_mean, "pixels", "pre-processing"),
        (blue_for_red, "pixels", "pre-processing"),
        (zero_backbone_channel, "backbone", "network"),
        (zero_pyramid_channel, "pyramid", "network"),
        (zero_head_channel, "head", "network"),
        (half_pixel_shift, "head", "network"),
        (decode_in_half_precision, "head", None),
        (suppress_at_half, "detections", "post-processing"),
    ],
)
def test_the_guilty_stage_is_named(
    judge: Callable[..., Result], sabotage: Sabotage, stage: str, part: str | None
) -> None:
    result = judge(sabotage)
    assert result.guilty == stage
    assert result.comparison.guilty_stages() == [stage]
    others = {
        name for name, cost in result.part_costs.items() if cost != pytest.approx(0, abs=1e-6)
    }
    assert others <= ({part} if part else {"network"})
    if part in ("pre-processing", "network"):
        assert result.costliest in (part, "")
