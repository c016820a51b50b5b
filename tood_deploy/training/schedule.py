"""The optimiser of a recipe, and its learning rate as a plain function of the step: there is no state to lose."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from tood_deploy.training.recipe import Recipe

WARMUP_START = 1e-3


def make_optimiser(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that learn."""
    learning = [p for p in parameters if p.requires_grad]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(learning, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(learning, recipe.lr, weight_decay=recipe.weight_decay)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate at a step, counted from 0 over the whole run."""
    rate = recipe.lr * _warmup_factor(step, recipe.warmup_steps)
    if recipe.schedule == "cosine":
        share = min(step / (recipe.epochs * steps_per_epoch), 1.0)
        return rate * 0.5 * (1 + math.cos(math.pi * share))
    epoch = step // steps_per_epoch
    return rate * 0.1 ** sum(epoch >= drop for drop in recipe.drops)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Gives every parameter this rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def _warmup_factor(step: int, warmup_steps: int) -> float:
    """Grows linearly and reaches 1 at the last step of the warm-up."""
    if step >= warmup_steps - 1:
        return 1.0
    return WARMUP_START + (1 - WARMUP_START) * step / (warmup_steps - 1)
