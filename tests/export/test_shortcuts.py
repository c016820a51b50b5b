"""The shortcuts through PyTorch's exporter: what the long way gives, and no trace of them after."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import rewriter
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter

from tood_deploy.export import shortcuts
from tood_deploy.export.graph import DeformForm
from tood_deploy.export.shortcuts import decompose, take_shortcuts
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS
from tood_deploy.model.detector import DenseDetector
from tood_deploy.parity.onnx_reference import OnnxRunner


class EveryOperator(nn.Module):
    """One of every operator that is exchanged, on a map of dynamic size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x.float()))
        kept = (y > 0) & (y < 1) | (y > 2)
        rows, columns = y.shape[2:]
        flat = (1 - y * kept).flatten(2).reshape(-1, 4, rows * columns)
        return flat + torch.arange(rows * columns).to(torch.float64).to(flat.dtype)


def export_small(module: nn.Module) -> onnx.ModelProto:
    rows, columns = (torch.export.Dim(name, min=1) for name in ("rows", "columns"))
    program = torch.onnx.export(
        module,
        (torch.rand(1, 3, 64, 96),),
        dynamo=True,
        dynamic_shapes=({2: 32 * rows, 3: 32 * columns},),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether every program was decomposed in the graph."""
    results: list[bool] = []

    def noting(*arguments: Any) -> bool:
        results.append(decompose(*arguments))
        return results[-1]

    monkeypatch.setattr(shortcuts, "decompose", noting)
    return results


class TestDecomposition:
    def test_every_exchanged_operator_computes_the_same(self, decomposed: list[bool]) -> None:
        module = EveryOperator().eval()
        nn.init.uniform_(module.norm.weight)
        nn.init.uniform_(module.norm.running_mean)  # type: ignore[arg-type]
        with take_shortcuts():
            graph = export_small(module)
        assert decomposed == [True]
        session = onnxruntime.InferenceSession(graph.SerializeToString())
        for size in ((64, 96), (32, 32), (160, 64)):
            x = torch.rand(1, 3, *size) * 4
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            np.testing.assert_allclose(
                np.asarray(found), module(x).detach().numpy(), rtol=1e-6, atol=1e-5
            )

    def test_sizes_are_read_off_the_inputs_alone(self) -> None:
        with take_shortcuts():
            graph = export_small(EveryOperator().eval())
        inputs = {value.name for value in graph.graph.input}
        assert all(node.input[0] in inputs for node in graph.graph.node if node.op_type == "Shape")

    def test_an_operator_that_is_not_known_goes_the_long_way(self, decomposed: list[bool]) -> None:
        class Writing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x + 1
                y.mul_(2)
                return y

        with take_shortcuts():
            graph = export_small(Writing().eval())
        assert decomposed == [False]
        (found,) = onnxruntime.InferenceSession(graph.SerializeToString()).run(
            None, {graph.graph.input[0].name: np.ones((1, 3, 32, 32), np.float32)}
        )
        assert (np.asarray(found) == 4).all()

    def test_nothing_of_it_stays(self) -> None:
        rules = rewriter._DEFAULT_REWRITE_RULES
        before = ExportedProgram.run_decompositions, Interpreter.run_node
        with take_shortcuts():
            assert ExportedProgram.run_decompositions is not before[0]
            assert all("try_rewrite" in vars(rule) for rule in rules)
        assert (ExportedProgram.run_decompositions, Interpreter.run_node) == before
        assert not any("try_rewrite" in vars(rule) for rule in rules)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deform", "fields"),
    [
        ("op", {}),
        ("op", {"depth": 50, "base_channels": 16, "deform_stages": (3,), "deform_tower": 1}),
        ("gather", {"depth": 50, "base_channels": 16, "deform_stages": (3,), "deform_tower": 1}),
    ],
)
def test_the_graph_computes_to_the_bit_what_that_of_the_long_way_does(
    deform: DeformForm,
    fields: dict[str, Any],
    seeded_model: Callable[..., DenseDetector],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded_model("tiny", tower_stages=2, **fields).eval()
    graphs = [onnx_from_model(model, deform=deform)]
    monkeypatch.setattr(shortcuts, "decompose", lambda *_: False)
    graphs.append(onnx_from_model(model, deform=deform))
    for graph in graphs:
        del graph.graph.output[len(OUTPUTS) :]
    quick, long = (OnnxRunner(graph) for graph in graphs)
    rng = np.random.default_rng(0)
    for batch, height, width in ((1, 64, 64), (2, 160, 128), (1, 32, 32)):
        images = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        inputs = images, np.array([[height - 7, width - 3]] * batch, np.int32), 0.05, 0.6
        pairs = list(zip(quick(*inputs), long(*inputs), strict=True))
        assert len(pairs) == len(OUTPUTS) + len(MAP_NAMES)
        assert all(np.array_equal(first, second) for first, second in pairs)
