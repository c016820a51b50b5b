"""Graphs without weights, made once per configuration and kept; weights are filled in by ourselves.

What PyTorch's exporter makes of a network depends on its configuration alone, so it is given
stand-in weights, no two alike: nothing that happens to be zero, one or the same in a checkpoint
changes the graph. A kept graph is an ONNX model whose weights have names and shapes but no values,
and a record of where every value comes from, a folded batch norm among them. It lies in
`$TOOD_HOME/graphs` under a hash of all that decides: configuration, versions, and our own sources.
It is data, compared with its checksum and never run. The number of classes is a stand-in too, where
it decides nothing but sizes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from tood_deploy.errors import OutputError
from tood_deploy.export.graph import DeformForm, ExportedGraph
from tood_deploy.export.result import timed
from tood_deploy.export.to_onnx import OPSET, onnx_from_model
from tood_deploy.files import atomic_path, home_folder
from tood_deploy.model.detector import DenseDetector, build_model
from tood_deploy.model.postprocess import rules_of
from tood_deploy.presets import MAX_CANDIDATES, Preset

FORMAT = 1
CLASSES = 1009  # in place of the real number: a prime, to be known in the sizes that it is part of
NO_SIZE = 2**40  # "to the end" of a slice and the like are beyond
MAX_FILES = 100  # of 60 to 200 KB; the least recently used go
RECORD = "tood_graph"  # metadata of a kept graph
PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "sympy")
SOURCES = (
    "model/*.py",
    "model/heads/*.py",
    "export/graph.py",
    "export/shortcuts.py",
    "export/to_onnx.py",
    "export/graph_cache.py",
    "graph_io.py",
)
# Fields of a preset that do not reach the graph, or reach it as values that are filled in.
OUTSIDE = {
    *(
        "name",
        "class_names",
        "imgsz",
        "resize",
        "scale_factor",
        "pad_divisor",
        "canvas_hw",
        "score_threshold",
    ),
    *("iou_threshold", "max_det", "weights", "published_ap", "mean", "std"),
}

Say = Callable[[str], None]
Weights = Mapping[str, NDArray[np.float32]]


class UnknownWeight(Exception):  # noqa: N818
    """A graph holds a weight in a shape that `Skeleton` cannot fill; the message names it."""


@dataclass(frozen=True)
class Source:
    """Where the values of one weight of a graph come from.

    Attributes:
        weight: the network's weight; of a bias that a batch norm left, that which it went into.
        norm: the batch norm that is folded into it; "" where there is none.
        bias: whether this is the bias that the batch norm leaves.
        eps: of the batch norm.
    """

    weight: str
    norm: str = ""
    bias: bool = False
    eps: float = 0.0

    def values(self, weights: Weights) -> NDArray[np.float32]:
        """Compute the values, as the exporter's optimiser does, to the bit."""
        if not self.norm:
            return weights[self.weight]
        gamma, beta, mean, variance = (
            weights[f"{self.norm}.{name}"]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = np.asarray(gamma / np.sqrt(variance + np.float32(self.eps)), np.float32)
        if self.bias:
            return np.asarray((np.zeros_like(mean) - mean) * scale + beta, np.float32)
        weight = weights[self.weight]
        return np.asarray(weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), np.float32)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A graph without the values of its weights.

    Attributes:
        graph: the exported graph, the values of all stages among its outputs.
        sources: of every weight, by its name in the graph.
        classes: of the network that was exported.
    """

    graph: onnx.ModelProto
    sources: Mapping[str, Source]
    classes: int

    def filled(self, model: DenseDetector, deform: DeformForm, max_det: int) -> onnx.ModelProto:
        """Return the graph with the weights of a network of its configuration."""
        weights = weights_of(ExportedGraph(model, deform, max_det))
        result = onnx.ModelProto()
        result.CopyFrom(self.graph)
        if self.classes != model.preset.num_classes:
            _set_classes(result.graph, model.preset.num_classes)
        for tensor in result.graph.initializer:
            if source := self.sources.get(tensor.name):
                values = source.values(weights)
                if values.size != np.prod(tensor.dims, dtype=int) or values.dtype != np.float32:
                    found, expected = f"{values.dtype} {values.shape}", list(tensor.dims)
                    raise AssertionError(f"{tensor.name} is {found}; expected {expected}")
                tensor.raw_data = values.tobytes()
        return result


def _set_classes(graph: onnx.GraphProto, classes: int) -> None:
    """Put a number of classes in the place of the stand-in, wherever a size holds it."""

    def real(size: int) -> int:
        return size // CLASSES * classes if size % CLASSES == 0 and size < NO_SIZE else size

    for tensor in graph.initializer:
        tensor.dims[:] = map(real, tensor.dims)
        if tensor.data_type == onnx.TensorProto.INT64:
            values = numpy_helper.to_array(tensor)
            tensor.raw_data = np.array(
                [real(int(value)) for value in values.flat], np.int64
            ).tobytes()
    for value in (*graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                dim.dim_value = real(dim.dim_value)


def graph_of(
    model: DenseDetector, *, deform: DeformForm, max_det: int, say: Say = lambda line: None
) -> onnx.ModelProto:
    """Return what `onnx_from_model` does, from a kept graph where there is one.

    Args:
        model: the network, in eval mode.
        deform: deformable convolutions as ONNX's operator ("op") or as gathers ("gather").
        max_det: rows D of the outputs.
        say: told what goes on, a line each.
    """
    with timed("graph"):
        skeleton = _kept_or_new(model.preset, deform, max_det, say)
    if skeleton is None:
        with timed("graph, not kept"):
            return onnx_from_model(model, deform=deform, max_det=max_det)
    with timed("fill and fold"):
        return skeleton.filled(model, deform, max_det)


def _kept_or_new(preset: Preset, deform: DeformForm, max_det: int, say: Say) -> Skeleton | None:
    """Return a configuration's graph without weights; None, which is said, where none can be."""
    preset = with_stand_in_classes(preset)
    description = describe(preset, deform, max_det)
    path = path_of(description)
    if skeleton := read_skeleton(path, description, say):
        say("filling the one that an earlier export made of this configuration")
        return skeleton
    say(
        "the first of this configuration on this machine takes half a minute or so; it is kept "
        "for the next export"
    )
    try:
        skeleton = make_skeleton(preset, deform, max_det)
    except UnknownWeight as error:
        say(f"this graph cannot be kept without its weights ({error}); making it with them")
        return None
    keep_skeleton(path, description, skeleton, say)
    return skeleton


