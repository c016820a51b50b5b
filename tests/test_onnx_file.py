"""Artefacts in files and in memory: what is read back, refused, cut, extended and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export.small_graph import save_small, small_graph
from onnx import TensorProto, helper, numpy_helper

from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.files import file_sha256
from tood_deploy.manifest import manifest_path, read_manifest
from tood_deploy.onnx_file import (
    cut_graph,
    needs_float_arithmetic,
    open_session,
    read_onnx,
    run_session,
    with_outputs,
)


def test_the_manifest_inside_is_read(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx", "fp16")
    artefact = read_onnx(path)
    assert (artefact.manifest.precision, artefact.manifest.preset.name) == ("fp16", "tiny")
    assert artefact.sha256 == file_sha256(path)


def test_the_manifest_beside_comes_first(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx", stated="fp16")
    manifest_path(path).write_text(read_onnx(path).manifest.with_artefact(path).to_json())
    read = read_manifest(path)
    assert read is not None
    assert read_onnx(path).manifest == read
    assert read.artefact_sha256


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(ToodError, match=r"a\.onnx: no such file"):
        read_onnx(path)
    path.write_text("no ONNX at all")
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        read_onnx(path)
    onnx.save(small_graph(), path)
    with pytest.raises(ArtefactError, match="an ONNX file, but not one of tood_deploy"):
        read_onnx(path)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx")
    model = onnx.load(path)
    del model.graph.output[-1]
    onnx.save(model, path)
    with pytest.raises(ArtefactError, match=r"outputs \['num_dets', 'boxes', 'scores'\], expected"):
        read_onnx(path)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx")
    manifest_path(path).write_text(read_onnx(path).manifest.with_artefact(path).to_json())
    save_small(path, "fp16")
    with pytest.raises(ArtefactError, match="is not the file its manifest describes"):
        read_onnx(path)


@pytest.fixture
def model() -> onnx.ModelProto:
    """double = 2 x; tripled = double + x; a branch reads it: y = tripled * factor, or x."""
    branch = helper.make_graph(
        [helper.make_node("Mul", ["tripled", "factor"], ["inner"])], "then", [], [value("inner")]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["inner_else"])], "else", [], [value("inner_else")]
    )
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("Add", ["double", "x"], ["tripled"]),
        helper.make_node("If", ["wanted"], ["y"], then_branch=branch, else_branch=other),
    ]
    inputs = [
        value("x"),
        value("factor"),
        helper.make_tensor_value_info("wanted", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [value("y")],
        [numpy_helper.from_array(np.array([2], np.float32), "two")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])


def run(model: onnx.ModelProto, output: str, **inputs: float | bool) -> float:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    types = {
        each.name: np.bool_ if "bool" in each.type else np.float32 for each in session.get_inputs()
    }
    assert set(types) == set(inputs)
    feeds = {
        name: np.array(number if types[name] is np.bool_ else [number], types[name])
        for name, number in inputs.items()
    }
    return float(np.asarray(session.run([output], feeds)[0])[0])


def test_a_part_from_the_start(model: onnx.ModelProto) -> None:
    assert run(cut_graph(model, [], ["tripled"]), "tripled", x=5) == 15


def test_a_part_from_a_given_value_keeps_the_inputs_it_needs(model: onnx.ModelProto) -> None:
    assert run(cut_graph(model, ["double"], ["tripled"]), "tripled", double=100, x=5) == 105


def test_values_that_an_inner_graph_reads_count(model: onnx.ModelProto) -> None:
    part = cut_graph(model, ["tripled"], ["y"])
    assert run(part, "y", tripled=7, factor=3, wanted=True, x=0) == 21
    assert [node.op_type for node in part.graph.node] == ["If"]


def test_a_given_value_that_is_not_needed_is_no_input(model: onnx.ModelProto) -> None:
    assert [each.name for each in cut_graph(model, ["tripled"], ["double"]).graph.input] == ["x"]


def test_a_variant_gives_inner_values_too(model: onnx.ModelProto) -> None:
    variant = with_outputs(model, ["double"])
    assert run(variant, "double", x=4, factor=1, wanted=True) == 8
    assert [each.name for each in model.graph.output] == ["y"]


def test_a_value_that_is_not_there(model: onnx.ModelProto) -> None:
    with pytest.raises(ArtefactError, match=r"c3.*export it again"):
        with_outputs(model, ["double", "c3"])


def quantised(zero_point: int, kind: type) -> onnx.ModelProto:
    """A product of activations and weights that are quantised and restored."""
    constants = {
        "scale": np.array(0.5, np.float32),
        "zero": np.array(zero_point, kind),
        "w": np.full((2, 2), 100, np.int8),
        "w_scale": np.array(1, np.float32),
        "w_zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["dw"]),
        helper.make_node("MatMul", ["d", "dw"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "scale", "zero"], ["pq"]),
        helper.make_node("DequantizeLinear", ["pq", "scale", "zero"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "quantised", value[:1], value[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class TestFloatArithmetic:
    def test_what_is_quantised_for_tensorrt_needs_it(self) -> None:
        assert needs_float_arithmetic(quantised(0, np.int8))
        assert not needs_float_arithmetic(quantised(128, np.uint8))

    @pytest.mark.parametrize("in_float", [True, False])
    def test_it_is_set_where_asked_for(self, in_float: bool) -> None:
        session = open_session(quantised(0, np.int8).SerializeToString(), float_arithmetic=in_float)
        entry = "session.disable_quant_qdq"
        options = session.get_session_options()
        try:
            value = options.get_session_config_entry(entry)
        except RuntimeError:  # not set
            value = ""
        assert value == ("1" if in_float else "")
        x = np.array([[1, 2], [3, 4]], np.float32)
        outputs: Any = session.run(None, {"x": x})
        np.testing.assert_allclose(outputs[0], np.full((2, 2), 63.5))


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    """No hash covers them, and they may lie anywhere."""
    path = save_small(tmp_path / "a.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "extra"))
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(ArtefactError, match="tensors in other files"):
        read_onnx(path)


def test_a_graph_that_fails_while_it_runs_is_one_error(tmp_path: Path) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    shape = numpy_helper.from_array(np.array([7], np.int64), "shape")
    graph = helper.make_graph([node], "g", [x], [y], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(model.SerializeToString())
    with pytest.raises(ArtefactError, match=r"an inference failed .*export the model again"):
        run_session(session, ["y"], {"x": np.zeros(5, np.float32)})
