"""A network at the start of training: first weights and frozen layers.

A preset and files of weights in, a network out. Knows no data and no steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tood_deploy.errors import CheckpointError, DownloadError
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.model.checkpoint_file import read_checkpoint
from tood_deploy.model.detector import DenseDetector, build_model
from tood_deploy.model.download import fetch_weights
from tood_deploy.model.heads import CLASS_LAYERS
from tood_deploy.model.resnet import BasicBlock, Bottleneck
from tood_deploy.presets import Preset, PublishedWeights
from tood_deploy.reporter import Reporter
from tood_deploy.training.config import BACKBONES

# What changes the meaning of weights and leaves no trace in them: training keeps the preset's.
SETTINGS = (
    "norm_groups",
    "norm_eps",
    "batch_norm_eps",
    "anchor_side",
    "anchor_offset",
    "delta_means",
    "delta_stds",
)
SETTINGS += ("channel_order", "pad_value", "mean", "std")
NOT_IN_BACKBONES = ("conv_offset.", "num_batches_tracked")


def new_model(preset: Preset, seed: int) -> DenseDetector:
    """Return the network with random weights that follow from the seed.

    Every residual block begins as the identity, its last norm's scale zero, as both public
    implementations train from scratch.
    """
    torch.manual_seed(seed)
    model = build_model(preset)
    for block in model.backbone.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
    return model


def load_backbone(
    model: DenseDetector, source: str | None, reporter: Reporter | None = None
) -> str:
    """Fill the backbone with weights trained for classification, in torchvision's key names.

    Args:
        model: it is changed.
        source: a file or a URL; None takes the published recipe's, downloaded once.
        reporter: shows how far a download is; one that is not quiet where not given.

    Returns:
        One line: what was loaded.

    Raises:
        CheckpointError: the file does not fit.
        DownloadError: it cannot be fetched.
    """
    path = _backbone_file(model.preset, source, reporter)
    state = dict(_backbone_tensors(read_checkpoint(path).state_dict))
    expected = model.backbone.state_dict()
    keys = [key for key in expected if not any(part in key for part in NOT_IN_BACKBONES)]
    missing = [key for key in keys if key not in state]
    wrong = [key for key in keys if key in state and state[key].shape != expected[key].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{path}: not the weights of a ResNet of depth {model.preset.depth} with "
            f"{model.preset.groups} groups: {len(missing)} keys missing "
            f"({', '.join(missing[:3])}), "
            f"{len(wrong)} of another shape ({', '.join(wrong[:3])})"
        )
    model.backbone.load_state_dict({key: state[key].float() for key in keys}, strict=False)
    return f"backbone: {len(keys)} tensors of {path}"


def load_pretrained(
    model: DenseDetector,
    checkpoint: str,
    weights_key: str | None = None,
    reporter: Reporter | None = None,
) -> str:
    """Fill the network from a checkpoint; where classes differ, the class layer stays random.

    Args:
        model: it is changed.
        checkpoint: of the same detector, a file of any known kind, or a preset's name.
        weights_key: which weights, where the file holds several.
        reporter: shows how far a download is; one that is not quiet where not given.

    Returns:
        One line: what was loaded, and whether the class layer was.

    Raises:
        CheckpointError: another structure, kind of anchors or setting of the network.
    """
    source = load_checkpoint(
        checkpoint, preset=model.preset, weights_key=weights_key, reporter=reporter
    )
    if source.preset.anchor != model.preset.anchor:
        raise CheckpointError(
            f"{checkpoint}: anchor-{source.preset.anchor}, the preset {model.preset.name} is "
            f"anchor-{model.preset.anchor}; choose another preset"
        )
    _check_settings(source.preset, model.preset, checkpoint)
    state = source.state_dict()
    if source.preset.class_names == model.preset.class_names:
        model.load_state_dict(state)
        return f"all weights from {checkpoint}"
    class_layer = f"bbox_head.{CLASS_LAYERS[model.preset.detector]}."
    kept = {key: value for key, value in state.items() if not key.startswith(class_layer)}
    model.load_state_dict(kept, strict=False)
    return (
        f"weights from {checkpoint}, but for the class layer, which starts anew: "
        f"{source.preset.num_classes} classes there, {model.preset.num_classes} here"
    )


def _check_settings(source: Preset, preset: Preset, checkpoint: str) -> None:
    """Raise CheckpointError where the two networks compute something else of the same weights."""
    for name in SETTINGS:
        given, expected = getattr(source, name), getattr(preset, name)
        if given != expected:
            raise CheckpointError(
                f"{checkpoint}: was trained with {name} = {given}, the preset {preset.name} has "
                f"{expected}, with which its weights compute something else; "
                "fine-tune a checkpoint of the preset's own settings"
            )


def freeze(model: DenseDetector, stages: int, norm: bool) -> None:
    """Put the network into training mode, and fix its first layers and running statistics.

    Args:
        model: the network.
        stages: backbone stages, the stem before them, that learn nothing; -1 leaves the stem free
            too, 0 fixes the stem alone.
        norm: batch norms keep their statistics; their scale and shift go on learning.
    """
    backbone = model.backbone
    fixed: list[nn.Module] = []
    if stages >= 0:
        layers = (getattr(backbone, f"layer{n}") for n in range(1, stages + 1))
        fixed = [backbone.conv1, backbone.bn1, *layers]
    for module in fixed:
        module.requires_grad_(False)
    model.train()
    for module in [*fixed, backbone] if norm else fixed:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()


def _backbone_file(preset: Preset, source: str | None, reporter: Reporter | None) -> Path:
    if source is not None and not re.match(r"https?://", source):
        return Path(source)
    weights = (
        BACKBONES.get((preset.depth, preset.groups)) if source is None else _weights_at(source)
    )
    if weights is None:
        raise CheckpointError(
            f"no ImageNet backbone is known for depth {preset.depth} with {preset.groups} groups; "
            "give --backbone-weights or --from-scratch"
        )
    try:
        return fetch_weights(replace(preset, weights=weights), reporter=reporter)
    except DownloadError as error:
        raise DownloadError(
            f"{error}; or give --backbone-weights FILE, --checkpoint or --from-scratch"
        ) from error


def _weights_at(url: str) -> PublishedWeights:
    """Return the weights at a URL, with the start of their hash where the name carries it."""
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return PublishedWeights(url, match[1] if match else "")


def _backbone_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under the backbone's own names, also out of a whole detector."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    for key, value in state.items():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), value
