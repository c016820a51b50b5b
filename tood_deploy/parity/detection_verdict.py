"""Whether detections are those of a reference: for lower precisions, and for self-tests.

Detections of both come in, a verdict goes out. Knows no runtime and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tood_deploy.errors import ToodError
from tood_deploy.matching import MatchCounts, NetDetections, match_boxes
from tood_deploy.parity.tolerances import (
    DEPLOYMENT_SCORE,
    AnswerTolerance,
    DetectionLimits,
    Failure,
    LimitRow,
)

MIN_DETECTIONS = 20  # of all images together, that a verdict in shares needs


@dataclass
class DetectionVerdict:
    """What a user would see of an artefact in lower precision, over all images.

    Attributes:
        score_threshold: above which detections count.
        reference_detections: of the reference, above it.
        artefact_detections: of the artefact, above it.
        lost: detections of the reference that the artefact lacks even a little below the threshold.
        added: the same the other way round.
        score_deviation: largest difference of the scores of a pair.
        box_deviation_px: largest difference of a pair's coordinates, pixels of the network's input.
        least_iou: smallest overlap of a pair.
        batch_slots: the same image alone against in every slot of a batch.
        ap: points of AP of both and the drop, where there are annotations.
        images: how many there were.
        images_sha256: of all their pixels.
    """

    score_threshold: float
    reference_detections: int = 0
    artefact_detections: int = 0
    lost: int = 0
    added: int = 0
    score_deviation: float = 0.0
    box_deviation_px: float = 0.0
    least_iou: float = 1.0
    batch_slots: MatchCounts = field(default_factory=MatchCounts)
    ap: dict[str, float] | None = None
    images: int = 0
    images_sha256: str = ""

    @property
    def lost_share(self) -> float:
        """Return the share of the reference's detections that are lost, 0 to 1."""
        return self.lost / self.reference_detections if self.reference_detections else 0.0

    @property
    def added_share(self) -> float:
        """Return the share of the artefact's detections that are added, 0 to 1."""
        return self.added / self.artefact_detections if self.artefact_detections else 0.0

    def add(self, expected: NetDetections, actual: NetDetections, limits: DetectionLimits) -> None:
        """Count one image.

        Args:
            expected: the reference's detections, also those a little below the threshold.
            actual: the artefact's, likewise.
            limits: of a pair.
        """
        matches = match_boxes(
            expected, actual, min_iou=limits.iou, max_score_difference=limits.score
        )
        above = [rows.scores > self.score_threshold for rows in (expected, actual)]
        first, second = matches.pairs.T
        self.reference_detections += int(above[0].sum())
        self.artefact_detections += int(above[1].sum())
        self.lost += int(np.delete(above[0], first).sum())
        self.added += int(np.delete(above[1], second).sum())
        counted = above[0][first] | above[1][second]
        self.score_deviation = max(
            self.score_deviation, float(matches.score_differences[counted].max(initial=0))
        )
        self.box_deviation_px = max(
            self.box_deviation_px, float(matches.box_differences_px[counted].max(initial=0))
        )
        self.least_iou = min(self.least_iou, float(matches.iou[counted].min(initial=1)))
        self.images += 1

    def add_slots(
        self, alone: NetDetections, slots: Sequence[NetDetections], limits: DetectionLimits
    ) -> None:
        """Count what depends on the slot of a batch.

        Args:
            alone: what the artefact gives for an image in a batch of one, above the threshold.
            slots: the same for the image in every slot of a larger batch.
            limits: of a pair.
        """
        for slot in slots:
            self.batch_slots += match_boxes(
                alone, slot, min_iou=limits.iou, max_score_difference=limits.score
            ).counts

    def failures(self, limits: DetectionLimits) -> list[Failure]:
        """Return every limit that was passed; one detection is never too many."""
        failed = []
        for what, count, total, limit in (
            ("lost", self.lost, self.reference_detections, limits.lost),
            ("added", self.added, self.artefact_detections, limits.added),
        ):
            if count > max(1, limit * total):
                share = f"({count / total:.1%}), at most {limit:.0%} allowed"
                failed.append(Failure("detections", f"{count} of {total} {what} {share}"))
        if (exchanged := self.batch_slots.exchanged) > self._allowed_in_slots(limits):
            failed.append(
                Failure("batch slots", f"{exchanged} detections depend on the batch slot")
            )
        if self.ap is not None:
            failed += ap_failures(self.ap["drop"], limits.ap_drop)
        return failed

    def _allowed_in_slots(self, limits: DetectionLimits) -> float:
        return max(1, limits.lost * self.batch_slots.reference)

    def rows(self, limits: DetectionLimits) -> Iterator[LimitRow]:
        """Yield what was measured beside its limit."""
        above = f"with a score above {self.score_threshold:.2g}"
        for what, count, total, share, limit in (
            ("lost", self.lost, self.reference_detections, self.lost_share, limits.lost),
            ("added", self.added, self.artefact_detections, self.added_share, limits.added),
        ):
            yield LimitRow(
                f"detections {what}, {above}", f"{count} of {total} ({share:.1%})", f"{limit:.0%}"
            )
        yield LimitRow("scores of a pair", f"{self.score_deviation:.2g}", f"{limits.score:g}")
        yield LimitRow("overlap of a pair", f"{self.least_iou:.2f}", f"at least {limits.iou:g}")
        yield LimitRow(
            "detections that depend on the batch slot",
            f"{self.batch_slots.exchanged}",
            f"{int(self._allowed_in_slots(limits))}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        shares = {"lost_share": self.lost_share, "added_share": self.added_share}
        # Under the name that older readers know: matched, and what only one of the two has.
        detections = MatchCounts(
            self.reference_detections,
            self.reference_detections - self.lost,
            self.added,
            self.score_deviation,
            self.box_deviation_px,
        )
        return asdict(self) | shares | {"detections": asdict(detections)}


def ap_failures(drop: float, limit: float) -> list[Failure]:
    """Return that too much AP is lost, if it is; NaN is too much.

    Args:
        drop: points of AP that were lost.
        limit: points that may be.
    """
    if drop <= limit:
        return []
    return [Failure("AP", f"drops by {drop:.2f} points, at most {limit:g} allowed")]


def choose_score_threshold(
    expected: Sequence[NetDetections], option: str = "--verify-images"
) -> float:
    """Return the score above which detections count.

    That is the deployment score, or less where so few detections exceed it that their shares would
    say nothing.

    Args:
        expected: the reference's detections of all images, down to low scores.
        option: that gives other images, for the message.

    Raises:
        ToodError: there is no detection at all.
    """
    scores = np.sort(np.concatenate([rows.scores for rows in expected]))[::-1]
    if not len(scores):
        raise ToodError(
            "nothing is found in any of the images to verify on; "
            f"give {option} a folder of images with objects in them"
        )
    last = scores[min(MIN_DETECTIONS, len(scores)) - 1]
    return min(DEPLOYMENT_SCORE, float(np.nextafter(last, np.float32(0))))


def answer_deviation(
    expected: NetDetections, actual: NetDetections, tolerance: AnswerTolerance
) -> str:
    """Return what is wrong with the answer to a self-test, as a clause; "" where nothing is.

    Args:
        expected: the stored answer.
        actual: the engine's.
        tolerance: how far it may be off.
    """
    matches = match_boxes(expected, actual)
    score_off = matches.score_differences / expected.scores.max(initial=1e-9)
    iou = matches.iou
    matched = int(((score_off <= tolerance.score) & (iou >= tolerance.iou)).sum())
    either = len(expected) + len(actual) - matched
    if matched >= tolerance.matched * either:
        return ""
    return (
        f"of {len(expected)} stored detections {matched} came again, {len(actual)} came in all; "
        f"scores are off by up to {score_off.max(initial=0):.2g} of the best one "
        f"(allowed {tolerance.score:g}), overlaps go down to {iou.min(initial=1):.2g} "
        f"(allowed {tolerance.iou:g})"
    )
