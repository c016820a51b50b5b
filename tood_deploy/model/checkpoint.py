"""Checkpoints into networks, and back: any of the known kinds in, our own safetensors out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tood_deploy.errors import CheckpointError, ToodError
from tood_deploy.files import atomic_path, file_sha256
from tood_deploy.model.checkpoint_file import OWN_KEY, CheckpointFile, few, read_checkpoint
from tood_deploy.model.checkpoint_metadata import (
    ConfigFacts,
    Shapes,
    numbered_classes,
    preset_from_shapes,
    read_config,
    same_structure,
)
from tood_deploy.model.download import fetch_weights
from tood_deploy.model.tood import Tood
from tood_deploy.presets import PRESETS, Convention, Preset, get_preset


def load_checkpoint(
    checkpoint: str | PathLike[str],
    *,
    preset: str | Preset | None = None,
    class_names: Sequence[str] | None = None,
    convention: Convention | None = None,
    weights_key: str | None = None,
) -> Tood:
    """The network of a checkpoint, in eval mode, float32, on the CPU. Never runs code from the file.

    Args:
        checkpoint: a file of MMDetection 2.x or 3.x, of the authors, or our own; or a preset's name, whose published weights
            are then downloaded once.
        preset: the configuration, where the file does not tell it; must not contradict the file.
        class_names: in place of the file's.
        convention: whose test-time behaviour to follow, in place of the one of the checkpoint's origin.
        weights_key: which weights to take where the file holds several, such as "ema", "model" or "teacher".

    Raises:
        CheckpointError: cannot be read, is refused, is not a TOOD detector, does not fit, does not tell its anchor kind, was trained with
            a setting that cannot be computed, or holds several networks.
        DownloadError: the published weights cannot be had.
    """
    if isinstance(preset, str):
        preset = get_preset(preset)
    if preset is None and is_preset_name(checkpoint):
        preset = PRESETS[str(checkpoint)]
    file = read_checkpoint(locate_checkpoint(checkpoint), weights_key)
    found = _describe(file, preset, named=class_names is not None)
    found = replace(
        found,
        class_names=_check_class_names(class_names, found, file.path),
        convention=convention or found.convention,
    )
    model = _fill(found, file)
    model.checkpoint_sha256 = file_sha256(file.path)
    return model


def is_preset_name(checkpoint: str | PathLike[str]) -> bool:
    """Whether this names a preset; a file of the same name comes first."""
    return str(checkpoint) in PRESETS and not Path(checkpoint).exists()


def locate_checkpoint(checkpoint: str | PathLike[str]) -> Path:
    """The file of a checkpoint; a preset's name downloads the published weights unless they are here already.

    Raises:
        DownloadError: the published weights cannot be had.
    """
    return (
        fetch_weights(PRESETS[str(checkpoint)]) if is_preset_name(checkpoint) else Path(checkpoint)
    )


def save_checkpoint(
    model: Tood, path: str | PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Writes our own format: safetensors, with preset and class names in its metadata, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    tensors = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for key, value in model.state_dict().items()
    }
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, {OWN_KEY: own_metadata(model.preset)}))


def own_metadata(preset: Preset) -> str:
    """JSON of a preset, as our own checkpoints hold it under the key `OWN_KEY`."""
    return json.dumps(preset.to_dict())


def _describe(file: CheckpointFile, given: Preset | None, named: bool) -> Preset:
    """Return the preset of a file: from our own metadata, else from what shapes, the framework's metadata and the user say together.

    `named`: the user gives the class names, so those of the file do not count.
    """
    shapes = _shapes(file.state_dict)
    found = preset_from_shapes(shapes, str(file.path))
    if given is not None and not same_structure(given, found):
        problems = _differences(_expected_shapes(given), shapes)
        raise CheckpointError(
            f"{file.path}: does not fit the preset {given.name}: {problems}; it fits {_alike(found)}"
        )
    if file.own_preset is not None:
        return _own_preset(file)
    facts = read_config(file.meta, str(file.path), found)
    count = found.num_classes
    names = (
        numbered_classes(count) if named else _class_names(facts, given or found, count, file.path)
    )
    found = _choose_preset(found, facts, given, file.path)
    try:
        return replace(found, class_names=names, convention=file.origin, **facts.settings)
    except ToodError as error:
        raise CheckpointError(
            f"{file.path}: its configuration cannot be computed: {error}"
        ) from error


def _choose_preset(found: Preset, facts: ConfigFacts, given: Preset | None, path: Path) -> Preset:
    """The one the user names, if the file does not contradict it; else the one that the file's metadata tells."""
    if given is not None:
        if facts.anchor not in (None, given.anchor):
            raise CheckpointError(
                f"{path}: its configuration says anchor-{facts.anchor}, the preset {given.name} is anchor-{given.anchor}; "
                "leave the preset out"
            )
        return given
    if facts.problem:
        raise CheckpointError(
            f"{path}: its configuration cannot be parsed ({facts.problem}), so that nothing tells how its weights are to be used; "
            f"say what it was trained as with --preset (in Python, preset=): {_alike(found)}"
        )
    if facts.anchor is None:
        raise CheckpointError(
            f"{path}: does not tell whether its head is anchor-free or anchor-based, as both have the same weights; "
            f"say which with --preset (in Python, preset=): {_alike(found)}"
        )
    return _preset_of_schedule(replace(found, anchor=facts.anchor), facts.epochs)


