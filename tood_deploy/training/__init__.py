"""Training: `fit` a network to data by a `Recipe`; losses and their `Targets` by themselves."""

from tood_deploy.training.assign import Targets
from tood_deploy.training.config import RECIPES, Recipe, RunOptions
from tood_deploy.training.loop import fit
from tood_deploy.training.loss import Losses
from tood_deploy.training.losses import AtssLoss, GflLoss, PaaLoss, ToodLoss

__all__ = [
    "RECIPES",
    "AtssLoss",
    "GflLoss",
    "Losses",
    "PaaLoss",
    "Recipe",
    "RunOptions",
    "Targets",
    "ToodLoss",
    "fit",
]
