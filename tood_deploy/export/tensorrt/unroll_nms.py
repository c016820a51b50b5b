"""Replace the loops of suppression in an exported graph, so that TensorRT can use CUDA graphs.

Comes in: an artefact in whatever precision, with thresholds for each image too: boxes and scores
are float32 in all of them. Goes out: the same with a fixed number of rounds, on masks in float16,
which holds 0, 1 and their counts exactly. An image for which these are too few gets -1 as its count
and no detections. A graph for engines that are run here gives the candidates as well, of which the
host then finds such an image's detections. Knows no runtime.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import onnx
import onnx_ir as ir
import torch
from onnx_ir.analysis import analyze_implicit_usage
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from tood_deploy.errors import ArtefactError
from tood_deploy.export.to_onnx import OPSET, quiet_exporter
from tood_deploy.graph_io import CANDIDATES
from tood_deploy.model.nms import best_for, nms_unrolled
from tood_deploy.onnx_file import OnnxArtefact

PREFIX = "unrolled_"  # of all values and nodes that come in
BOXES, SCORES, LABELS = (ir.DataType.FLOAT, 3), (ir.DataType.FLOAT, 2), (ir.DataType.INT64, 2)


@dataclass(frozen=True, eq=False)
class Suppression:
    """Suppression as it stands in a graph.

    Attributes:
        loop: the outer Loop; it gives its counter, the positions kept, and how many these are.
        reads: boxes (B, N, 4), scores (B, N) and labels (B, N) of the candidates, and the threshold
            of their overlap.
        count: N.
    """

    loop: ir.Node
    reads: tuple[ir.Value, ir.Value, ir.Value, ir.Value]
    count: int


def unroll_nms(artefact: OnnxArtefact, rounds: int | None = None) -> OnnxArtefact:
    """Return the artefact with suppression without a loop, in memory; its manifest has the rounds.

    Its file stays as it is. The graph gives its candidates, too, and looks at the best alone where
    these nearly always do; that for a model server does neither, as nobody there would go on with
    an image that needs more.

    Args:
        artefact: of tood-export, in any precision.
        rounds: of suppression; those of `nms_unrolled` where not given.

    Raises:
        ArtefactError: the graph does not hold suppression as tood-export writes it, or more than
            once.
    """
    from tood_deploy.model.nms import ROUNDS

    model = ir.from_proto(artefact.model)
    suppressions = list(_suppressions(model.graph))
    if len(suppressions) != 1:
        raise ArtefactError(
            f"{artefact.path}: the graph holds suppression in the form that tood-export writes "
            f"{len(suppressions)} times, expected once; "
            "export the ONNX again, or give --nms loop to build the graph as it is"
        )
    (suppression,) = suppressions
    manifest, is_served = artefact.manifest, artefact.manifest.build.serving is not None
    rounds = rounds or ROUNDS
    best = None if is_served else best_for(manifest.max_det)
    unrolled = suppression_graph(suppression.count, manifest.max_det, rounds, best)
    _replace(
        model.graph, suppression, ir.from_proto(onnx.compose.add_prefix(unrolled, PREFIX)).graph
    )
    if not is_served:
        _give_candidates(model.graph, suppression)
    RemoveUnusedNodesPass()(model)
    manifest = replace(manifest, build=replace(manifest.build, nms_rounds=rounds))
    return replace(artefact, model=ir.to_proto(model), manifest=manifest)


def _give_candidates(graph: ir.Graph, suppression: Suppression) -> None:
    """Add what suppression reads to the outputs of the graph, under the names of `CANDIDATES`."""
    first = graph.inputs[0].shape
    assert first is not None
    columns = ([suppression.count, 4], [suppression.count], [suppression.count])
    kinds = (BOXES, SCORES, LABELS)
    for name, value, (dtype, _), own in zip(
        CANDIDATES, suppression.reads, kinds, columns, strict=False
    ):
        value.name, value.type = name, ir.TensorType(dtype)
        value.shape = ir.Shape([first[0], *own])
        graph.outputs.append(value)


def _suppressions(graph: ir.Graph) -> Iterator[Suppression]:
    """Yield every suppression: an outer Loop that reads padded candidates and a threshold."""
    captured = analyze_implicit_usage(graph)
    for node in graph:
        if node.op_type == "Loop" and len(node.outputs) == 3:
            body = node.attributes["body"].as_graph()
            padded = {_kind(value): value for value in captured[body] if _maker(value) == "Pad"}
            thresholds = _thresholds(body, captured[body])
            counts = _candidates(padded.get(SCORES))
            if {BOXES, SCORES, LABELS} <= padded.keys() and len(thresholds) == len(counts) == 1:
                boxes, scores, labels = (
                    _before_pad(padded[kind]) for kind in (BOXES, SCORES, LABELS)
                )
                yield Suppression(node, (boxes, scores, labels, thresholds.pop()), counts[0])


def _maker(value: ir.Value) -> str:
    """Return the operator that makes a value; "" for inputs and constants of the graph."""
    node = value.producer()
    return "" if node is None else node.op_type


def _kind(value: ir.Value) -> tuple[ir.DataType | None, int | None]:
    return value.dtype, None if value.shape is None else len(value.shape)


def _thresholds(body: ir.Graph, captured: Collection[ir.Value]) -> set[ir.Value]:
    """Return the values from outside, no constants, that the body compares overlaps with."""
    compared = {node.inputs[1] for node in body if node.op_type == "Greater"}
    return {
        value
        for value in captured
        if value in compared and ir.convenience.get_const_tensor(value) is None
    }


def _pad(padded: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return what a Pad reads: the values, and by how much they are padded."""
    maker = padded.producer()
    assert maker is not None
    values, pads = maker.inputs[:2]
    assert values is not None
    assert pads is not None
    return values, pads


