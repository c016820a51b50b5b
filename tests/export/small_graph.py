"""A graph with the inputs, outputs and metadata of an exported one and a single convolution inside:
TensorRT builds it in a moment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tood_deploy.manifest import METADATA_KEY, Manifest
from tood_deploy.presets import PRESETS

CHANNELS, ROWS = 8, 100
MACS_A_PIXEL = 3 * 3 * 3 * CHANNELS
SUMS = ("mean", "valid_sum", "score_threshold", "iou_threshold")

# How the convolution's input and weight come about in each precision: operator, input, further
# inputs, output, attributes.
PRECISIONS: dict[str, list[onnx.NodeProto]] = {
    "fp32": [
        helper.make_node("Conv", ["pixels", "weight"], ["convolved"], name="the_conv", pads=[1] * 4)
    ],
    "fp16": [
        helper.make_node("Cast", ["pixels"], ["low_pixels"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["weight"], ["low_weight"], to=TensorProto.FLOAT16),
        helper.make_node(
            "Conv", ["low_pixels", "low_weight"], ["low"], name="the_conv", pads=[1] * 4
        ),
        helper.make_node("Cast", ["low"], ["convolved"], to=TensorProto.FLOAT),
    ],
    "int8": [
        helper.make_node("QuantizeLinear", ["pixels", "scale", "zero"], ["quantized_pixels"]),
        helper.make_node("DequantizeLinear", ["quantized_pixels", "scale", "zero"], ["low_pixels"]),
        helper.make_node("QuantizeLinear", ["weight", "scale", "zero"], ["quantized_weight"]),
        helper.make_node("DequantizeLinear", ["quantized_weight", "scale", "zero"], ["low_weight"]),
        helper.make_node(
            "Conv", ["low_pixels", "low_weight"], ["convolved"], name="the_conv", pads=[1] * 4
        ),
    ],
}


def small_graph(
    precision: str = "fp32", extra: Sequence[onnx.NodeProto] = (), read: str = "convolved"
) -> onnx.ModelProto:
    """The graph, with a convolution of that precision, and further nodes.

    Args:
        precision: of the convolution.
        extra: nodes that may read `pixels` (B, 3, H, W) and `convolved` (B, 8, H, W).
        read: the value, of four dimensions, that the outputs come from.
    """
    nodes = [
        helper.make_node("Cast", ["images"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["as_float"], ["pixels"], perm=[0, 3, 1, 2]),
        *PRECISIONS[precision],
        *extra,
        helper.make_node("ReduceMean", [read, "all_but_batch"], ["mean"], keepdims=0),
        helper.make_node("Cast", ["valid_hw"], ["valid_float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["valid_float", "second"], ["valid_sum"], keepdims=0),
        *(
            helper.make_node("Add", [f"sum_{i}" if i else SUMS[0], name], [f"sum_{i + 1}"])
            for i, name in enumerate(SUMS[1:])
        ),
        helper.make_node("Unsqueeze", [f"sum_{len(SUMS) - 1}", "second"], ["column"]),
        helper.make_node("Mul", ["column", "ones"], ["scores"]),
        helper.make_node("Unsqueeze", ["scores", "third"], ["thick"]),
        helper.make_node("Mul", ["thick", "box"], ["boxes"]),
        helper.make_node("Cast", ["scores"], ["labels"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", ["labels", "second"], ["num_dets"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        _inputs(),
        _outputs(),
        [numpy_helper.from_array(array, name) for name, array in _constants()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def save_small(
    path: Path, precision: str = "fp32", stated: str | None = None, **options: Any
) -> Path:
    """Writes the graph with a manifest in its metadata that states `stated` as precision, the true
    one where not given."""
    model = small_graph(precision, **options)
    manifest = Manifest(
        PRESETS["tiny"],
        precision=stated or precision,
        checkpoint_sha256="c" * 64,
        versions={"onnx": onnx.__version__},
    )
    helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    onnx.save(model, path)
    return path


def _inputs() -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(
            "images", TensorProto.UINT8, ["batch", "32*rows", "32*columns", 3]
        ),
        helper.make_tensor_value_info("valid_hw", TensorProto.INT32, ["batch", 2]),
        helper.make_tensor_value_info("score_threshold", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("iou_threshold", TensorProto.FLOAT, []),
    ]


def _outputs() -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info("num_dets", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", ROWS, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", ROWS]),
        helper.make_tensor_value_info("labels", TensorProto.INT32, ["batch", ROWS]),
    ]


def _constants() -> list[tuple[str, NDArray[np.generic]]]:
    rng = np.random.default_rng(0)
    return [
        ("weight", rng.normal(size=(CHANNELS, 3, 3, 3)).astype(np.float32)),
        ("scale", np.array(0.02, np.float32)),
        ("zero", np.array(0, np.int8)),
        ("all_but_batch", np.array([1, 2, 3], np.int64)),
        ("second", np.array([1], np.int64)),
        ("third", np.array([2], np.int64)),
        ("ones", np.ones((1, ROWS), np.float32)),
        ("box", np.ones((1, 1, 4), np.float32)),
    ]
