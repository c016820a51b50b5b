"""Measure which layers lose most in 8 bits, and choose the fewest that must stay float32.

Comes in: a float32 graph, ranges of its values, images. Goes out: layers by the damage that 8 bits
do to them, and graphs of mixed precision. Knows neither files nor targets.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.errors import InputError, ToodError
from tood_deploy.export.precision.half import (
    DATA_TYPES,
    LowPrecision,
    is_layer,
    is_vector_layer,
    layer_name,
    lower_precision,
)
from tood_deploy.export.precision.quantize import Ranges, Scheme, all_layers, quantize
from tood_deploy.graph_io import HEAD_OUTPUTS, INPUTS, OUTPUTS, graph_feeds
from tood_deploy.matching import NetDetections, box_iou, match_boxes, split_batch
from tood_deploy.onnx_file import needs_float_arithmetic, open_session
from tood_deploy.parity.tolerances import DEPLOYMENT_SCORE, DETECTION_LIMITS
from tood_deploy.reporter import Reporter

REPORTED = 5  # of the most sensitive groups, in a line

Maps = list[NDArray[Any]]
Prepared = tuple[
    NDArray[np.uint8], tuple[int, int]
]  # a padded image (rows, columns, 3) RGB, and what of it holds real pixels


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to make one group of layers 8-bit, all others being float32.

    Attributes:
        group: a pattern that fits the names of its layers.
        damage: how far the head's maps move where the reference finds something: the change of the
            score plus the loss of overlap,
            averaged over cells by the square of their best score. 0 where nothing moves.
    """

    group: str
    damage: float