def _before_pad(padded: ir.Value) -> ir.Value:
    return _pad(padded)[0]


def _candidates(padded_scores: ir.Value | None) -> list[int]:
    """Return N alone, the columns less those that the Pad appends.

    Nothing where the graph does not tell.
    """
    if padded_scores is None or padded_scores.shape is None:
        return []
    columns, pads = padded_scores.shape[1], ir.convenience.get_const_tensor(_pad(padded_scores)[1])
    return (
        [columns - int(pads.numpy()[-1])] if isinstance(columns, int) and pads is not None else []
    )


def _replace(graph: ir.Graph, old: Suppression, new: ir.Graph) -> None:
    """Move the nodes of `new` into `graph`, in front of the loop, and take the loop out."""
    for given, read in zip(new.inputs, old.reads, strict=True):
        given.replace_all_uses_with(read)
    constants, outputs, nodes = list(new.initializers.values()), list(new.outputs), list(new)
    new.initializers.clear()
    for constant in constants:
        graph.register_initializer(constant)
    new.outputs.clear()
    new.remove(nodes)
    graph.insert_before(old.loop, nodes)
    for was, value in zip(old.loop.outputs[1:], outputs, strict=True):
        was.replace_all_uses_with(value)
    graph.remove(old.loop, safe=True)


INPUTS = ("boxes", "scores", "labels", "iou_threshold")
OUTPUTS = ("kept", "num_dets")
EXAMPLE_BATCH = 2


class UnrolledSuppression(nn.Module):
    """`nms_unrolled`; where it is not exact, the count is -1."""

    def __init__(self, max_det: int, rounds: int, best: int | None) -> None:
        super().__init__()
        self.max_det, self.rounds, self.best = max_det, rounds, best

    def forward(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return positions (B, max_det) and how many of them count (B,), both int64."""
        kept = nms_unrolled(
            boxes,
            scores,
            labels,
            iou_threshold,
            self.max_det,
            rounds=self.rounds,
            mask_type=torch.float16,  # a GPU reads the masks again in every round
            best=self.best,
        )
        return kept.kept, torch.where(kept.exact, kept.num_dets, -1)


@lru_cache(maxsize=4)
def suppression_graph(count: int, max_det: int, rounds: int, best: int | None) -> onnx.ModelProto:
    """Return the graph for `count` candidates of an image, dynamic in the batch.

    Not to be changed, as further calls give the same object.

    Args:
        count: N.
        max_det, rounds, best: as of `nms_unrolled`.
    """
    batch = torch.export.Dim("batch", min=1)
    shape = (EXAMPLE_BATCH, count)
    example = (
        torch.zeros(*shape, 4),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.int64),
        torch.tensor(0.6),
    )
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            UnrolledSuppression(max_det, rounds, best).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({0: batch}, {0: batch}, {0: batch}, None),
            verbose=False,
        )
    assert program is not None
    return program.model_proto
