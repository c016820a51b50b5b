"""Training: `fit` a network to COCO-format data by a `Recipe`; `ToodLoss` and its `Targets` by themselves."""

from tood_deploy.training.loop import fit
from tood_deploy.training.loss import Losses, ToodLoss
from tood_deploy.training.recipe import RECIPES, Recipe
from tood_deploy.training.run import RunOptions
from tood_deploy.training.targets import Targets

__all__ = ["RECIPES", "Losses", "Recipe", "RunOptions", "Targets", "ToodLoss", "fit"]
