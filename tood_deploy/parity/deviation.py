"""How far the stages of two runs are apart, over any number of images in flat memory.

What both runs gave comes in; deviations by stage go out, and which stages are beyond `StageLimits`.
NumPy alone. They name the guilty stage; whether an artefact passes is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.matching import BoxMatches, MatchCounts, NetDetections, match_boxes
from tood_deploy.parity.stages import STAGES, Stage, Values, rows_of
from tood_deploy.parity.tolerances import StageLimits

# Bins of the absolute differences, for a quantile: 40 a decade, so within 6%, from 1e-12 to 1e8.
BINS_PER_DECADE, LOWEST_POWER, HIGHEST_POWER = 40, -12, 8
LARGEST_SAMPLE = 50_000  # elements of one array that the quantile looks at

ROW_STAGES = ("candidates", "detections")
DEPLOYED_SLACK = 5  # of maps as deployed: the rounding of all stages before adds up


def _no_counts() -> NDArray[np.int64]:
    return np.zeros((HIGHEST_POWER - LOWEST_POWER) * BINS_PER_DECADE + 1, np.int64)


@dataclass
class Deviation:
    """Absolute differences from a reference.

    Attributes:
        tolerance: what counts as outside lies above it.
        relative: whether the tolerance is in units of the reference's root mean square, array by
            array.
        elements: numbers compared.
        outside: of these, outside the tolerance; what is not a number is.
        not_numbers: NaN or infinite where the reference is not, or without a counterpart because
            shapes differ.
        largest: the largest difference of numbers.
        squares: sum of the squared differences, for the relative L2 norm.
        reference_squares: sum of the squares of the reference.
        counts: how many of a sample lie in which bin.
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

    def add(self, reference: NDArray[np.floating], other: NDArray[np.floating]) -> None:
        """Add two arrays.

        With other shapes nothing of them can be compared, and all of it counts as not a number.
        """
        if reference.shape != other.shape:
            other = np.full_like(reference, np.nan)
        known = np.isfinite(reference)
        both = known & np.isfinite(other)
        difference = np.abs(np.where(both, other, 0) - np.where(both, reference, 0)).ravel()
        reference = np.where(known, reference, 0)
        not_numbers = int(known.sum() - both.sum())
        reference_squares = float(np.square(reference, dtype=np.float64).sum())
        unit = (reference_squares / max(1, reference.size)) ** 0.5 if self.relative else 1.0
        self.elements += difference.size
        self.not_numbers += not_numbers
        self.outside += int((difference > self.tolerance * unit).sum()) + not_numbers
        self.largest = max(self.largest, float(difference.max(initial=0)))
        self.squares += float(np.square(difference, dtype=np.float64).sum())
        self.reference_squares += reference_squares
        self._count(difference[:: max(1, difference.size // LARGEST_SAMPLE)])

    def _count(self, sample: NDArray[np.floating]) -> None:
        powers = np.log10(np.maximum(sample, 10.0**LOWEST_POWER)) - LOWEST_POWER
        bins = np.ceil(powers * BINS_PER_DECADE).astype(int).clip(0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def __add__(self, other: Deviation) -> Deviation:
        """Return both together."""
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
        """Return what 99 of 100 differences are at most, to within 6%; 0 below 1e-12."""
        if not self.counts.sum():
            return 0.0
        bin_number = int(np.searchsorted(self.counts.cumsum(), 0.99 * self.counts.sum()))
        if not bin_number:
            return 0.0
        return min(self.largest, 10.0 ** (LOWEST_POWER + bin_number / BINS_PER_DECADE))

    @property
    def relative_l2(self) -> float:
        """Return the L2 norm of the difference over that of the reference.

        Infinite where anything is not a number.
        """
        if self.not_numbers:
            return float("inf")
        if not self.reference_squares:
            return float(self.squares > 0)
        return (self.squares / self.reference_squares) ** 0.5

    @property
    def worst(self) -> float:
        """Return the largest difference; infinite where anything is not a number."""
        return float("inf") if self.not_numbers else self.largest

    @property
    def outside_share(self) -> float:
        """Return the share of numbers outside the tolerance, 0 to 1."""
        return self.outside / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """Return plain values."""
        return {
            "max": self.worst,
            "p99": self.p99,
            "relative_l2": self.relative_l2,
            "outside_share": self.outside_share,
            "tolerance": self.tolerance,
            "elements": self.elements,
            "not_numbers": self.not_numbers,
        }


@dataclass
class BoxDeviation:
    """What became of the reference's boxes, over all images.

    Attributes:
        score: differences of the paired boxes' scores.
        box_px: differences of the paired boxes' coordinates, pixels.
        counts: boxes of the reference, found again, and added.
        not_numbers: boxes with a NaN or infinite coordinate or score.
    """

    score: Deviation = field(default_factory=Deviation)
    box_px: Deviation = field(default_factory=Deviation)
    counts: MatchCounts = field(default_factory=MatchCounts)
    not_numbers: int = 0

    def add(self, reference: NetDetections, other: NetDetections) -> BoxMatches:
        """Add one image, and return the pairs."""
        finite = np.isfinite(other.scores) & np.isfinite(other.boxes).all(axis=1)
        self.not_numbers += int((~finite).sum())
        matches = match_boxes(reference, other)
        first, second = matches.pairs.T
        self.score.add(reference.scores[first], other.scores[second])
        self.box_px.add(reference.boxes[first], other.boxes[second])
        self.counts += matches.counts
        return matches

    @property
    def lost(self) -> int:
        """Return how many boxes only the reference has."""
        return self.counts.reference - self.counts.matched

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "reference": self.counts.reference,
            "matched": self.counts.matched,
            "lost": self.lost,
            "added": self.counts.added,
            "matched_share": self.counts.matched_share,
            "not_numbers": self.not_numbers,
            "score": self.score.to_dict(),
            "box_px": self.box_px.to_dict(),
        }


@dataclass(frozen=True)
class Excess:
    """A deviation beyond a limit of `StageLimits`.

    Attributes:
        stage: "pixels" to "detections".
        limit_name: field of `StageLimits` that was passed.
        what: the value and measure.
        value: as measured; infinite for what is not a number.
        limit: as allowed.
    """

    stage: str
    limit_name: str
    what: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.stage}: {self.message}"

    @property
    def message(self) -> str:
        """Return what was measured and what is allowed."""
        if self.value == float("inf"):
            return f"{self.what} has NaN, infinite or missing numbers"
        return f"{self.what} {self.value:.3g}, at most {self.limit:.3g} allowed"

    @property
    def ratio(self) -> float:
        """Return how far beyond the limit it is; above 1."""
        return self.value / self.limit if self.limit else float("inf")


class StageDeviations:
    """The deviations of all stages.

    Attributes:
        limits: beyond which a stage counts as guilty.
        maps: by name of the graph's value, for the stages that give maps.
        rows: of the candidates and of the detections, by stage.
    """

    def __init__(self, limits: StageLimits, *, deployed: bool) -> None:
        """Begin with nothing compared.

        Args:
            limits: of a stage alone; of maps as deployed `DEPLOYED_SLACK` times as much is allowed.
            deployed: whether stages get what those before them gave, not the reference's values.
        """
        self.limits = limits
        slack = DEPLOYED_SLACK if deployed else 1
        self.maps = {
            name: _map_deviation(stage.name, name, limits, slack)
            for stage in STAGES
            if stage.name not in ROW_STAGES
            for name in stage.gives
        }
        self.rows = {
            name: BoxDeviation(Deviation(limits.max_score), Deviation(limits.max_box_px))
            for name in ROW_STAGES
        }

    def add(self, stage: Stage, reference: Values, other: Values) -> BoxMatches | None:
        """Add what a stage gave for one image.

        Args:
            stage: which.
            reference: what it gave in the reference.
            other: what it gave in the other run.

        Returns:
            The pairs of boxes; None for a stage of maps.
        """
        if stage.name in ROW_STAGES:
            return self.rows[stage.name].add(rows_of(stage, reference), rows_of(stage, other))
        for name in stage.gives:
            self.maps[name].add(reference[name], other[name])
        return None

    def by_stage(self) -> dict[str, Deviation]:
        """Return the deviation of every stage compared, in order; scores and boxes apart."""
        deviations: dict[str, Deviation] = {}
        for stage in STAGES:
            if stage.name in ROW_STAGES:
                rows = self.rows[stage.name]
                deviations[f"{stage.name}: scores"] = rows.score
                deviations[f"{stage.name}: boxes (px)"] = rows.box_px
            elif stage.name == "head":
                for kind in ("scores", "boxes"):
                    deviations[f"head: {kind}"] = self._sum(
                        [name for name in stage.gives if kind in name]
                    )
            else:
                deviations[stage.name] = self._sum(stage.gives)
        return {name: deviation for name, deviation in deviations.items() if deviation.elements}

    def _sum(self, names: Sequence[str]) -> Deviation:
        return reduce(add, (self.maps[name] for name in names))

    def excesses(self) -> Iterator[Excess]:
        """Yield what is beyond the limits, stage by stage; of a stage's maps the worst."""
        for stage in STAGES:
            if stage.name in ROW_STAGES:
                yield from self._row_excesses(stage.name)
            else:
                excesses = list(self._map_excesses(stage))
                yield from sorted(excesses, key=lambda excess: -excess.ratio)[:1]

    def _map_excesses(self, stage: Stage) -> Iterator[Excess]:
        for name in stage.gives:
            deviation, limit_name = self.maps[name], limit_name_of(stage.name, name)
            if not deviation.elements:
                continue
            measure, value = (
                ("relative L2", deviation.relative_l2)
                if deviation.relative
                else self._extreme(deviation)
            )
            if value > deviation.tolerance or deviation.not_numbers:
                value = float("inf") if deviation.not_numbers else value
                what = name if deviation.not_numbers else f"{name}: {measure}"
                yield Excess(stage.name, limit_name, what, value, deviation.tolerance)

    def _row_excesses(self, stage: str) -> Iterator[Excess]:
        rows = self.rows[stage]
        if rows.not_numbers:
            yield Excess(stage, "max_score", f"{rows.not_numbers} boxes", float("inf"), 0)
        for limit_name, what, deviation in (
            ("max_score", "score", rows.score),
            ("max_box_px", "coordinate (px)", rows.box_px),
        ):
            measure, value = self._extreme(deviation)
            if value > deviation.tolerance:
                yield Excess(stage, limit_name, f"{what} {measure}", value, deviation.tolerance)

    def _extreme(self, deviation: Deviation) -> tuple[str, float]:
        if self.limits.outliers:
            return "largest deviation", deviation.worst
        return "deviation of 99 in 100", deviation.p99

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, by name of the graph's value or of the stage."""
        maps = {
            name: deviation.to_dict() for name, deviation in self.maps.items() if deviation.elements
        }
        rows = {
            name: deviation.to_dict()
            for name, deviation in self.rows.items()
            if deviation.counts.reference + deviation.counts.added
        }
        return maps | rows


def limit_name_of(stage: str, name: str) -> str:
    """Return the field of `StageLimits` that goes with a map.

    Args:
        stage: "pixels" to "head".
        name: of the map in the graph.
    """
    if stage == "pixels":
        return "max_pixel"
    if stage == "head":
        return "max_box_strides" if "boxes" in name else "max_score"
    return "max_map"


def _map_deviation(stage: str, name: str, limits: StageLimits, slack: int) -> Deviation:
    limit_name = limit_name_of(stage, name)
    limit: float = getattr(limits, limit_name)
    if limit_name == "max_pixel":  # nothing comes before them
        return Deviation(limit)
    return Deviation(slack * limit, relative=limit_name == "max_map")
