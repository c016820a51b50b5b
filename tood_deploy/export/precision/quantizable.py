"""Which layers of an exported graph become 8-bit, and behind which values the Q/DQ pairs go. Knows no numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from tood_deploy.errors import ToodError
from tood_deploy.export.precision.low_region import layer_name

Reader = tuple[ir.Node, int]  # who reads a value: a node, and the position among its inputs
Pairs = dict[ir.Value, dict[Reader, None]]

CHANNEL_AXES = {"Conv": 0, "MatMul": -1}  # of the weight's output channels
# What gives scores, distances and offsets, where a cell moves by its error; and the attention, which works on one number a channel.
ALWAYS_FLOAT = ("*.tood_cls", "*.tood_reg", "*.cls_prob_module.last", "*.reg_offset_module.last", "*.conv_offset", "*.layer_attention.*")


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product with a constant.

    Attributes:
        name: of its weight, without what all weights begin and end with; the same at all levels, which share it.
        node: in the graph.
        weight: the constant.
    """

    name: str
    node: ir.Node
    weight: ir.Value

    @property
    def channel_axis(self) -> int:
        """The weight's axis of output channels."""
        assert self.weight.shape is not None
        return CHANNEL_AXES[self.node.op_type] % len(self.weight.shape)


def all_layers(graph: ir.Graph) -> list[Layer]:
    """Every layer that may become 8-bit, in the order of the graph."""
    layers = []
    for node in graph:
        weight = node.inputs[1] if node.op_type in CHANNEL_AXES else None
        if weight is not None and weight.is_initializer() and not _fits(name := layer_name(node), ALWAYS_FLOAT):
            layers.append(Layer(name, node, weight))
    return layers


def choose_layers(graph: ir.Graph, keep: Collection[str]) -> list[Layer]:
    """The layers that become 8-bit: all but those that `keep` names.

    Raises:
        ToodError: a pattern of `keep` fits no layer.
    """
    layers = all_layers(graph)
    names = list(dict.fromkeys(layer.name for layer in layers))
    if strangers := [pattern for pattern in keep if not any(fnmatchcase(name, pattern) for name in names)]:
        raise ToodError(f"no 8-bit layer is called {', '.join(strangers)}; expected patterns of {', '.join(names)}")
    return [layer for layer in layers if not _fits(layer.name, keep)]


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def place_pairs(layers: Collection[Layer], everywhere: bool) -> Pairs:
    """The values that get a Q/DQ pair, each with those who read from behind it.

    One pair serves all readers of a value. It stands before a pooling or an enlargement, not behind, so that these work on 8 bits, too.
    Of a sum, TensorRT fuses one side, the output of a convolution, which then has no pair, and reads the other in 8 bits.

    Args:
        layers: that become 8-bit.
        everywhere: also behind every layer: ONNX Runtime computes in 8 bits only between two pairs, OpenVINO fuses sums only between
            two, and what comes between layers, as normalisation does, then moves a quarter of the bytes.
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
    """The value whose pair gives this reader 8-bit numbers, and who must read from behind that pair."""
    value = reader[0].inputs[reader[1]]
    assert value is not None
    made_by = value.producer()
    return _origin((made_by, 0)) if made_by is not None and _is_transparent(made_by) else (value, reader)


def _is_transparent(node: ir.Node) -> bool:
    """Whether its output holds numbers of its input, unchanged."""
    return node.op_type == "MaxPool" or (node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "nearest")


def _summands(layers: Collection[Layer]) -> Iterator[tuple[Reader, bool]]:
    """The sides of sums beside the output of a layer that nobody else reads, and whether they are such outputs before a ReLU, too."""
    own = dict.fromkeys(layer.node for layer in layers if len(layer.node.outputs[0].uses()) == 1)  # in order: the same graph every time
    sums = dict.fromkeys(use.node for node in own for use in node.outputs[0].uses() if use.node.op_type == "Add")
    for node in sums:
        fused = [i for i, value in enumerate(node.inputs) if value is not None and value.producer() in own]
        rectified = [use.node.op_type for use in node.outputs[0].uses()] == ["Relu"]
        yield (node, 1 if 0 in fused else 0), len(fused) == 2 and rectified


def _activated(layer: Layer) -> ir.Value:
    """What a layer gives, behind its ReLU where that follows at once."""
    value = layer.node.outputs[0]
    readers = [use.node for use in value.uses()]
    return readers[0].outputs[0] if [node.op_type for node in readers] == ["Relu"] else value


def _readers(value: ir.Value, layers: Collection[ir.Node]) -> dict[Reader, None]:
    """All that read a value but layers that stay float32."""
    return {(use.node, use.idx): None for use in value.uses() if use.node in layers or use.node.op_type not in CHANNEL_AXES}
