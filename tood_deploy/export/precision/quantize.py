"""Write INT8 into an ONNX graph, by explicit Q/DQ pairs.

Comes in: a float32 graph and the ranges of its values. Goes out: the same graph with 8-bit
convolutions. Weights are symmetric int8 for each channel and stored as such, activations 8-bit for
each tensor, biases stay float32. Knows no runtime: TensorRT takes scheme "s8s8", the CPU's runtimes
"u8s7" or "u8s8".

CPUs without VNNI instructions add two products of uint8 and int8 in 16 bits, which saturate at
32767: with "u8s8" they give wrong sums. "u8s7" spends the weights' levels so that the two largest
of a channel add up to no more than 128: 255 * 128 fits, whichever two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.errors import ToodError
from tood_deploy.export.config import Scheme
from tood_deploy.export.precision.half import layer_name

Reader = tuple[ir.Node, int]  # who reads a value: a node, and the position among its inputs
Pairs = dict[ir.Value, dict[Reader, None]]

CHANNEL_AXES = {"Conv": 0, "MatMul": -1}  # of the weight's output channels
# What gives scores, distances and offsets, where a cell moves by its error; and the attention,
# which works on one number a channel. The distributions of GFL (`gfl_reg`), whose bins average the
# error, and the many classes of RetinaNet's nine anchors (`retina_cls`), a tenth of its arithmetic,
# are not among them.
ALWAYS_FLOAT = (
    "*.tood_cls",
    "*.tood_reg",
    "*.cls_prob_module.last",
    "*.reg_offset_module.last",
    "*.conv_offset",
    "*.layer_attention.*",
    "*.atss_cls",
    "*.atss_reg",
    "*.atss_centerness",
    "*.gfl_cls",
    "*.conv_cls",
    "*.conv_reg",
    "*.conv_centerness",
    "*.vfnet_cls",
    "*.vfnet_reg",
    "*.vfnet_reg_refine",
    "*.retina_reg",
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product with a constant.

    Attributes:
        name: of its weight, without what all weights begin and end with; the same at all levels,
            which share it.
        node: in the graph.
        weight: the constant.
    """

    name: str
    node: ir.Node
    weight: ir.Value

    @property
    def channel_axis(self) -> int:
        """Return the weight's axis of output channels."""
        assert self.weight.shape is not None
        return CHANNEL_AXES[self.node.op_type] % len(self.weight.shape)


def all_layers(graph: ir.Graph) -> list[Layer]:
    """Return every layer that may become 8-bit, in the order of the graph."""
    layers = []
    for node in graph:
        weight = node.inputs[1] if node.op_type in CHANNEL_AXES else None
        if (
            weight is not None
            and weight.is_initializer()
            and not _fits(name := layer_name(node), ALWAYS_FLOAT)
        ):
            layers.append(Layer(name, node, weight))
    return layers


def choose_layers(graph: ir.Graph, keep: Collection[str]) -> list[Layer]:
    """Return the layers that become 8-bit: all but those that `keep` names.

    Raises:
        ToodError: a pattern of `keep` fits no layer.
    """
    layers = all_layers(graph)
    names = list(dict.fromkeys(layer.name for layer in layers))
    if strangers := [
        pattern for pattern in keep if not any(fnmatchcase(name, pattern) for name in names)
    ]:
        raise ToodError(
            f"no 8-bit layer is called {', '.join(strangers)}; expected patterns of "
            f"{', '.join(names)}"
        )
    return [layer for layer in layers if not _fits(layer.name, keep)]


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def place_pairs(layers: Collection[Layer], everywhere: bool) -> Pairs:
    """Return the values that get a Q/DQ pair, each with those who read from behind it.

    One pair serves all readers of a value. It stands before a pooling or an enlargement, not
    behind, so that these work on 8 bits, too.
    Of a sum, TensorRT fuses one side, the output of a convolution, which then has no pair, and
    reads the other in 8 bits.

    Args:
        layers: that become 8-bit.
        everywhere: also behind every layer: ONNX Runtime computes in 8 bits only between two pairs,
            OpenVINO fuses sums only between
            two, and what comes between layers, as normalisation does, then moves a quarter of the
            bytes.
    """
    pairs: Pairs = {}
    for layer in layers:
        _add(pairs, (layer.node, 0))
    for reader, between_layers in list(_summands(layers)):
        if between_layers or _origin(reader)[0] in pairs:
            _add(pairs, reader)
    if everywhere:
        nodes = {layer.node for layer in layers}
        pairs = {value: _readers(value, nodes) for value in (*pairs, *map(_activated, layers))}
    return pairs


