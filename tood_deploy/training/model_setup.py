"""A network made ready for training: what is frozen, and where its first weights come from."""

from __future__ import annotations

from torch import nn

from tood_deploy.model.tood import Tood


def freeze(model: Tood, stages: int, norm: bool) -> None:
    """Fixes the first layers, and all running statistics, for good.

    Args:
        model: the network.
        stages: backbone stages, the stem before them, that learn nothing; -1 leaves the stem free too, 0 fixes the stem alone.
        norm: batch norms keep their statistics; their scale and shift go on learning.
    """
    backbone = model.backbone
    fixed = [] if stages < 0 else [backbone.conv1, backbone.bn1, *(getattr(backbone, f"layer{n}") for n in range(1, stages + 1))]
    for module in fixed:
        module.requires_grad_(False)
    keep = [*fixed, backbone] if norm else fixed
    model.train()
    for module in keep:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
