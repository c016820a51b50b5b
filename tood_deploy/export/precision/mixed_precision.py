"""Half precision written into an ONNX graph: float32 in, a strongly typed mixture out. Knows no runtime.

Layers and what lies between them (`low_region`) compute in fp16 or bf16, on weights stored so; casts stand where precisions meet. The
general converters do not fit: that of ONNX Runtime knows no bf16 and sends values between two float32 nodes through fp16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.errors import ToodError
from tood_deploy.export.precision.casts import NUMPY_TYPES, lower_nodes
from tood_deploy.export.precision.low_region import LAYERS, is_constant, is_layer, is_vector_layer, layer_name, low_region, typed_inputs

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
        """Plain values for the manifest."""
        return asdict(self) | {"lowered": list(self.lowered)}


def lower_precision(
    model: onnx.ModelProto, precision: LowPrecision, *, keep: Collection[str] | Mapping[str, str] = ()
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """The same graph with its convolutions and products with constants in half precision.

    Args:
        model: an exported graph, float32 or with Q/DQ pairs (then what is not 8-bit becomes half precision). Stays as it is.
        precision: "fp16" or "bf16"; the latter raises the graph's opset to 22.
        keep: patterns (as of file names) of what stays float32: names of layers, of nodes, of operators, or of values, which keep
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
    layers = dict.fromkeys(layer_name(node) for node in lowered.graph if node in low and is_layer(node))
    reasons = {layer_name(node): reason for node, reason in kept.items() if node.op_type in LAYERS | {"DeformConv"}}
    casts = lower_nodes(lowered.graph, low, data_type)
    return ir.to_proto(lowered), PrecisionReport(precision, tuple(layers), len(low), reasons, casts)


def half_values(model: onnx.ModelProto, *, keep: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the values that `lower_precision` would make or read in half precision, constants apart."""
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph
    _complete_types(graph)
    low = low_region(graph, _kept_nodes(graph, dict.fromkeys(keep, ""), ir.DataType.FLOAT16))
    touched = [value for node in graph if node in low for value in (*(read for _, read in typed_inputs(node)), *node.outputs)]
    return tuple(dict.fromkeys(value.name or "" for value in touched if value.dtype == ir.DataType.FLOAT and not is_constant(value)))


def _complete_types(graph: ir.Graph) -> None:
    """Types of values that shape inference leaves open: those of what they are made of."""
    for node in graph:
        value = node.outputs[0] if node.outputs else None
        if value is not None and value.type is None:
            value.type = next((read.type for _, read in typed_inputs(node) if read.type is not None), None)


def _opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)


def _kept_nodes(graph: ir.Graph, keep: Mapping[str, str], data_type: ir.DataType) -> dict[ir.Node, str]:
    """The nodes that must not be lowered, and why."""
    kept: dict[ir.Node, str] = {}
    unused = set(keep)
    for node in graph:
        names = _names(node)
        fitting = [pattern for pattern in keep if any(fnmatchcase(name, pattern) for name in names)]
        unused.difference_update(fitting)
        if fitting:
            kept[node] = f"{fitting[0]}: {keep[fitting[0]]}"
        elif node.op_type == "DeformConv":
            kept[node] = "its sampling positions have the type of its weights"
        elif is_layer(node) and is_vector_layer(node):
            kept[node] = "works on one position alone"
        elif not _constants_fit(node, data_type):
            kept[node] = "a weight is too large for it, or the scale of 8-bit numbers too small"
    if unused:
        raise ToodError(
            f"nothing in the graph is called {', '.join(sorted(unused))}; expected patterns of layers, nodes, operators or values"
        )
    return kept


def _names(node: ir.Node) -> list[str]:
    values = [value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    return [layer_name(node) if is_layer(node) else "", node.name or "", node.op_type, *values]


def _constants_fit(node: ir.Node, data_type: ir.DataType) -> bool:
    """Whether half precision holds the weights of a layer, or the scale of a Q/DQ node."""
    limits = ml_dtypes.finfo(NUMPY_TYPES[data_type])
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):  # at least as exact as what they scale
        return all(scale.min(initial=np.inf) >= INT8_LEVELS * float(limits.smallest_subnormal) for scale in _constants(node.inputs[1:2]))
    return not is_layer(node) or all(np.abs(constant).max(initial=0) <= float(limits.max) for constant in _constants(node.inputs))


def _constants(values: Sequence[ir.Value | None]) -> list[NDArray[Any]]:
    return [value.const_value.numpy() for value in values if value is not None and value.const_value is not None]
