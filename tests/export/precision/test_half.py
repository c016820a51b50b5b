"""Half precision in ONNX graphs: on small graphs written as text, where every cast can be counted,
and on the exported network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import nn

from tood_deploy.errors import ToodError
from tood_deploy.export.precision.half import (
    LowPrecision,
    emulate_low_precision,
    half_values,
    lower_precision,
)
from tood_deploy.graph_io import HEAD_OUTPUTS, INNER_VALUES
from tood_deploy.model.deform import DeformConv2d
from tood_deploy.onnx_file import with_outputs

HALF_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT32_OPERATORS = "Exp Softplus Sigmoid Floor Range GatherElements TopK ReduceMean ReduceMax Where Neg Div".split()  # noqa: E501


def small_graph(body: str, constants: str = "") -> onnx.ModelProto:
    """A graph from `x` to `y`, both (B, 4, H, W), with the random kernels `w`, `v` (3x3) and `u`
    (1x1) from 4 to 4 channels."""
    names = ", ".join(
        [
            "float[4,4,3,3] w, float[4,4,3,3] v, float[4,4,1,1] u",
            *([constants] if constants else []),
        ]
    )
    header = '<ir_version: 10, opset_import: ["" : 21]> g (float[b,4,h,w] x) => (float[b,4,h,w] y)'
    model = onnx.parser.parse_model(f"{header} <{names}> {{ {body} }}")
    rng = np.random.default_rng(0)
    for value in model.graph.value_info:  # constants without numbers
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(
            numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), value.name)
        )
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def lowered(
    model: onnx.ModelProto, precision: LowPrecision = "fp16", keep: Any = ()
) -> tuple[onnx.ModelProto, int]:
    """The lowered graph, checked, and how many casts it has."""
    result, report = lower_precision(model, precision, keep=keep)
    onnx.checker.check_model(result, full_check=True)
    assert report.casts == sum(node.op_type == "Cast" for node in result.graph.node) - sum(
        node.op_type == "Cast" for node in model.graph.node
    )
    return result, report.casts


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def run(
    model: onnx.ModelProto, feed: Mapping[str, NDArray[Any]], names: list[str] | None = None
) -> list[NDArray[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: Any = session.run(names, dict(feed))
    return found


PAD = "pads = [1,1,1,1]"
RESIDUAL = f"a = Conv<{PAD}>(x, w) r = Relu(a) b = Conv<{PAD}>(r, v) s = Add(b, r) t = Relu(s) y = Conv(t, u)"  # noqa: E501


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_between_layers_there_are_no_casts(precision: LowPrecision) -> None:
    model = small_graph(RESIDUAL)
    half, casts = lowered(model, precision)
    assert casts == 2  # of the input and of the output, which stays float32 and keeps its name
    types = value_types(half)
    assert types["y"] == TensorProto.FLOAT
    assert {types[name] for name in "arbstwvu"} == {HALF_TYPES[precision]}
    assert [entry.version for entry in half.opset_import] == [22 if precision == "bf16" else 21]


def test_the_model_that_was_given_stays_as_it_was() -> None:
    model = small_graph(RESIDUAL)
    before = model.SerializeToString()
    lower_precision(model, "fp16")
    lower_precision(model, "bf16")
    assert model.SerializeToString() == before


def test_normalisation_reads_and_writes_half_precision_with_float32_means() -> None:
    body = f"a = Conv<{PAD}>(x, w) n = GroupNormalization<num_groups = 2>(a, s, z) r = Relu(n) y = Conv(r, u)"  # noqa: E501
    half, casts = lowered(small_graph(body, "float[4] s = {1,1,1,1}, float[4] z = {0,0,0,0}"))
    assert casts == 2
    assert {value_types(half)[name] for name in "anrsz"} == {TensorProto.FLOAT16}
    (norm,) = (node for node in half.graph.node if node.op_type == "GroupNormalization")
    assert all(entry.i == 1 for entry in norm.attribute if entry.name == "stash_type")
    # Where its means would be in half precision, too, it stays as it is.
    half, _ = lowered(
        small_graph(
            body.replace("2>", "2, stash_type = 10>"),
            "float[4] s = {1,1,1,1}, float[4] z = {0,0,0,0}",
        )
    )
    assert value_types(half)["n"] == TensorProto.FLOAT


def test_what_follows_the_last_layer_stays_float32() -> None:
    body = "a = Conv(x, u) m = Mul(a, a) e = Exp(m) y = Add(e, a)"
    half, casts = lowered(small_graph(body))
    assert casts == 2
    assert {value_types(half)[name] for name in "mey"} == {TensorProto.FLOAT}


def test_a_sum_of_weighed_layers_needs_one_cast_and_one_for_all_weights() -> None:
    body = f"""
        a = Conv(x, u) b = Conv<{PAD}>(x, w) p = ReduceMean<keepdims = 1>(x, hw) q = Sigmoid(p)
        f, g = Split<axis = 1, num_outputs = 2>(q) i = Slice(f, zero, one, one) j = Slice(g, zero, one, one)
        c = Mul(a, i) d = Mul(b, j) s = Add(c, d) y = Softplus(s)
    """  # noqa: E501
    half, casts = lowered(
        small_graph(body, "int64[2] hw = {2,3}, int64[1] zero = {0}, int64[1] one = {1}")
    )
    assert casts == 3  # x, the weights before they are split, and the sum
    assert value_types(half)["q"] == TensorProto.FLOAT
    assert value_types(half)["s"] == TensorProto.FLOAT16


def test_a_sum_with_something_in_float32_stays_float32() -> None:
    half, casts = lowered(
        small_graph("a = Conv(x, u) p = Softplus(x) s = Add(a, p) y = Conv(s, u)")
    )
    assert casts == 4
    assert value_types(half)["s"] == TensorProto.FLOAT


@pytest.mark.parametrize(("mode", "casts"), [("nearest", 2), ("linear", 4)])
def test_enlarging_by_repetition_needs_no_float32(mode: str, casts: int) -> None:
    body = f'a = Conv(x, u) r = Resize<mode = "{mode}">(a, none, scales) y = Conv(r, u)'
    _, found = lowered(small_graph(body.replace("none", ""), "float[4] scales = {1, 1, 2, 2}"))
    assert found == casts


def test_reading_a_shape_needs_no_cast() -> None:
    half, casts = lowered(
        small_graph("a = Conv(x, u) h = Shape(a) r = Reshape(a, h) y = Conv(r, u)")
    )
    assert casts == 2
    assert [node.input[0] for node in half.graph.node if node.op_type == "Shape"] == ["a"]


def test_a_constant_that_both_precisions_read_is_stored_in_both() -> None:
    body = "a = Conv(x, u, c) e = Exp(c) f = Reshape(e, i) y = Mul(a, f)"
    half, _ = lowered(small_graph(body, "float[4] c, int64[4] i = {1,4,1,1}"))
    types = value_types(half)
    assert (types["c"], types["c_fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)


def test_constants_that_are_moved_are_stored_in_half_precision() -> None:
    body = "k = Reshape(m, i) a = Conv(x, k) y = Exp(a)"
    half, casts = lowered(small_graph(body, "float[16] m, int64[4] i = {4,4,1,1}"))
    assert casts == 2
    assert value_types(half)["m"] == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("pattern", "stay"), [("u", "y"), ("Add", "s"), ("t", "ty"), ("[rs]", "rbst"), ("w", "a")]
)
def test_patterns_keep_layers_operators_and_values(pattern: str, stay: str) -> None:
    model = small_graph(RESIDUAL)
    half, report = lower_precision(model, "fp16", keep={pattern: "because"})
    onnx.checker.check_model(half, full_check=True)
    types = value_types(half)
    assert {name for name in "arbsty" if types[name] == TensorProto.FLOAT} >= set(stay)
    assert all(reason == f"{pattern}: because" for reason in report.kept.values())


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(ToodError, match="nothing in the graph is called tood_rge"):
        lower_precision(small_graph(RESIDUAL), "fp16", keep=["tood_rge", "w"])


def test_weights_that_fp16_cannot_hold_stay_float32() -> None:
    model = small_graph(RESIDUAL)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "v")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1e6, "v"))
    half, report = lower_precision(model, "fp16")
    assert "too large" in report.kept["v"]
    assert value_types(half)["v"] == TensorProto.FLOAT
    assert "v" in lower_precision(model, "bf16")[1].lowered


def test_a_layer_on_one_position_stays_float32() -> None:
    body = "p = ReduceMean<keepdims = 1>(x, hw) a = Conv(p, u) q = Sigmoid(a) b = Mul(x, q) y = Conv(b, u)"  # noqa: E501
    half, report = lower_precision(small_graph(body, "int64[2] hw = {2,3}"), "fp16")
    assert value_types(half)["a"] == TensorProto.FLOAT
    assert value_types(half)["u"] == TensorProto.FLOAT
    assert report.kept == {"u": "works on one position alone"}
    assert report.lowered == ("u",)


def test_inner_graphs_read_float32() -> None:
    branches = [
        f"{name}_branch = {name} () => (float[b,4,h,w] o) {{ o = {operator}(a) }}"
        for name, operator in (("then", "Neg"), ("else", "Exp"))
    ]
    model = small_graph(f"a = Conv(x, u) y = If(k) <{', '.join(branches)}>", "bool k = {1}")
    half, casts = lowered(model)
    assert casts == 2
    x = np.random.default_rng(1).normal(size=(1, 4, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(run(half, {"x": x})[0], run(model, {"x": x})[0], atol=2e-3)


def test_8_bit_layers_take_half_precision_from_their_scales() -> None:
    body = """
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) k = DequantizeLinear(k8, s, z)
        a = Conv(d, k) r = Relu(a) y = Conv<pads = [1,1,1,1]>(r, w)
    """
    numbers = ", ".join(str(i % 5 - 2) for i in range(16))
    half, casts = lowered(
        small_graph(body, f"float s = {{0.02}}, int8 z = {{0}}, int8[4,4,1,1] k8 = {{{numbers}}}")
    )
    # None lies between DequantizeLinear and the convolution: runtimes would not compute in 8 bits.
    assert casts == 1
    assert {value_types(half)[name] for name in "dkar"} == {TensorProto.FLOAT16}
    assert value_types(half)["s"] == TensorProto.FLOAT
    _, casts = lowered(
        small_graph(
            body, f"float s = {{0.000001}}, int8 z = {{0}}, int8[4,4,1,1] k8 = {{{numbers}}}"
        )
    )
    assert casts == 3  # fp16 has two bits for such a scale


def test_values_in_half_precision_are_named_as_before() -> None:
    assert set(half_values(small_graph(RESIDUAL))) == set("xarbsty")
    assert set(half_values(small_graph(RESIDUAL), keep=["t"])) == set("xarbs")


def test_deformable_convolution_in_its_gather_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(16, 16, 3, padding=1, offset_groups=2)
    nn.init.normal_(layer.conv_offset.weight, std=0.2)
    module = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.ReLU(),
        layer,
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    ).eval()
    program = torch.onnx.export(
        module, (torch.randn(1, 4, 9, 12),), dynamo=True, opset_version=21, verbose=False
    )
    assert program is not None
    model = program.model_proto
    half, report = lower_precision(model, "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert (
        len(report.lowered) == 4
    )  # two convolutions, that of the offsets, and the product with the samples
    types = value_types(half)
    reads = {
        (node.op_type, types[name])
        for node in half.graph.node
        for name in node.input
        if name in types
    }
    assert {
        kind
        for operator, kind in reads
        if operator in ("Floor", "Sigmoid", "GreaterOrEqual", "Less", "Sub")
    } == {TensorProto.FLOAT}
    assert {kind for operator, kind in reads if operator == "MatMul"} == {TensorProto.FLOAT16}
    feed = {model.graph.input[0].name: torch.randn(1, 4, 9, 12).numpy()}
    np.testing.assert_allclose(run(half, feed)[0], run(model, feed)[0], atol=1e-2)


def test_deformable_convolution_as_an_operator_stays_float32() -> None:
    body = f"o = Conv<{PAD}>(x, k) a = DeformConv<{PAD}>(x, w, o) r = Relu(a) y = Conv(r, u)"
    half, report = lower_precision(small_graph(body, "float[18,4,3,3] k"), "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert "sampling positions" in report.kept["w"]
    assert {value_types(half)[name] for name in "wa"} == {TensorProto.FLOAT}


class TestEmulation:
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_every_step_is_rounded(self, precision: LowPrecision) -> None:
        half, _ = lowered(small_graph("a = Conv(x, u) r = Relu(a) y = Conv(r, u)"), precision)
        emulated = emulate_low_precision(half)
        onnx.checker.check_model(emulated, full_check=True)
        x = np.random.default_rng(1).normal(size=(1, 4, 2, 3)).astype(np.float32)
        (weight,) = (
            numpy_helper.to_array(tensor).astype(np.float32)
            for tensor in emulated.graph.initializer
            if tensor.name == "u"
        )

        def rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
            kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
            return torch.from_numpy(array).to(kind).float().numpy()

        def conv(array: NDArray[np.float32]) -> NDArray[np.float32]:
            return rounded(
                np.einsum("bihw,oi->bohw", array, weight[:, :, 0, 0], dtype=np.float64).astype(
                    np.float32
                )
            )

        expected = conv(np.maximum(conv(rounded(x)), 0))
        step = (
            float(np.spacing(np.abs(expected).max())) * 2**13
            if precision == "fp16"
            else float(np.spacing(np.abs(expected).max())) * 2**16
        )
        np.testing.assert_allclose(
            run(emulated, {"x": x})[0], expected, rtol=0, atol=step
        )  # sums of another order may round otherwise
        assert np.array_equal(
            run(emulated, {"x": x}, ["y"])[0], rounded(run(emulated, {"x": x})[0])
        )

    def test_values_keep_their_names(self) -> None:
        half, _ = lowered(small_graph(RESIDUAL), "bf16")
        names = {name for node in emulate_low_precision(half).graph.node for name in node.output}
        assert names >= set("arbsty")


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def network(
    request: pytest.FixtureRequest, tiny_artefact: Path
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The exported network, and the same in half precision."""
    model = onnx.load(tiny_artefact)
    return model, lowered(model, request.param)[0]


