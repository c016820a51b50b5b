"""Proves an artefact equal to its reference by running both on the same images.

Runners come in, the verdict for the manifest goes out. Float32 is judged map by map against what
float32 itself explains, then by detections; lower precisions by what a user would see of them, on
real images. The limits are in `tolerances`. Knows no file and no runtime.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.graph_io import OUTPUTS
from tood_deploy.manifest_sections import Parity
from tood_deploy.matching import NetDetections, split_batch
from tood_deploy.parity.detection_verdict import DetectionVerdict, choose_score_threshold
from tood_deploy.parity.float32_verdict import Allowance, Float32Judge, Float32Verdict
from tood_deploy.parity.reference import Outputs, Reference, Runner
from tood_deploy.parity.tolerances import FLOAT32_LIMITS, DetectionLimits, Failure, Float32Limits
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.reporter import Reporter

SIZES_HW = {"square": (320, 320), "portrait": (416, 256), "tiny": (64, 64)}
PADDING_HW = (10, 6)  # rows and columns fewer than the padded size, so that padding takes part
DIFFERENT = 2  # images in a batch whose maps are compared
BATCH = 3  # slots that must give the same
SCORE_THRESHOLD = 0.05
MAX_LISTED = 3  # failures in a message
SILENT = Reporter.silent()

Batch = tuple[NDArray[np.uint8], NDArray[np.int32]]


class Float32Verifier:
    """Runs the reference and a float32 artefact side by side.

    Attributes:
        verdict: what was measured so far.
    """

    def __init__(
        self, reference: Reference, run: Runner, limits: Float32Limits = FLOAT32_LIMITS
    ) -> None:
        """Run nothing yet.

        Args:
            reference: the network, or an artefact that was proven equal to it.
            run: the artefact, with its maps.
            limits: what is allowed.
        """
        self.reference, self.run = reference, run
        self._judge = Float32Judge(limits)
        self._pixels = hashlib.sha256()

    @property
    def verdict(self) -> Float32Verdict:
        """Return the verdict on all images so far."""
        return self._judge.verdict

    def compare(self, images: Sequence[NDArray[np.uint8]], imgsz: ImageSize) -> Allowance:
        """Compare maps and detections of a batch.

        Args:
            images: (H, W, 3) uint8 BGR, of one size.
            imgsz: what they are scaled to.

        Returns:
            What float32 explains of detections on images of that size.
        """
        batch = prepare(images, imgsz)
        noise = self.reference.measure(*batch, SCORE_THRESHOLD, self.reference.iou_threshold)
        outputs = self._run(batch)
        self._judge.judge_maps(noise, outputs[len(OUTPUTS) :], batch[0].shape[1:3])
        allowance = self._judge.allowance(noise)
        self._compare_detections(noise.detections[0], outputs, allowance)
        return allowance

    def compare_detections(
        self, image: NDArray[np.uint8], imgsz: ImageSize, allowance: Allowance
    ) -> None:
        """Compare the detections of one image.

        Args:
            image: (H, W, 3) uint8 BGR.
            imgsz: what it is scaled to.
            allowance: what float32 explains, measured on another image.
        """
        batch = prepare([image], imgsz)
        expected = self.reference.run(*batch, SCORE_THRESHOLD, self.reference.iou_threshold)
        self._compare_detections(expected, self._run(batch), allowance)

    def compare_slots(
        self, image: NDArray[np.uint8], imgsz: ImageSize, allowance: Allowance
    ) -> None:
        """Compare an image alone with the same in every slot of a batch.

        Args:
            image: (H, W, 3) uint8 BGR.
            imgsz: what it is scaled to.
            allowance: what float32 explains on images of that size.
        """
        images, valid_hw = prepare([image] * BATCH, imgsz)
        (alone,) = split_batch(self._run((images[:1], valid_hw[:1])))
        self._judge.judge_slots(alone, split_batch(self._run((images, valid_hw))), allowance)

    def _run(self, batch: Batch) -> Outputs:
        self._pixels.update(batch[0].tobytes())
        try:
            return self.run(*batch, SCORE_THRESHOLD, self.reference.iou_threshold)
        except CheckFailed:
            raise
        except Exception as error:  # of the runtime's own types, which share no public base
            shape, reason = batch[0].shape, str(error).strip().splitlines()[0][:300]
            raise CheckFailed(
                f"the artefact does not run on {shape[0]} images of {shape[1]}x{shape[2]}: {reason}"
            ) from error

    def _compare_detections(
        self, expected: Outputs, outputs: Outputs, allowance: Allowance
    ) -> None:
        for first, second in zip(split_batch(expected), split_batch(outputs), strict=True):
            self._judge.judge_detections(first, second, allowance)
        self.verdict.images_sha256 = self._pixels.hexdigest()

    def parity(self) -> Parity:
        """Return the verdict as the manifest holds it."""
        details = {"limits": asdict(self._judge.limits)} | self.verdict.to_dict()
        return _parity(self.reference, self.run, "float32 noise", details)


def prepare(images: Sequence[NDArray[np.uint8]], imgsz: ImageSize) -> Batch:
    """Return the graph's `images` and `valid_hw`.

    Args:
        images: (H, W, 3) uint8 BGR, of one size.
        imgsz: what they are scaled to.
    """
    prepared = [resize_and_pad(image, imgsz) for image in images]
    sizes_hw = [transform.resized_hw for _, transform in prepared]
    return np.stack([image for image, _ in prepared]), np.array(sizes_hw, np.int32)


def verify_float32(
    reference: Reference,
    run: Runner,
    *,
    images: Sequence[NDArray[np.uint8]] = (),
    reporter: Reporter = SILENT,
) -> Parity:
    """Compare a float32 artefact with its reference: at three sizes, alone and in batches.

    Args:
        reference: the network that was exported, or an artefact that was proven equal to it.
        run: the shipped artefact in a runtime, with its maps.
        images: (H, W, 3) uint8 BGR of the user's, compared at the model's own image size in
            addition to the built-in ones: of the first the maps, of all the detections.
        reporter: shows what is being compared.

    Returns:
        The parity verdict for the manifest.

    Raises:
        CheckFailed: the artefact is outside a limit; the message names the first guilty stage and
            the deviation.
    """
    verifier = Float32Verifier(reference, run)
    for number, (height, width) in enumerate(SIZES_HW.values()):
        reporter.info(f"comparing with {reference.run.name} on images of {height}x{width}")
        size_hw = height - PADDING_HW[0], width - PADDING_HW[1]
        batch = [synthetic_image(*size_hw, seed=BATCH * number + i) for i in range(DIFFERENT)]
        imgsz = min(size_hw), max(size_hw)
        allowance = verifier.compare(batch, imgsz)
        verifier.compare_slots(batch[0], imgsz, allowance)
    if len(images):
        reporter.info(f"comparing with {reference.run.name} on {len(images)} images of your own")
        allowance = verifier.compare(images[:1], reference.sizing)
        for image in images[1:]:
            verifier.compare_detections(image, reference.sizing, allowance)
    if failures := verifier.verdict.failed:
        raise CheckFailed(
            f"the artefact is not equal to its reference, {reference.run.name}: {_list(failures)}"
        )
    return verifier.parity()


def _list(failures: Sequence[Failure]) -> str:
    """Return the first failures as text, and how many more there are."""
    left_out = len(failures) - MAX_LISTED
    more = [f"and {left_out} more"] if left_out > 0 else []
    return "; ".join([*map(str, failures[:MAX_LISTED]), *more])


def verify_detections(
    reference: Reference,
    run: Runner,
    source_images: Sequence[NDArray[np.uint8]],
    limits: DetectionLimits,
    *,
    measure_ap: Callable[[], tuple[float, float]] | None = None,
    reporter: Reporter = SILENT,
) -> Parity:
    """Compare an artefact in lower precision with its reference as a user would see it.

    Args:
        reference: the network that was exported, or an artefact that was proven equal to it.
        run: the shipped artefact in the runtime that will run it, or the nearest thing to it.
        source_images: (H, W, 3) uint8 BGR, like those to come.
        limits: of its precision.
        measure_ap: returns points of AP of reference and artefact on annotated images.
        reporter: shows what is being compared.

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
    reporter.info(f"comparing detections with {reference.run.name} on {len(source_images)} images")
    batches = [prepare([image], reference.sizing) for image in source_images]
    iou = reference.iou_threshold
    expected = [_detect(reference.run, batch, 0.0, iou)[0] for batch in batches]
    verdict = DetectionVerdict(choose_score_threshold(expected))
    lowest = max(0.0, verdict.score_threshold - limits.score)
    for rows, batch in zip(expected, batches, strict=True):
        verdict.add(rows.above(lowest), _detect(run, batch, lowest, iou)[0], limits)
    verdict.add_slots(*_detect_in_slots(run, batches[0], verdict.score_threshold, iou), limits)
    verdict.images_sha256 = hashlib.sha256(
        b"".join(batch[0].tobytes() for batch in batches)
    ).hexdigest()
    if measure_ap is not None:
        reporter.info("measuring AP of both on the annotated images")
        before, after = measure_ap()
        verdict.ap = {"reference": before, "artefact": after, "drop": before - after}
    if failures := verdict.failures(limits):
        raise CheckFailed(
            "the artefact differs too much from its reference, "
            f"{reference.run.name}: {_list(failures)}"
        )
    details = {"limits": asdict(limits)} | verdict.to_dict()
    return _parity(reference, run, "detections", details)


def _parity(
    reference: Reference, run: Runner, judged_by: str, details: Mapping[str, Any]
) -> Parity:
    """Return a verdict as the manifest holds it.

    Args:
        reference, run: what was compared.
        judged_by: "float32 noise" or "detections".
        details: limits and deviations, and how many images.
    """
    names = {"reference": reference.run.name, "runtime": run.name, "judged_by": judged_by}
    return Parity.from_dict(names | dict(details))


def _detect(run: Runner, batch: Batch, score: float, iou: float) -> list[NetDetections]:
    return split_batch(run(*batch, score, iou))


def _detect_in_slots(
    run: Runner, batch: Batch, score: float, iou: float
) -> tuple[NetDetections, list[NetDetections]]:
    """Return the detections of an image alone, and of the same in every slot of a batch."""
    images, valid_hw = batch
    repeated = images.repeat(BATCH, 0), valid_hw.repeat(BATCH, 0)
    return _detect(run, batch, score, iou)[0], _detect(run, repeated, score, iou)