def _alike(found: Preset) -> str:
    """The presets of this structure, for a message."""
    return (
        " or ".join(name for name, preset in PRESETS.items() if same_structure(preset, found))
        or "a Preset made for it in Python"
    )


def _class_names(facts: ConfigFacts, preset: Preset, count: int, path: Path) -> tuple[str, ...]:
    """Return the file's names; where it has none the preset's, if there are as many as the weights have classes, else numbered ones."""
    names = facts.class_names
    if names is None:
        return preset.class_names if preset.num_classes == count else numbered_classes(count)
    if len(names) != count:
        raise CheckpointError(
            f"{path}: its weights have {count} classes, its metadata names {len(names)} ({few(names)}); "
            f"give the {count} names with --classes (in Python, class_names=)"
        )
    return names


def _preset_of_schedule(found: Preset, epochs: int | None) -> Preset:
    """Among presets that differ in schedule and anchor kind alone, the one the file was trained by; "custom" if none."""
    alike = [
        preset
        for preset in PRESETS.values()
        if same_structure(preset, found) and preset.anchor == found.anchor
    ]
    if not alike:
        return replace(found, name="custom", weights=None, published_ap=None)
    suffix = "2x" if epochs == 24 else "1x"
    best = next((preset for preset in alike if preset.name.endswith(suffix)), alike[0])
    return replace(best, class_names=found.class_names)


def _own_preset(file: CheckpointFile) -> Preset:
    try:
        return Preset.from_dict(json.loads(file.own_preset or ""))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file.path}: its metadata cannot be read ({error}); expected a checkpoint of tood_deploy"
        ) from error


def _expected_shapes(preset: Preset) -> Shapes:
    with torch.device("meta"):
        return _shapes(Tood(preset).state_dict())


def _check_class_names(
    class_names: Sequence[str] | None, found: Preset, path: Path
) -> tuple[str, ...]:
    if class_names is None:
        return found.class_names
    if len(class_names) != found.num_classes:
        raise CheckpointError(
            f"{path}: has {found.num_classes} classes, {len(class_names)} names were given; give one name for each class"
        )
    return tuple(class_names)


def _fill(preset: Preset, file: CheckpointFile) -> Tood:
    expected, state = _expected_shapes(preset), dict(file.state_dict)
    for key in (key for key, shape in expected.items() if not shape):
        if key.endswith("num_batches_tracked"):
            state.setdefault(
                key, torch.zeros((), dtype=torch.int64)
            )  # files from before PyTorch 0.4.1 lack it; nothing uses it
        if key in state and state[key].shape == (1,):
            state[key] = state[key][0]  # they also hold scalars as vectors of one
    if problems := _differences(expected, _shapes(state)):
        raise CheckpointError(
            f"{file.path}: does not fit the preset {preset.name}: {problems}; the file is damaged or of a variant of TOOD"
        )
    with torch.device("meta"):
        model = Tood(preset)
    model.load_state_dict(
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in state.items()
        },
        assign=True,
    )
    _check_finite(model, file.path)
    return model.requires_grad_(True).eval()


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _differences(expected: Shapes, found: Shapes) -> str:
    """What is missing, unexpected and mis-shaped, a few by name; empty where nothing is."""
    shared = expected.keys() & found.keys()
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {found[key]} for {expected[key]}"
            for key in sorted(shared)
            if found[key] != expected[key]
        ],
    }
    return "; ".join(
        f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    )


def _check_finite(model: Tood, path: Path) -> None:
    broken = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} tensors hold NaN or infinite values ({', '.join(broken[:3])}); the training diverged"
        )
