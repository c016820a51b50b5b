"""Write half precision into an ONNX graph.

Comes in: a float32 graph. Goes out: a strongly typed mixture. Layers and what lies between them
(`low_region`) compute in fp16 or bf16, on weights stored so; casts stand where precisions meet. The
general converters do not fit: that of ONNX Runtime has no bf16 and sends values between two float32
nodes through fp16. Knows no runtime.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.errors import ToodError

LAYERS = frozenset({"Conv", "MatMul", "Gemm"})
# Their outputs are values of their inputs, unchanged but for zeros.
MOVING = frozenset(
    "Concat Expand Flatten Gather Identity MaxPool Pad Relu Reshape Resize Slice Split Squeeze "
    "Transpose Unsqueeze".split()
)
POINTWISE = frozenset({"Add"})
PRODUCTS = frozenset({"Mul"})  # one operand of low precision is enough: the other is a factor
# Reads and writes half precision, and computes its means in float32 (`stash_type`).
NORMS = frozenset({"GroupNormalization"})
FLEXIBLE = MOVING | POINTWISE | PRODUCTS | NORMS
ANY_TYPE = frozenset({"Shape", "Size"})  # read no numbers


def low_region(graph: ir.Graph, kept: Collection[ir.Node]) -> set[ir.Node]:
    """Return the nodes that compute in half precision.

    Args:
        graph: whose values have types. Inner graphs, as of loops, are left alone.
        kept: nodes that do not.
    """
    layers = {node for node in graph if node not in kept and is_layer(node) and _reads_float(node)}
    low: set[ir.Node] = set(layers)
    at_hand = {
        value for node in layers for _, value in typed_inputs(node)
    }  # in half precision, whoever makes them
    for node in graph:
        if node not in kept and _reads_float(node) and _joins(node, at_hand):
            low.add(node)
        if node in low:
            at_hand.update(node.outputs)
    for node in reversed(list(graph)):
        if (
            node in low
            and node.op_type in FLEXIBLE
            and not _feeds(node, low)
            and not _merges(node, low)
        ):
            low.remove(node)
        elif node not in kept and _feeds_only(node, low):
            low.add(node)
    return low


def is_layer(node: ir.Node) -> bool:
    """Return whether a node is a convolution or a product with a constant."""
    return node.op_type in LAYERS and any(is_constant(value) for value in node.inputs[:2])


def layer_name(node: ir.Node) -> str:
    """Return a layer's name: its weight's, without what all weights begin and end with.

    It is the same at all levels, which share the weight.
    """
    for value in reversed(node.inputs[:2]):
        if is_constant(value):
            while value is not None and (made_by := value.producer()) is not None:
                value = made_by.inputs[0]
            return (
                (value.name or "" if value else "")
                .removeprefix("detector.model.")
                .removesuffix(".weight")
            )
    return node.name or ""


def is_vector_layer(node: ir.Node) -> bool:
    """Return whether a layer works on one position alone, as attention on pooled values does."""
    shape = node.outputs[0].shape
    return node.op_type == "Conv" and shape is not None and tuple(shape[2:]) == (1, 1)


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is a constant, be it moved around or stored in 8 bits."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return node.op_type in MOVING | {"DequantizeLinear"} and all(
        is_constant(read) for read in node.inputs if read is not None
    )


def typed_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Yield the inputs of a node that have the type of its arithmetic, with their positions.

    Indices, shapes and 8-bit numbers have another type.
    """
    assert node.graph is not None
    schema = onnx.defs.get_schema(node.op_type, node.graph.opset_imports[node.domain], node.domain)
    own = (schema.inputs if node.op_type == "QuantizeLinear" else schema.outputs)[0].type_str
    for i, value in enumerate(node.inputs):
        if value is not None and schema.inputs[min(i, len(schema.inputs) - 1)].type_str == own:
            yield i, value


def _feeds(node: ir.Node, nodes: Collection[ir.Node]) -> bool:
    """Return whether one of the nodes reads an output of this one."""
    return any(use.node in nodes for value in node.outputs for use in value.uses())


def _feeds_only(node: ir.Node, low: Collection[ir.Node]) -> bool:
    """Return whether a cast for nodes of low precision should go before this node.

    It should where the node restores 8-bit numbers, or moves one value, for these nodes alone.
    """
    uses = node.outputs[0].uses()
    moves = node.op_type in MOVING | {"DequantizeLinear"} and node.op_type != "Concat"
    return moves and not _interpolates(node) and bool(uses) and all(use.node in low for use in uses)


def _merges(node: ir.Node, low: Collection[ir.Node]) -> bool:
    """Return whether a sum joins several values of low precision, which would need a cast each."""
    return (
        node.op_type in POINTWISE
        and sum(value.producer() in low for _, value in typed_inputs(node)) > 1
    )


def _interpolates(node: ir.Node) -> bool:
    """Return whether a Resize computes means, instead of repeating values."""
    return node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest"


