"""Whether a float32 artefact is equal to its reference: by the noise of float32 itself.

The noise of a batch, the artefact's maps and the detections of both come in; a verdict goes out.
Knows no runtime and runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.graph_io import HEAD_OUTPUTS, MAP_NAMES, STAGE_OF_MAP
from tood_deploy.matching import MatchCounts, NetDetections, match_boxes, split_batch
from tood_deploy.parity.reference import Conditioning, MapNoise, deviation_of
from tood_deploy.parity.tolerances import FLOAT32_LIMITS, Failure, Float32Limits, LimitRow
from tood_deploy.presets import STRIDES

HEAD_SCORES, HEAD_BOXES = HEAD_OUTPUTS[: len(STRIDES)], HEAD_OUTPUTS[len(STRIDES) :]


@dataclass
class MapVerdict:
    """The worst of one map over all sizes.

    Attributes:
        deviation: largest absolute difference from float64.
        rms_ratio: root mean square of the deviation over that of the float32 noise.
        largest_ratio: largest deviation over the largest of the float32 noise.
    """

    deviation: float = 0.0
    rms_ratio: float = 0.0
    largest_ratio: float = 0.0

    def add(self, rms: float, largest: float, noise: MapNoise) -> None:
        """Add a map whose deviation has this root mean square and this largest value."""
        self.deviation = max(self.deviation, largest)
        self.rms_ratio = max(self.rms_ratio, rms / noise.rms)
        self.largest_ratio = max(self.largest_ratio, largest / noise.largest)


@dataclass
class Float32Verdict:
    """What the comparison of a float32 artefact measured, over all images.

    Attributes:
        maps: by name, of all that say something.
        ill_conditioned: maps of sizes where float32 itself is too far off to say anything; they are
            judged by detections.
        failed: the limits that were passed, in the order of the stages of each image.
        detections: reference against artefact.
        max_exchanges: in the worst image, by the artefact.
        float32_exchanges: the same, by the valid float32 computations among themselves.
        allowed_exchanges: the most that was allowed in an image.
        batch_slots: the same image alone against in every slot of a batch.
        images: how many there were.
        images_sha256: of all their pixels.
    """

    maps: dict[str, MapVerdict] = field(
        default_factory=lambda: {name: MapVerdict() for name in MAP_NAMES}
    )
    ill_conditioned: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    detections: MatchCounts = field(default_factory=MatchCounts)
    max_exchanges: int = 0
    float32_exchanges: int = 0
    allowed_exchanges: int = 0
    batch_slots: MatchCounts = field(default_factory=MatchCounts)
    images: int = 0
    images_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return asdict(self) | {"failed": [str(failure) for failure in self.failed]}

    def rows(self, limits: Float32Limits) -> Iterator[LimitRow]:
        """Yield what was measured beside its limit."""
        if any(verdict.largest_ratio for verdict in self.maps.values()):
            rms = max(verdict.rms_ratio for verdict in self.maps.values())
            largest = max(verdict.largest_ratio for verdict in self.maps.values())
            few = f"{limits.rms:g}, of maps with few cells {limits.rms_of_few:g}"
            yield LimitRow("maps, in units of float32's own noise, RMS", f"{rms:.2g}", few)
            yield LimitRow("the same, largest value", f"{largest:.2g}", f"{limits.largest:g}")
        yield LimitRow(
            "detections exchanged in an image", f"{self.max_exchanges}", f"{self.allowed_exchanges}"
        )


@dataclass(frozen=True)
class Allowance:
    """What float32 explains of the detections of images of one size.

    Attributes:
        scores: by how much a detection's score may differ.
        boxes_px: by how much its coordinates may differ, in pixels of the network's input.
        exchanges: how many detections may be exchanged in an image.
        slot_exchanges: the same between an image alone and in a slot of a batch.
    """

    scores: float
    boxes_px: float
    exchanges: float
    slot_exchanges: float

    def count(self, first: NetDetections, second: NetDetections) -> MatchCounts:
        """Count the detections of both that agree."""
        return match_boxes(
            first,
            second,
            min_iou=0,  # tiny boxes overlap little when they move by a rounding
            max_score_difference=self.scores,
            max_box_difference_px=self.boxes_px,
        ).counts


class Float32Judge:
    """Gathers the verdict on a float32 artefact, image by image.

    Attributes:
        limits: what is allowed.
        verdict: what was measured so far.
    """

    def __init__(
        self, limits: Float32Limits = FLOAT32_LIMITS, leave_out: Collection[str] = ()
    ) -> None:
        """Begin with nothing measured.

        Args:
            limits: what is allowed.
            leave_out: names of maps that are judged elsewhere, by limits of the user's own.
        """
        self.limits, self._leave_out = limits, frozenset(leave_out)
        self.verdict = Float32Verdict()

    def judge_maps(
        self, noise: Conditioning, maps: Sequence[NDArray[Any]], size_hw: tuple[int, ...]
    ) -> None:
        """Judge the maps of a batch.

        Args:
            noise: measured on that batch.
            maps: the artefact's, (B, C, h, w) each, in the order of `MAP_NAMES`.
            size_hw: padded rows and columns of the images, for the messages.
        """
        size = "x".join(map(str, size_hw))
        for name, own, values in zip(MAP_NAMES, noise.maps, maps, strict=True):
            if name in self._leave_out:
                continue
            rms, largest = deviation_of(values, own.exact, own.excluded)
            if not np.isfinite(rms):
                self._fail(name, size, "holds NaN or infinite numbers, or has another shape")
            elif self._says_nothing(own):
                self.verdict.ill_conditioned.append(f"{name} of {size}")
            else:
                self.verdict.maps[name].add(rms, largest, own)
                self._judge_map(name, size, rms, largest, own)

    def _judge_map(self, name: str, size: str, rms: float, largest: float, own: MapNoise) -> None:
        for what, off, unit, limit in (
            ("is", rms, own.rms, self.limits.rms_of(own.cells)),
            ("has a value that is", largest, own.largest, self.limits.largest),
        ):
            if not off <= limit * unit:
                self._fail(
                    name,
                    size,
                    f"{what} {off:.2g} off, {off / unit:.3g} times what float32 explains, "
                    f"at most {limit:g} times allowed",
                )
                return

    def _fail(self, name: str, size: str, what: str) -> None:
        self.verdict.failed.append(Failure(STAGE_OF_MAP[name], f"{name} of images {size} {what}"))

    def _says_nothing(self, noise: MapNoise) -> bool:
        return self.limits.rms_of(noise.cells) * noise.rms > self.limits.telling * noise.spread > 0

    def allowance(self, noise: Conditioning) -> Allowance:
        """Return by how much detections may differ.

        They may be as far off as the maps that they come from, and float32 may exchange some.

        Args:
            noise: measured on images of that size.
        """
        bounds = {
            name: self.limits.largest * own.largest
            for name, own in zip(MAP_NAMES, noise.maps, strict=True)
        }
        scores = max(self.limits.scores, *(bounds[name] for name in HEAD_SCORES))
        boxes_px = max(
            self.limits.boxes_px,
            *(bounds[name] * stride for name, stride in zip(HEAD_BOXES, STRIDES, strict=True)),
        )
        explained = Allowance(scores, boxes_px, np.inf, np.inf)
        expected, *others = (split_batch(detections) for detections in noise.detections)
        own_exchanges = max(
            explained.count(first, second).exchanged
            for other in others
            for first, second in zip(expected, other, strict=True)
        )
        self.verdict.float32_exchanges = max(self.verdict.float32_exchanges, own_exchanges)
        slot_exchanges = int(self.limits.exchanged * own_exchanges)
        return Allowance(scores, boxes_px, self.limits.exchanges + slot_exchanges, slot_exchanges)

    def judge_detections(
        self, expected: NetDetections, actual: NetDetections, allowance: Allowance
    ) -> None:
        """Judge the detections of one image.

        Args:
            expected: the reference's.
            actual: the artefact's.
            allowance: of images of that size.
        """
        counts = allowance.count(expected, actual)
        verdict = self.verdict
        verdict.detections += counts
        verdict.images += 1
        verdict.max_exchanges = max(verdict.max_exchanges, counts.exchanged)
        if np.isfinite(allowance.exchanges):
            verdict.allowed_exchanges = max(verdict.allowed_exchanges, int(allowance.exchanges))
        if counts.exchanged > allowance.exchanges:
            verdict.failed.append(
                Failure(
                    "detections",
                    f"{counts.exchanged} of {counts.reference} of one image exchanged, "
                    f"at most {allowance.exchanges} allowed",
                )
            )

    def judge_slots(
        self, alone: NetDetections, slots: Sequence[NetDetections], allowance: Allowance
    ) -> None:
        """Judge whether an image gives the same in every slot of a batch.

        Args:
            alone: what the artefact gives for the image in a batch of one.
            slots: what it gives for the image in every slot of a larger batch.
            allowance: of images of that size.
        """
        all_counts = [allowance.count(alone, slot) for slot in slots]
        self.verdict.batch_slots = sum(all_counts, self.verdict.batch_slots)
        worst = max(counts.exchanged for counts in all_counts)
        if worst > allowance.slot_exchanges:
            self.verdict.failed.append(
                Failure(
                    "batch slots",
                    f"{worst} of {len(alone)} detections of one image depend on the slot, "
                    f"at most {allowance.slot_exchanges} allowed",
                )
            )
