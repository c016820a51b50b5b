"""What suppression alone costs: the exact loop, its unrolled form in every mode, and torchvision's, on the candidates of real calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.failures import note_of, status_of
from benchmarks.gpu.measure import time_calls
from benchmarks.gpu.settings import CONF, IOU, Mode, Status
from benchmarks.gpu.torch_ways import Recorded
from tood_deploy.benchmark.latency.worker import warm_up
from tood_deploy.model.nms import nms, nms_unrolled
from tood_deploy.model.postprocess import MAX_DET, Candidates
from tood_deploy.model.tood import FusedDetector, Tood

Kept = tuple[Tensor, Tensor]


@dataclass
class NmsRow:
    """One way of suppression for one batch.

    Attributes:
        batch: images.
        how: which way.
        status, note: as those of a `Row`.
        times_ms: of every round.
        candidates: with a score above the threshold, in the image that has most.
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
    model: Tood, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], device: str
) -> Candidates:
    """What goes into suppression for a batch of padded images."""
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
    """All ways at all batches, taking turns; images are repeated where a batch is larger than what is given."""
    rows: list[NmsRow] = []
    for batch in batches:
        repeats = -(-batch // len(candidates.scores))
        part = Candidates(
            *(
                tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:batch].contiguous()
                for tensor in candidates
            )
        )
        rows += _measure_batch(part, _ways(part, modes), rounds, seconds)
    torch.compiler.reset()
    return rows


def _measure_batch(
    candidates: Candidates,
    ways: dict[str, Callable[[], Callable[[], Kept]]],
    rounds: int,
    seconds: float,
) -> list[NmsRow]:
    expected = [tensor.cpu() for tensor in nms(*candidates, IOU, MAX_DET)]
    most = int((candidates.scores > 0).sum(1).max())
    rows, calls = [], []
    for how, prepare in ways.items():
        row = NmsRow(len(candidates.scores), how, candidates=most)
        rows.append(row)
        try:
            call = prepare()
            row.images_that_differ = _count_differing(call(), expected)
            warm_up(lambda call=call: [tensor.cpu() for tensor in call()], 4 * seconds)
            calls.append((row, call))
        except Exception as error:
            row.status, row.note = status_of(error), note_of(error)
    for _ in range(rounds):
        for row, call in calls:
            row.times_ms.append(
                time_calls(lambda call=call: [tensor.cpu() for tensor in call()], seconds)
            )
    return rows


def _ways(
    candidates: Candidates, modes: Sequence[Mode]
) -> dict[str, Callable[[], Callable[[], Kept]]]:
    """How each is prepared, by its name."""
    threshold = torch.tensor(IOU, device=candidates.scores.device)

    def unrolled(*inputs: Tensor) -> Any:
        return nms_unrolled(inputs[0], inputs[1], inputs[2], inputs[3], MAX_DET)

    def recorded(function: Callable[..., Any]) -> Callable[[], Callable[[], Kept]]:
        def prepare() -> Callable[[], Kept]:
            graph = Recorded(function, (*candidates, threshold))
            return lambda: graph(*graph.inputs)[:2]

        return prepare

    ways: dict[str, Callable[[], Callable[[], Kept]]] = {
        "exact loop": lambda: lambda: nms(*candidates, IOU, MAX_DET),
        "unrolled": lambda: lambda: unrolled(*candidates, threshold)[:2],
    }
    if "graph" in modes:
        ways["unrolled, CUDA graph"] = recorded(unrolled)
    if "compiled" in modes:
        ways["unrolled, compiled, CUDA graph"] = recorded(
            torch.compile(unrolled, dynamic=False, fullgraph=True)
        )
    return ways | {"torchvision, a image at a time": lambda: _torchvision(candidates)}


def _torchvision(candidates: Candidates) -> Callable[[], Kept]:
    """Its `batched_nms`, as users call it."""
    from torchvision.ops import batched_nms  # pyright: ignore[reportMissingImports] - a comparison, where it is there

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


def _count_differing(found: Kept, expected: Sequence[Tensor]) -> int:
    places, counts = (tensor.cpu() for tensor in found)
    return int(((places != expected[0]).any(1) | (counts != expected[1])).sum())
