"""Proves an artefact equal to its reference, which is the network in PyTorch, by running both on the same pictures.

The shipped file itself is run, with the head's maps added as outputs in memory (`runners`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.export.compare import Match, map_deviation, match_detections, match_overlapping
from tood_deploy.export.graph import HEAD_OUTPUTS, OUTPUTS
from tood_deploy.export.pictures import synthetic_picture
from tood_deploy.export.runners import Maps, Reference, Runner
from tood_deploy.preprocess import resize_and_pad
from tood_deploy.rows import Rows, batch_rows

SIZES_HW = {"square": (320, 320), "portrait": (416, 256), "tiny": (64, 64)}
BATCH = 3
MOST_DEPENDING = 0.2  # share of detections that may depend on the batch slot, however coarse the arithmetic: other kernels, same numbers
SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6


@dataclass(frozen=True)
class Tolerances:
    """How far an artefact may be from PyTorch.

    Attributes:
        head_scores: of every score map, absolute.
        head_boxes: of every box map, in strides; None where it is only recorded.
        noise: where a network is so ill-conditioned that float32 itself is further off (GroupNorm over two values that are nearly equal
            is), this many times the deviation of PyTorch's own float32 from float64 on the same pictures, if that is more.
        scores: of a detection.
        boxes_px: of a detection's coordinates, pixels of the network input; None where boxes match that overlap (`PAIR_IOU`).
        exchanges: detections a picture that a decision on the very edge of a threshold may exchange.
        exchanged_share: the same as a share of the picture's detections, if that is more.
    """

    head_scores: float = 1e-5
    head_boxes: float | None = 1e-3
    noise: float = 10.0
    scores: float = 1e-5
    boxes_px: float | None = 0.05
    exchanges: int = 2
    exchanged_share: float = 0.0

    def match(self, reference: Rows, found: Rows) -> Match:
        """The detections of both that agree."""
        if self.boxes_px is None:
            return match_overlapping(reference, found, self.scores)
        return match_detections(reference, found, self.scores, self.boxes_px)

    def allowed_exchanges(self, match: Match) -> float:
        """How many detections of a picture may be exchanged."""
        return max(self.exchanges, self.exchanged_share * match.reference)


# By precision. The lower ones are to find what is broken; what they cost is measured in AP. The largest deviation of a box map is then of
# some cell of the background. Seen with bf16 on seeded and trained networks: scores within 0.03, 7 of 100 detections exchanged.
TOLERANCES = {
    "fp32": Tolerances(),
    "fp16": Tolerances(head_scores=0.05, head_boxes=None, scores=0.05, boxes_px=None, exchanged_share=0.15),
    "bf16": Tolerances(head_scores=0.1, head_boxes=None, scores=0.1, boxes_px=None, exchanged_share=0.2),
    "int8": Tolerances(head_scores=0.3, head_boxes=None, scores=0.3, boxes_px=None, exchanged_share=0.75),
}


@dataclass
class Verdict:
    """What the comparison found, over all pictures.

    Attributes:
        head_scores, head_boxes: largest deviations of the head's maps, boxes in strides.
        head_scores_noise, head_boxes_noise: of float32 from float64 in PyTorch, measured only where a deviation asked for it.
        failed: what was outside its tolerance, a sentence each.
        detections: PyTorch against the artefact.
        batch_slots: the same picture alone against in every slot of a batch.
        most_exchanges: detections exchanged in the worst picture.
        pictures: how many there were; and the SHA-256 of all their pixels.
    """

    head_scores: float = 0.0
    head_boxes: float = 0.0
    head_scores_noise: float = 0.0
    head_boxes_noise: float = 0.0
    failed: list[str] = field(default_factory=list)
    detections: Match = field(default_factory=Match)
    batch_slots: Match = field(default_factory=Match)
    most_exchanges: int = 0
    pictures: int = 0
    pictures_sha256: str = ""

    def failures(self, tolerances: Tolerances) -> list[str]:
        """One sentence for every stage outside its tolerance."""
        share = min(tolerances.exchanged_share, MOST_DEPENDING)
        depending, allowed = self.batch_slots.exchanged, share * self.batch_slots.reference
        slots = [f"detections that depend on the batch slot: {depending}, at most {allowed:g} allowed"] if depending > allowed else []
        return self.failed + slots


class Verifier:
    """Runs the reference and the artefact side by side."""

    def __init__(self, reference: Reference, run: Runner, tolerances: Tolerances) -> None:
        self.reference, self.run = reference, run
        self.tolerances = tolerances
        self.verdict = Verdict()
        self._pixels = hashlib.sha256()

    def compare(self, pictures: Sequence[NDArray[np.uint8]], imgsz: tuple[int, int]) -> None:
        """Adds a batch of pictures, (H, W, 3) uint8 BGR of one size, to the verdict."""
        prepared = [resize_and_pad(picture, imgsz) for picture in pictures]
        images = np.stack([image for image, _ in prepared])
        valid_hw = np.array([transform.resized_hw for _, transform in prepared], np.int32)
        self._pixels.update(images.tobytes())
        expected, found = (run(images, valid_hw, SCORE_THRESHOLD, IOU_THRESHOLD) for run in (self.reference.run, self.run))
        self._compare_maps(expected[len(OUTPUTS) :], found[len(OUTPUTS) :], images, valid_hw)
        for first, second in zip(batch_rows(expected), batch_rows(found), strict=True):
            self._add(self.tolerances.match(first, second))
        self.verdict.pictures += len(pictures)
        self.verdict.pictures_sha256 = self._pixels.hexdigest()

    def compare_slots(self, picture: NDArray[np.uint8], imgsz: tuple[int, int], batch: int = BATCH) -> None:
        """Adds to the verdict whether the artefact gives a picture the same rows alone and in every slot of a batch."""
        image, transform = resize_and_pad(picture, imgsz)
        images, valid_hw = image[None].repeat(batch, 0), np.array([transform.resized_hw], np.int32).repeat(batch, 0)
        alone, slots = (batch_rows(self.run(images[:n], valid_hw[:n], SCORE_THRESHOLD, IOU_THRESHOLD)) for n in (1, batch))
        for slot in slots:
            self.verdict.batch_slots += self.tolerances.match(alone[0], slot)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values for the manifest."""
        names = {"reference": self.reference.run.name, "runtime": self.run.name}
        return names | {"tolerances": asdict(self.tolerances)} | asdict(self.verdict)

    def _add(self, match: Match) -> None:
        self.verdict.detections += match
        self.verdict.most_exchanges = max(self.verdict.most_exchanges, match.exchanged)
        if match.exchanged > (allowed := self.tolerances.allowed_exchanges(match)):
            self.verdict.failed.append(f"detections exchanged in one picture: {match.exchanged}, at most {allowed:g} allowed")

    def _compare_maps(self, expected: Maps, found: Maps, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> None:
        half = len(HEAD_OUTPUTS) // 2
        exact: Maps | None = None
        for name, part in (("head_scores", slice(half)), ("head_boxes", slice(half, None))):
            deviation, allowed = _largest_deviation(expected[part], found[part]), getattr(self.tolerances, name)
            setattr(self.verdict, name, max(getattr(self.verdict, name), deviation))
            if allowed is None or deviation <= allowed:
                continue
            if self.reference.in_float64 is not None:
                exact = exact or self.reference.in_float64(images, valid_hw)
                noise = _largest_deviation(exact[part], expected[part])
                setattr(self.verdict, f"{name}_noise", max(getattr(self.verdict, f"{name}_noise"), noise))
                allowed = max(allowed, self.tolerances.noise * noise)
            if deviation > allowed:
                self.verdict.failed.append(
                    f"{name.replace('_', ' ')} of pictures {images.shape[1:3]} deviate: {deviation:.3g}, at most {allowed:.3g} allowed"
                )


def _largest_deviation(first: Maps, second: Maps) -> float:
    return max(map_deviation(one, other) for one, other in zip(first, second, strict=True))


def verify(
    reference: Reference,
    run: Runner,
    *,
    pictures: Sequence[NDArray[np.uint8]] = (),
    tolerances: Tolerances | None = None,
    synthetic: bool = True,
) -> dict[str, Any]:
    """Compares an artefact with its reference: at three sizes, in batches of one and three, and on the user's pictures.

    Args:
        reference: the network that was exported, or an artefact that was proven equal to it.
        run: the shipped artefact in a runtime.
        pictures: (H, W, 3) uint8 BGR, compared at the model's own picture size in addition to the built-in ones.
        tolerances: the published ones for float32 where not given.
        synthetic: whether to run the built-in pictures. What was quantised for pictures of one kind may be far off on another: compare it
            with a float reference on `pictures` of its kind alone.

    Returns:
        The parity verdict for the manifest.

    Raises:
        ToodError: there is no picture to compare on.
        CheckFailed: the artefact is outside a tolerance; the message names the stage and the deviation.
    """
    if not synthetic and not len(pictures):
        raise ToodError("no pictures to verify on; expected some of the kind that the model was quantised for")
    verifier = Verifier(reference, run, tolerances or TOLERANCES["fp32"])
    if synthetic:
        _compare_synthetic(verifier)
    else:
        verifier.compare_slots(pictures[0], reference.imgsz)
    for picture in pictures:
        verifier.compare([picture], reference.imgsz)
    if failures := verifier.verdict.failures(verifier.tolerances):
        raise CheckFailed(f"the artefact is not equal to its reference, {reference.run.name}: {'; '.join(failures)}")
    return verifier.to_dict()


def _compare_synthetic(verifier: Verifier) -> None:
    for number, (height, width) in enumerate(SIZES_HW.values()):
        # A few rows and columns fewer than the padded size, so that padding takes part.
        batch = [synthetic_picture(height - 10, width - 6, seed=BATCH * number + i) for i in range(BATCH)]
        imgsz = min(height - 10, width - 6), max(height - 10, width - 6)
        verifier.compare(batch[:1], imgsz)
        verifier.compare(batch, imgsz)
        verifier.compare_slots(batch[0], imgsz)
