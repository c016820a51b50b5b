"""Compute a graph's inner values on images, in ONNX Runtime.

Comes in: a graph, names of its values, images. Goes out: the values as arrays, image by image. A
network's inner values together take gigabytes for an image. So the graph is cut, in the order of
its nodes, into segments that give a few of the wanted values each; every node runs once for an
image, and only what later segments read stays in memory. Knows nothing of what the values are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.analysis import analyze_implicit_usage

from tood_deploy.errors import ArtefactError
from tood_deploy.graph_io import INPUTS
from tood_deploy.onnx_file import open_session

TOGETHER = 4  # wanted values of one segment: below 0.3 GB for the largest networks at 800 x 1344
SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Segment:
    """A part of the graph.

    Attributes:
        session: runs it.
        reads: the values it takes, by name.
        gives: the values it makes that are targets or that later segments read.
        targets: of these, the values that are asked for.
        last: values that no later segment reads.
    """

    session: ort.InferenceSession
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    targets: tuple[str, ...]
    last: tuple[str, ...]


class ActivationReader:
    """Computes inner values of one graph. Needs as much memory as a few of them."""

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        names: Sequence[str],
        *,
        threads: int | None = None,
        together: int = TOGETHER,
    ) -> None:
        """Cut the graph and open a session for every segment.

        Args:
            model: an exported graph, or its file.
            names: the wanted values; inputs of the graph cannot be among them.
            threads: of ONNX Runtime; the number of cores where not given.
            together: how many wanted values a segment gives.

        Raises:
            ArtefactError: the graph holds no value of such a name.
        """
        proto = onnx.load(model) if isinstance(model, Path) else model
        typed = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        by_name = {
            value.name: value for node in typed.graph for value in node.outputs if value.name
        }
        if missing := [name for name in names if name not in by_name]:
            raise ArtefactError(
                f"the graph makes no values {', '.join(missing[:3])}; take names of the graph "
                "itself, or export it again"
            )
        self._segments = list(
            _segments(typed, [by_name[name] for name in dict.fromkeys(names)], threads, together)
        )

    def read(self, image: NDArray[np.uint8], valid_hw: tuple[int, int]) -> Iterator[Values]:
        """Yield the wanted values of one image, some at a time.

        Take from each dictionary what is needed before asking for the next.

        Args:
            image: (rows, columns, 3) uint8 RGB, padded, as `resize_and_pad` gives it.
            valid_hw: rows and columns that hold real pixels.
        """
        thresholds = np.array(SCORE_THRESHOLD, np.float32), np.array(IOU_THRESHOLD, np.float32)
        held: Values = dict(
            zip(INPUTS, (image[None], np.array([valid_hw], np.int32), *thresholds), strict=True)
        )
        for segment in self._segments:
            outputs: Any = segment.session.run(
                list(segment.gives), {name: held[name] for name in segment.reads}
            )
            held.update(zip(segment.gives, outputs, strict=True))
            del outputs
            yield {name: held[name] for name in segment.targets}
            for name in segment.last:
                del held[name]


def _segments(
    model: ir.Model, targets: Sequence[ir.Value], threads: int | None, together: int
) -> Iterator[_Segment]:
    """Yield the graph in parts, each ending with the next few wanted values."""
    place = {value: i for i, node in enumerate(model.graph) for value in node.outputs}
    reads = _reads(model.graph, targets)
    targets = sorted(targets, key=place.__getitem__)
    known, start = set(model.graph.inputs), 0
    for first in range(0, len(targets), together):
        part = targets[first : first + together]
        end = place[part[-1]] + 1
        later = set[ir.Value]().union(*reads[end:])
        gives = [
            value
            for value, i in place.items()
            if start <= i < end and (value in part or value in later)
        ]
        takes = known.intersection(set[ir.Value]().union(*reads[start:end]))
        held = known.union(gives)
        yield _open_segment(model, takes, gives, part, held - later, threads)
        known, start = held & later, end


def _reads(graph: ir.Graph, targets: Sequence[ir.Value]) -> list[set[ir.Value]]:
    """Return what each node reads, its inner graphs included.

    Nothing where none of the wanted values depends on the node.
    """
    inner = analyze_implicit_usage(graph)
    reads: list[set[ir.Value]] = []
    needed = set(targets)
    for node in reversed(list(graph)):
        if needed.isdisjoint(node.outputs):
            reads.append(set())
            continue
        graphs = [
            attribute.as_graph()
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
        ]
        values = {value for value in node.inputs if value is not None}.union(
            *(inner[part] for part in graphs)
        )
        needed |= values
        reads.append(values)
    return reads[::-1]


def _open_segment(
    model: ir.Model,
    takes: set[ir.Value],
    gives: list[ir.Value],
    targets: list[ir.Value],
    last: set[ir.Value],
    threads: int | None,
) -> _Segment:
    reads = sorted(map(_name, takes))
    part = ir.convenience.extract(model.graph, reads, gives)
    proto = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    session = open_session(proto.SerializeToString(), threads=threads, keeps_memory=False)
    return _Segment(
        session,
        tuple(reads),
        tuple(map(_name, gives)),
        tuple(map(_name, targets)),
        tuple(map(_name, last)),
    )


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