class TestNetwork:
    def test_the_weights_take_half_the_space(
        self, network: tuple[onnx.ModelProto, onnx.ModelProto]
    ) -> None:
        assert network[1].ByteSize() < 0.55 * network[0].ByteSize()

    def test_all_convolutions_but_those_of_vectors_are_lowered(
        self, network: tuple[onnx.ModelProto, onnx.ModelProto]
    ) -> None:
        types = value_types(network[1])
        high = [
            node
            for node in network[1].graph.node
            if node.op_type == "Conv" and types[node.output[0]] == TensorProto.FLOAT
        ]
        assert high
        assert all("layer_attention" in node.input[1] for node in high)

    def test_what_needs_float32_has_it(
        self, network: tuple[onnx.ModelProto, onnx.ModelProto]
    ) -> None:
        types = value_types(network[1])
        for node in network[1].graph.node:
            if node.op_type in FLOAT32_OPERATORS:
                assert {types[name] for name in (*node.input, *node.output)}.isdisjoint(
                    HALF_TYPES.values()
                ), node.name

    def test_no_cast_undoes_another(self, network: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
        makers = {name: node for node in network[1].graph.node for name in node.output}
        casts = [node for node in network[1].graph.node if node.name.startswith("cast_")]
        assert casts
        assert not [
            node.name
            for node in casts
            if node.input[0] in makers and makers[node.input[0]].op_type == "Cast"
        ]
        assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(
            casts
        )  # each value once

    def test_stages_keep_their_names_and_the_head_its_type(
        self, network: tuple[onnx.ModelProto, onnx.ModelProto]
    ) -> None:
        assert with_outputs(network[1], INNER_VALUES)
        types = value_types(network[1])
        assert {types[name] for name in HEAD_OUTPUTS} == {TensorProto.FLOAT}
        assert types["pixels"] == TensorProto.FLOAT

    def test_head_maps_are_close(
        self, network: tuple[onnx.ModelProto, onnx.ModelProto], synth_image_bgr: Any
    ) -> None:
        precision = "bf16" if network[1].opset_import[0].version == 22 else "fp16"
        runnable = emulate_low_precision(network[1]) if precision == "bf16" else network[1]
        feed = {
            "images": synth_image_bgr(96, 128)[None],
            "valid_hw": np.array([[96, 128]], np.int32),
            "score_threshold": np.array(0.05, np.float32),
            "iou_threshold": np.array(0.6, np.float32),
        }
        names = list(HEAD_OUTPUTS)
        expected, found = (
            run(with_outputs(model, names), feed, names) for model in (network[0], runnable)
        )
        scores = max(np.abs(a - b).max() for a, b in zip(expected[:5], found[:5], strict=True))
        boxes = max(
            np.abs(a - b).mean() / np.abs(a).mean()
            for a, b in zip(expected[5:], found[5:], strict=True)
        )
        limit = {"fp16": 0.01, "bf16": 0.08}[precision]
        assert 0 < scores < limit  # eleven and eight bits, through forty layers
        assert boxes < limit
