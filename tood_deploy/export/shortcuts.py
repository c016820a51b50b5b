"""Shortcuts through PyTorch's exporter: the same graph in a third of the time.

`ExportedProgram.run_decompositions` traces a program twice more to break up a handful of operators,
and reasons about every shape again. Nothing in our graph writes in place, so these few can be
exchanged one by one. Likewise the search for types to promote need not compute every value again,
and the optimiser need not try a rule on a node that the rule cannot be about. Programs that hold
any other operator go PyTorch's own way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import sympy
import torch
from onnxscript import rewriter
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._sympy.functions import FloorDiv

aten: Any = torch.ops.aten
RENAMED = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.reshape.default: aten.view.default,
}
EXCHANGED = {
    *RENAMED,
    aten.rsub.Scalar,
    aten.to.dtype,
    aten.batch_norm.default,
    aten.flatten.using_ints,
    aten.sym_size.int,
}
# Operators that PyTorch has no kernel of, which the exporter can write all the same, or takes out.
WRITTEN = {
    aten.chunk.default,
    aten.contiguous.default,
    aten.conv2d.default,
    aten.group_norm.default,
    aten.matmul.default,
    aten.max_pool2d.default,
    aten.pad.default,
    aten.repeat_interleave.self_int,
    aten.softmax.int,
    aten.upsample_nearest2d.vec,
    aten.where.ScalarOther,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
}
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@contextmanager
def take_shortcuts() -> Iterator[None]:
    """Let the exporter take the shortcuts inside the block."""
    with _quick_decompositions(), _quick_rewriting():
        yield


@contextmanager
def _quick_rewriting() -> Iterator[None]:
    """Let every rule of the optimiser be tried on nodes of its own operator alone.

    A rule compares its last operator with a node's; but rules that end in several nodes gather all
    nodes of the graph before, for every node.
    """
    with ExitStack() as stack:
        for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()):
            stack.enter_context(_on_own_operator(rule))
        yield


@contextmanager
def _on_own_operator(rule: Any) -> Iterator[None]:
    operator_of_rule = rule._target_pattern.output_nodes[0].op_identifier()
    apply = rule.try_rewrite

    def try_rewrite(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if operator_of_rule not in (None, node.op_identifier()):
            return None
        return apply(model, graph, node, **options)

    rule.try_rewrite = try_rewrite
    try:
        yield
    finally:
        del rule.try_rewrite


@contextmanager
def _quick_decompositions() -> Iterator[None]:
    """Let `decompose` take programs apart inside the block, where it knows every operator."""
    slow = ExportedProgram.run_decompositions
    with ExitStack() as stack:

        def quick(
            program: ExportedProgram, decomp_table: Mapping[Any, Callable[..., Any]]
        ) -> ExportedProgram:
            if not decompose(program, decomp_table):
                return slow(program, dict(decomp_table))
            stack.enter_context(_known_values(program))
            return program

        stack.callback(setattr, ExportedProgram, "run_decompositions", slow)
        ExportedProgram.run_decompositions = quick  # pyright: ignore[reportAttributeAccessIssue]
        yield


@contextmanager
def _known_values(program: ExportedProgram) -> Iterator[None]:
    """Let a program that is looked through, for types to promote, be computed where it changed."""
    compute = Interpreter.run_node
    nodes = (
        node
        for module in _graph_modules(program)
        for node in module.graph.nodes
        if node.op == "call_function" and "val" in node.meta
    )
    traced = {node: (node.target, node.args, node.kwargs) for node in nodes}

    def look_up(interpreter: Interpreter, n: Node) -> Any:
        return (
            n.meta["val"]
            if traced.get(n) == (n.target, n.args, n.kwargs)
            else compute(interpreter, n)
        )

    Interpreter.run_node = look_up  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Interpreter.run_node = compute


def decompose(program: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> bool:
    """Exchange, in place, the operators that cannot be written as ONNX.

    Returns False, and changes nothing, where there is an operator that it does not know.

    Args:
        program: a traced network of which nothing writes in place.
        table: PyTorch's decompositions of all operators that the exporter cannot write.
    """
    modules = _graph_modules(program)
    if not all(_is_known(node, table) for module in modules for node in module.graph.nodes):
        return False
    for module in modules:
        sizes = Sizes(module.graph)
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in EXCHANGED:
                _exchange(node, sizes)
        module.graph.eliminate_dead_code()
        module.recompile()
    return True


def _graph_modules(program: ExportedProgram) -> list[GraphModule]:
    return [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]


def _is_known(node: Node, table: Mapping[Any, Callable[..., Any]]) -> bool:
    target: Any = node.target
    if not (isinstance(target, torch._ops.OpOverload) and node.users):
        return True
    if target in EXCHANGED or target in WRITTEN:
        return True
    return not (
        target in table
        or target._schema.is_mutable
        or target.has_kernel_for_dispatch_key(COMPOSITE)
    )


class Sizes:
    """Sizes of a graph's maps as arithmetic on the sizes of its inputs, each worked out once.

    Read off a map in the middle, a size would be one more reader of that map, and stand in the way
    of fusing what makes it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[sympy.Basic, Node] = {}
        self.symbols: dict[sympy.Basic, tuple[Node, int, int]] = {}
        self.last_input = graph.find_nodes(op="placeholder")[-1]
        for node in graph.find_nodes(op="placeholder"):
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, torch.SymInt):
                    expression: Any = size.node.expr
                    factor, symbol = expression.as_coeff_Mul()
                    self.symbols.setdefault(symbol, (node, axis, int(factor)))

    def node_of(self, size: torch.SymInt | int) -> Node | int:
        """Return the node that gives a size."""
        return self._node(size.node.expr) if isinstance(size, torch.SymInt) else size

    def _node(self, expression: sympy.Basic) -> Node | int:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if expression not in self.known:
            self.known[expression] = self._new_node(expression)
        return self.known[expression]

    def _new_node(self, expression: sympy.Basic) -> Node:
        if expression in self.symbols:
            tensor, axis, factor = self.symbols[expression]
            size = self._call(aten.sym_size.int, tensor, axis)
            return size if factor == 1 else self._call(operator.floordiv, size, factor)
        function = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}[
            expression.func
        ]
        first, *others = (self._node(argument) for argument in expression.args)
        for other in others:
            first = self._call(function, first, other)
        assert isinstance(first, Node)
        return first

    def _call(self, function: Callable[..., Any], *arguments: Node | int) -> Node:
        """Add a node behind the inputs and the nodes added before."""
        with self.graph.inserting_after(self.last_input):
            node = self.graph.call_function(function, arguments)
        self.last_input = node
        sizes: list[Any] = [
            argument.meta["val"] if isinstance(argument, Node) else argument
            for argument in arguments
        ]
        node.meta["val"] = (
            sizes[0].shape[sizes[1]] if function is aten.sym_size.int else function(*sizes)
        )
        return node


