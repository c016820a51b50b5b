"""Batch normalisation of a trained network is a factor and a summand for each channel; this writes it so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tood_deploy.export.precision.low_region import is_constant


def split_batch_norm(graph: ir.Graph, node: ir.Node) -> tuple[ir.Node, ...]:
    """Replaces a BatchNormalization whose numbers are constants by Mul and Add; any other node is left as it is.

    As one node with an input in half precision and statistics in float32, as ONNX allows, ONNX Runtime 1.31 fails on it (it merges the
    node with a product before it, and takes all to be of one type).

    Returns:
        The nodes that now do the work.
    """
    values = node.inputs[1:5]
    if node.op_type != "BatchNormalization" or not all(is_constant(value) for value in values):
        return (node,)
    scale, shift, mean, variance = (value.const_value.numpy().astype(np.float64) for value in values if value and value.const_value)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    output = node.outputs[0]
    product = ir.node("Mul", [node.inputs[0], _channels(graph, f"{output.name}_factor", factor)], name=f"{node.name}_factor")
    total = ir.node(
        "Add", [product.outputs[0], _channels(graph, f"{output.name}_summand", shift - mean * factor)], name=f"{node.name}_summand"
    )
    product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = f"{output.name}_scaled", output.type, output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product, total], [output], total.outputs)
    return product, total


def _channels(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
    """A constant (C, 1, 1)."""
    tensor = ir.tensor(numbers.astype(np.float32).reshape(-1, 1, 1), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((len(numbers), 1, 1)))
    graph.register_initializer(value)
    return value
