"""What an artefact is compared with: a runner that gives maps and detections, and how noisy float32 is on the same input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tood_deploy.model.tood import FusedDetector, Stages, Tood
from tood_deploy.presets import Sizing

ROUNDING = 2.0**-24  # the largest relative error of one float32 rounding
SAMPLES, SAMPLES_OF_SMALL, SMALL_PIXELS = (
    4,
    8,
    128 * 128,
)  # a map of one cell says little alone, and is quick to compute
INVERSION_EDGE = 1e-3  # strides; a box whose sides are as near to each other may be inverted in one computation and not in another

Map = NDArray[np.float64]
aten: Any = torch.ops.aten


@dataclass(frozen=True, eq=False)
class MapNoise:
    """The float32 noise of one map.

    Attributes:
        exact: the map in float64.
        rms: root mean square of the deviation from it, over all computations and values.
        largest: the largest one.
        excluded: values that hang on a decision which float32 takes either way, of the shape of `exact`; None where there are none.
    """

    exact: Map
    rms: float
    largest: float
    excluded: NDArray[np.bool_] | None = None

    @property
    def cells(self) -> int:
        """Rows times columns."""
        return self.exact.shape[-2] * self.exact.shape[-1]

    @property
    def spread(self) -> float:
        """How far the map's own values lie apart: their standard deviation."""
        return float(self.exact.std())


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The noise of every map of a batch, in the order of the stages, and the detections of every float32 computation."""

    maps: tuple[MapNoise, ...]
    detections: tuple[list[NDArray[Any]], ...]


class ValidRounding(TorchDispatchMode):
    """Makes PyTorch compute as another float32 runtime might: operands a rounding off, sums in another order."""

    def __init__(self, seed: int, one_pass_variance: bool) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.one_pass_variance = one_pass_variance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces convolutions, matrix products and group norms; everything else runs as it is."""
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
        """The values, each up to one rounding off."""
        noise = torch.rand(values.shape, generator=self.generator, dtype=values.dtype)
        return noise.mul_(2).sub_(1).mul_(ROUNDING).add_(1).mul_(values)

    def _reorder(
        self, x: Tensor, weight: Tensor, x_dim: int, weight_dim: int, groups: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Both operands with the dimension that is summed over in another order; as they are where groups share it out."""
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
    """Group norm with the variance as the mean of squares less the square of the mean, as the ONNX operator is defined."""
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
        score_threshold, iou_threshold: of the detections.

    Returns:
        The noise of `MAP_NAMES`, (B, C, h, w) each: pixels, C3 to C5, P3 to P7, scores of P3 to P7, boxes of P3 to P7.
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


def collect_noise(
    exact: Sequence[Map],
    excluded: Sequence[NDArray[np.bool_] | None],
    runs: Iterable[tuple[list[NDArray[Any]], list[NDArray[Any]]]],
) -> Conditioning:
    """Gather the noise of several float32 computations.

    Args:
        exact: every map in float64.
        excluded: of every map what is not compared, see `MapNoise`.
        runs: of every computation its detections and its maps.
    """
    errors: list[list[tuple[float, float]]] = [[] for _ in exact]
    detections = []
    for found, maps in runs:
        detections.append(found)
        for own, values, true, left_out in zip(errors, maps, exact, excluded, strict=True):
            own.append(deviation_of(values, true, left_out))
    return Conditioning(
        tuple(_noise(*each) for each in zip(exact, errors, excluded, strict=True)),
        tuple(detections),
    )


def _computed_otherwise(detector: FusedDetector, inputs: Any, seed: int) -> Stages:
    with ValidRounding(seed, one_pass_variance=bool(seed % 2)):
        return detector(*inputs)


def deviation_of(
    values: NDArray[Any], exact: Map, excluded: NDArray[np.bool_] | None
) -> tuple[float, float]:
    """Return the root mean square and the largest deviation from `exact`; infinite where shapes differ or a value is not a number."""
    if values.shape != exact.shape or not np.isfinite(values).all():
        return float("inf"), float("inf")
    off = np.abs(values - exact)
    if excluded is not None:
        off[excluded] = 0
    return float(np.sqrt(np.square(off).mean())), float(off.max(initial=0))


def _noise(
    exact: Map, errors: Sequence[tuple[float, float]], excluded: NDArray[np.bool_] | None
) -> MapNoise:
    """The noise from each computation's deviation, at least what rounding the result itself costs."""
    rms = max(
        float(np.sqrt(np.mean([each**2 for each, _ in errors]))),
        ROUNDING * float(np.sqrt(np.square(exact).mean())),
    )
    largest = max(*(each for _, each in errors), ROUNDING * float(np.abs(exact).max(initial=0)))
    return MapNoise(exact, rms, largest, excluded)


def _exact_maps(
    detector: FusedDetector, images: Tensor, valid_hw: Tensor, plain: Stages
) -> tuple[list[Map], list[NDArray[np.bool_] | None]]:
    """All maps in float64, and of the boxes the cells that lie on the edge of being inverted.

    MMDetection gives an inverted box back as it was before alignment, which is a step: float64 tells on which side of it a cell lies, and
    plain float32 tells the value of the boxes that are given back.
    """
    model = copy.deepcopy(detector.model).double()
    model.bbox_head.keep_inverted = True
    pixels = detector.normalise(images, valid_hw).double()
    backbone = model.backbone(pixels)
    pyramid = model.neck(backbone)
    head = model.bbox_head(pyramid)
    exact = [tensor.numpy() for tensor in (pixels, *backbone, *pyramid, *head.scores)]
    excluded: list[NDArray[np.bool_] | None] = [None] * len(exact)
    for aligned, kept in zip(head.boxes_strides, plain.head.boxes_strides, strict=True):
        sides = (aligned[:, 2:] - aligned[:, :2]).amin(1, keepdim=True)
        restore = not detector.model.bbox_head.keep_inverted
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


Outputs = list[NDArray[Any]]
Measure = Callable[[NDArray[np.uint8], NDArray[np.int32], float, float], Conditioning]


class Runner(Protocol):
    """Runs the graph of DESIGN section 4.

    Attributes:
        name: runtime, version, precision and device, for the verdict.
    """

    name: str

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """Return what `OUTPUTS` names, then, if opened with maps, what `MAP_NAMES` names; the arrays are the caller's."""
        ...


@dataclass(frozen=True)
class Reference:
    """What an artefact is compared with.

    Attributes:
        run: runs it.
        sizing: how users' images are brought to the size of the network's input.
        measure: measures the float32 noise of its maps on a batch.
    """

    run: Runner
    sizing: Sizing
    measure: Measure


class TorchRunner:
    """The network in PyTorch, float32, with its maps."""

    def __init__(self, detector: FusedDetector) -> None:
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
        """See `Runner`."""
        stages = self.detector(
            torch.from_numpy(images), torch.from_numpy(valid_hw), score_threshold, iou_threshold
        )
        return [tensor.numpy() for tensor in (*stages.detections, *stage_maps(stages))]


def torch_reference(model: Tood, max_det: int) -> Reference:
    """The network itself."""
    detector = FusedDetector(model, max_det).eval()
    return Reference(
        TorchRunner(detector),
        model.preset.sizing,
        lambda *inputs: measure_conditioning(detector, *inputs),
    )
