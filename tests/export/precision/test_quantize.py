"""Q/DQ graphs: what is in them, how close they stay to float32, and that the runtimes really
compute in 8 bits."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import numpy_helper

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.openvino_runtime import shared_core
from tood_deploy.errors import ToodError
from tood_deploy.export.config import Scheme
from tood_deploy.export.precision.quantize import (
    ALWAYS_FLOAT,
    Ranges,
    activation_parameters,
    calibrated_values,
    choose_layers,
    place_pairs,
    quantize,
    weight_parameters,
)
from tood_deploy.graph_io import HEAD_OUTPUTS, INNER_VALUES, graph_feeds
from tood_deploy.onnx_file import with_outputs

IMGSZ = (96, 128)
BLOCK = "backbone.layer1.1"

SCHEMES = get_args(Scheme)


@pytest.fixture(scope="module")
def quantized(model: onnx.ModelProto, ranges: Ranges) -> dict[str, onnx.ModelProto]:
    return {scheme: quantize(model, ranges, scheme=scheme) for scheme in SCHEMES}


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def convolutions(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Every convolution and what makes its weight: "" for a constant."""
    made_by = makers(model)
    for node in model.graph.node:
        if node.op_type == "Conv":
            yield node, made_by[node.input[1]].op_type if node.input[1] in made_by else ""


