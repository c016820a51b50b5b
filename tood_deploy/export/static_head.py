"""The head with static kernels: the tower's stages one by one, where the network joins them and makes a kernel for every image.

The same sums in another order (parity below 1e-5). A static kernel can be quantised and laid out in advance, and nothing is joined to
1536 channels. Weighing what the convolutions give, not what they take, leaves them the input that the next stage reads too, so that it is
quantised once. docs/performance.md has the measurements.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.head import Alignment, TaskAlignedHead, TaskDecomposition, TowerMaps


def use_static_kernels(head: TaskAlignedHead) -> None:
    """Replaces what reads the tower's stages, in place; the weights are shared."""
    for name in ("cls_decomp", "reg_decomp"):
        setattr(head, name, StaticDecomposition(getattr(head, name)))
    for name in ("cls_prob_module", "reg_offset_module"):
        setattr(head, name, StaticAlignment(getattr(head, name), len(head.inter_convs)))


class StaticDecomposition(nn.Module):
    """A `TaskDecomposition` that weighs the convolved stages."""

    def __init__(self, layer: TaskDecomposition) -> None:
        super().__init__()
        self.layer = layer
        self.kernels = _kernels_by_stage(layer.reduction_conv.conv.weight, layer.stages)

    def forward(self, tower: TowerMaps) -> Tensor:
        """As `TaskDecomposition.forward`."""
        weights = self.layer.stage_weights(tower).unsqueeze(2).unsqueeze(3)
        parts = [
            F.conv2d(stage, kernel) * weights[:, i : i + 1]
            for i, (stage, kernel) in enumerate(zip(tower.stages, self.kernels, strict=True))
        ]
        return F.relu(self.layer.reduction_conv.gn(_sum(parts)))


class StaticAlignment(nn.Module):
    """An `Alignment` that sums over the convolved stages."""

    def __init__(self, layer: Alignment, stages: int) -> None:
        super().__init__()
        first, self.activation, self.last = layer
        assert isinstance(first, nn.Conv2d)
        self.kernels = _kernels_by_stage(first.weight, stages)
        self.bias = first.bias

    def forward(self, tower: TowerMaps) -> Tensor:
        """As `Alignment.forward`."""
        parts = [
            F.conv2d(stage, kernel, None if i else self.bias)
            for i, (stage, kernel) in enumerate(zip(tower.stages, self.kernels, strict=True))
        ]
        return self.last(self.activation(_sum(parts)))


def _kernels_by_stage(kernel: Tensor, stages: int) -> nn.ParameterList:
    """(C', S*C, 1, 1) cut into S kernels (C', C, 1, 1)."""
    return nn.ParameterList(part.detach().contiguous() for part in kernel.chunk(stages, dim=1))


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
