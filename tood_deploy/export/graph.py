"""The network as the exporter sees it: flat outputs, static kernels, a form of deformable layers.

The model knows nothing of this file (DESIGN section 4).
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tood_deploy.model.deform import DeformConv2d, OffsetConv2d, sample_taps
from tood_deploy.model.detector import DenseDetector, FusedDetector, Stages
from tood_deploy.model.heads.tood import Alignment, TaskAlignedHead, TaskDecomposition, TowerMaps
from tood_deploy.model.static_detector import fold_deformable_batch_norms


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


DeformForm = Literal["op", "gather"]
DEFORM_OPSET = 19  # that brought DeformConv


class ExportedGraph(nn.Module):
    """`FusedDetector` with its outputs in a row: `OUTPUTS`, then `inner_value_names`."""

    def __init__(self, model: DenseDetector, deform: DeformForm, max_det: int) -> None:
        super().__init__()
        model = _copy_sharing_weights(model)
        if isinstance(model.bbox_head, TaskAlignedHead):
            use_static_kernels(model.bbox_head)
        fold_deformable_batch_norms(model)  # the exporter folds those behind ordinary ones
        if deform == "op":
            _exchange(model, DeformConv2d, DeformConvOp)
        _exchange(model, OffsetConv2d, OffsetConvOp if deform == "op" else OffsetConvProduct)
        self.detector = FusedDetector(model, max_det).eval()

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, ...]:
        """See `FusedDetector.forward`."""
        stages = self.detector(images, valid_hw, score_threshold, iou_threshold)
        return (*stages.detections, *inner_values(stages))


def inner_values(stages: Stages) -> tuple[Tensor, ...]:
    """What `inner_value_names` names, in its order."""
    head = (*stages.head.scores, *stages.head.boxes_strides)
    maps = (stages.pixels, *stages.backbone, *stages.pyramid, *head)
    return (*maps, *stages.candidates, *stages.ranking)


class DeformConvOp(nn.Module):
    """A `DeformConv2d` as ONNX's own operator. Only ever traced, never run by PyTorch."""

    def __init__(self, layer: DeformConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As `DeformConv2d.forward`."""
        layer = self.layer
        offset, mask = layer.offset_and_mask(x)
        attributes = {
            "group": layer.groups,
            "offset_group": layer.offset_groups,
            "kernel_shape": list(layer.weight.shape[2:]),
            "pads": [layer.padding] * 4,
            "strides": [layer.stride] * 2,
            "dilations": [1, 1],
        }
        return _deform_node(layer, x, offset, mask, attributes)


class OffsetConvOp(nn.Module):
    """An `OffsetConv2d` as ONNX's own operator. Only ever traced, never run by PyTorch."""

    def __init__(self, layer: OffsetConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """As `OffsetConv2d.forward`."""
        kernel, padding = list(self.layer.weight.shape[2:]), self.layer.padding
        attributes = {"kernel_shape": kernel, "pads": [padding] * 4}
        return _deform_node(self.layer, x, offset, None, attributes)


class OffsetConvProduct(nn.Module):
    """An `OffsetConv2d` as gathers and one product with a matrix that is made once, here.

    The optimiser folds no constant as large as these kernels, and layers whose weight is no plain
    constant stay float32 in INT8.
    """

    def __init__(self, layer: OffsetConv2d) -> None:
        super().__init__()
        out_channels, _, *kernel = layer.weight.shape
        self.kernel_hw, self.padding = (kernel[0], kernel[1]), layer.padding
        matrix = layer.weight.detach().flatten(2).permute(2, 1, 0)
        self.weight = nn.Parameter(matrix.reshape(-1, out_channels).contiguous())

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """As `OffsetConv2d.forward`."""
        samples = sample_taps(x, offset, None, self.kernel_hw, padding=self.padding)
        product = samples.reshape(-1, self.weight.shape[0]) @ self.weight
        batch, (height, width) = x.shape[0], offset.shape[2:]
        out = product.reshape(batch, height, width, self.weight.shape[1])
        return out.permute(0, 3, 1, 2).contiguous()


def _deform_node(
    layer: DeformConv2d | OffsetConv2d,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    attributes: dict[str, Any],
) -> Tensor:
    """Return what a DeformConv node gives.

    Args:
        layer: has the weight.
        x: (B, C, H, W).
        offset, mask: as `deform_conv2d` takes them.
        attributes: of the node, where they are not the operator's defaults.
    """
    return torch.onnx.ops.symbolic(
        "DeformConv",
        (x, layer.weight, offset, None, mask),
        attributes,
        dtype=x.dtype,
        shape=(x.shape[0], layer.weight.shape[0], *offset.shape[2:]),
        version=DEFORM_OPSET,
    )


def _copy_sharing_weights(model: DenseDetector) -> DenseDetector:
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def _exchange(
    model: DenseDetector, kind: type[nn.Module], make: Callable[[Any], nn.Module]
) -> None:
    """Exchange every layer of a kind for another form of it, in place.

    Args:
        model: with the layers.
        kind: of the layers.
        make: gives the other form.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