@dataclass(frozen=True)
class KeptLayers:
    """The outcome of a search.

    Attributes:
        keep: patterns of the layers that stay float32.
        drop: how much worse the rest then is, in the unit of the search.
        trials: how many groups were kept and how much worse it was, in order of the search.
        ranked: all groups, the most sensitive first; empty where nothing had to be kept.
    """

    keep: tuple[str, ...]
    drop: float
    trials: tuple[tuple[int, float], ...]
    ranked: tuple[Sensitivity, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return asdict(self)


def layer_groups(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return patterns of the layers that are measured together, in the order of the network.

    A group is one layer, or the parts of one that was cut.
    """
    names = dict.fromkeys(layer.name for layer in all_layers(ir.from_proto(model).graph))
    return tuple(dict.fromkeys(re.sub(r"\.\d+$", ".*", name) for name in names))


def measure_sensitivity(
    model: onnx.ModelProto,
    ranges: Ranges,
    images: Sequence[Prepared],
    *,
    scheme: Scheme,
    reporter: Reporter | None = None,
) -> list[Sensitivity]:
    """Return the damage of every group of layers, the largest first.

    Args:
        model: an exported float32 graph.
        ranges: of its activations.
        images: to measure on; two or three will do for the order.
        scheme: see `quantize`.
        reporter: of progress.
    """
    groups = layer_groups(model)
    references = _head_maps(model, images)
    measured = []
    reporter = reporter or Reporter.silent()
    for group in reporter.track(groups, "measuring layers"):
        others = [other for other in groups if other != group]
        maps = _head_maps(quantize(model, ranges, scheme=scheme, keep=others), images)
        damages = [
            map_damage(reference, moved) for reference, moved in zip(references, maps, strict=True)
        ]
        measured.append(Sensitivity(group, float(np.mean(damages))))
    return sorted(measured, key=lambda one: -one.damage)


def choose_kept(
    ranked: Sequence[Sensitivity],
    drop_of: Callable[[Collection[str]], float],
    max_drop: float,
    reporter: Reporter,
) -> KeptLayers:
    """Return the fewest of the most sensitive layers that must stay float32.

    Their number is doubled until it is enough, and the last interval then halved.

    Args:
        ranked: as `measure_sensitivity` gives them.
        drop_of: makes all layers 8-bit but those of these patterns, and returns how much worse
            that is.
        max_drop: the most it may be.
        reporter: of the first of the list, and of every trial.
    """
    groups = [one.group for one in ranked]
    reporter.info(
        "most sensitive to 8 bits: "
        + ", ".join(f"{one.group} {one.damage:.4f}" for one in ranked[:REPORTED])
    )
    drops: dict[int, float] = {}

    def is_enough(count: int) -> bool:
        drops[count] = drop_of(tuple(groups[:count])) if count < len(groups) else 0.0
        reporter.info(
            f"{count} of {len(groups)} groups of layers stay float32: {drops[count]:.3f} worse, "
            f"at most {max_drop:g} allowed"
        )
        return drops[count] <= max_drop

    below, count = -1, 0
    while not is_enough(count):
        below, count = count, min(max(1, 2 * count), len(groups))
    while count - below > 1:
        middle = (below + count) // 2
        below, count = (below, middle) if is_enough(middle) else (middle, count)
    return KeptLayers(tuple(groups[:count]), drops[count], tuple(drops.items()), tuple(ranked))


def map_damage(reference: Maps, measured: Maps) -> float:
    """Return how far the maps of one image are from the reference: see `Sensitivity.damage`."""
    total, weights = 0.0, 0.0
    half = len(HEAD_OUTPUTS) // 2
    for i in range(half):
        scores, moved = (_by_cell(maps[i]) for maps in (reference, measured))
        boxes, moved_boxes = (_by_cell(maps[half + i]) for maps in (reference, measured))
        weight = np.square(scores.max(axis=1))
        damage = np.abs(scores - moved).max(axis=1) + 1 - box_iou(boxes, moved_boxes)
        total += float((weight * damage).sum())
        weights += float(weight.sum())
    return total / weights if weights else 0.0


def _by_cell(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return (cells, channels) of a map (1, channels, h, w)."""
    return values[0].reshape(values.shape[1], -1).T.astype(np.float64)


def _head_maps(model: onnx.ModelProto, images: Sequence[Prepared]) -> list[Maps]:
    """Return the head's maps of every image; candidates and suppression are left out."""
    whole = ir.from_proto(model)
    by_name = {value.name: value for node in whole.graph for value in node.outputs}
    part = ir.convenience.extract(
        whole.graph, whole.graph.inputs[:2], [by_name[name] for name in HEAD_OUTPUTS]
    )
    proto = ir.to_proto(ir.Model(part, ir_version=whole.ir_version))
    session = open_session(
        proto.SerializeToString(), float_arithmetic=needs_float_arithmetic(proto)
    )
    inputs = [
        dict(zip(INPUTS, (image[None], np.array([valid_hw], np.int32)), strict=False))
        for image, valid_hw in images
    ]
    maps: Any = [session.run(list(HEAD_OUTPUTS), values) for values in inputs]
    return maps


NAME_PARTS = 2  # of a layer's name: "backbone.layer3", "bbox_head.inter_convs"

Quantize = Callable[[onnx.ModelProto, Collection[str]], onnx.ModelProto]


def network_parts(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Return the names of a network's layers by the part that they belong to, in order."""
    parts: dict[str, dict[str, None]] = {}
    for node in ir.from_proto(model).graph:
        if is_layer(node) and not is_vector_layer(node):
            name = layer_name(node)
            parts.setdefault(".".join(name.split(".")[:NAME_PARTS]), {})[name] = None
    return {part: tuple(names) for part, names in parts.items()}


def rank_parts(
    parts: Mapping[str, Sequence[str]], sensitivities: Sequence[Sensitivity]
) -> tuple[str, ...]:
    """Return the parts by the damage that 8 bits do to all their layers, the largest first.

    See `measure_sensitivity`.
    """
    damages = {
        part: sum(
            one.damage
            for one in sensitivities
            if any(fnmatchcase(name, one.group) for name in names)
        )
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
    """Return the graph with a precision for every part.

    Args:
        model: an exported float32 graph.
        mixture: "fp32", "int8", and one of "fp16" and "bf16", by part.
        parts: names of the layers by part, as of `network_parts`.
        quantize: makes all layers 8-bit but those whose names are given, and others that it knows
            to be sensitive; needed for int8.
        beside_int8: what computes, of parts in int8, what cannot be 8-bit; float32 where not given.

    Raises:
        ToodError: two kinds of half precision, or int8 without `quantize`.
    """

    def layers_in(precision: str) -> list[str]:
        return [name for part, own in mixture.items() if own == precision for name in parts[part]]

    used = set(mixture.values()) | (
        {beside_int8} if beside_int8 and "int8" in mixture.values() else set()
    )
    half = sorted(used & DATA_TYPES.keys())
    if len(half) > 1:
        raise ToodError(f"a mixture of {' and '.join(half)}; expected one of them")
    if quantized := set(layers_in("int8")):
        if quantize is None:
            raise ToodError(
                "int8 is part of the mixture and there is nothing to quantise with; give "
                "calibration images"
            )
        possible = dict.fromkeys(layer.name for layer in all_layers(ir.from_proto(model).graph))
        model = quantize(model, [name for name in possible if name not in quantized])
    if half:
        keep = dict.fromkeys(map(glob.escape, layers_in("fp32")), "better so in the search")
        model, _ = lower_precision(model, cast(LowPrecision, half[0]), keep=keep)
    return model


SCORE_THRESHOLD, IOU_THRESHOLD = DEPLOYMENT_SCORE, 0.6
SCORE_TOLERANCE = DETECTION_LIMITS["int8"].score


class DetectionMismatch:
    """Compares graphs with one reference, on the same images."""

    def __init__(
        self,
        reference: onnx.ModelProto,
        images: Sequence[Prepared],
        score_threshold: float = SCORE_THRESHOLD,
    ) -> None:
        """Run the reference; detections have a score above the threshold.

        Raises:
            InputError: it finds nothing in the images.
        """
        self.images, self.score_threshold = images, score_threshold
        self.expected = self._detect(reference)
        if not any(map(len, self.expected)):
            raise InputError(
                f"nothing is found with a score above {score_threshold} in {len(images)} "
                "calibration images, so quality cannot be "
                "measured; give images of what is to be found"
            )

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return the per cent of the detections of both that only one of the two has.

        A pair overlaps and differs little in score.
        """
        detections = self._detect(model)
        total = sum(map(len, self.expected)) + sum(map(len, detections))
        matched = sum(
            match_boxes(*rows, max_score_difference=SCORE_TOLERANCE).counts.matched
            for rows in zip(self.expected, detections, strict=True)
        )
        return 100 * (1 - 2 * matched / total)

    def _detect(self, model: onnx.ModelProto) -> list[NetDetections]:
        session = open_session(
            model.SerializeToString(), float_arithmetic=needs_float_arithmetic(model)
        )
        rows = []
        for image, valid_hw in self.images:
            inputs = graph_feeds(
                image[None], np.array([valid_hw], np.int32), self.score_threshold, IOU_THRESHOLD
            )
            outputs: Any = session.run(list(OUTPUTS), inputs)
            rows += split_batch(outputs)
        return rows
