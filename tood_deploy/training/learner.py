"""One step of learning: a batch in, updated weights out. Knows no files and no ends of epochs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tood_deploy.errors import CheckFailed
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.model.head import HeadMaps, SeparateTowers
from tood_deploy.training.config import LOSS_TERMS, Recipe
from tood_deploy.training.data import Batch
from tood_deploy.training.distributed import gather_objects, mean_over_ranks, world_size
from tood_deploy.training.init import freeze
from tood_deploy.training.losses import build_loss


class WeightAverage:
    """Keeps `decay` of the average at each update, less at first, and adds of the network."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the network's present weights; whole numbers are copied."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - keep)
            else:
                self.state[key].copy_(value)

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a stored average."""
        self.updates = updates
        for key, value in state.items():
            self.state[key].copy_(value)


WARMUP_START = 1e-3


def make_optimiser(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the parameters that learn."""
    learning = [p for p in parameters if p.requires_grad]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(
            learning, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
    return torch.optim.AdamW(learning, recipe.lr, weight_decay=recipe.weight_decay)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the rate at a step.

    Args:
        recipe: gives rate, schedule and warm-up.
        step: counted from 0 over the whole run.
        steps_per_epoch: of the data.
    """
    rate = recipe.lr * _warmup_factor(step, recipe.warmup_steps)
    if recipe.schedule == "cosine":
        share = min(step / (recipe.epochs * steps_per_epoch), 1.0)
        return rate * 0.5 * (1 + math.cos(math.pi * share))
    epoch = step // steps_per_epoch
    return rate * 0.1 ** sum(epoch >= drop for drop in recipe.drops)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter this rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def _warmup_factor(step: int, warmup_steps: int) -> float:
    """Return a factor that grows linearly and reaches 1 at the last step of the warm-up."""
    if step >= warmup_steps - 1:
        return 1.0
    return WARMUP_START + (1 - WARMUP_START) * step / (warmup_steps - 1)


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """What a step gave.

    Attributes:
        losses: means of all terms over all workers, by name.
        grad_norm: of the gradient before clipping.
        positives: anchor points that learnt a box, of this worker.
    """

    losses: dict[str, float]
    grad_norm: float
    positives: int


class NonFinite(CheckFailed):
    """A loss or gradient that is no number; the weights are as they were before the step."""


class Learner:
    """A network with all that changes it.

    Attributes:
        model: the network, whose raw weights learn.
        average: of the weights, None where the recipe keeps none.
    """

    def __init__(self, model: DenseDetector, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.model = model.to(device)
        if device.type == "cpu":
            _run_channels_last(model.backbone)
        self.prepare()
        self.normalise = FusedDetector(model).to(device).normalise
        self.criterion = build_loss(model.preset, recipe)
        self.optimiser = make_optimiser(model.parameters(), recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.average = WeightAverage(model, recipe.ema) if recipe.ema is not None else None
        network = MapsNetwork(model) if self.criterion.reads_maps else model
        self.network = _wrap(network, recipe, device)

    def prepare(self) -> None:
        """Go into training mode, but for what the recipe freezes; evaluation ends it."""
        freeze(self.model, self.recipe.frozen_stages, self.recipe.freeze_norm)

    def step(self, parts: Sequence[Batch], epoch: int, rate: float) -> StepResult:
        """Learn from one batch.

        Args:
            parts: of the batch, as many as the recipe accumulates.
            epoch: counted from 0; decides the kind of assignment.
            rate: of learning.

        Raises:
            NonFinite: the loss or its gradient is not finite; the weights are untouched.
        """
        set_learning_rate(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        names = self.criterion.term_names
        sums, positives = torch.zeros(len(names), device=self.device), 0
        for number, part in enumerate(parts, start=1):
            with self._sync(last=number == len(parts)):
                part_losses, count = self._backward(part, epoch, len(parts))
            sums += part_losses
            positives += count
        losses = dict(zip(names, mean_over_ranks(sums).tolist(), strict=True))
        ids = [key for part in parts for key in part.image_ids]
        said = " + ".join(f"{losses[name]} ({LOSS_TERMS[name]})" for name in names)
        if not _finite(*losses.values()):
            raise NonFinite(f"the loss is {said}; images {_gather_ids(ids)}")
        self.scaler.unscale_(self.optimiser)
        norm = self._clip()
        if not _finite(norm) and not self.scaler.is_enabled():
            raise NonFinite(
                f"the gradient's norm is {norm}, the loss {said}; images {_gather_ids(ids)}"
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        return StepResult(losses, norm, positives)

    def deployed_weights(self) -> dict[str, Tensor]:
        """Return the average's weights where there is one, else the network's."""
        return self.average.state if self.average is not None else self.model.state_dict()

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, apart from `deployed_weights`."""
        return {
            "model": self.model.state_dict() if self.average is not None else {},
            "average_updates": self.average.updates if self.average is not None else 0,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `deployed_weights` and `state` gave."""
        self.model.load_state_dict(state["model"] or weights)
        if self.average is not None:
            self.average.restore(weights, state["average_updates"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and len(state["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def _backward(self, batch: Batch, epoch: int, parts: int) -> tuple[Tensor, int]:
        """Add the gradient of one part.

        Args:
            batch: the part.
            epoch: counted from 0.
            parts: number of them.

        Returns:
            Its detached terms, in the criterion's order, divided by `parts`; and its positives.
        """
        images = self.normalise(
            batch.images.to(self.device, non_blocking=True), batch.valid_hw.to(self.device)
        )
        precision = AUTOCAST[self.recipe.precision]
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            out = self.network(images)
        losses = self.criterion(out, batch.targets, epoch)
        self.scaler.scale(losses.total / parts).backward()
        terms = torch.stack([losses.terms[name] for name in self.criterion.term_names])
        return terms.detach() / parts, losses.positives

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let gradients travel between workers with the last part only."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> float:
        """Clip the gradient as the recipe says; return its norm before."""
        learning = [p for p in self.model.parameters() if p.grad is not None]
        if self.recipe.clip is not None:
            return float(nn.utils.clip_grad_norm_(learning, self.recipe.clip))
        return float(nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None]))


class MapsNetwork(nn.Module):
    """A detector that gives its head's raw maps, which losses on logits read."""

    def __init__(self, model: DenseDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> HeadMaps:
        """Return the maps of normalised images (B, 3, H, W)."""
        model, head = self.model, self.model.bbox_head
        if not isinstance(head, SeparateTowers):
            raise TypeError(f"{type(head).__name__} has no raw maps; expected separate towers")
        return head.maps(model.neck(model.backbone(images)))


def _run_channels_last(backbone: nn.Module) -> None:
    """Let a backbone compute in channels-last; its maps come out in the usual layout.

    oneDNN's convolutions of large maps with few channels, as the first ones are, are up to twice
    as fast in it. Of small maps they gain nothing, and group norms, which the head has, lose.
    """

    def enter(_: nn.Module, images: tuple[Tensor]) -> tuple[Tensor]:
        return (images[0].contiguous(memory_format=torch.channels_last),)

    def leave(_: nn.Module, __: tuple[Tensor], maps: list[Tensor]) -> list[Tensor]:
        return [values.contiguous() for values in maps]

    backbone.register_forward_pre_hook(enter)
    backbone.register_forward_hook(leave)


def _wrap(network: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    if recipe.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    if world_size() > 1:
        network = DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None
        )
    return network


def _finite(*values: float) -> bool:
    return bool(torch.tensor(values).isfinite().all())


def _gather_ids(ids: list[int]) -> str:
    return ", ".join(str(key) for share in gather_objects(ids) for key in share)