def _exchange(node: Node, sizes: Sizes) -> None:
    """Put what the exporter can write in the place of one operator."""
    target: Any = node.target
    args: Any = node.args
    if target in RENAMED:
        node.target = RENAMED[target]
    elif target is aten.rsub.Scalar:
        node.target, node.args = aten.sub.Tensor, (args[1], args[0], *args[2:])
    elif target is aten.to.dtype:
        if args[0].meta["val"].dtype == args[1]:
            node.replace_all_uses_with(args[0])
        else:
            node.target, node.args, node.kwargs = (
                aten._to_copy.default,
                args[:1],
                {"dtype": args[1]},
            )
    elif target is aten.batch_norm.default:
        _exchange_batch_norm(node)
    elif target is aten.flatten.using_ints:
        _exchange_flatten(node, sizes)
    elif isinstance(node.meta["val"], torch.SymInt) and args[0].op != "placeholder":
        replacement = sizes.node_of(node.meta["val"])
        assert isinstance(replacement, Node)
        node.replace_all_uses_with(replacement)


def _exchange_batch_norm(node: Node) -> None:
    """Exchange a batch norm that is not training."""
    x, weight, bias, mean, variance, training, momentum, eps, _ = node.args
    assert not training
    with node.graph.inserting_before(node):
        norm = node.graph.call_function(
            aten._native_batch_norm_legit_no_training.default,
            (x, weight, bias, mean, variance, momentum, eps),
        )
        first = node.graph.call_function(operator.getitem, (norm, 0))
    empty = node.meta["val"].new_empty(0)
    norm.meta, first.meta = node.meta | {"val": (node.meta["val"], empty, empty)}, node.meta
    node.replace_all_uses_with(first)


def _exchange_flatten(node: Node, sizes: Sizes) -> None:
    """Exchange a flattening of the last axes for a view; the others tell its last size."""
    x, start = node.args[:2]
    assert isinstance(start, int)
    kept, last = node.meta["val"].shape[:start], node.meta["val"].shape[start]
    assert len(node.meta["val"].shape) == start + 1
    last = last if isinstance(last, int) else -1
    node.target, node.args = aten.view.default, (x, [*map(sizes.node_of, kept), last])
