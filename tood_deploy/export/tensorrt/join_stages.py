"""Let one product a level read the stages of the head's tower, as suits a GPU.

Comes in: an artefact in float32, fp16 or bf16. Its graph has a form made for CPUs: a 1x1
convolution with a constant kernel for every stage, task and alignment, 24 a level, whose results
are weighed and summed. Goes out: the same with all stages of a level side by side, multiplied once
with one matrix for each image, whose columns are the kernels, times the image's weights. The two
tasks' weights come of one attention. A graph without such sums, as of other heads or with 8-bit
layers, stays as it is. Knows no runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tood_deploy.onnx_file import OnnxArtefact

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
PREFIX = "joined_"  # of constants that come in
PASSING = ("Cast", "Flatten", "Reshape", "Unsqueeze")  # their outputs are values of their inputs


@dataclass(frozen=True, eq=False)
class Part:
    """One summand: a 1x1 convolution of a stage, weighed for each image or not.

    Attributes:
        stage: what it reads, (B, C, H, W).
        kernel: (R, C, 1, 1).
        bias: (R,); None where there is none.
        weights: (B, S, 1, 1) of all stages; None where it is not weighed.
        position: of its own weight among these.
    """

    stage: ir.Value
    kernel: ir.Value
    bias: ir.Value | None
    weights: ir.Value | None = None
    position: int = 0


@dataclass(frozen=True, eq=False)
class StageSum:
    """A sum over the convolved stages of a level.

    Attributes:
        result: (B, R, H, W).
        parts: one for each stage, in order.
    """

    result: ir.Value
    parts: tuple[Part, ...]

    @property
    def stages(self) -> tuple[ir.Value, ...]:
        """Return the stages, in order."""
        return tuple(part.stage for part in self.parts)

    @property
    def inputs(self) -> int:
        """Return how many channels all stages have together, S*C."""
        return len(self.parts) * int(self.kernels().shape[2])

    @property
    def weights(self) -> ir.Value | None:
        """Return what all parts are weighed with; None where they are not."""
        return self.parts[0].weights

    def kernels(self) -> NDArray[np.generic]:
        """Return the kernels of all stages, (R, S, C)."""
        return np.stack([_constant(part.kernel)[:, :, 0, 0] for part in self.parts], axis=1)

    def bias(self) -> NDArray[np.generic] | None:
        """Return the sum of all biases, (1, R, 1, 1)."""
        biases = [_constant(part.bias) for part in self.parts if part.bias is not None]
        return np.sum(biases, axis=0)[None, :, None, None] if biases else None


def join_stages(artefact: OnnxArtefact) -> OnnxArtefact:
    """Return the artefact with one product a level, in memory; its manifest says for how many.

    Its file stays as it is.
    """
    model = ir.from_proto(artefact.model)
    levels: dict[tuple[ir.Value, ...], list[StageSum]] = {}
    for one in _stage_sums(model.graph):
        levels.setdefault(one.stages, []).append(one)
    joined = {stages: sums for stages, sums in levels.items() if _has_tasks(sums)}
    if not joined:
        return artefact
    for number, (stages, sums) in enumerate(joined.items()):
        _join_level(model.graph, stages, sums, f"{PREFIX}{number}_")
    model.graph.sort()
    RemoveUnusedNodesPass()(model)
    build = artefact.manifest.build
    build = replace(build, details={**build.details, "joined_levels": len(joined)})
    manifest = replace(artefact.manifest, build=build)
    return replace(artefact, model=ir.to_proto(model), manifest=manifest)


def _has_tasks(sums: Sequence[StageSum]) -> bool:
    """Return whether some sums are weighed, and all of these of one width.

    Others alone would be a plain convolution.
    """
    return len({one.kernels().shape for one in sums if one.weights is not None}) == 1


def _stage_sums(graph: ir.Graph) -> Iterator[StageSum]:
    """Yield every sum whose summands are convolved stages, all of them weighed or none."""
    for node in graph:
        if node.op_type == "Add" and not _feeds_an_addition(node):
            parts = [_part(value) for value in _summands(node.outputs[0])]
            known = tuple(part for part in parts if part is not None)
            if len(known) == len(parts) > 1 and _are_alike(known):
                yield StageSum(node.outputs[0], known)


def _feeds_an_addition(node: ir.Node) -> bool:
    uses = node.outputs[0].uses()
    return len(uses) == 1 and next(iter(uses)).node.op_type == "Add"


def _summands(value: ir.Value) -> list[ir.Value]:
    """Return what a chain of additions sums up, from the left; additions used elsewhere are one."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return [value]
    first, second = node.inputs
    assert first is not None
    assert second is not None
    return [*(_summands(first) if len(first.uses()) == 1 else [first]), second]