def _add(pairs: Pairs, reader: Reader) -> None:
    value, first_reader = _origin(reader)
    pairs.setdefault(value, {})[first_reader] = None


def _origin(reader: Reader) -> tuple[ir.Value, Reader]:
    """Return the value whose Q/DQ pair serves a reader, and the reader behind that pair.

    They differ from the value that is read where a pooling or an enlargement lies between.
    """
    value = reader[0].inputs[reader[1]]
    assert value is not None
    made_by = value.producer()
    return (
        _origin((made_by, 0))
        if made_by is not None and _is_transparent(made_by)
        else (value, reader)
    )


def _is_transparent(node: ir.Node) -> bool:
    """Return whether a node's output holds numbers of its input, unchanged."""
    return node.op_type == "MaxPool" or (
        node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "nearest"
    )


def _summands(layers: Collection[Layer]) -> Iterator[tuple[Reader, bool]]:
    """Yield the other operand of every sum that a layer's output goes into, for a Q/DQ pair.

    Only layers whose output has no other reader count. With each operand comes whether both
    operands are such outputs and the sum is followed by a ReLU alone.
    """
    own = dict.fromkeys(
        layer.node for layer in layers if len(layer.node.outputs[0].uses()) == 1
    )  # in order: the same graph every time
    sums = dict.fromkeys(
        use.node for node in own for use in node.outputs[0].uses() if use.node.op_type == "Add"
    )
    for node in sums:
        fused = [
            i
            for i, value in enumerate(node.inputs)
            if value is not None and value.producer() in own
        ]
        rectified = [use.node.op_type for use in node.outputs[0].uses()] == ["Relu"]
        yield (node, 1 if 0 in fused else 0), len(fused) == 2 and rectified


def _activated(layer: Layer) -> ir.Value:
    """Return a layer's output, behind its ReLU where that follows at once."""
    value = layer.node.outputs[0]
    readers = [use.node for use in value.uses()]
    return readers[0].outputs[0] if [node.op_type for node in readers] == ["Relu"] else value


def _readers(value: ir.Value, layers: Collection[ir.Node]) -> dict[Reader, None]:
    """Return all that read a value, without layers that stay float32."""
    return {
        (use.node, use.idx): None
        for use in value.uses()
        if use.node in layers or use.node.op_type not in CHANNEL_AXES
    }


Ranges = Mapping[str, tuple[float, float]]

WEIGHT_LEVELS = 127  # -128 stays unused, so that the range is symmetric
PAIR_LEVELS = 127  # of the two largest weights of a channel together; rounding adds at most one


@dataclass(frozen=True)
class Parameters:
    """How a tensor's real numbers become 8-bit ones: round(x / scale) + zero_point, clipped."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


def quantize(
    model: onnx.ModelProto, ranges: Ranges, *, scheme: Scheme, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """Return the same graph with its convolutions and products with constants in 8 bits.

    Args:
        model: an exported float32 graph.
        ranges: lowest and highest value of every activation that `calibrated_values` names, by
            name.
        scheme: "s8s8" has symmetric int8 activations (zero point 0), "u8s8" uint8 ones: zero point
            0 where no value is negative;
            "u8s7" is "u8s8" with weights that no CPU saturates on.
        keep: patterns (as of file names) of layers that stay float32, besides those that always do.

    Raises:
        ToodError: a pattern of `keep` fits no layer, or an activation has no range.
    """
    quantized = ir.from_proto(model)
    graph = quantized.graph
    layers = choose_layers(graph, keep)
    pairs = place_pairs(layers, everywhere=scheme != "s8s8")
    if missing := [value.name for value in pairs if value.name not in ranges]:
        raise ToodError(
            f"no range is known of {', '.join(map(str, missing[:3]))}; calibrate this very graph"
        )
    for value, readers in pairs.items():
        assert value.name is not None
        _insert_pair(graph, value, readers, activation_parameters(*ranges[value.name], scheme))
    _quantize_weights(graph, layers, scheme)
    return ir.to_proto(quantized)


def calibrated_values(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the activations whose ranges `quantize` may need.

    They cover every scheme, and every choice of layers to keep.
    """
    return tuple(
        value.name or ""
        for value in place_pairs(all_layers(ir.from_proto(model).graph), everywhere=True)
    )


