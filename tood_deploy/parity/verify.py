"""Proves an artefact equal to its reference by running both on the same images. Knows no file and no runtime.

Float32 is judged map by map against what float32 itself explains (`conditioning`), then by detections; lower precisions by
what a user would see of them, on real images. The limits are in `tolerances`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS, STAGE_OF_MAP
from tood_deploy.matching import MatchCounts, NetDetections, match_boxes, split_batch
from tood_deploy.parity.reference import (
    Conditioning,
    MapNoise,
    Outputs,
    Reference,
    Runner,
    deviation_of,
)
from tood_deploy.parity.tolerances import (
    DEPLOYMENT_SCORE,
    FLOAT32_LIMITS,
    DetectionLimits,
    Float32Limits,
)
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.presets import STRIDES

SIZES_HW = {"square": (320, 320), "portrait": (416, 256), "tiny": (64, 64)}
DIFFERENT = 2  # images in a batch whose maps are compared
BATCH = 3  # slots that must give the same
SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6
FEWEST_DETECTIONS = 20  # of all images together, that a verdict in shares needs

Batch = tuple[NDArray[np.uint8], NDArray[np.int32]]
Say = Callable[[str], None]


@dataclass
class MapVerdict:
    """The worst of one map over all sizes.

    Attributes:
        deviation: largest absolute difference from float64.
        rms_ratio, largest_ratio: of the deviation to the float32 noise.
    """

    deviation: float = 0.0
    rms_ratio: float = 0.0
    largest_ratio: float = 0.0


@dataclass
class Float32Verdict:
    """What the comparison of a float32 artefact found, over all images.

    Attributes:
        maps: by name, of all that say something.
        ill_conditioned: maps of sizes where float32 itself is too far off to say anything; they are judged by detections.
        failed: what was outside its limit, a sentence each, in the order of the stages.
        detections: reference against artefact.
        most_exchanges, float32_exchanges: in the worst image, by the artefact and by the valid float32 computations among themselves.
        batch_slots: the same image alone against in every slot of a batch.
        images: how many there were; and the SHA-256 of all their pixels.
    """

    maps: dict[str, MapVerdict] = field(
        default_factory=lambda: {name: MapVerdict() for name in MAP_NAMES}
    )
    ill_conditioned: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    detections: MatchCounts = field(default_factory=MatchCounts)
    most_exchanges: int = 0
    float32_exchanges: int = 0
    batch_slots: MatchCounts = field(default_factory=MatchCounts)
    images: int = 0
    images_sha256: str = ""


@dataclass(frozen=True)
class Allowance:
    """By how much a detection may differ, and how many may be exchanged in an image: what float32 explains on images of one size."""

    scores: float
    boxes_px: float
    exchanges: int

    def match(self, first: NetDetections, second: NetDetections) -> MatchCounts:
        """The detections of both that agree."""
        return match_boxes(
            first,
            second,
            min_iou=0,
            max_score_difference=self.scores,
            max_box_difference_px=self.boxes_px,
        ).counts


class Float32Verifier:
    """Runs the reference and a float32 artefact side by side."""

    def __init__(
        self, reference: Reference, run: Runner, limits: Float32Limits = FLOAT32_LIMITS
    ) -> None:
        self.reference, self.run, self.limits = reference, run, limits
        self.verdict = Float32Verdict()
        self._pixels = hashlib.sha256()

    def compare(self, images: Sequence[NDArray[np.uint8]], imgsz: ImageSize) -> Allowance:
        """Compares maps and detections of a batch of images, (H, W, 3) uint8 BGR of one size; returns what their float32 explains."""
        batch = prepare(images, imgsz)
        noise = self.reference.measure(*batch, SCORE_THRESHOLD, IOU_THRESHOLD)
        found = self._run(batch)
        self._compare_maps(noise, found[len(OUTPUTS) :], batch[0].shape[1:3])
        allowance = self._allowance(noise)
        self._compare_detections(noise.detections[0], found, allowance)
        return allowance

    def compare_detections(
        self, image: NDArray[np.uint8], imgsz: ImageSize, allowance: Allowance
    ) -> None:
        """Compares the detections of one image, with what was explained of another one."""
        batch = prepare([image], imgsz)
        expected = self.reference.run(*batch, SCORE_THRESHOLD, IOU_THRESHOLD)
        self._compare_detections(expected, self._run(batch), allowance)

    def compare_slots(
        self, image: NDArray[np.uint8], imgsz: ImageSize, allowance: Allowance
    ) -> None:
        """Compares an image alone with the same in every slot of a batch."""
        images, valid_hw = prepare([image] * BATCH, imgsz)
        (alone,) = split_batch(self._run((images[:1], valid_hw[:1])))
        matches = [
            allowance.match(alone, slot) for slot in split_batch(self._run((images, valid_hw)))
        ]
        self.verdict.batch_slots = sum(matches, self.verdict.batch_slots)
        if any(match.exchanged > allowance.exchanges - self.limits.exchanges for match in matches):
            self.verdict.failed.append(
                f"batch slots: detections of images {images.shape[1:3]} depend on the slot"
            )

    def _run(self, batch: Batch) -> Outputs:
        self._pixels.update(batch[0].tobytes())
        try:
            return self.run(*batch, SCORE_THRESHOLD, IOU_THRESHOLD)
        except CheckFailed:
            raise
        except Exception as error:  # of the runtime's own types, which share no public base
            shape, reason = batch[0].shape, str(error).strip().splitlines()[0][:300]
            raise CheckFailed(
                f"the artefact does not run on {shape[0]} images of {shape[1]}x{shape[2]}: {reason}"
            ) from error

    def _compare_maps(self, noise: Conditioning, found: Outputs, size_hw: tuple[int, ...]) -> None:
        size = "x".join(map(str, size_hw))
        for name, own, values in zip(MAP_NAMES, noise.maps, found, strict=True):
            rms, largest = deviation_of(values, own.exact, own.excluded)
            if self._says_nothing(own) and np.isfinite(rms):
                self.verdict.ill_conditioned.append(f"{name} of {size}")
                continue
            worst = self.verdict.maps[name]
            worst.deviation = max(worst.deviation, largest)
            worst.rms_ratio, worst.largest_ratio = (
                max(worst.rms_ratio, rms / own.rms),
                max(worst.largest_ratio, largest / own.largest),
            )
            rms_limit = self.limits.rms_of(own.cells)
            for what, off, unit, limit in (
                ("", rms, own.rms, rms_limit),
                ("a value of ", largest, own.largest, self.limits.largest),
            ):
                if not off <= limit * unit:
                    self.verdict.failed.append(
                        f"{STAGE_OF_MAP[name]}: {what}{name} of images {size} is {off:.2g} off, {off / unit:.3g} times what float32 "
                        f"explains, at most {limit:g} times allowed"
                    )
                    break

    def _says_nothing(self, noise: MapNoise) -> bool:
        return self.limits.rms_of(noise.cells) * noise.rms > self.limits.telling * noise.spread > 0

    def _allowance(self, noise: Conditioning) -> Allowance:
        """Detections may be as far off as the maps that they come from, and float32 may exchange some of them."""
        strides = dict(
            zip((name for name in MAP_NAMES if name.startswith("head_boxes")), STRIDES, strict=True)
        )
        bounds = {
            name: self.limits.largest * own.largest
            for name, own in zip(MAP_NAMES, noise.maps, strict=True)
        }
        scores = max(
            self.limits.scores,
            *(bound for name, bound in bounds.items() if name.startswith("head_scores")),
        )
        boxes_px = max(
            self.limits.boxes_px, *(bounds[name] * stride for name, stride in strides.items())
        )
        expected, *others = ([*split_batch(each)] for each in noise.detections)
        own = [
            match_boxes(
                *rows, min_iou=0, max_score_difference=scores, max_box_difference_px=boxes_px
            ).counts.exchanged
            for other in others
            for rows in zip(expected, other, strict=True)
        ]
        self.verdict.float32_exchanges = max(self.verdict.float32_exchanges, *own)
        return Allowance(
            scores, boxes_px, self.limits.exchanges + int(self.limits.exchanged * max(own))
        )

    def _compare_detections(self, expected: Outputs, found: Outputs, allowance: Allowance) -> None:
        for first, second in zip(split_batch(expected), split_batch(found), strict=True):
            match = allowance.match(first, second)
            self.verdict.detections += match
            self.verdict.images += 1
            self.verdict.most_exchanges = max(self.verdict.most_exchanges, match.exchanged)
            if match.exchanged > allowance.exchanges:
                self.verdict.failed.append(
                    f"detections: {match.exchanged} of {match.reference} of one image exchanged, at most {allowance.exchanges} allowed"
                )
        self.verdict.images_sha256 = self._pixels.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values for the manifest."""
        names = {
            "reference": self.reference.run.name,
            "runtime": self.run.name,
            "judged_by": "float32 noise",
        }
        return names | {"limits": asdict(self.limits)} | asdict(self.verdict)


