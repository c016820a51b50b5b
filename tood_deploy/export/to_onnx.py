"""A network in, one ONNX graph out, with pre- and post-processing inside and dynamic in size.

Knows nothing of runtimes. What the stages before the detections give (`STAGE_VALUES`) are values of
the graph under fixed names but no outputs of it: `with_outputs` makes a copy that gives them, so
what is verified is the shipped graph itself.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor

from tood_deploy.export.graph import DeformForm, ExportedGraph
from tood_deploy.export.shortcuts import take_shortcuts
from tood_deploy.graph_io import INPUTS, OUTPUTS, inner_value_names
from tood_deploy.model.detector import DenseDetector
from tood_deploy.model.postprocess import MAX_DET
from tood_deploy.presets import SIZE_DIVISOR

OPSET = 21  # the first with GroupNormalization as one node
# No two alike, none of them one; rows and columns in units of SIZE_DIVISOR.
EXAMPLE_BATCH, EXAMPLE_H, EXAMPLE_W = 2, 8, 10


def example_inputs() -> tuple[tuple[Tensor, ...], tuple[dict[int, Any] | None, ...]]:
    """Return inputs to trace a detector with, and which of their sizes are dynamic: batch, image.

    What `ExportedGraph` takes: (N, H, W, 3) uint8 images, (N, 2) int32 sizes, two thresholds.
    """
    height, width = EXAMPLE_H * SIZE_DIVISOR, EXAMPLE_W * SIZE_DIVISOR
    example = (
        torch.zeros(EXAMPLE_BATCH, height, width, 3, dtype=torch.uint8),
        torch.full((EXAMPLE_BATCH, 2), height, dtype=torch.int32),
        torch.tensor(0.05),
        torch.tensor(0.6),
    )
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    sizes = {0: batch, 1: SIZE_DIVISOR * rows, 2: SIZE_DIVISOR * columns}
    return example, (sizes, {0: batch}, None, None)


def onnx_from_model(
    model: DenseDetector,
    *,
    deform: DeformForm = "op",
    max_det: int = MAX_DET,
    optimise: bool = True,
) -> onnx.ModelProto:
    """Return the exported graph, with the values of all stages as outputs, too.

    Their names are those of `inner_value_names`.

    Args:
        model: the network, in eval mode.
        deform: deformable convolutions as ONNX's operator ("op") or as gathers ("gather"), for
            runtimes that lack it.
        max_det: rows D of the outputs.
        optimise: whether constants and batch norms are folded; without, every weight keeps its
            name and its numbers.
    """
    # The loops go through the compiler: nothing that earlier exports left there takes part.
    torch.compiler.reset()
    graph = ExportedGraph(model, deform, max_det).eval()
    example, dynamic = example_inputs()
    with quiet_exporter(), take_shortcuts(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=(*OUTPUTS, *inner_value_names(model.preset)),
            dynamic_shapes=dynamic,
            verbose=False,
            optimize=optimise,
        )
    assert program is not None
    return _tidy(program.model_proto)


def _tidy(exported: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's notes on every node, which hold source paths of this machine."""
    exported.producer_name, exported.doc_string = "tood_deploy", ""
    graphs = [exported.graph]
    while graphs:
        graph = graphs.pop()
        del graph.metadata_props[:]
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            del value.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            graphs.extend(
                attribute.g
                for attribute in node.attribute
                if attribute.type == onnx.AttributeProto.GRAPH
            )
    return exported


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silences what the exporter says of itself and of packages it could have used."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
