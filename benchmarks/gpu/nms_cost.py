"""Measure what suppression alone costs, on the candidates of real calls.

The exact loop, its unrolled form in every mode of PyTorch, and torchvision's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.failures import note_of, status_of
from benchmarks.gpu.measure import time_calls
from benchmarks.gpu.settings import CONF, IOU, Mode, Status
from tood_deploy.benchmark.latency.worker import warm_up
from tood_deploy.engines.torch_graphs import Recorded
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.model.nms import best_for, nms, nms_unrolled
from tood_deploy.model.postprocess import MAX_DET, Candidates

Kept = tuple[Tensor, Tensor]
Call = Callable[[], Kept]


@dataclass
class NmsRow:
    """One method of suppression for one batch.

    Attributes:
        batch: images.
        how: the method.
        status, note: as those of a `Row`.
        times_ms: of every round.
        candidates: with a score above the threshold, in the image that has the most.
        images_that_differ: from the exact loop.
    """

    batch: int
    how: str
    status: Status = "ok"
    note: str = ""
    times_ms: list[list[float]] = field(default_factory=list)
    candidates: int = 0
    images_that_differ: int = 0


@torch.no_grad()
def candidates_of(
    model: DenseDetector, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], device: str
) -> Candidates:
    """Return the input of suppression for a batch of padded images.

    Args:
        model: the network.
        images: (B, H, W, 3) uint8 RGB.
        valid_hw: (B, 2) rows and columns that hold real pixels.
        device: "cuda" or "cpu".
    """
    detector = FusedDetector(copy.deepcopy(model)).to(device).eval()
    source_images, rows = (torch.from_numpy(array).to(device) for array in (images, valid_hw))
    return detector(source_images, rows, CONF, IOU).candidates


def measure_nms(
    candidates: Candidates,
    batches: Sequence[int],
    modes: Sequence[Mode],
    rounds: int,
    seconds: float,
) -> list[NmsRow]:
    """Measure all methods at all batches, taking turns.

    Args:
        candidates: of some images, which are repeated for a larger batch.
        batches: images of a call.
        modes: of PyTorch.
        rounds: in which all methods take turns.
        seconds: that a method is measured for in a round.
    """
    rows: list[NmsRow] = []
    for batch in batches:
        repeats = -(-batch // len(candidates.scores))
        parts = (part.repeat(repeats, *[1] * (part.dim() - 1))[:batch] for part in candidates)
        repeated = Candidates(*(part.contiguous() for part in parts))
        rows += _measure_batch(repeated, _methods(repeated, modes), rounds, seconds)
    torch.compiler.reset()
    return rows


def _measure_batch(
    candidates: Candidates, methods: dict[str, Callable[[], Call]], rounds: int, seconds: float
) -> list[NmsRow]:
    """Measure all methods on one batch.

    Args:
        candidates: of the batch.
        methods: functions that prepare a call, by name.
        rounds, seconds: as of `measure_nms`.
    """
    expected = [tensor.cpu() for tensor in nms(*candidates, IOU, MAX_DET)]
    count = int((candidates.scores > 0).sum(1).max())
    rows: list[NmsRow] = []
    calls: list[tuple[NmsRow, Callable[[], object]]] = []
    for how, prepare in methods.items():
        row = NmsRow(len(candidates.scores), how, candidates=count)
        rows.append(row)
        try:
            call = prepare()
            row.images_that_differ = _count_differing(call(), expected)
            to_host = partial(_call_to_host, call)
            warm_up(to_host, 4 * seconds)
            calls.append((row, to_host))
        except Exception as error:
            row.status, row.note = status_of(error), note_of(error)
    for _ in range(rounds):
        for row, to_host in calls:
            row.times_ms.append(time_calls(to_host, seconds))
    return rows


def _call_to_host(call: Call) -> list[Tensor]:
    return [tensor.cpu() for tensor in call()]


def _methods(candidates: Candidates, modes: Sequence[Mode]) -> dict[str, Callable[[], Call]]:
    """Return by name the functions that prepare a call of a method."""
    threshold = torch.tensor(IOU, device=candidates.scores.device)

    def unrolled(boxes: Tensor, scores: Tensor, labels: Tensor, iou: Tensor) -> Any:
        return nms_unrolled(boxes, scores, labels, iou, MAX_DET, best=best_for(MAX_DET))

    def recorded(function: Callable[..., Any]) -> Callable[[], Call]:
        def prepare() -> Call:
            graph = Recorded(function, (*candidates, threshold))
            return lambda: graph(*graph.inputs)[:2]

        return prepare

    methods: dict[str, Callable[[], Call]] = {
        "exact loop": lambda: lambda: nms(*candidates, IOU, MAX_DET),
        "unrolled": lambda: lambda: unrolled(*candidates, threshold)[:2],
    }
    if "graph" in modes:
        methods["unrolled, CUDA graph"] = recorded(unrolled)
    if "compiled" in modes:
        compiled = torch.compile(unrolled, dynamic=False, fullgraph=True)
        methods["unrolled, compiled, CUDA graph"] = recorded(compiled)
    return methods | {"torchvision, an image at a time": lambda: _torchvision(candidates)}


def _torchvision(candidates: Candidates) -> Call:
    """Return a call of torchvision's `batched_nms`, as users call it."""
    # A comparison where it is installed.
    from torchvision.ops import batched_nms  # pyright: ignore[reportMissingImports]

    def call() -> Kept:
        count = candidates.scores.shape[1]
        kept = torch.full((len(candidates.scores), MAX_DET), count, device=candidates.scores.device)
        counts = []
        for i, (boxes, scores, labels) in enumerate(zip(*candidates, strict=True)):
            valid = int((scores > 0).sum())
            places = batched_nms(boxes[:valid], scores[:valid], labels[:valid], IOU)[:MAX_DET]
            kept[i, : len(places)] = places
            counts.append(len(places))
        return kept, torch.tensor(counts)

    return call


def _count_differing(kept: Kept, expected: Sequence[Tensor]) -> int:
    places, counts = (tensor.cpu() for tensor in kept)
    return int(((places != expected[0]).any(1) | (counts != expected[1])).sum())
