"""Load checkpoints into networks, and save networks.

A checkpoint of any known kind, or a preset's name, in, a `DenseDetector` out; and back, into our
own safetensors. Decides which preset a file belongs to, by what its metadata, its shapes and the
user say together. How files are read is `checkpoint_file`'s business.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tood_deploy.errors import CheckpointError, ToodError
from tood_deploy.files import atomic_path, file_sha256
from tood_deploy.model.checkpoint_file import OWN_KEY, CheckpointFile, list_some, read_checkpoint
from tood_deploy.model.checkpoint_metadata import (
    ConfigFacts,
    Shapes,
    numbered_classes,
    preset_from_shapes,
    read_config,
    same_structure,
)
from tood_deploy.model.config_heads import keys_of
from tood_deploy.model.detector import DenseDetector
from tood_deploy.model.download import fetch_weights
from tood_deploy.preprocess import with_imgsz
from tood_deploy.presets import BASES, PRESETS, Convention, Preset, get_preset
from tood_deploy.reporter import Reporter


def load_checkpoint(
    checkpoint: str | PathLike[str],
    *,
    preset: str | Preset | None = None,
    class_names: Sequence[str] | None = None,
    convention: Convention | None = None,
    weights_key: str | None = None,
    imgsz: Sequence[int] | None = None,
    reporter: Reporter | None = None,
) -> DenseDetector:
    """Load the network of a checkpoint, in eval mode, float32, on the CPU.

    Never runs code from the file.

    Args:
        checkpoint: a file of MMDetection 2.x or 3.x, of the authors, or our own; or a preset's
            name, whose published weights are then downloaded once.
        preset: the configuration, where the file does not hold it; must not contradict the file.
        class_names: in place of the file's.
        convention: whose test-time behaviour to follow, in place of that of the file's origin.
        weights_key: the weights to take where the file holds several networks, such as "ema",
            "model" or "teacher".
        imgsz: (short side, long side) of the images, in place of the file's; see `with_imgsz`.
        reporter: shows how far a download is; one that is not quiet where not given.

    Raises:
        ToodError: `imgsz` is not two positive whole numbers.
        CheckpointError: cannot be read, is refused, is not a detector of the family, does not fit,
            does not say what its weights leave open, was trained with a setting that cannot be
            computed, or holds several networks.
        DownloadError: the published weights cannot be downloaded or stored.
    """
    if isinstance(preset, str):
        preset = get_preset(preset)
    if preset is None and is_preset_name(checkpoint):
        preset = PRESETS[str(checkpoint)]
    file = read_checkpoint(locate_checkpoint(checkpoint, reporter), weights_key)
    sha256 = file_sha256(file.path)
    own = _preset_of_file(file, preset, sha256, named=class_names is not None)
    names = _check_class_names(class_names, own, file.path)
    own = replace(own, class_names=names, convention=convention or own.convention)
    model = _fill(with_imgsz(own, imgsz), file)
    model.checkpoint_sha256 = sha256
    return model


def is_preset_name(checkpoint: str | PathLike[str]) -> bool:
    """Return whether this is the name of a preset and of no file."""
    return str(checkpoint) in PRESETS and not Path(checkpoint).exists()


def locate_checkpoint(checkpoint: str | PathLike[str], reporter: Reporter | None = None) -> Path:
    """Return the file of a checkpoint; of a preset's name that of its weights, downloaded once.

    Args:
        checkpoint: the file, or a preset's name.
        reporter: shows how far a download is; one that is not quiet where not given.

    Raises:
        DownloadError: the published weights cannot be downloaded or stored.
    """
    if is_preset_name(checkpoint):
        return fetch_weights(PRESETS[str(checkpoint)], reporter=reporter)
    return Path(checkpoint)


def save_checkpoint(
    model: DenseDetector, path: str | PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write our own format, safetensors with the preset in its metadata, whole or not at all.

    Args:
        model: the network.
        path: of the file.
        dtype: of the floating-point tensors in the file.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for key, value in model.state_dict().items()
    }
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, {OWN_KEY: own_metadata(model.preset)}))


def own_metadata(preset: Preset) -> str:
    """Return the JSON of a preset, as our own checkpoints hold it under the key `OWN_KEY`."""
    return json.dumps(preset.to_dict())


def _preset_of_file(file: CheckpointFile, given: Preset | None, sha256: str, named: bool) -> Preset:
    """Return the preset of a file: that in our own files, else one from shapes, metadata and user.

    A published file is known by its hash, whatever an old framework wrote into it.

    Args:
        file: the checkpoint.
        given: the user's preset.
        sha256: of the file.
        named: whether the user gives the class names, so that those of the file do not count.
    """
    shapes = _shapes(file.state_dict)
    fitting = preset_from_shapes(shapes, str(file.path))
    if given is not None and not same_structure(given, fitting):
        problems = _differences(_expected_shapes(given), shapes)
        raise CheckpointError(
            f"{file.path}: does not fit the preset {given.name}: {problems}; "
            f"it fits {_presets_like(fitting)}"
        )
    if file.own_preset is not None:
        return _own_preset(file)
    published = _published(sha256)
    if published is not None and given in (None, published):
        return published
    facts = read_config(file.meta, str(file.path), fitting)
    count = fitting.num_classes
    names = numbered_classes(count)
    if not named:
        names = _class_names(facts, given or fitting, count, file.path)
    chosen = _choose_preset(fitting, facts, given, file.path)
    fields = {"class_names": names, "convention": file.origin} | facts.settings
    try:
        return replace(chosen, **fields)
    except ToodError as error:
        raise CheckpointError(
            f"{file.path}: its configuration cannot be computed: {error}"
        ) from error


def _published(sha256: str) -> Preset | None:
    """Return the preset whose published weights are the file of this hash; None where none is."""
    for preset in PRESETS.values():
        if preset.weights is not None and sha256.startswith(preset.weights.sha256_prefix):
            return preset
    return None


def _choose_preset(fitting: Preset, facts: ConfigFacts, given: Preset | None, path: Path) -> Preset:
    """Return the user's preset if the file does not contradict it, else that of the metadata.

    Args:
        fitting: the preset that the shapes fit, of whatever they leave open.
        facts: of the metadata.
        given: the user's preset.
        path: the file, for errors.
    """
    if given is not None:
        _check_given(given, facts, path)
        return given
    cure = f"with --preset (in Python, preset=): {_presets_like(fitting)}"
    if facts.problem:
        raise CheckpointError(
            f"{path}: its configuration cannot be parsed ({facts.problem}), so that nothing says "
            f"how its weights are to be used; say what it was trained as {cure}"
        )
    if fitting.detector == "tood":
        if facts.anchor is None:
            raise CheckpointError(
                f"{path}: does not tell whether its head is anchor-free or anchor-based, as both "
                f"have the same weights; say which {cure}"
            )
        return _preset_of_schedule(replace(fitting, anchor=facts.anchor), facts.epochs)
    if open_question := _open_question(fitting, facts):
        raise CheckpointError(
            f"{path}: does not tell {open_question}, as both have the same weights; say which "
            f"{cure}"
        )
    base = BASES[facts.detector or fitting.detector]
    own = {"detector": base.detector, "score_voting": base.score_voting}
    style = facts.settings.get("backbone_style", fitting.backbone_style)
    told: dict[str, Any] = own | {"backbone_style": style, "anchor": base.anchor}
    return _preset_of_schedule(replace(fitting, **told), facts.epochs)


def _open_question(fitting: Preset, facts: ConfigFacts) -> str:
    """Return what neither weights nor configuration say of a relative of TOOD; "" for nothing."""
    if keys_of(fitting.detector) == "atss" and facts.detector is None:
        return "whether it is a detector of ATSS or of PAA"
    two_styles = fitting.detector in ("fcos", "retinanet") and fitting.depth >= 50
    if two_styles and "backbone_style" not in facts.settings:
        return "whether its backbone has the strides of Caffe or of PyTorch"
    return ""


def _check_given(given: Preset, facts: ConfigFacts, path: Path) -> None:
    """Refuse the user's preset where the file's configuration says something else.

    Args:
        given: the preset.
        facts: of the metadata.
        path: the file, for errors.
    """
    says: dict[str, tuple[object, str]] = {
        "detector": (facts.detector, given.detector),
        "anchor": (facts.anchor and f"anchor-{facts.anchor}", f"anchor-{given.anchor}"),
        "style": (facts.settings.get("backbone_style"), given.backbone_style),
    }
    for said, own in says.values():
        if said not in (None, own):
            raise CheckpointError(
                f"{path}: its configuration says {said}, the preset {given.name} is {own}; leave "
                "the preset out"
            )


def _presets_like(preset: Preset) -> str:
    """Return the names of presets of this structure, for a message."""
    names = [name for name, other in PRESETS.items() if same_structure(other, preset)]
    return " or ".join(names) or "a Preset of your own (in Python)"


def _class_names(facts: ConfigFacts, preset: Preset, count: int, path: Path) -> tuple[str, ...]:
    """Return the file's names, else the preset's if there are as many as classes, else numbers.

    Args:
        facts: of the metadata.
        preset: the user's or the fitting one.
        count: classes of the weights.
        path: the file, for errors.
    """
    names = facts.class_names
    if names is None:
        return preset.class_names if preset.num_classes == count else numbered_classes(count)
    if len(names) != count:
        raise CheckpointError(
            f"{path}: its weights have {count} classes, its metadata names {len(names)} "
            f"({list_some(names)}); give the {count} names with --classes (in Python, class_names=)"
        )
    return names


def _preset_of_schedule(fitting: Preset, epochs: int | None) -> Preset:
    """Return the preset that a file was trained by, among those that differ in schedule alone.

    Args:
        fitting: of the file's structure and meaning.
        epochs: of the training.

    Returns:
        The preset of that schedule; where there is none of this structure and meaning, the given
        one under the name "custom".
    """
    alike = [
        preset
        for preset in PRESETS.values()
        if same_structure(preset, fitting) and _same_meaning(preset, fitting)
    ]
    if not alike:
        return replace(fitting, name="custom", weights=None, published_ap=None)
    suffix = {24: "2x", 36: "3x"}.get(epochs or 0, "1x")
    best = next((preset for preset in alike if preset.name.endswith(suffix)), alike[0])
    return replace(best, class_names=fitting.class_names)


def _same_meaning(first: Preset, second: Preset) -> bool:
    """Return whether two presets of one structure compute the same of the same weights."""

    def meaning(preset: Preset) -> tuple[object, ...]:
        return preset.detector, preset.anchor, preset.backbone_style

    return meaning(first) == meaning(second)


def _own_preset(file: CheckpointFile) -> Preset:
    try:
        return Preset.from_dict(json.loads(file.own_preset or ""))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file.path}: its metadata cannot be read ({error}); "
            "expected a checkpoint of tood_deploy"
        ) from error


def _expected_shapes(preset: Preset) -> Shapes:
    with torch.device("meta"):
        return _shapes(DenseDetector(preset).state_dict())


def _check_class_names(
    class_names: Sequence[str] | None, preset: Preset, path: Path
) -> tuple[str, ...]:
    """Return the names that the user gives, else the preset's.

    Args:
        class_names: the user's.
        preset: of the file.
        path: the file, for errors.
    """
    if class_names is None:
        return preset.class_names
    if len(class_names) != preset.num_classes:
        raise CheckpointError(
            f"{path}: has {preset.num_classes} classes, {len(class_names)} names were given; "
            "give one name for each class"
        )
    return tuple(class_names)


def _fill(preset: Preset, file: CheckpointFile) -> DenseDetector:
    """Build the network of a preset and fill it with the file's tensors, all of them."""
    expected, state = _expected_shapes(preset), dict(file.state_dict)
    for key in (key for key, shape in expected.items() if not shape):
        # Files from before PyTorch 0.4.1 lack batch counts, which nothing uses, and hold scalars as
        # vectors of one.
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros((), dtype=torch.int64))
        if key in state and state[key].shape == (1,):
            state[key] = state[key][0]
    if problems := _differences(expected, _shapes(state)):
        raise CheckpointError(
            f"{file.path}: does not fit the preset {preset.name}: {problems}; "
            f"the file is damaged or of a variant of {preset.detector}"
        )
    with torch.device("meta"):
        model = DenseDetector(preset)
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = value.float()
    model.load_state_dict(state, assign=True)
    _check_finite(model, file.path)
    return model.requires_grad_(True).eval()


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _differences(expected: Shapes, actual: Shapes) -> str:
    """Return what is missing, unexpected and of another shape, a few by name; "" where nothing."""
    shared = sorted(expected.keys() & actual.keys())
    reshaped = [key for key in shared if actual[key] != expected[key]]
    kinds = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unexpected": sorted(actual.keys() - expected.keys()),
        "of another shape": [f"{key} {actual[key]} for {expected[key]}" for key in reshaped],
    }
    parts = [
        f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
    return "; ".join(parts)


def _check_finite(model: DenseDetector, path: Path) -> None:
    tensors = model.state_dict()
    floating = {key: value for key, value in tensors.items() if value.is_floating_point()}
    broken = [key for key, value in floating.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} tensors hold NaN or infinite values "
            f"({', '.join(broken[:3])}); the training diverged: take an earlier checkpoint"
        )
