"""Which layers lose most when they become 8-bit, measured one by one, and the fewest that must stay float32 for a wanted quality."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.export.precision.quantizable import all_layers
from tood_deploy.export.precision.quantize import Ranges, Scheme, quantize
from tood_deploy.graph_io import HEAD_OUTPUTS, INPUTS
from tood_deploy.onnx_session import open_session
from tood_deploy.rows import row_iou

MOST_TOLD = 5

Maps = list[NDArray[Any]]
Prepared = tuple[NDArray[np.uint8], tuple[int, int]]  # a padded picture (rows, columns, 3) RGB, and what of it holds real pixels


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to make one group of layers 8-bit, all others being float32.

    Attributes:
        group: a pattern that fits the names of its layers.
        damage: how far the head's maps move where the reference finds something: the change of the score plus the loss of overlap,
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
        """Plain values for the manifest."""
        return asdict(self)


def layer_groups(model: onnx.ModelProto) -> tuple[str, ...]:
    """Patterns of the layers that are measured together, in the order of the network: one layer, or the parts of one that was cut."""
    names = dict.fromkeys(layer.name for layer in all_layers(ir.from_proto(model).graph))
    return tuple(dict.fromkeys(re.sub(r"\.\d+$", ".*", name) for name in names))


def measure_sensitivity(
    model: onnx.ModelProto,
    ranges: Ranges,
    pictures: Sequence[Prepared],
    *,
    scheme: Scheme,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sensitivity]:
    """The damage of every group of layers, the largest first.

    Args:
        model: an exported float32 graph.
        ranges: of its activations.
        pictures: to measure on; two or three will do for the order.
        scheme: see `quantize`.
        progress: called with how many groups are done and how many there are.
    """
    groups = layer_groups(model)
    references = _head_maps(model, pictures)
    found = []
    for done, group in enumerate(groups, start=1):
        others = [other for other in groups if other != group]
        maps = _head_maps(quantize(model, ranges, scheme=scheme, keep=others), pictures)
        damages = [map_damage(reference, moved) for reference, moved in zip(references, maps, strict=True)]
        found.append(Sensitivity(group, float(np.mean(damages))))
        progress(done, len(groups))
    return sorted(found, key=lambda one: -one.damage)


def choose_kept(
    ranked: Sequence[Sensitivity], drop_of: Callable[[Collection[str]], float], max_drop: float, say: Callable[[str], None]
) -> KeptLayers:
    """The fewest of the most sensitive layers that must stay float32, by doubling their number and then halving the interval.

    Args:
        ranked: as `measure_sensitivity` gives them.
        drop_of: makes all layers 8-bit but those of these patterns, and tells how much worse that is.
        max_drop: the most it may be.
        say: told the first of the list, and one line for every trial.
    """
    groups = [one.group for one in ranked]
    say("most sensitive to 8 bits: " + ", ".join(f"{one.group} {one.damage:.4f}" for one in ranked[:MOST_TOLD]))
    drops: dict[int, float] = {}

    def is_enough(count: int) -> bool:
        drops[count] = drop_of(tuple(groups[:count])) if count < len(groups) else 0.0
        say(f"{count} of {len(groups)} groups of layers stay float32: {drops[count]:.3f} worse, at most {max_drop:g} allowed")
        return drops[count] <= max_drop

    below, count = -1, 0
    while not is_enough(count):
        below, count = count, min(max(1, 2 * count), len(groups))
    while count - below > 1:
        middle = (below + count) // 2
        below, count = (below, middle) if is_enough(middle) else (middle, count)
    return KeptLayers(tuple(groups[:count]), drops[count], tuple(drops.items()), tuple(ranked))


def map_damage(reference: Maps, found: Maps) -> float:
    """How far the maps of one picture are from the reference: see `Sensitivity.damage`."""
    total, weights = 0.0, 0.0
    half = len(HEAD_OUTPUTS) // 2
    for i in range(half):
        scores, moved = (_by_cell(maps[i]) for maps in (reference, found))
        boxes, moved_boxes = (_by_cell(maps[half + i]) for maps in (reference, found))
        weight = np.square(scores.max(axis=1))
        damage = np.abs(scores - moved).max(axis=1) + 1 - row_iou(boxes, moved_boxes)
        total += float((weight * damage).sum())
        weights += float(weight.sum())
    return total / weights if weights else 0.0


def _by_cell(values: NDArray[Any]) -> NDArray[np.float64]:
    """(cells, channels) of a map (1, channels, h, w)."""
    return values[0].reshape(values.shape[1], -1).T.astype(np.float64)


def _head_maps(model: onnx.ModelProto, pictures: Sequence[Prepared]) -> list[Maps]:
    """What the head says of every picture; candidates and suppression are left out."""
    whole = ir.from_proto(model)
    made = {value.name: value for node in whole.graph for value in node.outputs}
    part = ir.convenience.extract(whole.graph, whole.graph.inputs[:2], [made[name] for name in HEAD_OUTPUTS])
    proto = ir.to_proto(ir.Model(part, ir_version=whole.ir_version))
    session = open_session(proto.SerializeToString())
    inputs = [dict(zip(INPUTS, (image[None], np.array([valid_hw], np.int32)), strict=False)) for image, valid_hw in pictures]
    found: Any = [session.run(list(HEAD_OUTPUTS), values) for values in inputs]
    return found