def _part(value: ir.Value) -> Part | None:
    """Return what a summand is; None where it is something else."""
    node = value.producer()
    if node is None or len(value.uses()) != 1:
        return None
    if node.op_type == "Conv":
        return _convolution(node)
    if node.op_type != "Mul":
        return None
    convolved, weight = node.inputs
    maker = None if weight is None else weight.producer()
    conv = None if convolved is None else convolved.producer()
    if maker is None or conv is None or (maker.op_type, conv.op_type) != ("Slice", "Conv"):
        return None
    part, (start, end, axis) = _convolution(conv), _slice(maker)
    if part is None or len(conv.outputs[0].uses()) != 1 or (end - start, axis) != (1, 1):
        return None
    return replace(part, weights=maker.inputs[0], position=start)


def _convolution(node: ir.Node) -> Part | None:
    """Return a 1x1 convolution with a constant kernel, in a type that a product takes."""
    stage, kernel, *bias = node.inputs
    if stage is None or kernel is None or kernel.const_value is None:
        return None
    is_plain = (
        node.attributes.get_int("group", 1) == 1
        and set(node.attributes.get_ints("strides", [1])) == {1}
        and set(node.attributes.get_ints("pads", [0])) == {0}
    )
    if not is_plain or kernel.dtype not in FLOATS or tuple(kernel.const_value.shape[2:]) != (1, 1):
        return None
    return Part(stage, kernel, bias[0] if bias else None)


def _slice(node: ir.Node) -> tuple[int, int, int]:
    """Return start, end and axis of a Slice of constants; zeros where they are none."""
    constants = [value and ir.convenience.get_const_tensor(value) for value in node.inputs[1:4]]
    if len(constants) < 3 or any(value is None or value.size != 1 for value in constants):
        return 0, 0, 0
    start, end, axis = (int(value.numpy().reshape(-1)[0]) for value in constants if value)
    return start, end, axis


def _are_alike(parts: Sequence[Part]) -> bool:
    """Return whether parts can be rows of one product: of all stages, in order."""
    if len({part.weights for part in parts}) > 1 or len({part.stage for part in parts}) < len(
        parts
    ):
        return False
    in_order = [part.position for part in parts] == list(range(len(parts)))
    return in_order if parts[0].weights is not None else True


def _constant(value: ir.Value) -> NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _join_level(
    graph: ir.Graph, stages: Sequence[ir.Value], sums: Sequence[StageSum], prefix: str
) -> None:
    """Put the product in the place of the sums of one level.

    Args:
        graph: that holds them; its nodes are out of order afterwards.
        stages: S of them, (B, C, H, W).
        sums: that read them.
        prefix: of the names of constants.
    """
    maker = Maker(graph, prefix)
    joined = maker.op("Concat", list(stages), axis=1)
    pooled = _join_means(maker, stages, joined)
    tasks = [one for one in sums if one.weights is not None]
    others = [one for one in sums if one.weights is None]
    columns = [_weighed(maker, tasks, pooled), *(_for_all_images(maker, one) for one in others)]
    matrix = maker.op("Concat", columns, axis=2) if others else columns[0]
    # Channels last: so convolutions of a GPU read and write their maps.
    rows_last = maker.op("Transpose", [joined], perm=[0, 2, 3, 1])
    flat = maker.op("Reshape", [rows_last, maker.whole_numbers(0, -1, sums[0].inputs)])
    product = maker.op("MatMul", [flat, matrix])
    widths = [one.kernels().shape[0] for one in (*tasks, *others)]
    size = maker.op("Shape", [joined], start=2, end=4)
    ends = maker.whole_numbers(0), maker.whole_numbers(sum(widths))
    shape = maker.op("Concat", [ends[0], size, ends[1]], axis=0)
    maps = maker.op("Transpose", [maker.op("Reshape", [product, shape])], perm=[0, 3, 1, 2])
    for one, part in zip((*tasks, *others), maker.split(maps, widths), strict=True):
        bias = one.bias()
        result = part if bias is None else maker.op("Add", [part, maker.constant(bias)])
        result.type, result.shape = one.result.type, one.result.shape
        one.result.replace_all_uses_with(result)
    maker.finish()


