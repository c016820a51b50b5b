"""Training: `fit` a network to data by a `Recipe`; `ToodLoss` and its `Targets` by themselves."""

from tood_deploy.training.assign import Targets
from tood_deploy.training.config import RECIPES, Recipe, RunOptions
from tood_deploy.training.loop import fit
from tood_deploy.training.loss import Losses, ToodLoss

__all__ = ["RECIPES", "Losses", "Recipe", "RunOptions", "Targets", "ToodLoss", "fit"]
