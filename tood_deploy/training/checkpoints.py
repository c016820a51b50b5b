"""Training checkpoints: files that hold all that is needed to go on exactly.

Weights and a run's state in, files out, whole or not at all, and back. The weights to deploy lie
where `load_checkpoint` finds them, under "state_dict" beside the preset; the rest under "training".
Knows nothing of what the state means.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tood_deploy.errors import CheckpointError, OutputError
from tood_deploy.files import atomic_path
from tood_deploy.model.checkpoint import own_metadata
from tood_deploy.model.checkpoint_content import check_content
from tood_deploy.model.checkpoint_file import OWN_KEY, load_content
from tood_deploy.presets import Preset

LAST, BEST, FINAL = "last.pth", "best.pth", "model.safetensors"


def write_training_checkpoint(
    path: Path, preset: Preset, weights: Mapping[str, Tensor], training: Mapping[str, Any]
) -> None:
    """Write one checkpoint; an older one of the same name stays until the new one is on the disk.

    Args:
        path: the file.
        preset: with its class names.
        weights: to deploy.
        training: tensors, numbers, texts and containers of them.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    content = {
        OWN_KEY: own_metadata(preset),
        "state_dict": dict(weights),
        "training": dict(training),
    }
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OutputError, RuntimeError) as error:
        # PyTorch's writer turns some disk errors into RuntimeError.
        older = f"the older {path.name} is intact" if path.is_file() else "nothing was left behind"
        raise OutputError(
            f"{path}: the checkpoint cannot be written ({_reason(error)}); {older}: "
            "make room, then go on with --resume"
        ) from error


def read_training_state(path: Path) -> dict[str, Any]:
    """Return the whole content of a training checkpoint. Never runs code from the file.

    Raises:
        CheckpointError: damaged, or not a training checkpoint of ours.
    """
    check_content(path)
    content = load_content(path)
    if (
        not isinstance(content, dict)
        or OWN_KEY not in content
        or not isinstance(content.get("training"), dict)
    ):
        raise CheckpointError(
            f"{path}: holds no state of a training; expected a checkpoint of tood-train"
        )
    return content


def make_run_folder(output: Path) -> None:
    """Make the folder of a run, if it is not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    text = getattr(cause, "strerror", None) or str(error)
    return str(text).splitlines()[0][:200] if str(text) else type(error).__name__
