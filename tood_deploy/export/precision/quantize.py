"""INT8 by explicit Q/DQ pairs: a float32 graph and the ranges of its values in, the same graph with 8-bit convolutions out.

Weights are symmetric int8 a channel and stored as such, activations 8-bit a tensor, biases stay float32. What is quantised and where the
pairs go is `quantizable`'s to say. Knows no runtime: TensorRT takes scheme "s8s8", the CPU's runtimes "u8s7" or "u8s8".

CPUs without VNNI instructions add two products of uint8 and int8 in 16 bits, which saturate at 32767: with "u8s8" they give wrong sums.
"u8s7" spends the weights' levels so that the two largest of a channel add up to no more than 128: 255 * 128 fits, whichever two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.errors import ToodError
from tood_deploy.export.precision.quantizable import Layer, Reader, all_layers, choose_layers, place_pairs

Scheme = Literal["s8s8", "u8s8", "u8s7"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
Ranges = Mapping[str, tuple[float, float]]

WEIGHT_LEVELS = 127  # -128 stays unused, so that the range is symmetric
PAIR_LEVELS = 127  # of the two largest weights of a channel together; rounding adds at most one


@dataclass(frozen=True)
class Parameters:
    """How a tensor's real numbers become 8-bit ones: round(x / scale) + zero_point, clipped."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


def quantize(model: onnx.ModelProto, ranges: Ranges, *, scheme: Scheme, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The same graph with its convolutions and products with constants in 8 bits.

    Args:
        model: an exported float32 graph.
        ranges: lowest and highest value of every activation that `calibrated_values` names, by name.
        scheme: "s8s8" has symmetric int8 activations (zero point 0), "u8s8" uint8 ones: zero point 0 where no value is negative;
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
        raise ToodError(f"no range is known of {', '.join(map(str, missing[:3]))}; calibrate this very graph")
    for value, readers in pairs.items():
        assert value.name is not None
        _insert_pair(graph, value, readers, activation_parameters(*ranges[value.name], scheme))
    _quantize_weights(graph, layers, scheme)
    return ir.to_proto(quantized)


def calibrated_values(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the activations whose ranges `quantize` may ask for, whatever the scheme and whatever it keeps."""
    return tuple(value.name or "" for value in place_pairs(all_layers(ir.from_proto(model).graph), everywhere=True))


def activation_parameters(low: float, high: float, scheme: Scheme) -> Parameters:
    """Scale and zero point of an activation whose values lie between `low` and `high`; zero is always exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "s8s8":
        return Parameters(_scale(max(-low, high) / 127), np.array(0, np.int8))
    scale = _scale((high - low) / 255)
    return Parameters(scale, np.array(round(-low / float(scale)), np.uint8))


def weight_parameters(weight: NDArray[np.float32], axis: int, scheme: Scheme) -> Parameters:
    """Symmetric scales of a weight, one for each of its output channels, which lie along `axis`."""
    sizes = np.sort(np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)), axis=1)
    scale = sizes[:, -1] / WEIGHT_LEVELS
    if scheme == "u8s7":
        scale = np.maximum(scale, sizes[:, -2:].sum(axis=1) / PAIR_LEVELS)
    scale = _scale(scale)
    return Parameters(scale, np.zeros(len(scale), np.int8))


def _scale(scale: Any) -> NDArray[np.float32]:
    """As float32; 1 where all values are zero."""
    scale = np.asarray(scale, np.float32)
    return np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1))


def _insert_pair(graph: ir.Graph, value: ir.Value, readers: Collection[Reader], parameters: Parameters) -> None:
    """A Q/DQ pair behind a value, from which `readers` then read."""
    constants = _constants(graph, f"{value.name}_", parameters)
    quantized = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}_quantize")
    restored = ir.node("DequantizeLinear", [quantized.outputs[0], *constants], name=f"{value.name}_dequantize")
    quantized.outputs[0].name, restored.outputs[0].name = f"{value.name}_quantized", f"{value.name}_dequantized"
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantized, restored])
    else:
        graph.insert_after(producer, [quantized, restored])
    for node, i in readers:
        node.replace_input_with(i, restored.outputs[0])


def _quantize_weights(graph: ir.Graph, layers: Collection[Layer], scheme: Scheme) -> None:
    """Every weight as int8 and its way back; layers of several levels share them."""
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
    rounded = np.round(weight / parameters.scale.reshape(shape)).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    constants = _constants(graph, f"{layer.weight.name}_", parameters)
    quantized = _constant(graph, f"{layer.weight.name}_quantized", rounded)
    node = ir.node("DequantizeLinear", [quantized, *constants], {"axis": layer.channel_axis}, name=f"{layer.weight.name}_dequantize")
    node.outputs[0].name = f"{layer.weight.name}_dequantized"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _constants(graph: ir.Graph, prefix: str, parameters: Parameters) -> tuple[ir.Value, ir.Value]:
    return _constant(graph, f"{prefix}scale", parameters.scale), _constant(graph, f"{prefix}zero_point", parameters.zero_point)


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.shape = ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
