"""Which runtime opens which model. Imports a runtime only when it is asked for."""

from os import PathLike
from pathlib import Path
from typing import Any

from tood_deploy.engines.base import Engine
from tood_deploy.errors import ToodError
from tood_deploy.presets import PRESETS

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")


def open_engine(model: str | PathLike[str], *, device: str = "cpu", **options: Any) -> Engine:
    """Opens a model in the runtime it is made for.

    Args:
        model: an .onnx artefact (ONNX Runtime); a checkpoint (.pth, .pt, .safetensors) or a preset's name (PyTorch).
        device: "cpu" or "cuda".
        **options: of that runtime: `threads`, and for checkpoints what `load_checkpoint` takes.

    Raises:
        ToodError: no such file, not a model, or the device is not there.
    """
    if device not in ("cpu", "cuda"):
        raise ToodError(f"device is {device!r}; expected cpu or cuda")
    path = Path(model)
    suffix = path.suffix.lower()
    named = str(model) in PRESETS and not path.exists()
    if not named and not path.is_file():
        raise ToodError(f"{model}: no such file; expected an .onnx artefact, a checkpoint, or one of the presets {', '.join(PRESETS)}")
    if suffix == ".onnx":
        from tood_deploy.engines.onnx_engine import OnnxEngine

        return OnnxEngine(path, device=device, **options)
    if named or suffix in CHECKPOINT_SUFFIXES:
        from tood_deploy.engines.torch_engine import TorchEngine

        return TorchEngine(model, device=device, **options)
    expected = ", ".join((".onnx", *CHECKPOINT_SUFFIXES))
    raise ToodError(f"{model}: a file ending in {suffix or 'nothing'} is not a model that can be opened; expected one of {expected}")
