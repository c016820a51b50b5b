"""Runtimes behind one face: `open_engine` picks one by the model's file name.

Names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tood_deploy.engines.base import BatchDetections, Engine
    from tood_deploy.engines.open import open_engine

__all__ = ["BatchDetections", "Engine", "open_engine"]

_MODULES = {"BatchDetections": "base", "Engine": "base", "open_engine": "open"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
