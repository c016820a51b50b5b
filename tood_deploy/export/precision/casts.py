"""Changes the types of nodes in a graph and puts casts where types meet, one for each value and direction. Knows not which nodes or why."""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tood_deploy.export.precision.low_region import ANY_TYPE, typed_inputs

NUMPY_TYPES = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
SUFFIXES = {ir.DataType.FLOAT16: "_fp16", ir.DataType.BFLOAT16: "_bf16", ir.DataType.FLOAT: "_fp32"}

Reader = tuple[ir.Node, int]


def lower_nodes(graph: ir.Graph, low: Collection[ir.Node], data_type: ir.DataType) -> int:
    """Gives nodes a half-precision type; all others keep theirs.

    Values keep their names, constants that only these nodes read are stored in half precision, and outputs of the graph stay float32.

    Args:
        graph: whose values have types.
        low: nodes of the graph that compute in float32.
        data_type: what they shall compute in.

    Returns:
        How many casts were put in.
    """
    made = low_outputs(graph, low)
    casts = sum(_widen_elsewhere(graph, value, low, data_type) for value in made)
    for value in made:
        value.type = ir.TensorType(data_type)
    reads: dict[ir.Value, list[Reader]] = {}
    for node in graph:
        for i, value in typed_inputs(node) if node in low else ():
            if value.dtype == ir.DataType.FLOAT:
                reads.setdefault(value, []).append((node, i))
    return casts + sum(_narrow(graph, value, readers, data_type) for value, readers in reads.items())


def low_outputs(graph: ir.Graph, low: Collection[ir.Node]) -> list[ir.Value]:
    """The float32 values that these nodes make, in the order of the graph."""
    return [value for node in graph if node in low for value in node.outputs if value.dtype == ir.DataType.FLOAT]


def _widen_elsewhere(graph: ir.Graph, value: ir.Value, low: Collection[ir.Node], data_type: ir.DataType) -> bool:
    """Lets readers that are not low read a float32 copy of a value that becomes low; whether that took a cast."""
    readers = [(use.node, use.idx) for use in value.uses() if use.node not in low and use.node.op_type not in ANY_TYPE]
    if not readers and not value.is_graph_output():
        return False
    widened = _cast(graph, value, ir.DataType.FLOAT, readers)
    for i, output in enumerate(graph.outputs):
        if output is value:
            widened.name, value.name = value.name, f"{value.name}{SUFFIXES[data_type]}"
            graph.outputs[i] = widened
    return True


def _narrow(graph: ir.Graph, value: ir.Value, readers: Collection[Reader], data_type: ir.DataType) -> bool:
    """Lets these readers read a value in half precision: a constant as stored so, else a cast; whether that took one."""
    if value.const_value is None:
        _cast(graph, value, data_type, readers)
        return True
    stored = ir.tensor(value.const_value.numpy().astype(NUMPY_TYPES[data_type]), data_type)
    if len(readers) < len(value.uses()):
        value = ir.Value(name=f"{value.name}{SUFFIXES[data_type]}", shape=value.shape)
        _redirect(readers, value)
    value.const_value, value.type = stored, ir.TensorType(data_type)
    graph.register_initializer(value)
    return False


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, readers: Collection[Reader]) -> ir.Value:
    """A copy of another type, which these readers then read."""
    node = ir.node("Cast", [value], {"to": to}, name=f"cast_{value.name}{SUFFIXES[to]}")
    cast = node.outputs[0]
    cast.name, cast.type, cast.shape = f"{value.name}{SUFFIXES[to]}", ir.TensorType(to), value.shape
    made_by = value.producer()
    if made_by is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(made_by, node)
    _redirect(readers, cast)
    return cast


def _redirect(readers: Collection[Reader], value: ir.Value) -> None:
    for node, position in readers:
        node.replace_input_with(position, value)
