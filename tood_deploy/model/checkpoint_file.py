"""Reads checkpoint files without ever running code from them. Knows nothing of the network.

A file becomes its tensors under MMDetection 3.x names, and the metadata that came with them. Layouts: reference/SPEC.md section 5.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tood_deploy.errors import CheckpointError
from tood_deploy.model.file_content import COPY_AGAIN, check_content
from tood_deploy.model.weights_choice import choose_weights
from tood_deploy.presets import Convention

OWN_KEY = "tood_deploy"  # under which our own files hold the preset, as JSON

AUTHORS_NAMES = (
    ("_decomp.la_conv1.", "_decomp.layer_attention.0."),
    ("_decomp.la_conv2.", "_decomp.layer_attention.2."),
    ("bbox_head.cls_prob_conv1.", "bbox_head.cls_prob_module.0."),
    ("bbox_head.cls_prob_conv2.", "bbox_head.cls_prob_module.2."),
    ("bbox_head.reg_offset_conv1.", "bbox_head.reg_offset_module.0."),
    ("bbox_head.reg_offset_conv2.", "bbox_head.reg_offset_module.2."),
)

# Metadata classes that training frameworks leave in their files. None of it is needed: each is read as an empty object.
METADATA_CLASSES = (
    "builtins.getattr",  # mmengine's HistoryBuffer names its own methods by it
    "collections.defaultdict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)


class Skipped(dict[Any, Any]):
    """Stands in for a metadata object whose class is not needed; takes whatever the file says of it and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds.

    Attributes:
        path: the file.
        state_dict: tensors under MMDetection 3.x names.
        meta: the framework's metadata; empty where there is none.
        own_preset: JSON of the preset, in our own files.
        origin: whose key names the file has.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    own_preset: str | None = None
    origin: Convention = "mmdet"


def read_checkpoint(path: Path, weights_key: str | None = None) -> CheckpointFile:
    """Read a checkpoint of MMDetection, of the authors, or of our own.

    Args:
        path: the file.
        weights_key: which weights to take where it holds several; see `choose_weights`.

    Raises:
        CheckpointError: no such file, no checkpoint, damaged, asks to run code, holds no weights, or those of several networks.
    """
    if check_content(path) == "safetensors":
        return _read_safetensors(path, weights_key)
    content = load_content(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary of weights")
    tensors = choose_weights(content, path, weights_key)
    meta, own_preset = content.get("meta"), content.get(OWN_KEY)
    return CheckpointFile(
        path,
        dict(_canonical(tensors)),
        meta if isinstance(meta, Mapping) else {},
        own_preset if isinstance(own_preset, str) else None,
        "authors" if any(old in key for key in tensors for old, _ in AUTHORS_NAMES) else "mmdet",
    )


def _read_safetensors(path: Path, weights_key: str | None) -> CheckpointFile:
    try:
        with safe_open(path, framework="pt") as file:
            own_preset = (file.metadata() or {}).get(OWN_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors, cut or not such a file ({error}); {COPY_AGAIN}") from error
    return CheckpointFile(path, dict(_canonical(choose_weights(tensors, path, weights_key))), own_preset=own_preset)


def load_content(path: Path) -> Any:
    """Return what PyTorch stored in a file that `check_content` takes for its own, without ever running code from it.

    Raises:
        CheckpointError: damaged, or asks to run code.
    """
    allowed: list[Any] = [(Skipped, name) for name in METADATA_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # said below where it fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path}: {_reason(str(error), path)}") from error


def _reason(message: str, path: Path) -> str:
    """Say why PyTorch could not load a file; its own words advise to run whatever the file holds."""
    if refused := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"refused, because loading it would run code of its own ({refused[1]}); "
            "expected weights and plain metadata only: save the state_dict alone in the environment that it comes from"
        )
    if "magic number" in message or "Unsupported operand" in message or "persistent" in message:
        return "is no file that torch.save wrote, or a damaged one; save the state_dict with torch.save, or copy or download it again"
    return f"cannot be read, cut or not a checkpoint ({path.stat().st_size:,} bytes); {COPY_AGAIN}"


def _canonical(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors under MMDetection 3.x names, without wrappers' prefixes and mmcv's averaged copies."""
    for key, tensor in tensors.items():
        key = key.removeprefix("module.")
        if key.startswith("ema_"):
            continue  # mmcv 1.x: the raw weights, the main names hold the average
        for old, new in AUTHORS_NAMES:
            key = key.replace(old, new)
        yield key.replace("conv2_offset.", "conv2.conv_offset."), tensor
