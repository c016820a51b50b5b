"""Which nodes of an exported graph compute in half precision, so that few casts are needed. Knows neither types nor numbers.

Convolutions and products with constants do, and what lies between two of them and loses nothing by it: moving values, rectifying, adding
residuals, weighing. Everything else, such as normalisation, exponentials, positions, decoding and suppression, does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
import onnx_ir as ir

LAYERS = frozenset({"Conv", "MatMul", "Gemm"})
# Their outputs are values of their inputs, unchanged but for zeros.
MOVING = frozenset("Concat Expand Flatten Gather Identity MaxPool Pad Relu Reshape Resize Slice Split Squeeze Transpose Unsqueeze".split())
POINTWISE = frozenset({"Add"})
PRODUCTS = frozenset({"Mul"})  # one operand of low precision is enough: the other is a factor
FLEXIBLE = MOVING | POINTWISE | PRODUCTS
ANY_TYPE = frozenset({"Shape", "Size"})  # read no numbers


def low_region(graph: ir.Graph, kept: Collection[ir.Node]) -> set[ir.Node]:
    """The nodes that compute in half precision.

    Args:
        graph: whose values have types. Inner graphs, as of loops, are left alone.
        kept: nodes that do not.
    """
    layers = {node for node in graph if node not in kept and is_layer(node) and _reads_float(node)}
    low: set[ir.Node] = set(layers)
    at_hand = {value for node in layers for _, value in typed_inputs(node)}  # in half precision, whoever makes them
    for node in graph:
        if node not in kept and _reads_float(node) and _joins(node, at_hand):
            low.add(node)
        if node in low:
            at_hand.update(node.outputs)
    for node in reversed(list(graph)):
        if node in low and node.op_type in FLEXIBLE and not _feeds(node, low) and not _merges(node, low):
            low.remove(node)
        elif node not in kept and _feeds_only(node, low):
            low.add(node)
    return low


def is_layer(node: ir.Node) -> bool:
    """Whether a node is a convolution or a product with a constant."""
    return node.op_type in LAYERS and any(is_constant(value) for value in node.inputs[:2])


def layer_name(node: ir.Node) -> str:
    """What a layer is called: as its weight, without what all weights begin and end with; the same at all levels, which share it."""
    for value in reversed(node.inputs[:2]):
        if is_constant(value):
            while value is not None and (made_by := value.producer()) is not None:
                value = made_by.inputs[0]
            return (value.name or "" if value else "").removeprefix("detector.model.").removesuffix(".weight")
    return node.name or ""


def is_vector_layer(node: ir.Node) -> bool:
    """Whether a layer works on one position alone, as attention on pooled values does."""
    shape = node.outputs[0].shape
    return node.op_type == "Conv" and shape is not None and tuple(shape[2:]) == (1, 1)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, be it moved around or stored in 8 bits."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return node.op_type in MOVING | {"DequantizeLinear"} and all(is_constant(read) for read in node.inputs if read is not None)


def typed_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """The inputs of a node whose type is that of its arithmetic, by their positions: not indices, shapes, or numbers of 8 bits."""
    assert node.graph is not None
    schema = onnx.defs.get_schema(node.op_type, node.graph.opset_imports[node.domain], node.domain)
    own = (schema.inputs if node.op_type == "QuantizeLinear" else schema.outputs)[0].type_str
    for i, value in enumerate(node.inputs):
        if value is not None and schema.inputs[min(i, len(schema.inputs) - 1)].type_str == own:
            yield i, value


def _feeds(node: ir.Node, nodes: Collection[ir.Node]) -> bool:
    """Whether one of the nodes reads what this one makes."""
    return any(use.node in nodes for value in node.outputs for use in value.uses())


def _feeds_only(node: ir.Node, low: Collection[ir.Node]) -> bool:
    """Whether a node restores 8-bit numbers, or moves one value, for nodes of low precision alone: then the cast goes before it."""
    uses = node.outputs[0].uses()
    moves = node.op_type in MOVING | {"DequantizeLinear"} and node.op_type != "Concat"
    return moves and not _interpolates(node) and bool(uses) and all(use.node in low for use in uses)


def _merges(node: ir.Node, low: Collection[ir.Node]) -> bool:
    """Whether a sum makes one value of several of low precision, which would need a cast each."""
    return node.op_type in POINTWISE and sum(value.producer() in low for _, value in typed_inputs(node)) > 1


def _interpolates(node: ir.Node) -> bool:
    """Whether a Resize computes means, instead of repeating values."""
    return node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest"


def _reads_float(node: ir.Node) -> bool:
    first = node.inputs[0] if node.inputs else None
    return first is not None and first.dtype == ir.DataType.FLOAT


def _joins(node: ir.Node, at_hand: Collection[ir.Value]) -> bool:
    """Whether a node may work on what is at hand in half precision."""
    if node.op_type not in FLEXIBLE | {"QuantizeLinear"} or _interpolates(node):
        return False
    reads = [value for _, value in typed_inputs(node)]
    fitting = [value in at_hand and not is_constant(value) for value in reads]
    if node.op_type in PRODUCTS:
        return any(fitting)
    return any(fitting) and all(fits or is_constant(value) for fits, value in zip(fitting, reads, strict=True))
