"""Training: `ToodLoss` and its `Targets`."""

from tood_deploy.training.loss import Losses, ToodLoss
from tood_deploy.training.targets import Targets

__all__ = ["Losses", "Targets", "ToodLoss"]
