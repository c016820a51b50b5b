"""The network in PyTorch: `build_model`, `load_checkpoint`, and their results."""

from tood_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from tood_deploy.model.detector import DenseDetector, FusedDetector, build_model
from tood_deploy.model.head import HeadOutput

__all__ = [
    "DenseDetector",
    "FusedDetector",
    "HeadOutput",
    "build_model",
    "load_checkpoint",
    "save_checkpoint",
]
