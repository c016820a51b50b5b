"""Small changes to ONNX graphs, to break them on purpose or to look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those inside loops and branches included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def edit_weight(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Changes an initializer."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node that gives a value."""
    return next(node for node in model.graph.node if name in node.output)
