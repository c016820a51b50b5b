"""tood_deploy: from a TOOD checkpoint to fast, proven detections.

Names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tood_deploy.detections import Detections
    from tood_deploy.engines import open_engine
    from tood_deploy.errors import ToodError
    from tood_deploy.inference.detector import Detector
    from tood_deploy.inference.frame import Moment, Selection
    from tood_deploy.inference.live import Reconnection
    from tood_deploy.inference.slicing import Slicing
    from tood_deploy.presets import PRESETS, Preset


__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Detections",
    "Detector",
    "Moment",
    "Preset",
    "Reconnection",
    "Selection",
    "Slicing",
    "ToodError",
    "__version__",
    "open_engine",
]

_HOMES = {
    "Detections": "tood_deploy.detections",
    "Detector": "tood_deploy.inference.detector",
    "Moment": "tood_deploy.inference.frame",
    "PRESETS": "tood_deploy.presets",
    "Preset": "tood_deploy.presets",
    "Reconnection": "tood_deploy.inference.live",
    "Selection": "tood_deploy.inference.frame",
    "Slicing": "tood_deploy.inference.slicing",
    "ToodError": "tood_deploy.errors",
    "open_engine": "tood_deploy.engines",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
