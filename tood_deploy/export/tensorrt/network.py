"""From an ONNX graph to TensorRT's network, strongly typed: the precision of every layer is the one written into the ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from tood_deploy.errors import ArtefactError
from tood_deploy.export.onnx_artefact import OnnxArtefact
from tood_deploy.tensorrt_flavour import Flavour

AVOIDED_BY = {"DeformConv": "export the ONNX with --deform gather"}


@dataclass(frozen=True, eq=False)
class ParsedNetwork:
    """A network and what must live as long as it: the builder it belongs to, and the parser that owns its weights."""

    builder: Any
    parser: Any
    network: Any


def parse_network(flavour: Flavour, artefact: OnnxArtefact) -> ParsedNetwork:
    """The network of an artefact.

    Raises:
        ArtefactError: the library lacks an operator, or refuses how one is used.
    """
    trt = flavour.module
    builder = trt.Builder(flavour.logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 may know nothing else
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, flavour.logger)
    if missing := sorted(name for name in set(operators(artefact.model.graph)) if not parser.supports_operator(name)):
        advice = "; ".join(AVOIDED_BY[name] for name in missing if name in AVOIDED_BY) or "export the ONNX again with tood-export"
        raise ArtefactError(f"{artefact.path}: {flavour.title} has no operator {', '.join(missing)}; {advice}")
    if not parser.parse(artefact.model.SerializeToString()):
        raise ArtefactError(
            f"{artefact.path}: {flavour.title} cannot take it: {_first_error(parser)}; export the ONNX again with tood-export"
        )
    return ParsedNetwork(builder, parser, network)


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """The operator of every node, those in the bodies of loops too."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "the parser gave no reason"
    error = parser.get_error(0)
    return f"operator {error.node_operator()} at node {error.node_name()}: {' '.join(error.desc().split())}"
