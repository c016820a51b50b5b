"""How far arrays of numbers are from a reference, gathered over any number of images in flat memory. NumPy alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.graph_io import MAP_NAMES
from tood_deploy.matching import NetDetections, match_boxes
from tood_deploy.parity.reference import Conditioning
from tood_deploy.parity.stages import STAGES, Stage, Values
from tood_deploy.parity.tolerances import FLOAT32_LIMITS, Gates
from tood_deploy.presets import STRIDES

BINS_PER_DECADE, LOWEST_POWER, HIGHEST_POWER = 40, -12, 8
LARGEST_SAMPLE = 50_000  # elements of one array that the quantile looks at


def _no_counts() -> NDArray[np.int64]:
    return np.zeros((HIGHEST_POWER - LOWEST_POWER) * BINS_PER_DECADE + 1, np.int64)


@dataclass
class Deviation:
    """Absolute differences from a reference.

    Attributes:
        tolerance: what counts as outside lies above it.
        relative: whether the tolerance is in units of the reference's root mean square, array by array.
        elements: numbers compared.
        outside: of these, outside the tolerance; what is not a number is.
        not_numbers: NaN or infinite where the reference is not, or without a counterpart because shapes differ.
        largest: the largest difference of numbers.
        squares, reference_squares: sums of squares, for the relative L2 norm.
        counts: how many of a sample lie in which power of ten.
    """

    tolerance: float = 0.0
    relative: bool = False
    elements: int = 0
    outside: int = 0
    not_numbers: int = 0
    largest: float = 0.0
    squares: float = 0.0
    reference_squares: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=_no_counts, repr=False)

    def add(self, reference: NDArray[np.floating], found: NDArray[np.floating]) -> None:
        """Adds two arrays; with other shapes nothing of them can be compared, and all of it counts as not a number."""
        if reference.shape != found.shape:
            found = np.full_like(reference, np.nan)
        known = np.isfinite(reference)
        both = known & np.isfinite(found)
        difference = np.abs(np.where(both, found, 0) - np.where(both, reference, 0)).ravel()
        reference = np.where(known, reference, 0)
        not_numbers = int(known.sum() - both.sum())
        self.elements += difference.size
        self.not_numbers += not_numbers
        unit = (
            float(np.sqrt(np.square(reference, dtype=np.float64).mean()))
            if self.relative and reference.size
            else 1.0
        )
        self.outside += int((difference > self.tolerance * unit).sum()) + not_numbers
        self.largest = max(self.largest, float(difference.max(initial=0)))
        self.squares += float(np.square(difference, dtype=np.float64).sum())
        self.reference_squares += float(np.square(reference, dtype=np.float64).sum())
        self._count(difference[:: max(1, difference.size // LARGEST_SAMPLE)])

    def _count(self, sample: NDArray[np.floating]) -> None:
        powers = np.log10(np.maximum(sample, 10.0**LOWEST_POWER)) - LOWEST_POWER
        bins = np.ceil(powers * BINS_PER_DECADE).astype(int).clip(0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def __add__(self, other: Deviation) -> Deviation:
        """Both together."""
        return Deviation(
            max(self.tolerance, other.tolerance),
            self.relative,
            self.elements + other.elements,
            self.outside + other.outside,
            self.not_numbers + other.not_numbers,
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.reference_squares + other.reference_squares,
            self.counts + other.counts,
        )

    @property
    def p99(self) -> float:
        """99 of 100 differences are at most this, to within 6%; 0 below 1e-12."""
        if not self.counts.sum():
            return 0.0
        bin_number = int(np.searchsorted(self.counts.cumsum(), 0.99 * self.counts.sum()))
        return (
            min(self.largest, 10.0 ** (LOWEST_POWER + bin_number / BINS_PER_DECADE))
            if bin_number
            else 0.0
        )

    @property
    def relative_l2(self) -> float:
        """L2 norm of the difference over that of the reference; infinite where anything is not a number."""
        if self.not_numbers:
            return float("inf")
        return (
            float(np.sqrt(self.squares / self.reference_squares))
            if self.reference_squares
            else float(self.squares > 0)
        )

    @property
    def worst(self) -> float:
        """The largest difference; infinite where anything is not a number."""
        return float("inf") if self.not_numbers else self.largest

    @property
    def outside_share(self) -> float:
        """0 to 1."""
        return self.outside / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """Plain values."""
        return {
            "max": self.worst,
            "p99": self.p99,
            "relative_l2": self.relative_l2,
            "outside_share": self.outside_share,
            "tolerance": self.tolerance,
            "elements": self.elements,
            "not_numbers": self.not_numbers,
        }


ROW_STAGES = ("candidates", "detections")
CARRIED_SLACK = 5  # of maps as deployed: the rounding of all stages before adds up


@dataclass(frozen=True)
class Failure:
    """One limit that was passed.

    Attributes:
        stage: "pixels" to "detections", "AP", "batch slots" or "sizes".
        what: the value and measure.
        found, allowed: numbers of that measure.
        carried: whether it was found with what the stages before handed on, not with the reference's values.
    """

    stage: str
    what: str
    found: float
    allowed: float
    carried: bool = False

    def __str__(self) -> str:
        how = " (with what the stages before it handed on)" if self.carried else ""
        return f"{self.stage}: {self.what} {self.found:.3g}, allowed {self.allowed:.3g}{how}"

    @property
    def ratio(self) -> float:
        """How far beyond the limit; above 1."""
        return self.found / self.allowed if self.allowed else float("inf")


class StageDeviations:
    """What is gathered of all stages.

    Attributes:
        maps: by name of the graph's value, for the stages that give maps.
        rows: of the candidates and of the detections.
    """

    def __init__(self, gates: Gates, carried: bool) -> None:
        self.gates, self.carried = gates, carried
        self.maps = {
            name: self._new_deviation(stage, name)
            for stage in STAGES
            if stage.name not in ROW_STAGES
            for name in stage.gives
        }
        self.rows = {
            name: RowDeviation(Deviation(gates.max_score), Deviation(gates.max_box_px))
            for name in ROW_STAGES
        }

    def _new_deviation(self, stage: Stage, name: str) -> Deviation:
        if stage.name == "pixels":
            return Deviation(self.gates.max_pixel)
        slack = CARRIED_SLACK if self.carried else 1
        if stage.name == "head":
            return Deviation(
                slack * (self.gates.max_box_strides if "boxes" in name else self.gates.max_score)
            )
        return Deviation(slack * self.gates.max_map, relative=True)

    def allow_noise(self, noise: Conditioning) -> None:
        """Raises the limits to what float32 itself explains on the input that is compared, where that is more."""
        strides = dict(zip(MAP_NAMES[-len(STRIDES) :], STRIDES, strict=True))
        for name, own in zip(MAP_NAMES, noise.maps, strict=True):
            deviation, largest = self.maps[name], FLOAT32_LIMITS.largest * own.largest
            unit = float(np.sqrt(np.square(own.exact).mean()))
            allowed = (
                FLOAT32_LIMITS.rms_of(own.cells) * own.rms / unit
                if deviation.relative and unit
                else largest
            )
            deviation.tolerance = max(deviation.tolerance, allowed)
            for rows in self.rows.values():
                if name.startswith("head_scores"):
                    rows.score.tolerance = max(rows.score.tolerance, largest)
                elif name in strides:
                    rows.box_px.tolerance = max(rows.box_px.tolerance, largest * strides[name])

    def add(self, stage: Stage, reference: Values, found: Values) -> NDArray[np.intp] | None:
        """Adds what a stage gave for one image; for candidates and detections, gives the pairs of rows."""
        if stage.name in ROW_STAGES:
            return self.rows[stage.name].add(rows_of(stage, reference), rows_of(stage, found))
        for name in stage.gives:
            self.maps[name].add(reference[name], found[name])
        return None

    def waterfall(self) -> dict[str, Deviation]:
        """The deviation of every stage that was compared, in their order; scores and boxes apart."""
        found: dict[str, Deviation] = {}
        for stage in STAGES:
            if stage.name in ROW_STAGES:
                found |= {
                    f"{stage.name}: scores": self.rows[stage.name].score,
                    f"{stage.name}: boxes (px)": self.rows[stage.name].box_px,
                }
            elif stage.name == "head":
                for kind in ("scores", "boxes"):
                    found[f"head: {kind}"] = _sum(
                        [self.maps[name] for name in stage.gives if kind in name]
                    )
            else:
                found[stage.name] = _sum([self.maps[name] for name in stage.gives])
        return {name: deviation for name, deviation in found.items() if deviation.elements}

    def failures(self) -> Iterator[Failure]:
        """Every limit that a stage passed, in the order of the stages; of a stage's maps the worst alone."""
        for stage in STAGES:
            failed = list(
                self._row_failures(stage.name)
                if stage.name in ROW_STAGES
                else self._map_failures(stage)
            )
            yield from sorted(failed, key=lambda failure: -failure.ratio)[
                : len(failed) if stage.name in ROW_STAGES else 1
            ]

    def _map_failures(self, stage: Stage) -> Iterator[Failure]:
        for name in stage.gives:
            deviation = self.maps[name]
            if not deviation.elements:
                continue
            measure, found = (
                ("relative L2", deviation.relative_l2)
                if deviation.relative
                else self._extreme(deviation)
            )
            if deviation.not_numbers:
                yield Failure(
                    stage.name,
                    f"{name}: NaN, infinite or missing numbers:",
                    deviation.not_numbers,
                    0,
                    self.carried,
                )
            elif found > deviation.tolerance:
                yield Failure(
                    stage.name, f"{name}: {measure}", found, deviation.tolerance, self.carried
                )

    def _row_failures(self, stage: str) -> Iterator[Failure]:
        rows = self.rows[stage]
        if rows.not_numbers:
            yield Failure(
                stage, "boxes with NaN or infinite numbers:", rows.not_numbers, 0, self.carried
            )
        if rows.matched_share < self.gates.min_matched:
            yield Failure(
                stage,
                "share lost or added",
                1 - rows.matched_share,
                1 - self.gates.min_matched,
                self.carried,
            )
        for what, deviation in (("score", rows.score), ("coordinate (px)", rows.box_px)):
            measure, found = self._extreme(deviation)
            if found > deviation.tolerance:
                yield Failure(stage, f"{what} {measure}", found, deviation.tolerance, self.carried)

    def _extreme(self, deviation: Deviation) -> tuple[str, float]:
        return (
            ("largest deviation", deviation.worst)
            if self.gates.outliers
            else ("deviation of 99 in 100", deviation.p99)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by name of the graph's value or of the stage."""
        return {
            name: found.to_dict()
            for name, found in (*self.maps.items(), *self.rows.items())
            if _has_content(found)
        }


def _has_content(found: Deviation | RowDeviation) -> bool:
    return bool(found.elements if isinstance(found, Deviation) else found.reference + found.added)


def _sum(deviations: list[Deviation]) -> Deviation:
    total = deviations[0]
    for deviation in deviations[1:]:
        total = total + deviation
    return total


def rows_of(stage: Stage, values: Values) -> NetDetections:
    """The candidates or detections of the one image in a batch, without the rows that hold none."""
    if stage.name == "candidates":
        boxes, scores, labels = (values[name][0] for name in stage.gives)
        real = ~(scores <= 0)  # a NaN stays, to be told
        return NetDetections(boxes[real], scores[real], labels[real])
    count, boxes, scores, labels = (values[name][0] for name in stage.gives)
    return NetDetections(boxes[:count], scores[:count], labels[:count])


@dataclass
class RowDeviation:
    """What became of the reference's boxes, over all images.

    Attributes:
        score, box_px: shifts of the paired boxes' scores and coordinates (pixels).
        reference: boxes of the reference.
        matched: of these, found again.
        added: boxes that only the other has.
        not_numbers: boxes with a NaN or infinite coordinate or score.
    """

    score: Deviation = field(default_factory=Deviation)
    box_px: Deviation = field(default_factory=Deviation)
    reference: int = 0
    matched: int = 0
    added: int = 0
    not_numbers: int = 0

    def add(self, reference: NetDetections, found: NetDetections) -> NDArray[np.intp]:
        """Adds one image; gives the pairs, see `match_boxes`."""
        self.not_numbers += int(
            (~np.isfinite(found.scores) | ~np.isfinite(found.boxes).all(axis=1)).sum()
        )
        pairs = match_boxes(reference, found).pairs
        self.score.add(reference.scores[pairs[:, 0]], found.scores[pairs[:, 1]])
        self.box_px.add(reference.boxes[pairs[:, 0]], found.boxes[pairs[:, 1]])
        self.reference += len(reference)
        self.matched += len(pairs)
        self.added += len(found) - len(pairs)
        return pairs

    @property
    def lost(self) -> int:
        """Boxes that only the reference has."""
        return self.reference - self.matched

    @property
    def matched_share(self) -> float:
        """Of the boxes of either run, those that both have: 0 to 1; 1 where there are none."""
        either = self.reference + self.added
        return self.matched / either if either else 1.0

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {
            "reference": self.reference,
            "matched": self.matched,
            "lost": self.lost,
            "added": self.added,
            "matched_share": self.matched_share,
            "not_numbers": self.not_numbers,
            "score": self.score.to_dict(),
            "box_px": self.box_px.to_dict(),
        }
