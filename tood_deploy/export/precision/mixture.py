"""The parts of a network, and the graph in which every part has a precision of its own."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import onnx
import onnx_ir as ir

from tood_deploy.errors import ToodError
from tood_deploy.export.precision.low_region import is_layer, is_vector_layer, layer_name
from tood_deploy.export.precision.mixed_precision import DATA_TYPES, LowPrecision, lower_precision
from tood_deploy.export.precision.quantizable import all_layers
from tood_deploy.export.precision.sensitivity import Sensitivity

NAME_PARTS = 2  # of a layer's name: "backbone.layer3", "bbox_head.inter_convs"

Quantize = Callable[[onnx.ModelProto, Collection[str]], onnx.ModelProto]


def network_parts(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """The names of a network's layers by the part of the network that they belong to, in the order of the network."""
    parts: dict[str, dict[str, None]] = {}
    for node in ir.from_proto(model).graph:
        if is_layer(node) and not is_vector_layer(node):
            name = layer_name(node)
            parts.setdefault(".".join(name.split(".")[:NAME_PARTS]), {})[name] = None
    return {part: tuple(names) for part, names in parts.items()}


def rank_parts(parts: Mapping[str, Sequence[str]], sensitivities: Sequence[Sensitivity]) -> tuple[str, ...]:
    """The parts in order of the damage that 8 bits do to all their layers together, the largest first; see `measure_sensitivity`."""
    damages = {
        part: sum(one.damage for one in sensitivities if any(fnmatchcase(name, one.group) for name in names))
        for part, names in parts.items()
    }
    return tuple(sorted(damages, key=lambda part: -damages[part]))


def mix_precisions(
    model: onnx.ModelProto,
    mixture: Mapping[str, str],
    parts: Mapping[str, Sequence[str]],
    *,
    quantize: Quantize | None = None,
    beside_int8: LowPrecision | None = None,
) -> onnx.ModelProto:
    """The graph with a precision for every part.

    Args:
        model: an exported float32 graph.
        mixture: "fp32", "int8", and one of "fp16" and "bf16", by part.
        parts: names of the layers by part, as of `network_parts`.
        quantize: makes all layers 8-bit but those whose names are given, and others that it knows to be sensitive; needed for int8.
        beside_int8: what computes, of parts in int8, what cannot be 8-bit; float32 where not given.

    Raises:
        ToodError: two kinds of half precision, or int8 without `quantize`.
    """

    def layers_in(precision: str) -> list[str]:
        return [name for part, found in mixture.items() if found == precision for name in parts[part]]

    used = set(mixture.values()) | ({beside_int8} if beside_int8 and "int8" in mixture.values() else set())
    half = sorted(used & DATA_TYPES.keys())
    if len(half) > 1:
        raise ToodError(f"a mixture of {' and '.join(half)}; expected one of them")
    if quantized := set(layers_in("int8")):
        if quantize is None:
            raise ToodError("int8 is part of the mixture and there is nothing to quantise with; give calibration pictures")
        possible = dict.fromkeys(layer.name for layer in all_layers(ir.from_proto(model).graph))
        model = quantize(model, [name for name in possible if name not in quantized])
    if half:
        keep = dict.fromkeys(map(glob.escape, layers_in("fp32")), "better so in the search")
        model, _ = lower_precision(model, cast(LowPrecision, half[0]), keep=keep)
    return model
