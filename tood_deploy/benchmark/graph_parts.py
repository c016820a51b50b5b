"""Cuts one part out of an ONNX graph: from given inner values to wanted ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx


def cut_graph(model: onnx.ModelProto, given: Sequence[str], wanted: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that computes `wanted`, with `given` as its inputs.

    What the part needs beyond these stays an input where it is one of the whole graph (sizes are taken from `images`).

    Args:
        model: a model whose inner values have types that shape inference can tell.
        given: inner values that become inputs, as far as they are needed.
        wanted: values that become the outputs.
    """
    graph = model.graph
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reached, needed, pending = set[str](), set[int](), list(wanted)
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        if name in makers and name not in given and makers[name] not in needed:
            needed.add(makers[name])
            pending += _reads(graph.node[makers[name]])
    inputs = [_typed(model, name) for name in given if name in reached] + [value for value in graph.input if value.name in reached]
    part = onnx.helper.make_graph(
        [node for i, node in enumerate(graph.node) if i in needed],
        graph.name,
        inputs,
        [onnx.ValueInfoProto(name=name) for name in wanted],
        [tensor for tensor in graph.initializer if tensor.name in reached],
    )
    return onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """All values a node reads, those that its inner graphs take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _reads(inner)
            yield from (value.name for value in attribute.g.output)


def _typed(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """A value's type, without its shape, which is dynamic."""
    value = next(value for value in model.graph.value_info if value.name == name)
    return onnx.helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, None)
