"""The exported graph: what is in it, what its manifest states, and that a changed one fails."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from manifest_values import plain
from onnx_edits import all_nodes, edit_weight

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.export.export import export_onnx
from tood_deploy.files import file_sha256
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import METADATA_KEY, Manifest, read_manifest
from tood_deploy.onnx_file import with_outputs
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.verify import verify_float32

# What every runtime builds (DESIGN section 4). No GridSample, no NonMaxSuppression, nothing of a
# domain of its own.
STANDARD_OPERATORS = frozenset(
    "Add And Cast Clip Concat Conv CumSum DeformConv Div Equal Exp Expand Floor Gather "
    "GatherElements Greater GreaterOrEqual "
    "GroupNormalization Identity Less Log Loop MatMul Max MaxPool Min Mul Neg Not Or Pad "
    "Range ReduceMax ReduceMean ReduceSum Relu "
    "Reshape Resize ScatterElements Shape Sigmoid Slice Softplus Split Squeeze Sub TopK Transpose Unsqueeze Where".split()  # noqa: E501
)


@pytest.fixture(scope="module")
def graph(tiny_artefact: Path) -> onnx.ModelProto:
    return onnx.load(tiny_artefact)


class TestGraph:
    def test_only_standard_operators(self, graph: onnx.ModelProto) -> None:
        counts = Counter(node.op_type for node in all_nodes(graph.graph))
        assert counts.keys() <= STANDARD_OPERATORS
        assert {node.domain for node in all_nodes(graph.graph)} == {""}
        assert (
            counts["GroupNormalization"] == 8 * 5
        )  # of every level: native, not chains of InstanceNormalization
        assert not graph.functions

    def test_passes_the_checker_at_opset_21(self, graph: onnx.ModelProto) -> None:
        onnx.checker.check_model(graph, full_check=True)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 21)]

    def test_inputs_and_outputs_are_the_contract(self, graph: onnx.ModelProto) -> None:
        def describe(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
            tensor = value.type.tensor_type
            return tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]

        kinds = onnx.TensorProto
        assert [value.name for value in graph.graph.input] == list(INPUTS)
        assert [value.name for value in graph.graph.output] == list(OUTPUTS)
        assert [describe(value) for value in graph.graph.input] == [
            (kinds.UINT8, ["batch", "32*rows", "32*columns", 3]),
            (kinds.INT32, ["batch", 2]),
            (kinds.FLOAT, []),
            (kinds.FLOAT, []),
        ]
        assert [describe(value) for value in graph.graph.output] == [
            (kinds.INT32, ["batch"]),
            (kinds.FLOAT, ["batch", 100, 4]),
            (kinds.FLOAT, ["batch", 100]),
            (kinds.INT32, ["batch", 100]),
        ]

    def test_uint8_is_cast_before_anything_else(self, graph: onnx.ModelProto) -> None:
        readers = [node.op_type for node in graph.graph.node if "images" in node.input]
        assert set(readers) <= {"Cast", "Shape"}

    def test_topk_stays_within_the_limit_of_tensorrt(self, graph: onnx.ModelProto) -> None:
        constants = {
            value.name: onnx.numpy_helper.to_array(value) for value in graph.graph.initializer
        }
        depths = [
            int(constants[node.input[1]].item())
            for node in all_nodes(graph.graph)
            if node.op_type == "TopK"
        ]
        assert len(depths) == 11
        assert max(depths) <= 3840

    def test_holds_no_path_of_the_machine_that_made_it(self, tiny_artefact: Path) -> None:
        content = tiny_artefact.read_bytes()
        for trace in (str(Path(__file__).parents[2]), "Traceback", 'File "'):
            assert trace.encode() not in content


class TestManifest:
    def test_lies_beside_and_inside(
        self, tiny_artefact: Path, tiny_checkpoint: Path, graph: onnx.ModelProto
    ) -> None:
        manifest = read_manifest(tiny_artefact)
        assert manifest is not None
        assert manifest.artefact_sha256 == file_sha256(tiny_artefact)
        assert manifest.checkpoint_sha256 == file_sha256(tiny_checkpoint)
        inside = Manifest.from_json(
            {prop.key: prop.value for prop in graph.metadata_props}[METADATA_KEY], "inside"
        )
        assert inside.preset == manifest.preset
        assert {"torch", "onnx", "onnxruntime", "tood_deploy"} <= manifest.versions.keys()

    def test_verdict_says_what_was_compared(self, tiny_artefact: Path) -> None:
        manifest = read_manifest(tiny_artefact)
        assert manifest is not None
        parity = plain(manifest)["parity"]
        assert parity["images"] == 2 * 2
        assert (
            parity["detections"]["reference"] > 200
        )  # the stand-in weights find things: the comparison is not empty
        assert (
            parity["detections"]["matched"]
            >= parity["detections"]["reference"] - 2 * parity["images"]
        )
        assert parity["batch_slots"]["matched"] == parity["batch_slots"]["reference"] > 100
        assert (
            0
            < max(each["rms_ratio"] for each in parity["maps"].values())
            <= parity["limits"]["rms_of_few"]
        )


class TestVerification:
    @pytest.mark.parametrize(
        ("name", "stage"),
        [("tood_cls.bias", "head: head_scores"), ("tood_reg.bias", "head: head_boxes")],
    )
    def test_a_changed_artefact_fails_and_the_stage_is_named(
        self, name: str, stage: str, tiny_artefact: Path, tiny_reference: Reference
    ) -> None:
        broken = onnx.load(tiny_artefact)
        constant = next(value.name for value in broken.graph.initializer if name in value.name)
        edit_weight(broken, constant, lambda values: np.multiply(values, 1.001, out=values))
        with pytest.raises(CheckFailed, match=stage):
            verify_float32(tiny_reference, OnnxRunner(broken))

    def test_values_of_a_rewritten_graph_are_missed(self, graph: onnx.ModelProto) -> None:
        with pytest.raises(ToodError, match="no values nowhere"):
            with_outputs(graph, ["nowhere"])


SETTINGS: dict[str, Any] = {
    "depth": 50,
    "base_channels": 16,
    "deform_stages": (3, 4),
    "deform_tower": 1,
    "anchor": "based",
    "norm_groups": 16,
    "norm_eps": 1e-3,
    "batch_norm_eps": 1e-3,
    "anchor_side": 6.0,
    "anchor_offset": 0.5,
    "delta_means": (0.1, 0.0, 0.0, 0.1),
    "delta_stds": (0.1, 0.2, 0.3, 0.2),
    "channel_order": "bgr",
    "pad_value": (0.5, 0.0, -0.5),
    "resize": "stretch",
    "imgsz": (90, 160),
    "iou_threshold": 0.4,
    "max_det": 50,
    "candidates_per_level": 300,
}


@pytest.mark.slow
@pytest.mark.usefixtures("full_sizes")
def test_every_setting_is_in_the_artefact(seeded_model: Callable[..., Any], tmp_path: Path) -> None:
    """Equal to the network in PyTorch, whose settings are tested apart against naive
    computations."""
    model, path = seeded_model("tiny", **SETTINGS), tmp_path / "a.onnx"
    export_onnx(model, path)
    manifest = read_manifest(path)
    assert manifest is not None
    assert (manifest.preset, manifest.max_det) == (model.preset, 50)
    norms = [node for node in onnx.load(path).graph.node if node.op_type == "GroupNormalization"]
    assert {
        attribute.i
        for node in norms
        for attribute in node.attribute
        if attribute.name == "num_groups"
    } == {16}
    image = synthetic_image(100, 300, 0)
    with (
        Detector(path, conf=0.05) as exported,
        Detector(TorchEngine(model), conf=0.05) as reference,
    ):
        assert (exported.iou, exported.max_det, exported.sizing) == (0.4, 50, model.preset.sizing)
        prepared = exported.prepare(image).transform
        assert (prepared.resized_hw, prepared.net_hw) == ((90, 160), (96, 160))
        found, expected = exported(image), reference(image)
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(
        np.sort(found.boxes, axis=0), np.sort(expected.boxes, axis=0), atol=0.05
    )


EVERY = [
    "r50-1x",
    "r50-anchor-1x",
    "r101-2x",
    "x101-2x",
    "r101-dcn-2x",
    "x101-dcn-2x",
]  # r50-2x is r50-1x under another name


@pytest.mark.slow
@pytest.mark.usefixtures("full_sizes")
@pytest.mark.parametrize(
    ("name", "deform"),
    [
        ("r50-1x", "op"),
        *(pytest.param(name, "op", marks=pytest.mark.large) for name in EVERY[1:]),
        pytest.param("x101-dcn-2x", "gather", marks=pytest.mark.large),
    ],
)
def test_every_preset_exports_and_verifies(
    name: str, deform: Any, seeded_model: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = export_onnx(seeded_model(name), tmp_path / "model.onnx", deform=deform)
    graph = onnx.load(tmp_path / "model.onnx")
    counts = Counter(node.op_type for node in all_nodes(graph.graph))
    assert counts.keys() <= STANDARD_OPERATORS
    assert counts["DeformConv"] == (
        0 if deform == "gather" else {"r101-dcn-2x": 30 + 10, "x101-dcn-2x": 26 + 10}.get(name, 0)
    )
    assert plain(manifest)["parity"]["detections"]["reference"] > 300