def with_stand_in_classes(preset: Preset) -> Preset:
    """Return the preset with `CLASSES` classes; as it is where they decide more than sizes."""
    sizes = (
        preset.candidates_per_level,
        preset.channels,
        preset.base_channels,
        preset.base_width * preset.groups,
    )
    # Where all pairs of the best anchors are kept, few classes decide how many a level gives.
    pairs = preset.candidates_per_level * min(preset.num_classes, CLASSES)
    few_pairs = not rules_of(preset).limits_pairs and pairs < MAX_CANDIDATES
    if few_pairs or any(size % CLASSES == 0 for size in sizes):
        return preset
    return replace(preset, class_names=tuple(map(str, range(CLASSES))))


def describe(preset: Preset, deform: DeformForm, max_det: int) -> str:
    """Return all that decides what a graph is, as JSON."""
    values = {
        "format": FORMAT,
        "network": {
            field.name: getattr(preset, field.name)
            for field in fields(preset)
            if field.name not in OUTSIDE
        },
        "classes": preset.num_classes,
        "deform": deform if preset.is_deformable else "none",
        "max_det": max_det,
        "opset": OPSET,
        "versions": {package: version(package) for package in PACKAGES},
        "sources": SOURCES_SHA256,
    }
    return json.dumps(values, sort_keys=True)


