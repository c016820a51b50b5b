"""What decides whether an artefact passes: the comparer of tood-export, fed image by image.

Detections and maps of reference and artefact come in; failures, and what was measured beside its
limit, go out. The limits are `parity.tolerances`', or the user's own in their place. Runs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import ToodError
from tood_deploy.graph_io import MAP_NAMES, STAGE_OF_MAP
from tood_deploy.matching import MatchCounts, NetDetections
from tood_deploy.parity.detection_verdict import (
    MIN_DETECTIONS,
    DetectionVerdict,
    ap_failures,
    choose_score_threshold,
)
from tood_deploy.parity.deviation import limit_name_of
from tood_deploy.parity.float32_verdict import Allowance, Float32Judge
from tood_deploy.parity.reference import Conditioning
from tood_deploy.parity.tolerances import (
    DETECTION_LIMITS,
    FLOAT32_LIMITS,
    STAGE_LIMITS,
    DetectionLimits,
    Failure,
    Float32Limits,
    LimitRow,
    StageLimits,
    base_precision,
)

STAGE_LIMIT_NAMES = {field.name for field in fields(StageLimits)}


@dataclass(frozen=True)
class OwnLimits:
    """Limits that the user gave; None for those of the table.

    Attributes:
        max_pixel: of the network's input, in its normalised units.
        max_map: of a map of backbone or pyramid, relative L2 norm.
        max_score: of a score.
        max_box_strides: of the head's boxes, in strides.
        max_box_px: of a box, in pixels of the network's input.
        min_matched: share of the detections of either run that both must have, 0 to 1.
        max_ap_drop: points of AP, 0 to 100.
    """

    max_pixel: float | None = None
    max_map: float | None = None
    max_score: float | None = None
    max_box_strides: float | None = None
    max_box_px: float | None = None
    min_matched: float | None = None
    max_ap_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not value >= 0 or (name == "min_matched" and value > 1):
                expected = "0 to 1" if name == "min_matched" else "0 or more"
                option = f"--{name.replace('_', '-')}"
                raise ToodError(f"{option} is {value}; expected a number, {expected}")

    def given(self) -> dict[str, float]:
        """Return the limits that were given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def stage_limits(self, precision: str) -> StageLimits:
        """Return the limits of the stages, with those that were given in their place."""
        given = {name: value for name, value in self.given().items() if name in STAGE_LIMIT_NAMES}
        return replace(STAGE_LIMITS[base_precision(precision)], **given)

    def float32_limits(self) -> Float32Limits:
        """Return the limits of float32 artefacts, with those that were given in their place."""
        drop = FLOAT32_LIMITS.ap_drop if self.max_ap_drop is None else self.max_ap_drop
        return replace(FLOAT32_LIMITS, ap_drop=drop)

    def detection_limits(self, precision: str) -> DetectionLimits:
        """Return the limits of lower precisions, with those that were given in their place."""
        limits = DETECTION_LIMITS[base_precision(precision)]
        if self.min_matched is not None:
            limits = replace(limits, lost=1 - self.min_matched, added=1 - self.min_matched)
        if self.max_score is not None:
            limits = replace(limits, score=min(1.0, self.max_score))
        if self.max_ap_drop is not None:
            limits = replace(limits, ap_drop=self.max_ap_drop)
        return limits

    def widen(self, allowance: Allowance) -> Allowance:
        """Return what is allowed of float32 detections, with what was given in its place."""
        return Allowance(
            allowance.scores if self.max_score is None else self.max_score,
            allowance.boxes_px if self.max_box_px is None else self.max_box_px,
            allowance.exchanges if self.min_matched is None else np.inf,
            allowance.slot_exchanges,
        )


TABLE_LIMITS = OwnLimits()  # none of the user's own


class Check(ABC):
    """Gathers the verdict on one artefact."""

    @abstractmethod
    def add(self, expected: NetDetections, actual: NetDetections) -> None:
        """Add the detections of reference and artefact on one image."""

    @abstractmethod
    def add_slots(self, alone: NetDetections, slots: Sequence[NetDetections]) -> None:
        """Add the artefact's detections of an image alone, and in every slot of a batch."""

    @abstractmethod
    def failures(self, ap: dict[str, float] | None) -> list[Failure]:
        """Return the limits that were passed; called once, at the end.

        Args:
            ap: points of AP of "reference" and "artefact", and the "drop"; None where not known.
        """

    @property
    @abstractmethod
    def batch_slots(self) -> MatchCounts:
        """Return how an image alone compares with every slot of a batch; after `failures`."""

    @abstractmethod
    def rows(self) -> list[LimitRow]:
        """Return what was measured beside its limit; after `failures`."""