def _weighed(maker: Maker, tasks: Sequence[StageSum], pooled: ir.Value | None) -> ir.Value:
    """Return the columns of the tasks in the matrix, (B, S*C, T*R): kernels times weights.

    Args:
        maker: of the nodes.
        tasks: T sums.
        pooled: the mean of all stages, (B, S*C, 1, 1), if the graph has it.
    """
    kernels = np.stack([one.kernels() for one in tasks], axis=0)
    count, rows, stages, channels = kernels.shape
    weights = None if pooled is None else _joint_attention(maker, tasks, pooled)
    if weights is None:
        weights = maker.op("Concat", [one.weights for one in tasks], axis=3)
        weights = maker.op("Unsqueeze", [weights, maker.whole_numbers(4)])
    values = kernels.transpose(2, 3, 0, 1)[None]  # (1, S, C, T, R)
    scaled = maker.op("Mul", [maker.constant(values), weights])
    return maker.op("Reshape", [scaled, maker.whole_numbers(0, stages * channels, count * rows)])


def _for_all_images(maker: Maker, one: StageSum) -> ir.Value:
    """Return the columns of a sum that no image weighs, (B, S*C, R)."""
    kernels = one.kernels().transpose(1, 2, 0)[None]
    flat = maker.constant(kernels.reshape(1, one.inputs, -1))
    batch = maker.op("Shape", [one.parts[0].stage], start=0, end=1)
    return maker.op(
        "Expand", [flat, maker.op("Concat", [batch, maker.whole_numbers(1, 1)], axis=0)]
    )


def _attention(weights: ir.Value | None, pooled: ir.Value) -> tuple[Part, Part] | None:
    """Return the two convolutions that a task's weights come of; None where they come otherwise.

    A ReLU stands between them, a sigmoid behind them.
    """
    path: list[ir.Node] = []
    value = weights
    while value is not None and value is not pooled and (node := value.producer()) is not None:
        path.append(node)
        value = node.inputs[0]
    order = [node.op_type for node in reversed(path) if node.op_type not in PASSING]
    if value is not pooled or order != ["Conv", "Relu", "Conv", "Sigmoid"]:
        return None
    last, first = (_convolution(node) for node in path if node.op_type == "Conv")
    return None if first is None or last is None else (first, last)


def _joint_attention(maker: Maker, tasks: Sequence[StageSum], pooled: ir.Value) -> ir.Value | None:
    """Return the weights of all tasks as of one attention, (B, S, 1, T, 1).

    None where the tasks have none, or such as do not fit together.

    Args:
        maker: of the nodes.
        tasks: T sums over S stages.
        pooled: the mean of all stages.
    """
    known = [one for task in tasks if (one := _attention(task.weights, pooled))]
    if len(known) < len(tasks) or len({_constant(last.kernel).shape for _, last in known}) > 1:
        return None
    count, stages = len(tasks), len(tasks[0].parts)
    hidden = maker.conv(pooled, [first for first, _ in known], group=1)
    hidden = maker.op("Relu", [hidden])
    weights = maker.op("Sigmoid", [maker.conv(hidden, [last for _, last in known], group=count)])
    if (low := tasks[0].parts[0].kernel.dtype) not in (None, known[0][1].kernel.dtype):
        weights = maker.op("Cast", [weights], to=low)
    by_task = maker.op("Reshape", [weights, maker.whole_numbers(0, count, stages)])
    by_stage = maker.op("Transpose", [by_task], perm=[0, 2, 1])
    return maker.op("Unsqueeze", [by_stage, maker.whole_numbers(2, 4)])