def prepare(images: Sequence[NDArray[np.uint8]], imgsz: ImageSize) -> Batch:
    """The graph's `images` and `valid_hw` for images (H, W, 3) uint8 BGR of one size."""
    prepared = [resize_and_pad(image, imgsz) for image in images]
    return np.stack([image for image, _ in prepared]), np.array(
        [transform.resized_hw for _, transform in prepared], np.int32
    )


def verify_float32(
    reference: Reference,
    run: Runner,
    *,
    images: Sequence[NDArray[np.uint8]] = (),
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compare a float32 artefact with its reference: at three sizes, alone and in batches, and on the user's images.

    Args:
        reference: the network that was exported, or an artefact that was proven equal to it.
        run: the shipped artefact in a runtime, with its maps.
        images: (H, W, 3) uint8 BGR, compared at the model's own image size in addition to the built-in ones: of the first the maps, of
            all the detections.
        say: told what is being compared, a line each.

    Returns:
        The parity verdict for the manifest.

    Raises:
        CheckFailed: the artefact is outside a limit; the message names the first guilty stage and the deviation.
    """
    verifier = Float32Verifier(reference, run)
    for number, (height, width) in enumerate(SIZES_HW.values()):
        say(f"comparing with {reference.run.name} on images of {height}x{width}")
        # A few rows and columns fewer than the padded size, so that padding takes part.
        batch = [
            synthetic_image(height - 10, width - 6, seed=BATCH * number + i)
            for i in range(DIFFERENT)
        ]
        imgsz = min(height - 10, width - 6), max(height - 10, width - 6)
        allowance = verifier.compare(batch, imgsz)
        verifier.compare_slots(batch[0], imgsz, allowance)
    if len(images):
        say(f"comparing with {reference.run.name} on {len(images)} images of your own")
        allowance = verifier.compare(images[:1], reference.sizing)
        for image in images[1:]:
            verifier.compare_detections(image, reference.sizing, allowance)
    if failures := verifier.verdict.failed:
        raise CheckFailed(
            f"the artefact is not equal to its reference, {reference.run.name}: {'; '.join(failures[:3])}{_more(failures)}"
        )
    return verifier.to_dict()


def _more(failures: Sequence[str]) -> str:
    return f"; and {len(failures) - 3} more" if len(failures) > 3 else ""


@dataclass
class DetectionVerdict:
    """What a user would see of an artefact in lower precision.

    Attributes:
        score_threshold: above which detections count.
        reference_detections, artefact_detections: how many each found.
        lost, added: of the reference that the artefact lacks, and the other way round.
        score_deviation: largest difference of the scores of a pair.
        box_deviation_px: largest difference of a pair's coordinates, pixels of the network input.
        least_iou: smallest overlap of a pair.
        batch_slots: the same image alone against in every slot of a batch.
        ap: points of AP of both and the drop, where there are annotations.
        images: how many there were.
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
        """0 to 1."""
        return self.lost / self.reference_detections if self.reference_detections else 0.0

    @property
    def added_share(self) -> float:
        """0 to 1."""
        return self.added / self.artefact_detections if self.artefact_detections else 0.0

    def add(self, expected: NetDetections, found: NetDetections, limits: DetectionLimits) -> None:
        """Counts one image: detections above the threshold on one side that the other lacks even a little below it."""
        matches = match_boxes(
            expected, found, min_iou=limits.iou, max_score_difference=limits.score
        )
        pairs, overlaps = matches.pairs, matches.iou
        first, second = (set(pairs[:, side].tolist()) for side in (0, 1))
        wanted, given = (
            set(np.flatnonzero(rows.scores > self.score_threshold).tolist())
            for rows in (expected, found)
        )
        self.reference_detections += len(wanted)
        self.artefact_detections += len(given)
        self.lost, self.added = self.lost + len(wanted - first), self.added + len(given - second)
        seen = [
            number
            for number, (one, other) in enumerate(pairs.tolist())
            if one in wanted or other in given
        ]
        scores = np.abs(expected.scores[pairs[seen, 0]] - found.scores[pairs[seen, 1]])
        boxes = np.abs(expected.boxes[pairs[seen, 0]] - found.boxes[pairs[seen, 1]])
        self.score_deviation = max(self.score_deviation, float(scores.max(initial=0)))
        self.box_deviation_px = max(self.box_deviation_px, float(boxes.max(initial=0)))
        self.least_iou = min(self.least_iou, float(overlaps[seen].min(initial=1)))
        self.images += 1

    def failures(self, limits: DetectionLimits) -> list[str]:
        """A sentence for every limit that was passed; one detection is never too many."""
        failed = []
        for what, count, total, limit in (
            ("lost", self.lost, self.reference_detections, limits.lost),
            ("added", self.added, self.artefact_detections, limits.added),
        ):
            if count > max(1, limit * total):
                failed.append(
                    f"{count} of {total} detections {what} ({count / total:.1%}), at most {limit:.0%} allowed"
                )
        if self.ap is not None and not self.ap["drop"] <= limits.ap_drop:
            failed.append(
                f"AP drops by {self.ap['drop']:.2f} points, at most {limits.ap_drop:g} allowed"
            )
        if (depend := self.batch_slots.exchanged) > max(
            1, limits.lost * self.batch_slots.reference
        ):
            failed.append(f"{depend} detections depend on the batch slot")
        return failed

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
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


def verify_detections(
    reference: Reference,
    run: Runner,
    source_images: Sequence[NDArray[np.uint8]],
    limits: DetectionLimits,
    *,
    measure_ap: Callable[[], tuple[float, float]] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compare an artefact in lower precision with its reference as a user would see it, on real images.

    Args:
        reference: the network that was exported, or an artefact that was proven equal to it.
        run: the shipped artefact in the runtime that will run it, or the nearest thing to it.
        images: (H, W, 3) uint8 BGR, like those to come.
        limits: of its precision.
        measure_ap: gives points of AP of reference and artefact on annotated images.
        say: told what is being compared, a line each.

    Returns:
        The parity verdict for the manifest.

    Raises:
        ToodError: there is no image, or the reference finds nothing in any.
        CheckFailed: the artefact is outside a limit; the message names it.
    """
    if not len(source_images):
        raise ToodError(
            "no images to verify on; give --verify-images a folder of images like those to come"
        )
    say(f"comparing detections with {reference.run.name} on {len(source_images)} images")
    batches = [prepare([image], reference.sizing) for image in source_images]
    expected = [_rows(reference.run, batch, 0.0) for batch in batches]
    verdict = DetectionVerdict(_score_threshold(expected))
    lowest = max(0.0, verdict.score_threshold - limits.score)
    for rows, batch in zip(expected, batches, strict=True):
        verdict.add(_above(rows, lowest), _rows(run, batch, lowest), limits)
    images, valid_hw = batches[0]
    alone = _rows(run, batches[0], verdict.score_threshold)
    slots = split_batch(
        run(
            images.repeat(BATCH, 0),
            valid_hw.repeat(BATCH, 0),
            verdict.score_threshold,
            IOU_THRESHOLD,
        )
    )
    for slot in slots:
        matches = match_boxes(alone, slot, min_iou=limits.iou, max_score_difference=limits.score)
        verdict.batch_slots += matches.counts
    verdict.images_sha256 = hashlib.sha256(
        b"".join(batch[0].tobytes() for batch in batches)
    ).hexdigest()
    if measure_ap is not None:
        say("measuring AP of both on the annotated images")
        before, after = measure_ap()
        verdict.ap = {"reference": before, "artefact": after, "drop": before - after}
    if failures := verdict.failures(limits):
        raise CheckFailed(
            f"the artefact differs too much from its reference, {reference.run.name}: {'; '.join(failures)}"
        )
    names = {"reference": reference.run.name, "runtime": run.name, "judged_by": "detections"}
    return names | {"limits": asdict(limits)} | verdict.to_dict()


def _rows(run: Runner, batch: Batch, score_threshold: float) -> NetDetections:
    """The detections of a batch of one."""
    return split_batch(run(*batch, score_threshold, IOU_THRESHOLD))[0]


def _above(rows: NetDetections, score: float) -> NetDetections:
    chosen = rows.scores > score
    return NetDetections(rows.boxes[chosen], rows.scores[chosen], rows.labels[chosen])


def _score_threshold(expected: Sequence[NetDetections]) -> float:
    """The deployment score, or less where so few detections exceed it that their shares would say nothing.

    Raises:
        ToodError: nothing is found at all.
    """
    scores = np.sort(np.concatenate([rows.scores for rows in expected]))[::-1]
    if not len(scores):
        raise ToodError(
            "nothing is found in any of the images to verify on; give --verify-images a folder of images with objects in them"
        )
    last = scores[min(FEWEST_DETECTIONS, len(scores)) - 1]
    return min(DEPLOYMENT_SCORE, float(np.nextafter(last, np.float32(0))))
