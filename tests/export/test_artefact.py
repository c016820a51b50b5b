"""The exported artefact: what is in it, what it says of itself, and that nothing wrong is ever left behind."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from manifest_values import plain
from onnx_edits import all_nodes

from tood_deploy.cli.export import main
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.data.images import read_images
from tood_deploy.errors import CheckFailed, OutputError, ToodError
from tood_deploy.export import export as artefact_module
from tood_deploy.export.export import export_onnx
from tood_deploy.files import file_sha256
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import METADATA_KEY, Manifest, read_manifest
from tood_deploy.model import load_checkpoint
from tood_deploy.onnx_file import with_outputs
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.parity.torch_reference import torch_reference
from tood_deploy.parity.verify import verify_float32

# What every runtime builds (DESIGN section 4). No GridSample, no NonMaxSuppression, nothing of a domain of its own.
STANDARD_OPERATORS = frozenset(
    "Add And Cast Clip Concat Conv CumSum DeformConv Div Equal Exp Expand Floor Gather GatherElements Greater GreaterOrEqual "
    "GroupNormalization Identity Less Log Loop MatMul Max MaxPool Min Mul Neg Not Or Pad Range ReduceMax ReduceMean ReduceSum Relu "
    "Reshape Resize ScatterElements Shape Sigmoid Slice Softplus Split Squeeze Sub TopK Transpose Unsqueeze Where".split()
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
        for trace in (str(Path(artefact_module.__file__).parent), "Traceback", 'File "'):
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
        assert parity["images"] == 3 * 2
        assert (
            parity["detections"]["reference"] > 300
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


def edit(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def scale_constant(name_part: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        found = [value for value in model.graph.initializer if name_part in value.name]
        assert found, f"no constant called *{name_part}*"
        found[0].CopyFrom(
            onnx.numpy_helper.from_array(
                onnx.numpy_helper.to_array(found[0]) * np.float32(factor), found[0].name
            )
        )

    return change


class TestVerification:
    @pytest.mark.parametrize(
        ("name", "stage"),
        [("tood_cls.bias", "head: head_scores"), ("tood_reg.bias", "head: head_boxes")],
    )
    def test_a_changed_artefact_fails_and_the_stage_is_named(
        self, name: str, stage: str, tiny_artefact: Path, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        broken = edit(tiny_artefact, tmp_path / "broken.onnx", scale_constant(name, 1.001))
        with pytest.raises(CheckFailed, match=stage):
            verify_float32(
                torch_reference(load_checkpoint(tiny_checkpoint), 100), OnnxRunner(broken)
            )

    def test_values_of_a_rewritten_graph_are_missed(self, graph: onnx.ModelProto) -> None:
        with pytest.raises(ToodError, match="no values nowhere"):
            with_outputs(graph, ["nowhere"])

    def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(
        self,
        tiny_artefact: Path,
        tiny_checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(artefact_module, "graph_of", lambda *args, **kwargs: "unused")
        broken = edit(tiny_artefact, tmp_path / "broken.onnx", scale_constant("tood_cls.bias", 2.0))
        monkeypatch.setattr(
            artefact_module, "save_onnx", lambda exported, manifest, path: shutil.copy(broken, path)
        )
        output = tmp_path / "out" / "model.onnx"
        output.parent.mkdir()
        output.write_bytes(b"old")
        with pytest.raises(CheckFailed, match="not equal"):
            export_onnx(load_checkpoint(tiny_checkpoint), output)
        assert output.read_bytes() == b"old"
        assert list(output.parent.iterdir()) == [output]

    def test_a_full_disk_leaves_nothing(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(artefact_module, "graph_of", lambda *args, **kwargs: "unused")
        monkeypatch.setattr(artefact_module, "save_onnx", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            export_onnx(load_checkpoint(tiny_checkpoint), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())

    def test_an_interrupted_export_leaves_nothing(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(artefact_module, "graph_of", interrupt)
        assert (
            main([str(tiny_checkpoint), "--output", str(tmp_path / "model.onnx"), "--quiet"]) == 130
        )
        assert not list(tmp_path.iterdir())


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing.pth"], "nothing.pth: no such file"),
            (["{checkpoint}", "--output", "model.engine"], "expected a name ending in .onnx"),
            (["{checkpoint}", "--output", "/proc/nowhere/model.onnx"], "cannot be written"),
            (["{checkpoint}", "--max-det", "0"], "max_det is 0; expected 1 to 3840"),
            (
                ["{checkpoint}", "--imgsz", "0", "640"],
                "imgsz is 0 640; expected two positive numbers",
            ),
            (["{checkpoint}", "--classes", "a,b"], "has 80 classes, 2 names"),
            (["{checkpoint}", "--classes", "a,a"], "expected one different name"),
            (["{checkpoint}", "--preset", "r50-1x"], "does not fit the preset r50-1x"),
            (["{checkpoint}", "--preset", "r51"], "no preset is called 'r51'"),
            (["{checkpoint}", "--verify-images", "{folder}"], "no images in it"),
        ],
    )
    def test_wrong_use_is_one_line_and_exit_2(
        self,
        arguments: list[str],
        message: str,
        tiny_checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code = main(
            [text.format(checkpoint=tiny_checkpoint, folder=tmp_path) for text in arguments]
            + ["--quiet"]
        )
        captured = capsys.readouterr()
        assert code == 2
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_failed_check_is_exit_1(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise CheckFailed("head scores deviate")

        monkeypatch.setattr(artefact_module, "graph_of", lambda *args, **kwargs: "unused")
        monkeypatch.setattr(artefact_module, "save_onnx", lambda *args: None)
        monkeypatch.setattr(artefact_module, "OnnxRunner", lambda path: None)
        monkeypatch.setattr(artefact_module, "verify_float32", fail)
        assert main([str(tiny_checkpoint), "--output", str(tmp_path / "a.onnx")]) == 1
        assert not list(tmp_path.iterdir())

    def test_help_explains_class_counts(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "Any number of classes works" in capsys.readouterr().out

    def test_says_what_it_made(
        self,
        tiny_checkpoint: Path,
        tiny_artefact: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(artefact_module, "graph_of", lambda *args, **kwargs: "unused")
        monkeypatch.setattr(
            artefact_module,
            "save_onnx",
            lambda exported, manifest, path: shutil.copy(tiny_artefact, path),
        )
        assert (
            main(
                [
                    str(tiny_checkpoint),
                    "--output",
                    str(tmp_path / "a.onnx"),
                    "--imgsz",
                    "300",
                    "200",
                ]
            )
            == 0
        )
        captured = capsys.readouterr()
        assert "detections matched" in captured.out
        assert "80 classes (person, bicycle, car, ...)" in captured.err
        steps = (
            "checked all",
            "loading the checkpoint",
            "making the graph",
            "comparing with PyTorch",
            "self-test",
            "writing it",
        )
        places = [captured.err.find(step) for step in steps]
        assert -1 not in places
        assert places == sorted(places), "a line at each step, in their order"
        manifest = json.loads((tmp_path / "a.json").read_text())
        assert manifest["preset"]["imgsz"] == [200, 300]


class TestImages:
    def test_synthetic_images_are_seeded(self) -> None:
        first = synthetic_image(33, 70, 5)
        assert first.shape == (33, 70, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, synthetic_image(33, 70, 5))
        assert not np.array_equal(first, synthetic_image(33, 70, 6))

    def test_unreadable_image_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("no image")
        with pytest.raises(ToodError, match=r"a\.png: cannot be read"):
            read_images(tmp_path, 5)


EVERY = [
    "r50-1x",
    "r50-anchor-1x",
    "r101-2x",
    "x101-2x",
    "r101-dcn-2x",
    "x101-dcn-2x",
]  # r50-2x is r50-1x under another name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "deform"), [*((name, "op") for name in EVERY), ("x101-dcn-2x", "gather")]
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
