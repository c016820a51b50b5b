"""What a mixed-precision graph computes, for runtimes that lack its precision: the same numbers, stored as float32.

ONNX Runtime has no bf16 convolution on the CPU. So every node computes in float32, on operands and with results rounded to half
precision, which is what matrix units do that multiply in half precision and add up in float32.
"""

import numpy as np
import onnx
import onnx_ir as ir

from tood_deploy.export.precision.casts import NUMPY_TYPES
from tood_deploy.export.precision.low_region import MOVING


def emulate_low_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph that gives what a graph of `lower_precision` gives, and needs no operator in half precision but Cast."""
    emulated = ir.from_proto(model)
    graph = emulated.graph
    for value in graph.initializers.values():
        if value.dtype in NUMPY_TYPES and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32))
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype is not None and value.dtype in NUMPY_TYPES:
                _compute_in_float32(graph, node, value, value.dtype)
    return ir.to_proto(emulated)


def _compute_in_float32(graph: ir.Graph, node: ir.Node, value: ir.Value, data_type: ir.DataType) -> None:
    """Makes a node's output float32, and rounded, unless the node only moves numbers that are rounded already."""
    name, readers = value.name, value.uses()
    if node.op_type != "Cast":
        value.type = ir.TensorType(ir.DataType.FLOAT)
    if node.op_type in MOVING:
        return
    value.name = f"{name}_unrounded"
    rounded = value
    for to in (data_type, ir.DataType.FLOAT)[node.op_type == "Cast" :]:
        step = ir.node("Cast", [rounded], {"to": to})
        graph.insert_after(rounded.producer() or node, step)
        rounded = step.outputs[0]
        rounded.type, rounded.shape = ir.TensorType(to), value.shape
    rounded.name = name
    for use in readers:
        use.node.replace_input_with(use.idx, rounded)
