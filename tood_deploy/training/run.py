"""What a run is asked for, where it stands, and what it takes: plain values beside the loop."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray


class Verdict(Protocol):
    """What an evaluation gives: numbers by name, "AP" among them, and pictures to look at."""

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers, 0 to 1."""
        ...

    @property
    def pictures(self) -> Sequence[NDArray[Any]]:
        """(H, W, 3) uint8 RGB."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """How a run is run, not what it learns.

    Attributes:
        output: its folder.
        device: "cpu", or this worker's GPU.
        workers: loading processes a worker.
        save_every: steps between two checkpoints within an epoch; None writes one an epoch.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        resume: go on from the folder's last checkpoint, if there is one.
        stop_after: epochs, counted from 1, after which this call ends early.
    """

    output: Path
    device: str | torch.device = "cpu"
    workers: int = 0
    save_every: int | None = None
    evaluate_every: int = 1
    resume: bool = False
    stop_after: int | None = None


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done, over all epochs.
        history: one entry for every epoch that is finished, evaluation included.
        best_ap: the best so far, -1 before the first evaluation.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_ap: float = -1.0


def epoch_means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean losses, and what a step takes at the median: it does not notice the few that something else disturbed."""
    if not steps:
        return {}
    means = {name: statistics.fmean(step[name] for step in steps) for name in ("cls", "box", "grad_norm", "positives")}
    medians = {name: statistics.median(step[name] for step in steps) for name in ("seconds", "data_seconds", "images_per_s")}
    return means | medians | {"lr": steps[-1]["lr"]}
