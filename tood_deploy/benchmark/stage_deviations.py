"""The deviation of every stage of one detector from the reference, in one setting: each alone, or all as deployed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.deviation import Deviation
from tood_deploy.benchmark.matching import RowDeviation
from tood_deploy.benchmark.stages import STAGES, Stage, Values
from tood_deploy.graph_io import MAP_NAMES
from tood_deploy.parity.conditioning import Conditioning
from tood_deploy.parity.tolerances import FLOAT32_LIMITS, Gates
from tood_deploy.presets import STRIDES
from tood_deploy.rows import Rows

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
        self.maps = {name: self._new_deviation(stage, name) for stage in STAGES if stage.name not in ROW_STAGES for name in stage.gives}
        self.rows = {name: RowDeviation(Deviation(gates.max_score), Deviation(gates.max_box_px)) for name in ROW_STAGES}

    def _new_deviation(self, stage: Stage, name: str) -> Deviation:
        if stage.name == "pixels":
            return Deviation(self.gates.max_pixel)
        slack = CARRIED_SLACK if self.carried else 1
        if stage.name == "head":
            return Deviation(slack * (self.gates.max_box_strides if "boxes" in name else self.gates.max_score))
        return Deviation(slack * self.gates.max_map, relative=True)

    def allow_noise(self, noise: Conditioning) -> None:
        """Raises the limits to what float32 itself explains on the input that is compared, where that is more."""
        strides = dict(zip(MAP_NAMES[-len(STRIDES) :], STRIDES, strict=True))
        for name, own in zip(MAP_NAMES, noise.maps, strict=True):
            deviation, largest = self.maps[name], FLOAT32_LIMITS.largest * own.largest
            unit = float(np.sqrt(np.square(own.exact).mean()))
            allowed = FLOAT32_LIMITS.rms_of(own.cells) * own.rms / unit if deviation.relative and unit else largest
            deviation.tolerance = max(deviation.tolerance, allowed)
            for rows in self.rows.values():
                if name.startswith("head_scores"):
                    rows.score.tolerance = max(rows.score.tolerance, largest)
                elif name in strides:
                    rows.box_px.tolerance = max(rows.box_px.tolerance, largest * strides[name])

    def add(self, stage: Stage, reference: Values, found: Values) -> NDArray[np.intp] | None:
        """Adds what a stage gave for one picture; for candidates and detections, gives the pairs of rows."""
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
                found |= {f"{stage.name}: scores": self.rows[stage.name].score, f"{stage.name}: boxes (px)": self.rows[stage.name].box_px}
            elif stage.name == "head":
                for kind in ("scores", "boxes"):
                    found[f"head: {kind}"] = _sum([self.maps[name] for name in stage.gives if kind in name])
            else:
                found[stage.name] = _sum([self.maps[name] for name in stage.gives])
        return {name: deviation for name, deviation in found.items() if deviation.elements}

    def failures(self) -> Iterator[Failure]:
        """Every limit that a stage passed, in the order of the stages; of a stage's maps the worst alone."""
        for stage in STAGES:
            failed = list(self._row_failures(stage.name) if stage.name in ROW_STAGES else self._map_failures(stage))
            yield from sorted(failed, key=lambda failure: -failure.ratio)[: len(failed) if stage.name in ROW_STAGES else 1]

    def _map_failures(self, stage: Stage) -> Iterator[Failure]:
        for name in stage.gives:
            deviation = self.maps[name]
            if not deviation.elements:
                continue
            measure, found = ("relative L2", deviation.relative_l2) if deviation.relative else self._extreme(deviation)
            if deviation.not_numbers:
                yield Failure(stage.name, f"{name}: NaN, infinite or missing numbers:", deviation.not_numbers, 0, self.carried)
            elif found > deviation.tolerance:
                yield Failure(stage.name, f"{name}: {measure}", found, deviation.tolerance, self.carried)

    def _row_failures(self, stage: str) -> Iterator[Failure]:
        rows = self.rows[stage]
        if rows.not_numbers:
            yield Failure(stage, "boxes with NaN or infinite numbers:", rows.not_numbers, 0, self.carried)
        if rows.matched_share < self.gates.min_matched:
            yield Failure(stage, "share lost or added", 1 - rows.matched_share, 1 - self.gates.min_matched, self.carried)
        for what, deviation in (("score", rows.score), ("coordinate (px)", rows.box_px)):
            measure, found = self._extreme(deviation)
            if found > deviation.tolerance:
                yield Failure(stage, f"{what} {measure}", found, deviation.tolerance, self.carried)

    def _extreme(self, deviation: Deviation) -> tuple[str, float]:
        return ("largest deviation", deviation.worst) if self.gates.outliers else ("deviation of 99 in 100", deviation.p99)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by name of the graph's value or of the stage."""
        return {name: found.to_dict() for name, found in (*self.maps.items(), *self.rows.items()) if _has_content(found)}


def _has_content(found: Deviation | RowDeviation) -> bool:
    return bool(found.elements if isinstance(found, Deviation) else found.reference + found.added)


def _sum(deviations: list[Deviation]) -> Deviation:
    total = deviations[0]
    for deviation in deviations[1:]:
        total = total + deviation
    return total


def rows_of(stage: Stage, values: Values) -> Rows:
    """The candidates or detections of the one picture in a batch, without the rows that hold none."""
    if stage.name == "candidates":
        boxes, scores, labels = (values[name][0] for name in stage.gives)
        real = ~(scores <= 0)  # a NaN stays, to be told
        return Rows(boxes[real], scores[real], labels[real])
    count, boxes, scores, labels = (values[name][0] for name in stage.gives)
    return Rows(boxes[:count], scores[:count], labels[:count])