def _reads_float(node: ir.Node) -> bool:
    first = node.inputs[0] if node.inputs else None
    return first is not None and first.dtype == ir.DataType.FLOAT


def _joins(node: ir.Node, at_hand: Collection[ir.Value]) -> bool:
    """Return whether a node may compute on the values that are in half precision already."""
    if node.op_type not in FLEXIBLE | {"QuantizeLinear"} or _interpolates(node):
        return False
    if node.op_type in NORMS and node.attributes.get_int("stash_type", 1) != 1:
        return False
    reads = [value for _, value in typed_inputs(node)]
    fitting = [value in at_hand and not is_constant(value) for value in reads]
    if node.op_type in PRODUCTS:
        return any(fitting)
    return any(fitting) and all(
        fits or is_constant(value) for fits, value in zip(fitting, reads, strict=True)
    )


NUMPY_TYPES = {
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
SUFFIXES = {ir.DataType.FLOAT16: "_fp16", ir.DataType.BFLOAT16: "_bf16", ir.DataType.FLOAT: "_fp32"}

Reader = tuple[ir.Node, int]


def lower_nodes(graph: ir.Graph, low: Collection[ir.Node], data_type: ir.DataType) -> int:
    """Give nodes a half-precision type; all others keep theirs.

    Values keep their names, constants that only these nodes read are stored in half precision, and
    outputs of the graph stay float32.

    Args:
        graph: whose values have types.
        low: nodes of the graph that compute in float32.
        data_type: what they shall compute in.

    Returns:
        How many casts were put in.
    """
    outputs = low_outputs(graph, low)
    casts = sum(_widen_elsewhere(graph, value, low, data_type) for value in outputs)
    for value in outputs:
        value.type = ir.TensorType(data_type)
    reads: dict[ir.Value, list[Reader]] = {}
    for node in graph:
        for i, value in typed_inputs(node) if node in low else ():
            if value.dtype == ir.DataType.FLOAT:
                reads.setdefault(value, []).append((node, i))
    return casts + sum(
        _narrow(graph, value, readers, data_type) for value, readers in reads.items()
    )


def low_outputs(graph: ir.Graph, low: Collection[ir.Node]) -> list[ir.Value]:
    """Return the float32 outputs of these nodes, in the order of the graph."""
    return [
        value
        for node in graph
        if node in low
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT
    ]


def _widen_elsewhere(
    graph: ir.Graph, value: ir.Value, low: Collection[ir.Node], data_type: ir.DataType
) -> bool:
    """Let readers that are not low read a float32 copy of a value that becomes low.

    Returns whether that took a cast.
    """
    readers = [
        (use.node, use.idx)
        for use in value.uses()
        if use.node not in low and use.node.op_type not in ANY_TYPE
    ]
    if not readers and not value.is_graph_output():
        return False
    widened = _cast(graph, value, ir.DataType.FLOAT, readers)
    for i, output in enumerate(graph.outputs):
        if output is value:
            widened.name, value.name = value.name, f"{value.name}{SUFFIXES[data_type]}"
            graph.outputs[i] = widened
    return True


def _narrow(
    graph: ir.Graph, value: ir.Value, readers: Collection[Reader], data_type: ir.DataType
) -> bool:
    """Let these readers read a value in half precision: a constant is stored so, others are cast.

    Returns whether that took a cast.
    """
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


def _cast(
    graph: ir.Graph, value: ir.Value, to: ir.DataType, readers: Collection[Reader]
) -> ir.Value:
    """Return a copy of another type, which these readers then read."""
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


LowPrecision = Literal["fp16", "bf16"]
DATA_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
INT8_LEVELS = 127
BF16_OPSET = 22  # the first whose Conv and MaxPool take bf16


@dataclass(frozen=True)
class PrecisionReport:
    """What became of a graph.

    Attributes:
        precision: "fp16" or "bf16".
        lowered: names of the layers that compute in it, each once.
        nodes: how many nodes do, layers at all levels and what lies between.
        kept: layers that stay float32, and why.
        casts: how many casts were put in.
    """

    precision: LowPrecision
    lowered: tuple[str, ...]
    nodes: int
    kept: Mapping[str, str]
    casts: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return asdict(self) | {"lowered": list(self.lowered)}


def lower_precision(
    model: onnx.ModelProto,
    precision: LowPrecision,
    *,
    keep: Collection[str] | Mapping[str, str] = (),
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """Return the same graph with its convolutions and products with constants in half precision.

    Args:
        model: an exported graph, float32 or with Q/DQ pairs (then what is not 8-bit becomes half
            precision). Stays as it is.
        precision: "fp16" or "bf16"; the latter raises the graph's opset to 22.
        keep: patterns (as of file names) of what stays float32: names of layers, of nodes, of
            operators, or of values, which keep
            both who makes and who reads them. A mapping gives the reasons, for the report.

    Raises:
        ToodError: a pattern of `keep` fits nothing.
    """
    if precision == "bf16":
        model = onnx.version_converter.convert_version(model, max(BF16_OPSET, _opset(model)))
    lowered = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    data_type = DATA_TYPES[precision]
    wishes = keep if isinstance(keep, Mapping) else dict.fromkeys(keep, "asked for")
    _complete_types(lowered.graph)
    kept = _kept_nodes(lowered.graph, wishes, data_type)
    low = low_region(lowered.graph, kept)
    layers = dict.fromkeys(
        layer_name(node) for node in lowered.graph if node in low and is_layer(node)
    )
    reasons = {
        layer_name(node): reason
        for node, reason in kept.items()
        if node.op_type in LAYERS | {"DeformConv"}
    }
    casts = lower_nodes(lowered.graph, low, data_type)
    return ir.to_proto(lowered), PrecisionReport(precision, tuple(layers), len(low), reasons, casts)


def half_values(model: onnx.ModelProto, *, keep: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the values that `lower_precision` would put in half precision.

    Constants are left out.
    """
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph
    _complete_types(graph)
    low = low_region(graph, _kept_nodes(graph, dict.fromkeys(keep, ""), ir.DataType.FLOAT16))
    touched = [
        value
        for node in graph
        if node in low
        for value in (*(read for _, read in typed_inputs(node)), *node.outputs)
    ]
    return tuple(
        dict.fromkeys(
            value.name or ""
            for value in touched
            if value.dtype == ir.DataType.FLOAT and not is_constant(value)
        )
    )


def _complete_types(graph: ir.Graph) -> None:
    """Fill in types of values that shape inference leaves open: those of their inputs."""
    for node in graph:
        value = node.outputs[0] if node.outputs else None
        if value is not None and value.type is None:
            value.type = next(
                (read.type for _, read in typed_inputs(node) if read.type is not None), None
            )


def _opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)


def _kept_nodes(
    graph: ir.Graph, keep: Mapping[str, str], data_type: ir.DataType
) -> dict[ir.Node, str]:
    """Return the nodes that must not be lowered, and why."""
    check_patterns(graph, keep)
    kept: dict[ir.Node, str] = {}
    for node in graph:
        if fitting := _fitting(node, keep):
            kept[node] = f"{fitting[0]}: {keep[fitting[0]]}"
        elif node.op_type == "DeformConv":
            kept[node] = "its sampling positions have the type of its weights"
        elif is_layer(node) and is_vector_layer(node):
            kept[node] = "works on one position alone"
        elif not _constants_fit(node, data_type):
            kept[node] = "a weight is too large for it, or the scale of 8-bit numbers too small"
    return kept


def check_patterns(graph: ir.Graph, patterns: Collection[str]) -> None:
    """Refuse patterns of what stays float32 that fit nothing in a graph.

    Raises:
        ToodError: there are such patterns.
    """
    fitting = {pattern for node in graph for pattern in _fitting(node, patterns)}
    if unused := sorted(set(patterns) - fitting):
        raise ToodError(
            f"nothing in the graph is called {', '.join(unused)}; "
            "expected patterns of layers, nodes, operators or values"
        )


def _fitting(node: ir.Node, patterns: Collection[str]) -> list[str]:
    """Return the patterns that fit a node, its layer, its operator or one of its values."""
    if not patterns:
        return []
    names = _names(node)
    return [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]


def _names(node: ir.Node) -> list[str]:
    values = [
        value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name
    ]
    return [layer_name(node) if is_layer(node) else "", node.name or "", node.op_type, *values]


def _constants_fit(node: ir.Node, data_type: ir.DataType) -> bool:
    """Return whether half precision holds the weights of a layer, or the scale of a Q/DQ node."""
    limits = ml_dtypes.finfo(NUMPY_TYPES[data_type])
    if node.op_type in (
        "QuantizeLinear",
        "DequantizeLinear",
    ):  # at least as exact as what they scale
        return all(
            scale.min(initial=np.inf) >= INT8_LEVELS * float(limits.smallest_subnormal)
            for scale in _constants(node.inputs[1:2])
        )
    return not is_layer(node) or all(
        np.abs(constant).max(initial=0) <= float(limits.max) for constant in _constants(node.inputs)
    )


def _constants(values: Sequence[ir.Value | None]) -> list[NDArray[Any]]:
    return [
        value.const_value.numpy()
        for value in values
        if value is not None and value.const_value is not None
    ]


def emulate_low_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes what a graph of `lower_precision` does, by casts alone.

    It needs no operator in half precision but Cast.
    """
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


def _compute_in_float32(
    graph: ir.Graph, node: ir.Node, value: ir.Value, data_type: ir.DataType
) -> None:
    """Make a node's output float32, and rounded.

    Where the node only moves numbers, they are rounded already.
    """
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
