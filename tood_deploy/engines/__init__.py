"""Runtimes behind one face: `open_engine` picks one by the model's file name."""

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.engines.opening import open_engine

__all__ = ["BatchDetections", "Engine", "open_engine"]
