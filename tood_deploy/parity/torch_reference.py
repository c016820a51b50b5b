"""The network in PyTorch as what artefacts are compared with, and how noisy its float32 is.

A network comes in; its maps and detections, and the noise of every map, go out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tood_deploy.model.detector import DenseDetector, FusedDetector, Stages
from tood_deploy.model.heads.tood import TaskAlignedHead
from tood_deploy.parity.reference import (
    INVERSION_EDGE,
    ROUNDING,
    Conditioning,
    Map,
    Outputs,
    Reference,
    collect_noise,
)

# Float32 computations that the noise is measured with. A map of one cell says little alone, and is
# quick to compute, so small inputs get more of them.
SAMPLES, SAMPLES_OF_SMALL, SMALL_PIXELS = 4, 8, 128 * 128

aten: Any = torch.ops.aten


class ValidRounding(TorchDispatchMode):
    """Makes PyTorch compute as another float32 runtime might.

    Operands are a rounding off, and sums are in another order.
    """

    def __init__(self, seed: int, one_pass_variance: bool) -> None:
        """Set how to compute.

        Args:
            seed: of roundings and orders.
            one_pass_variance: compute group norms as the ONNX operator is defined, see
                `_one_pass_group_norm`.
        """
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.one_pass_variance = one_pass_variance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace convolutions, matrix products and group norms; leave everything else."""
        operation = func.overloadpacket
        if operation is aten.convolution:
            x, weight = self._reorder(
                self._round(args[0]), self._round(args[1]), 1, 1, groups=args[8]
            )
            return func(x, weight, *args[2:], **(kwargs or {}))
        if operation in (aten.mm, aten.bmm):
            return func(
                *self._reorder(self._round(args[0]), self._round(args[1]), -1, -2), **(kwargs or {})
            )
        if operation is aten.native_group_norm:
            x = self._round(args[0])
            return (
                _one_pass_group_norm(x, *args[1:])
                if self.one_pass_variance
                else func(x, *args[1:], **(kwargs or {}))
            )
        return func(*args, **(kwargs or {}))

    def _round(self, values: Tensor) -> Tensor:
        """Return the values, each up to one rounding off."""
        noise = torch.rand(values.shape, generator=self.generator, dtype=values.dtype)
        return noise.mul_(2).sub_(1).mul_(ROUNDING).add_(1).mul_(values)

    def _reorder(
        self, x: Tensor, weight: Tensor, x_dim: int, weight_dim: int, groups: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return both operands with the dimension that is summed over in another order.

        Where groups share that dimension out, the operands stay as they are.

        Args:
            x: one operand.
            weight: the other one.
            x_dim: dimension of `x` that is summed over.
            weight_dim: the same of `weight`.
            groups: of a convolution.
        """
        if groups != 1:
            return x, weight
        order = torch.randperm(x.shape[x_dim], generator=self.generator)
        return x.index_select(x_dim, order), weight.index_select(weight_dim, order)


def _one_pass_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    batch: int,
    channels: int,
    cells: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a group norm with the variance as the mean of squares less the square of the mean.

    So the ONNX operator is defined. Takes and returns what `aten.native_group_norm` does.
    """
    grouped = x.reshape(batch, groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped.square().mean(2, keepdim=True) - mean.square()).clamp(min=0)
    scale = (variance + eps).rsqrt()
    normalised = ((grouped - mean) * scale).reshape(x.shape)
    return (
        normalised * weight[:, None, None] + bias[:, None, None],
        mean.flatten(1),
        scale.flatten(1),
    )


def measure_conditioning(
    detector: FusedDetector,
    images: NDArray[np.uint8],
    valid_hw: NDArray[np.int32],
    score_threshold: float,
    iou_threshold: float,
) -> Conditioning:
    """Measure the float32 noise of a network on a batch.

    Args:
        detector: the network with its pre- and post-processing, in float32 on the CPU.
        images: (B, H, W, 3) uint8 RGB; H and W multiples of 32.
        valid_hw: (B, 2) int32 rows and columns that hold real pixels.
        score_threshold: score that a detection must exceed, 0 to 1.
        iou_threshold: overlap above which the weaker of two boxes goes, 0 to 1.

    Returns:
        The noise of `MAP_NAMES`, (B, C, h, w) each: pixels, C3 to C5, P3 to P7, scores of P3 to P7,
        boxes of P3 to P7.
    """
    inputs = torch.from_numpy(images), torch.from_numpy(valid_hw), score_threshold, iou_threshold
    small = images.shape[1] * images.shape[2] <= SMALL_PIXELS
    with torch.no_grad():
        plain = detector(*inputs)
        exact, excluded = _exact_maps(detector, *inputs[:2], plain)
        others = (
            _computed_otherwise(detector, inputs, seed)
            for seed in range(1, SAMPLES_OF_SMALL if small else SAMPLES)
        )
        runs = (
            (_numpy(stages.detections), _numpy(stage_maps(stages)))
            for stages in chain([plain], others)
        )
        return collect_noise(exact, excluded, runs)


def _computed_otherwise(detector: FusedDetector, inputs: Any, seed: int) -> Stages:
    with ValidRounding(seed, one_pass_variance=bool(seed % 2)):
        return detector(*inputs)


def _exact_maps(
    detector: FusedDetector, images: Tensor, valid_hw: Tensor, plain: Stages
) -> tuple[list[Map], list[NDArray[np.bool_] | None]]:
    """Return all maps in float64, and of the boxes the cells on the edge of being inverted.

    MMDetection gives an inverted box of TOOD back as it was before alignment, which is a step.
    Float64 says on which side of it a cell lies, and plain float32 the value of the boxes that are
    given back.

    Args:
        detector: in float32.
        images: (B, H, W, 3) uint8 RGB.
        valid_hw: (B, 2) int32.
        plain: what the detector itself computed of these.
    """
    model = copy.deepcopy(detector.model).double()
    restore = False
    if isinstance(model.bbox_head, TaskAlignedHead):
        restore = not model.bbox_head.keep_inverted
        model.bbox_head.keep_inverted = True
    pixels = detector.normalise(images, valid_hw).double()
    backbone = model.backbone(pixels)
    pyramid = model.neck(backbone)
    head = model.bbox_head(pyramid)
    exact = [tensor.numpy() for tensor in (pixels, *backbone, *pyramid, *head.scores)]
    excluded: list[NDArray[np.bool_] | None] = [None] * len(exact)
    for aligned, kept in zip(head.boxes_strides, plain.head.boxes_strides, strict=True):
        sides = (aligned[:, 2:] - aligned[:, :2]).amin(1, keepdim=True)
        exact.append(torch.where((sides < 0) & restore, kept.double(), aligned).numpy())
        on_edge = ((sides.abs() < INVERSION_EDGE) & restore).expand_as(aligned).numpy()
        excluded.append(on_edge if on_edge.any() else None)
    return exact, excluded


def stage_maps(stages: Stages) -> list[Tensor]:
    """Return the maps of all stages, in the order of `MAP_NAMES`."""
    return [
        stages.pixels,
        *stages.backbone,
        *stages.pyramid,
        *stages.head.scores,
        *stages.head.boxes_strides,
    ]


def _numpy(tensors: Iterable[Tensor]) -> list[NDArray[Any]]:
    return [tensor.numpy() for tensor in tensors]


class TorchRunner:
    """The network in PyTorch, float32, with its maps."""

    def __init__(self, detector: FusedDetector) -> None:
        """Take a detector on the CPU."""
        self.detector = detector.eval()
        self.name = f"PyTorch {torch.__version__}, float32"

    @torch.inference_mode()
    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """Run a batch, see `Runner`."""
        stages = self.detector(
            torch.from_numpy(images), torch.from_numpy(valid_hw), score_threshold, iou_threshold
        )
        return [tensor.numpy() for tensor in (*stages.detections, *stage_maps(stages))]


def torch_reference(model: DenseDetector, max_det: int) -> Reference:
    """Return a network as a reference, with at most `max_det` detections an image."""
    detector = FusedDetector(model, max_det).eval()
    return Reference(
        TorchRunner(detector),
        model.preset.sizing,
        lambda *inputs: measure_conditioning(detector, *inputs),
        model.preset.iou_threshold,
    )
