"""The network in PyTorch: `build_model`, `load_checkpoint`, and their results."""

from tood_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from tood_deploy.model.head import HeadOutput
from tood_deploy.model.tood import FusedDetector, Tood, build_model

__all__ = [
    "FusedDetector",
    "HeadOutput",
    "Tood",
    "build_model",
    "load_checkpoint",
    "save_checkpoint",
]
