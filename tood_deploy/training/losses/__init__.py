"""The losses of the detectors, one file each; `build_loss` gives the one of a training."""

from tood_deploy.errors import ToodError
from tood_deploy.presets import DetectorName, Preset
from tood_deploy.training.config import Recipe
from tood_deploy.training.losses.atss import AtssLoss
from tood_deploy.training.losses.gfl import GflLoss
from tood_deploy.training.losses.paa import PaaLoss
from tood_deploy.training.losses.tood import ToodLoss

DetectorLoss = ToodLoss | AtssLoss | GflLoss | PaaLoss

LOSSES: dict[DetectorName, type[AtssLoss] | type[GflLoss] | type[PaaLoss]] = {
    "atss": AtssLoss,
    "gfl": GflLoss,
    "paa": PaaLoss,
}


def build_loss(preset: Preset, recipe: Recipe) -> DetectorLoss:
    """Return the loss that a detector is trained by.

    Raises:
        ToodError: there is none for this detector.
    """
    if recipe.loss == "tood" or preset.detector == "tood":
        return ToodLoss(preset, warmup_epochs=recipe.atss_epochs)
    if preset.detector not in LOSSES:
        trained = ", ".join(("tood", *LOSSES))
        raise ToodError(
            f"{preset.name}: there is no training of {preset.detector}; expected one of {trained}"
        )
    return LOSSES[preset.detector](preset)