class Float32Check(Check):
    """Judges float32 by its noise: the maps of the first image and of every size, all detections.

    Attributes:
        limits: of the table, or the user's own in their place.
        judge: does it.
    """

    def __init__(self, own: OwnLimits) -> None:
        """Begin with nothing judged; maps that the user's own limits are for are left to these."""
        self.limits, self._own = own.float32_limits(), own
        leave_out = [
            name for name in MAP_NAMES if limit_name_of(STAGE_OF_MAP[name], name) in own.given()
        ]
        self.judge = Float32Judge(self.limits, leave_out)
        self._allowance: Allowance | None = None

    @property
    def needs_noise(self) -> bool:
        """Return whether nothing is explained yet: the first image's noise is to be measured."""
        return self._allowance is None

    def explain(
        self, noise: Conditioning, maps: Sequence[NDArray[Any]] | None, size_hw: tuple[int, int]
    ) -> None:
        """Judge maps, and take what float32 explains of images of this size.

        Args:
            noise: measured on an image.
            maps: the artefact's on it, in the order of `MAP_NAMES`; None where they cannot be had.
            size_hw: padded rows and columns of the image.
        """
        if maps is not None:
            self.judge.judge_maps(noise, maps, size_hw)
        self._allowance = self._own.widen(self.judge.allowance(noise))

    def add(self, expected: NetDetections, actual: NetDetections) -> None:
        """Judge the detections of one image."""
        assert self._allowance is not None
        self.judge.judge_detections(expected, actual, self._allowance)

    def add_slots(self, alone: NetDetections, slots: Sequence[NetDetections]) -> None:
        """Judge whether the detections depend on the slot."""
        assert self._allowance is not None
        self.judge.judge_slots(alone, slots, self._allowance)

    def failures(self, ap: dict[str, float] | None) -> list[Failure]:
        """Return the limits that were passed, in the order of the stages of each image."""
        failed = list(self.judge.verdict.failed)
        share, least = self.judge.verdict.detections.matched_share, self._own.min_matched
        if least is not None and share < least:
            failed.append(
                Failure("detections", f"{share:.3g} are in both, at least {least:g} wanted")
            )
        return failed + (ap_failures(ap["drop"], self.limits.ap_drop) if ap else [])

    @property
    def batch_slots(self) -> MatchCounts:
        """Return how an image alone compares with every slot of a batch."""
        return self.judge.verdict.batch_slots

    def rows(self) -> list[LimitRow]:
        """Return what was measured beside its limit."""
        return list(self.judge.verdict.rows(self.limits))


class DetectionCheck(Check):
    """Judges a lower precision by the detections that a user would see.

    Attributes:
        limits: of the table, or the user's own in their place.
        verdict: what was measured; after `failures`.
    """

    def __init__(self, own: OwnLimits, precision: str) -> None:
        """Begin with no image."""
        self.limits = own.detection_limits(precision)
        self.verdict = DetectionVerdict(0.0)
        self._expected: list[NetDetections] = []
        self._actual: list[NetDetections] = []
        self._slots: list[tuple[NetDetections, Sequence[NetDetections]]] = []

    def add(self, expected: NetDetections, actual: NetDetections) -> None:
        """Keep the detections of one image: from where on they count is known at the end."""
        self._expected.append(expected)
        self._actual.append(actual)

    def add_slots(self, alone: NetDetections, slots: Sequence[NetDetections]) -> None:
        """Keep the detections of one image in every slot of a batch."""
        self._slots.append((alone, slots))

    def has_enough(self, conf: float) -> bool:
        """Return whether detections above `conf` are all that the verdict looks at."""
        if sum(map(len, self._expected)) < MIN_DETECTIONS:
            return False
        return choose_score_threshold(self._expected) - self.limits.score >= conf

    def failures(self, ap: dict[str, float] | None) -> list[Failure]:
        """Return the limits that were passed.

        Raises:
            ToodError: the reference found nothing at all.
        """
        threshold = choose_score_threshold(self._expected, option="--images")
        lowest = max(0.0, threshold - self.limits.score)
        self.verdict = DetectionVerdict(threshold, ap=ap)
        for expected, actual in zip(self._expected, self._actual, strict=True):
            self.verdict.add(expected.above(lowest), actual.above(lowest), self.limits)
        for alone, slots in self._slots:
            rows = [slot.above(threshold) for slot in slots]
            self.verdict.add_slots(alone.above(threshold), rows, self.limits)
        return self.verdict.failures(self.limits)

    @property
    def batch_slots(self) -> MatchCounts:
        """Return how an image alone compares with every slot of a batch."""
        return self.verdict.batch_slots

    def rows(self) -> list[LimitRow]:
        """Return what was measured beside its limit."""
        return list(self.verdict.rows(self.limits))


def check_for(precision: str, own: OwnLimits) -> Float32Check | DetectionCheck:
    """Return what judges an artefact.

    Args:
        precision: of its arithmetic, such as "fp32" or "int8, bf16".
        own: limits that the user gave.
    """
    if base_precision(precision) == "fp32":
        return Float32Check(own)
    return DetectionCheck(own, precision)
