"""How a preset is trained: every number of the published recipes, and what a user may change.

Plain values: reads and writes no files, imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from tood_deploy.errors import ToodError
from tood_deploy.presets import PublishedWeights
from tood_deploy.windows import DEFAULT_OVERLAP, MIN_VISIBLE, check_overlap, check_window_size

Optimiser = Literal["sgd", "adamw"]
Schedule = Literal["step", "cosine"]
Precision = Literal["fp32", "bf16", "fp16"]
LossName = Literal["own", "tood"]

# What a loss is the sum of, as logs name it and as a person reads it.
LOSS_TERMS = {
    "cls": "classes",
    "box": "boxes",
    "centerness": "centre-ness",
    "distribution": "distributions",
    "overlap": "overlaps",
}


@dataclass(frozen=True)
class Recipe:
    """One training run. The defaults are the published 1x recipe (reference/SPEC.md section 3).

    Attributes:
        epochs: passes over the data.
        batch: images of one step, over all workers and accumulated parts together.
        optimiser, lr, momentum, weight_decay: momentum is SGD's; the decay is on every parameter,
            as in the published recipes.
        schedule: "step" divides the rate by 10 after each epoch in `drops`; "cosine" lets it fall
            to zero.
        drops: epochs, counted from 1, after which the rate drops.
        warmup_steps: steps in which the rate grows from a thousandth.
        clip: largest norm of the whole gradient; None leaves it alone.
        accumulate: parts a step is computed in; averaging factors are those of a part.
        loss: the detector's own, or TOOD's (task-aligned learning) on the scores and boxes of
            whatever head.
        atss_epochs: epochs of ATSS before task-aligned assignment; TOOD's loss alone has them.
        short_sides: smallest and largest short side that images are scaled to, drawn per image;
            None: the preset's size.
        flip, flip_vertical: share of images mirrored.
        colour: strength of random brightness, contrast and saturation, 0 to 1.
        slice: rows and columns of windows that images are cut into; None: whole images.
        overlap: of neighbouring windows, as a share of their side.
        min_visible: share of a box that a window must show to have it.
        group_by_aspect: a batch holds either wide or tall images, which saves padding.
        frozen_stages: backbone stages that do not learn, 0 for the stem alone, -1 for none.
        freeze_norm: batch norms keep their statistics.
        precision: of the network's arithmetic; losses are always float32.
        ema: share that the averaged weights keep at each step; None keeps no average.
        compile: through torch.compile.
        seed: of weights, order and augmentation.
    """

    epochs: int = 12
    batch: int = 16
    optimiser: Optimiser = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = "step"
    drops: tuple[int, ...] = (8, 11)
    warmup_steps: int = 500
    clip: float | None = None
    accumulate: int = 1
    loss: LossName = "own"
    atss_epochs: int = 4
    short_sides: tuple[int, int] | None = None
    flip: float = 0.5
    flip_vertical: float = 0.0
    colour: float = 0.0
    slice: tuple[int, int] | None = None
    overlap: float = DEFAULT_OVERLAP
    min_visible: float = MIN_VISIBLE
    group_by_aspect: bool = True
    frozen_stages: int = 1
    freeze_norm: bool = True
    precision: Precision = "fp32"
    ema: float | None = None
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            self._check(name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("warmup_steps", "atss_epochs", "weight_decay", "seed"):
            self._check(name, getattr(self, name) >= 0, "a number of at least 0")
        for name in ("flip", "flip_vertical", "colour", "momentum"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        self._check("lr", self.lr > 0, "a number above 0")
        self._check("clip", self.clip is None or self.clip > 0, "a number above 0")
        self._check("ema", self.ema is None or 0 < self.ema < 1, "a number between 0 and 1")
        self._check("frozen_stages", -1 <= self.frozen_stages <= 4, "a number from -1 to 4")
        whole_parts = self.batch % self.accumulate == 0
        self._check("batch", whole_parts, f"a multiple of accumulate ({self.accumulate})")
        if self.short_sides is not None:
            in_order = 1 <= self.short_sides[0] <= self.short_sides[1]
            self._check("short_sides", in_order, "smallest and largest, in pixels")
        if self.slice is not None:
            object.__setattr__(self, "slice", check_window_size(self.slice))
        check_overlap(self.overlap)
        self._check("min_visible", 0 < self.min_visible <= 1, "a share above 0, at most 1")
        for name, allowed in (
            ("optimiser", get_args(Optimiser)),
            ("schedule", get_args(Schedule)),
            ("precision", get_args(Precision)),
            ("loss", get_args(LossName)),
        ):
            self._check(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    def _check(self, name: str, right: bool, expected: str) -> None:
        """Raise ToodError unless a field's value is right."""
        if not right:
            raise ToodError(f"{name} is {getattr(self, name)}; expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` wrote; fields of other versions are left out."""
        known = {field.name for field in fields(cls)}
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        return cls(**plain)

    def with_epochs(self, epochs: int) -> Recipe:
        """Return the same over another number of epochs, the drops at the same shares of them."""
        return replace(
            self,
            epochs=epochs,
            drops=tuple(round(drop * epochs / self.epochs) for drop in self.drops),
        )

    def with_batch(self, batch: int) -> Recipe:
        """Return the same with another batch, the learning rate scaled along with it."""
        return replace(self, batch=batch, lr=self.lr * batch / self.batch)


ONE_X = Recipe()
TWO_X = Recipe(epochs=24, drops=(16, 22), short_sides=(480, 800))
# PAA's: in MMDetection its 2x keeps the preset's size, and its 3x draws one.
TWO_X_ONE_SIZE = replace(TWO_X, short_sides=None)
THREE_X = Recipe(epochs=36, drops=(28, 34), short_sides=(640, 800))
# From scratch on small data, as reference/bccd_tiny_mmdet.txt has it.
SMALL = Recipe(
    epochs=30,
    batch=8,
    optimiser="adamw",
    lr=1e-3,
    weight_decay=0.05,
    drops=(20, 27),
    warmup_steps=100,
    clip=35.0,
    frozen_stages=-1,
    freeze_norm=False,
)

RECIPES: dict[str, Recipe] = {
    "r50-1x": ONE_X,
    "r50-anchor-1x": ONE_X,
    "r50-2x": TWO_X,
    "r101-2x": TWO_X,
    "x101-2x": TWO_X,
    "r101-dcn-2x": TWO_X,
    "x101-dcn-2x": TWO_X,
    "atss-r50-1x": ONE_X,
    "gfl-r50-1x": ONE_X,
    "paa-r50-1x": ONE_X,
    "atss-r101-1x": ONE_X,
    "gfl-r50-2x": TWO_X,
    "gfl-r101-2x": TWO_X,
    "paa-r50-2x": TWO_X_ONE_SIZE,
    "paa-r50-3x": THREE_X,
    "paa-r101-1x": ONE_X,
    "paa-r101-2x": TWO_X_ONE_SIZE,
    "paa-r101-3x": THREE_X,
    **dict.fromkeys(("tiny", "tiny-atss", "tiny-gfl", "tiny-paa"), SMALL),
}

TORCHVISION = "https://download.pytorch.org/models"
# ImageNet backbones the published models start from, by depth and groups.
BACKBONES: dict[tuple[int, int], PublishedWeights] = {
    (50, 1): PublishedWeights(f"{TORCHVISION}/resnet50-0676ba61.pth", "0676ba61"),
    (101, 1): PublishedWeights(f"{TORCHVISION}/resnet101-63fe2227.pth", "63fe2227"),
    (101, 64): PublishedWeights(
        "https://download.openmmlab.com/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth",
        "ee2c6f71",
    ),
}


class Verdict(Protocol):
    """What an evaluation gives: numbers by name, "AP" among them, and images to look at."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return numbers by name, 0 to 1."""
        ...

    @property
    def images(self) -> Sequence[NDArray[Any]]:
        """Return images to look at, (H, W, 3) uint8 RGB."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """How a run is run, not what it learns.

    Attributes:
        output: its folder.
        device: "cpu", "cuda", or this worker's GPU, such as "cuda:1".
        workers: loading processes a worker.
        save_every: steps between two checkpoints within an epoch; None writes one an epoch.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        resume: go on from the folder's last checkpoint, if there is one.
        stop_after: epochs, counted from 1, after which this call ends early.
    """

    output: Path
    device: str = "cpu"
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
    """Return mean losses, and what a step takes at the median.

    The median does not notice the few steps that something else disturbed.
    """
    if not steps:
        return {}
    names = (*(name for name in LOSS_TERMS if name in steps[0]), "grad_norm", "positives")
    means = {name: statistics.fmean(step[name] for step in steps) for name in names}
    medians = {
        name: statistics.median(step[name] for step in steps)
        for name in ("seconds", "data_seconds", "images_per_s")
    }
    return means | medians | {"lr": steps[-1]["lr"]}
