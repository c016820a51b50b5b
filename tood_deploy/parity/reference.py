"""What an artefact is compared with, and how far float32 itself is off on the same input.

Maps of several valid float32 computations come in, the noise of each map goes out: the unit of a
float32 verdict. NumPy alone; `torch_reference` and `onnx_reference` do the computing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tood_deploy.presets import Sizing

ROUNDING = 2.0**-24  # the largest relative error of one float32 rounding

# In strides. A box whose sides are as near to each other may be inverted in one computation and not
# in another.
INVERSION_EDGE = 1e-3

Map = NDArray[np.float64]
Outputs = list[NDArray[Any]]


@dataclass(frozen=True, eq=False)
class MapNoise:
    """The float32 noise of one map.

    Attributes:
        exact: (B, C, h, w) the map in float64.
        rms: root mean square of the deviation from it, over all computations and values.
        largest: the largest one.
        excluded: (B, C, h, w) values that hang on a decision which float32 takes either way; None
            where there are none.
    """

    exact: Map
    rms: float
    largest: float
    excluded: NDArray[np.bool_] | None = None

    @property
    def cells(self) -> int:
        """Return rows times columns."""
        return self.exact.shape[-2] * self.exact.shape[-1]

    @property
    def spread(self) -> float:
        """Return how far the map's own values lie apart: their standard deviation."""
        return float(self.exact.std())


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The noise of a batch.

    Attributes:
        maps: of every map, in the order of `MAP_NAMES`.
        detections: of every float32 computation, what `OUTPUTS` names; the plain one first.
    """

    maps: tuple[MapNoise, ...]
    detections: tuple[Outputs, ...]


def collect_noise(
    exact: Sequence[Map],
    excluded: Sequence[NDArray[np.bool_] | None],
    runs: Iterable[tuple[Outputs, Outputs]],
) -> Conditioning:
    """Gather the noise of several float32 computations.

    Args:
        exact: every map in float64.
        excluded: of every map what is not compared, see `MapNoise`.
        runs: of every computation its detections and its maps; taken one at a time, as they are
            large.
    """
    deviations: list[list[tuple[float, float]]] = [[] for _ in exact]
    all_detections = []
    for detections, maps in runs:
        all_detections.append(detections)
        for own, values, true, left_out in zip(deviations, maps, exact, excluded, strict=True):
            own.append(deviation_of(values, true, left_out))
    noise = map(_noise_of_map, exact, deviations, excluded)
    return Conditioning(tuple(noise), tuple(all_detections))


def deviation_of(
    values: NDArray[Any], exact: Map, excluded: NDArray[np.bool_] | None
) -> tuple[float, float]:
    """Return the root mean square and the largest deviation of a map.

    Both are infinite where shapes differ or a value is not a number.

    Args:
        values: (B, C, h, w) the map of some computation.
        exact: (B, C, h, w) the same in float64.
        excluded: see `MapNoise`.
    """
    if values.shape != exact.shape or not np.isfinite(values).all():
        return float("inf"), float("inf")
    off = np.abs(values - exact)
    if excluded is not None:
        off[excluded] = 0
    return float(np.sqrt(np.square(off).mean())), float(off.max(initial=0))


def _noise_of_map(
    exact: Map, deviations: Sequence[tuple[float, float]], excluded: NDArray[np.bool_] | None
) -> MapNoise:
    """Return the noise of all computations, at least what rounding the result itself costs."""
    mean_square = float(np.mean([rms**2 for rms, _ in deviations]))
    rms = max(mean_square**0.5, ROUNDING * float(np.sqrt(np.square(exact).mean())))
    rounding = ROUNDING * float(np.abs(exact).max(initial=0))
    return MapNoise(exact, rms, max(rounding, *(most for _, most in deviations)), excluded)


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
        """Run a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB, padded to multiples of 32.
            valid_hw: (B, 2) int32 rows and columns that hold real pixels.
            score_threshold: score that a detection must exceed, 0 to 1.
            iou_threshold: overlap above which the weaker of two boxes goes, 0 to 1.

        Returns:
            What `OUTPUTS` names, then, if opened with maps, what `MAP_NAMES` names. The arrays are
            the caller's.
        """
        ...


Measure = Callable[[NDArray[np.uint8], NDArray[np.int32], float, float], Conditioning]


@dataclass(frozen=True)
class Reference:
    """What an artefact is compared with.

    Attributes:
        run: runs it.
        sizing: how users' images are brought to the size of the network's input.
        measure: measures the float32 noise of its maps on a batch; takes what `run` takes.
        iou_threshold: of the suppression, the model's own.
    """

    run: Runner
    sizing: Sizing
    measure: Measure
    iou_threshold: float = 0.6