def _sources_sha256() -> str:
    """Hash our own files that make graphs."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for pattern in SOURCES:
        files = sorted(package.glob(pattern))
        assert files, pattern
        for file in files:
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


SOURCES_SHA256 = _sources_sha256()  # of what was imported: files may change under a running process


def path_of(description: str) -> Path:
    """Return where the graph of this description is kept."""
    return home_folder("graphs") / f"{hashlib.sha256(description.encode()).hexdigest()[:32]}.graph"


def read_skeleton(path: Path, description: str, say: Say) -> Skeleton | None:
    """Read a kept graph; None where there is none, or none that is whole, which is said.

    The file holds the SHA-256 of what follows the first line, and an ONNX model, compressed.
    """
    try:
        checksum, packed = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(packed).hexdigest().encode() != checksum:
            raise ValueError("another checksum")
        graph = onnx.ModelProto.FromString(zlib.decompress(packed))
        record = json.loads(graph.metadata_props[0].value)
        if record["description"] != description:
            raise ValueError("another description")
        sources = {name: Source(**source) for name, source in record["sources"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, IndexError, TypeError, zlib.error, DecodeError) as error:
        say(f"{path}: cannot be used, damaged or cut ({error}); making this graph again")
        return None
    del graph.metadata_props[:]
    with suppress(OSError):
        path.touch()  # the least recently used go first
    return Skeleton(graph, sources, record["classes"])


def keep_skeleton(path: Path, description: str, skeleton: Skeleton, say: Say) -> None:
    """Write a graph for the next export, whole or not at all; where that cannot be, it is said."""
    record = {
        "description": description,
        "classes": skeleton.classes,
        "sources": {name: vars(source) for name, source in skeleton.sources.items()},
    }
    graph = onnx.ModelProto()
    graph.CopyFrom(skeleton.graph)
    graph.metadata_props.add(key=RECORD, value=json.dumps(record))
    packed = zlib.compress(graph.SerializeToString(deterministic=True))
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(hashlib.sha256(packed).hexdigest().encode() + b"\n" + packed)
    except OutputError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        say(
            f"the graph is not kept: {path.parent} cannot be written ({reason}); "
            "name another folder in TOOD_HOME"
        )
        return
    with suppress(OSError):  # another process may be clearing up as well
        kept = [file for file in path.parent.glob("*.graph") if not file.name.startswith(".")]
        kept.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        for old in kept[MAX_FILES:]:
            old.unlink(missing_ok=True)


def make_skeleton(preset: Preset, deform: DeformForm, max_det: int) -> Skeleton:
    """Export a configuration with stand-in weights, and find out where each of them went.

    Raises:
        UnknownWeight: the exporter has made something of a weight that we cannot make ourselves.
    """
    stand_in = _stand_in(preset)
    graph = onnx_from_model(stand_in, deform=deform, max_det=max_det)
    network = ExportedGraph(stand_in, deform, max_det)
    weights = weights_of(network)
    sources = _find_sources(graph, network, weights)
    for tensor in graph.graph.initializer:
        if tensor.name in sources:
            tensor.ClearField("raw_data")
    return Skeleton(graph, sources, preset.num_classes)


def weights_of(network: ExportedGraph) -> dict[str, NDArray[np.float32]]:
    """Return all weights and buffers of a network by name."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        name: tensor.detach().numpy()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }


def _stand_in(preset: Preset) -> DenseDetector:
    """Return a preset's network with random weights, no two alike, no variance near zero."""
    with torch.device("meta"):
        model = build_model(preset)
    model = model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _find_sources(
    graph: onnx.ModelProto, network: ExportedGraph, weights: Weights
) -> dict[str, Source]:
    """Find out what every weight of a graph was made from, by comparing bytes.

    Raises:
        UnknownWeight: a weight of the network is not in the graph in any known way.
    """
    norms = {
        name: module.eps
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    biases = {
        Source("", norm, True, eps).values(weights).tobytes(): norm for norm, eps in norms.items()
    }
    by_values = {values.tobytes(): name for name, values in weights.items()}
    tensors = {
        tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in graph.graph.initializer
    }
    sources: dict[str, Source] = {}
    for name, values in tensors.items():
        if values in by_values:  # in its own shape or, where an axis was added, in another one
            sources[name] = Source(by_values[values])
        elif norm := biases.get(values):
            weight = name.removesuffix("_bias")
            sources[name] = Source(weight, norm, True, norms[norm])
            sources[weight] = Source(weight, norm, False, norms[norm])
    for name, source in sources.items():
        if source.norm and source.values(weights).tobytes() != tensors.get(name):
            raise UnknownWeight(f"{name} is not {source.weight} with {source.norm} folded into it")
    used = {source.weight for source in sources.values()}
    used |= {
        f"{source.norm}.{part}"
        for source in sources.values()
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    if lost := sorted(set(dict(network.named_parameters())) - used - _unused(network)):
        raise UnknownWeight(f"{lost[0]} has become part of something else")
    return sources


def _unused(network: ExportedGraph) -> set[str]:
    """Return the names of kernels that the exported network holds in pieces instead."""
    return {name for name, _ in network.named_parameters() if ".layer.reduction_conv.conv." in name}