def activation_parameters(low: float, high: float, scheme: Scheme) -> Parameters:
    """Return scale and zero point of an activation between `low` and `high`; zero stays exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "s8s8":
        return Parameters(_scale(max(-low, high) / 127), np.array(0, np.int8))
    scale = _scale((high - low) / 255)
    return Parameters(scale, np.array(round(-low / float(scale)), np.uint8))


def weight_parameters(weight: NDArray[np.float32], axis: int, scheme: Scheme) -> Parameters:
    """Return symmetric scales of a weight, one for each output channel along `axis`."""
    sizes = np.sort(np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)), axis=1)
    scale = sizes[:, -1] / WEIGHT_LEVELS
    if scheme == "u8s7":
        scale = np.maximum(scale, sizes[:, -2:].sum(axis=1) / PAIR_LEVELS)
    scale = _scale(scale)
    return Parameters(scale, np.zeros(len(scale), np.int8))


def _scale(scale: Any) -> NDArray[np.float32]:
    """Return a scale as float32; 1 where all values are zero."""
    scale = np.asarray(scale, np.float32)
    return np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1))


def _insert_pair(
    graph: ir.Graph, value: ir.Value, readers: Collection[Reader], parameters: Parameters
) -> None:
    """Insert a Q/DQ pair behind a value, from which `readers` then read."""
    constants = _constants(graph, f"{value.name}_", parameters)
    quantized = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}_quantize")
    restored = ir.node(
        "DequantizeLinear", [quantized.outputs[0], *constants], name=f"{value.name}_dequantize"
    )
    quantized.outputs[0].name, restored.outputs[0].name = (
        f"{value.name}_quantized",
        f"{value.name}_dequantized",
    )
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantized, restored])
    else:
        graph.insert_after(producer, [quantized, restored])
    for node, i in readers:
        node.replace_input_with(i, restored.outputs[0])


def _quantize_weights(graph: ir.Graph, layers: Collection[Layer], scheme: Scheme) -> None:
    """Store every weight as int8 with its way back; layers of several levels share them."""
    restored: dict[str, ir.Value] = {}
    for layer in layers:
        name = layer.weight.name
        assert name is not None
        if name not in restored:
            restored[name] = _restored_weight(graph, layer, scheme)
        layer.node.replace_input_with(1, restored[name])
    for name in restored:
        if not graph.initializers[name].uses():
            del graph.initializers[name]


def _restored_weight(graph: ir.Graph, layer: Layer, scheme: Scheme) -> ir.Value:
    assert layer.weight.const_value is not None
    weight = layer.weight.const_value.numpy()
    parameters = weight_parameters(weight, layer.channel_axis, scheme)
    shape = [-1 if i == layer.channel_axis else 1 for i in range(weight.ndim)]
    rounded = (
        np.round(weight / parameters.scale.reshape(shape))
        .clip(-WEIGHT_LEVELS, WEIGHT_LEVELS)
        .astype(np.int8)
    )
    constants = _constants(graph, f"{layer.weight.name}_", parameters)
    quantized = _constant(graph, f"{layer.weight.name}_quantized", rounded)
    node = ir.node(
        "DequantizeLinear",
        [quantized, *constants],
        {"axis": layer.channel_axis},
        name=f"{layer.weight.name}_dequantize",
    )
    node.outputs[0].name = f"{layer.weight.name}_dequantized"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _constants(graph: ir.Graph, prefix: str, parameters: Parameters) -> tuple[ir.Value, ir.Value]:
    return _constant(graph, f"{prefix}scale", parameters.scale), _constant(
        graph, f"{prefix}zero_point", parameters.zero_point
    )


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    value = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    value.shape = ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