def _join_means(maker: Maker, stages: Sequence[ir.Value], joined: ir.Value) -> ir.Value | None:
    """Put one mean of all stages in the place of a mean of each, side by side, and return it.

    None where the graph has no such means.

    Args:
        maker: of the nodes.
        stages: S of them, (B, C, H, W).
        joined: all of them side by side.
    """
    for node in list(maker.graph):
        means = [value.producer() if value else None for value in node.inputs]
        if node.op_type != "Concat" or node.attributes.get_int("axis", 0) != 1:
            continue
        if [_averaged(mean) for mean in means] != list(stages):
            continue
        first = means[0]
        assert first is not None
        assert first.inputs[0] is not None
        read = joined
        if first.inputs[0] is not stages[0]:
            read = maker.op("Cast", [joined], to=ir.DataType.FLOAT)
        mean = maker.op("ReduceMean", [read, first.inputs[1]], keepdims=1)
        mean.type, mean.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(mean)
        return mean
    return None


def _averaged(node: ir.Node | None) -> ir.Value | None:
    """Return the map that a node averages over rows and columns, be it widened before."""
    if node is None or node.op_type != "ReduceMean" or node.inputs[0] is None:
        return None
    made_by = node.inputs[0].producer()
    widens = made_by is not None and made_by.op_type == "Cast"
    return made_by.inputs[0] if widens and made_by is not None else node.inputs[0]


class Maker:
    """Makes nodes and constants, which `finish` puts into a graph."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        """Begin with nothing; names of constants get the prefix."""
        self.graph = graph
        self._prefix = prefix
        self._tape = tape.Tape()
        self._constants: list[ir.Value] = []

    def op(
        self, name: str, inputs: Sequence[ir.Value | None], **attributes: int | Sequence[int]
    ) -> ir.Value:
        """Return the output of a new node.

        Args:
            name: of the operator.
            inputs: that it reads.
            **attributes: of the node.
        """
        return self._tape.op(name, inputs, attributes)

    def conv(self, value: ir.Value, parts: Sequence[Part], *, group: int) -> ir.Value:
        """Return a 1x1 convolution of a value with the kernels of several, one below the other.

        Args:
            value: (B, C, H, W).
            parts: whose kernels and biases it has.
            group: into so many groups of channels the value is cut, 1 or one for each part.
        """
        kernels = [_constant(part.kernel) for part in parts]
        inputs = [value, self.constant(np.concatenate(kernels))]
        if any(part.bias is not None for part in parts):
            none = np.zeros(len(kernels[0]), kernels[0].dtype)
            biases = [none if part.bias is None else _constant(part.bias) for part in parts]
            inputs.append(self.constant(np.concatenate(biases)))
        return self.op("Conv", inputs, group=group)

    def split(self, value: ir.Value, rows: Sequence[int]) -> Sequence[ir.Value]:
        """Return the parts of a value along its second axis, of so many rows each."""
        inputs = [value, self.whole_numbers(*rows)]
        return self._tape.op_multi_out("Split", inputs, {"axis": 1}, num_outputs=len(rows))

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """Return a constant of the graph."""
        value = ir.Value(name=f"{self._prefix}{len(self._constants)}")
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(array.shape)
        self._constants.append(value)
        return value

    def whole_numbers(self, *numbers: int) -> ir.Value:
        """Return a constant of whole numbers."""
        return self.constant(np.array(numbers, np.int64))

    def finish(self) -> None:
        """Put all of it into the graph, the nodes at its end."""
        for value in self._constants:
            self.graph.register_initializer(value)
        self.graph.extend(self._tape.nodes)