def head_maps(model: onnx.ModelProto) -> list[NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        with_outputs(model, HEAD_OUTPUTS).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    images = synthetic_image(*IMGSZ, 7)[None]
    found: Any = session.run(
        list(HEAD_OUTPUTS), graph_feeds(images, np.array([IMGSZ], np.int32), 0.05, 0.6)
    )
    return found


def relative_error(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class TestParameters:
    @given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from(SCHEMES))
    @settings(max_examples=200, deadline=None)
    def test_a_range_is_covered_and_zero_is_exact(
        self, low: float, high: float, scheme: Scheme
    ) -> None:
        low, high = min(low, high), max(low, high)
        parameters = activation_parameters(low, high, scheme)
        scale, zero = float(parameters.scale), int(parameters.zero_point)
        limits = np.iinfo(parameters.zero_point.dtype)
        assert limits.min <= zero <= limits.max
        for number in (low, high, 0.0, (low + high) / 2):
            restored = (
                np.clip(np.round(number / scale) + zero, limits.min, limits.max) - zero
            ) * scale
            assert (
                abs(restored - number) <= scale * 1.001 + 1e-30
            )  # half a step, and half of another for the rounded zero point
        assert scheme != "s8s8" or zero == 0

    def test_what_a_relu_gives_has_zero_point_zero(self) -> None:
        parameters = activation_parameters(0.0, 5.1, "u8s8")
        assert parameters.zero_point.dtype == np.uint8
        assert (float(parameters.scale), int(parameters.zero_point)) == (pytest.approx(0.02), 0)

    @pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_weights_by_channel(self, axis: int, scheme: Scheme) -> None:
        weight = np.random.default_rng(0).standard_normal((4, 6, 3, 3)).astype(np.float32)
        weight[(slice(None),) * axis + (2,)] = 0  # a channel without weights
        parameters = weight_parameters(weight, axis, scheme)
        for i, scale in enumerate(parameters.scale):
            part = weight.take(i, axis)
            assert scale == (np.float32(1) if i == 2 else pytest.approx(np.abs(part).max() / 127))
        assert not parameters.zero_point.any()

    @given(
        arrays(
            np.float32,
            st.tuples(st.integers(1, 4), st.integers(1, 12)),
            elements=st.floats(-1e3, 1e3, width=32),
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_no_two_portable_weights_of_a_channel_saturate(self, weight: np.ndarray) -> None:
        """255 times the two largest stays below 2^15, whichever two a CPU adds in 16 bits."""
        scale = weight_parameters(weight, 0, "u8s7").scale[:, None]
        levels = np.sort(np.abs(np.round(weight / scale).clip(-127, 127)), axis=1)
        assert (255 * levels[:, -2:].sum(axis=1) <= 32767).all()
        assert (np.abs(levels * scale - np.sort(np.abs(weight), axis=1)) <= scale * 0.501).all()


@pytest.mark.parametrize("scheme", SCHEMES)
class TestGraph:
    def test_is_valid_and_names_all_stages(
        self, scheme: str, quantized: dict[str, onnx.ModelProto]
    ) -> None:
        onnx.checker.check_model(quantized[scheme], full_check=True)
        assert set(INNER_VALUES) <= makers(quantized[scheme]).keys()

    def test_all_layers_but_the_last_of_the_head(
        self, scheme: str, quantized: dict[str, onnx.ModelProto]
    ) -> None:
        kinds = Counter(kind for _, kind in convolutions(quantized[scheme]))
        # 20 of the backbone, 8 of the pyramid; on each of 5 levels 6 of the tower and 24 that read
        # it, 4 outputs and 4 of attention.
        assert kinds == {"DequantizeLinear": 20 + 8 + 5 * (6 + 24), "": 5 * 8}
        floats = {
            node.input[1].removeprefix("detector.model.bbox_head.")
            for node, kind in convolutions(quantized[scheme])
            if not kind
        }
        assert floats == {
            "tood_cls.weight",
            "tood_reg.weight",
            "cls_prob_module.last.weight",
            "reg_offset_module.last.weight",
            *(
                f"{task}_decomp.layer.layer_attention.{i}.weight"
                for task in ("cls", "reg")
                for i in (0, 2)
            ),
        }

    def test_weights_are_stored_as_int8_by_channel_and_once(
        self, scheme: str, quantized: dict[str, onnx.ModelProto], model: onnx.ModelProto
    ) -> None:
        arrays, made_by, floats = (
            constants(quantized[scheme]),
            makers(quantized[scheme]),
            constants(model),
        )
        weights = {
            node.input[1]: made_by[node.input[1]]
            for node, kind in convolutions(quantized[scheme])
            if kind
        }
        assert len(weights) == 20 + 8 + 6 + 24  # levels share
        for node in weights.values():
            stored, scale, zero = (arrays[name] for name in node.input)
            assert (stored.dtype, zero.dtype, scale.shape) == (np.int8, np.int8, (len(stored),))
            assert not zero.any()
            name = node.output[0].removesuffix("_dequantized")
            assert name not in arrays
            step = scale.reshape(-1, 1, 1, 1)
            assert (np.abs(stored * step - floats[name]) <= step * 0.501).all()

    def test_biases_stay_float(self, scheme: str, quantized: dict[str, onnx.ModelProto]) -> None:
        arrays = constants(quantized[scheme])
        biases = [
            arrays[node.input[2]]
            for node, _ in convolutions(quantized[scheme])
            if len(node.input) > 2
        ]
        assert len(biases) > 40
        assert {bias.dtype for bias in biases} == {np.dtype(np.float32)}

    def test_activations_have_one_pair_of_the_scheme(
        self, scheme: str, quantized: dict[str, onnx.ModelProto]
    ) -> None:
        arrays = constants(quantized[scheme])
        pairs = [node for node in quantized[scheme].graph.node if node.op_type == "QuantizeLinear"]
        zeros = np.array([arrays[node.input[2]] for node in pairs])
        assert zeros.dtype == (np.int8 if scheme == "s8s8" else np.uint8)
        assert zeros.any() == (scheme != "s8s8")
        assert all(arrays[node.input[1]].shape == () for node in pairs)
        assert len({node.input[0] for node in pairs}) == len(pairs)

    def test_every_8_bit_layer_reads_8_bits(
        self, scheme: str, quantized: dict[str, onnx.ModelProto]
    ) -> None:
        made_by = makers(quantized[scheme])

        def source(name: str) -> str:
            node = made_by[name]
            return source(node.input[0]) if node.op_type in ("MaxPool", "Resize") else node.op_type

        assert {
            source(node.input[0]) for node, kind in convolutions(quantized[scheme]) if kind
        } == {"DequantizeLinear"}

    def test_head_maps_stay_close(
        self, scheme: str, quantized: dict[str, onnx.ModelProto], model: onnx.ModelProto
    ) -> None:
        for expected, found in zip(head_maps(model), head_maps(quantized[scheme]), strict=True):
            assert 0 < relative_error(expected, found) < 0.2

    def test_the_float_graph_stays_as_it_is(
        self, scheme: Scheme, model: onnx.ModelProto, ranges: Ranges
    ) -> None:
        before = model.SerializeToString(deterministic=True)
        quantize(model, ranges, scheme=scheme)
        assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_with_a_constant(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, 4)))
    node = onnx.helper.make_node("MatMul", ["x", "some.weight"], ["y"])
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", (5, 8)), ("y", (5, 4)))
    ]
    graph = onnx.helper.make_graph(
        [node], "product", values[:1], values[1:], [numpy_helper.from_array(weight, "some.weight")]
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    ranges = {"x": (float(x.min()), float(x.max())), "y": (-10.0, 10.0)}
    assert set(calibrated_values(model)) == ranges.keys()
    quantized = quantize(model, ranges, scheme=scheme)
    onnx.checker.check_model(quantized, full_check=True)
    assert constants(quantized)["some.weight_scale"].shape == (4,)
    session = ort.InferenceSession(
        quantized.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: Any = session.run(["y"], {"x": x})[0]
    # The rounding alone; on a CPU without VNNI the sums of u8s8 and s8s8 saturate besides.
    assert 0 < relative_error(x @ weight, found) < (0.03 if scheme == "u8s7" else 0.5)


class TestPlacement:
    def residual_inputs(self, model: onnx.ModelProto) -> list[str]:
        """What makes the two sides of the identity block's sum."""
        made_by = makers(model)
        block = next(node for node, _ in convolutions(model) if f"{BLOCK}.conv2" in node.input[1])
        output = block.output[0]
        total = next(
            node
            for node in model.graph.node
            if node.op_type == "Add"
            and any(name.removesuffix("_dequantized") == output for name in node.input)
        )
        return sorted(made_by[name].op_type for name in total.input)

    def test_tensorrt_fuses_a_convolution_with_the_sum_behind_it(
        self, quantized: dict[str, onnx.ModelProto]
    ) -> None:
        assert self.residual_inputs(quantized["s8s8"]) == ["Conv", "DequantizeLinear"]

    def test_cpu_runtimes_want_both_sides_in_8_bits(
        self, quantized: dict[str, onnx.ModelProto]
    ) -> None:
        assert self.residual_inputs(quantized["u8s8"]) == ["DequantizeLinear"] * 2

    def test_pooling_works_on_8_bits(self, quantized: dict[str, onnx.ModelProto]) -> None:
        for model in quantized.values():
            pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
            assert makers(model)[pool.input[0]].op_type == "DequantizeLinear"

    def test_kept_layers_read_and_write_float(self, model: onnx.ModelProto, ranges: Ranges) -> None:
        kept = quantize(
            model, ranges, scheme="u8s8", keep=[f"{BLOCK}.conv1", "bbox_head.*_decomp.kernels.*"]
        )
        made_by = makers(kept)
        floats = [node for node, kind in convolutions(kept) if not kind]
        assert len(floats) == 5 * 8 + 1 + 5 * 12
        block = next(node for node in floats if BLOCK in node.input[1])
        assert made_by[block.input[0]].op_type == "Relu"
        assert all(
            made_by[node.input[0]].op_type == "Relu"
            for node in floats
            if "kernels" in node.input[1]
        )

    @pytest.mark.parametrize(
        "kept",
        ["backbone.conv1", "backbone.layer2.0.*", "neck.*", "bbox_head.inter_convs.[02].conv"],
    )
    def test_calibration_covers_whatever_is_kept(self, kept: str, model: onnx.ModelProto) -> None:
        names = set(calibrated_values(model))
        for everywhere in (True, False):
            pairs = place_pairs(choose_layers(ir.from_proto(model).graph, [kept]), everywhere)
            assert {value.name for value in pairs} < names


class TestBadInput:
    def test_a_pattern_that_fits_nothing(self, model: onnx.ModelProto, ranges: Ranges) -> None:
        with pytest.raises(
            ToodError,
            match=r"no 8-bit layer is called backbone\.layer9\.\*; expected patterns of "
            r"backbone\.conv1, ",
        ):
            quantize(model, ranges, scheme="u8s8", keep=["neck.*", "backbone.layer9.*"])

    @pytest.mark.parametrize("pattern", ALWAYS_FLOAT)
    def test_what_is_always_float_cannot_be_kept(
        self, pattern: str, model: onnx.ModelProto, ranges: Ranges
    ) -> None:
        with pytest.raises(ToodError, match="no 8-bit layer"):
            quantize(model, ranges, scheme="u8s8", keep=[pattern])

    def test_a_range_that_is_missing(self, model: onnx.ModelProto, ranges: Ranges) -> None:
        with pytest.raises(
            ToodError, match="no range is known of pixels; calibrate this very graph"
        ):
            quantize(
                model,
                {name: found for name, found in ranges.items() if name != "pixels"},
                scheme="s8s8",
            )


class TestRuntimes:
    def test_onnxruntime_computes_all_of_them_in_8_bits(
        self, quantized: dict[str, onnx.ModelProto], tmp_path: Path
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(
            quantized["u8s8"].SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        assert kinds["QLinearConv"] == 20 + 8 + 5 * (6 + 24)
        assert kinds["Conv"] + kinds["FusedConv"] == 5 * 8
        assert kinds["QLinearAdd"] == 8  # residuals

    def test_openvino_computes_all_of_them_in_8_bits(
        self, quantized: dict[str, onnx.ModelProto], tmp_path: Path
    ) -> None:
        pytest.importorskip("openvino")
        onnx.save(quantized["u8s8"], tmp_path / "model.onnx")
        core = shared_core()
        graph = core.read_model(tmp_path / "model.onnx")
        graph.reshape({"images": [1, *IMGSZ, 3], "valid_hw": [1, 2]})
        compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def told(node: Any, key: str) -> str:
            return str(node.get_rt_info()[key].astype(str)) if key in node.get_rt_info() else ""

        nodes = [
            node
            for node in compiled.get_runtime_model().get_ops()
            if told(node, "layerType") == "Convolution"
        ]
        kinds = Counter(told(node, "runtimePrecision") for node in nodes)
        assert kinds == {"u8": 20 + 8 + 5 * (6 + 24), "f32": 5 * 8}

    def test_tensorrt_takes_the_head(self, quantized: dict[str, onnx.ModelProto]) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        head = _until_head(quantized["s8s8"])
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(head.SerializeToString()), [
            parser.get_error(i).desc() for i in range(parser.num_errors)
        ]


def _until_head(model: onnx.ModelProto) -> onnx.ModelProto:
    whole = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    made = {value.name: value for node in whole.graph for value in node.outputs}
    part = ir.convenience.extract(
        whole.graph, whole.graph.inputs[:2], [made[name] for name in HEAD_OUTPUTS]
    )
    return ir.to_proto(ir.Model(part, ir_version=whole.ir_version))
