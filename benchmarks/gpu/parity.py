"""Compare every variant with PyTorch in float32 on the CPU, on the same padded images.

Images and open engines in, plain numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.settings import CONF, IOU
from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.inference.detector import Detector, Prepared
from tood_deploy.matching import MatchCounts, NetDetections, match_boxes, split_batch
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.parity.tolerances import DETECTION_LIMITS

EXCHANGES = 2  # detections of an image that decisions on the very edge of a threshold may exchange


@dataclass(frozen=True)
class Tolerances:
    """How far the detections of one image may be apart.

    Attributes:
        scores: of a pair.
        boxes_px: of a pair's coordinates; None where boxes match that overlap by `iou`.
        iou: see there.
        exchanged_share: share of an image's detections that may be exchanged, where that is more
            than `EXCHANGES`.
    """

    scores: float
    boxes_px: float | None
    iou: float
    exchanged_share: float

    def match(self, reference: NetDetections, other: NetDetections) -> MatchCounts:
        """Return how many detections of both agree."""
        return match_boxes(
            reference,
            other,
            min_iou=self.iou,
            max_score_difference=self.scores,
            max_box_difference_px=np.inf if self.boxes_px is None else self.boxes_px,
        ).counts

    def allowed_exchanges(self, match: MatchCounts) -> float:
        """Return how many detections of an image may be exchanged."""
        return max(EXCHANGES, self.exchanged_share * match.reference)


# On a GPU float32 is summed up in other orders, by other convolution algorithms, than on the CPU.
GPU_FP32 = Tolerances(1e-3, 0.5, 0.0, 0.02)


def tolerances_of(precision: str) -> Tolerances:
    """Return the tolerances of a precision."""
    if precision == "fp32":
        return GPU_FP32
    limits = DETECTION_LIMITS[precision]
    return Tolerances(limits.score, None, limits.iou, limits.lost)


class Reference:
    """The network in PyTorch, float32, on the CPU, and its detections."""

    def __init__(
        self, model: DenseDetector, images: Sequence[NDArray[np.uint8]], size_hw: tuple[int, int]
    ) -> None:
        self.detector, self.size_hw = FusedDetector(model).eval(), size_hw
        self.images = images
        self._expected: list[NetDetections] | None = None

    def compare(self, engine: Engine, batch: int, precision: str) -> dict[str, Any]:
        """Run every image through an engine, in all slots of a batch, and compare detections.

        Args:
            engine: open.
            batch: images of a call.
            precision: of the engine, which the tolerances depend on.

        Returns:
            The counts of matched detections, the tolerances, the images outside them, and the
            images whose first and last slot differ.
        """
        prepared = self._prepare(engine)
        if self._expected is None:
            self._expected = [self._run(image) for image in prepared]
        tolerances = tolerances_of(precision)
        total, worst, outside, slots = MatchCounts(), 0, 0, 0
        for image, expected in zip(prepared, self._expected, strict=True):
            first, last = _ends(_infer(engine, image, batch))
            match = tolerances.match(expected, first)
            total, worst = total + match, max(worst, match.exchanged)
            outside += match.exchanged > tolerances.allowed_exchanges(match)
            slots += _differ(first, last, tolerances)
        return asdict(total) | {
            "images": len(prepared),
            "images_outside": outside,
            "worst_exchanges": worst,
            "slots_that_differ": slots,
            "tolerances": asdict(tolerances),
        }

    def _prepare(self, engine: Engine) -> list[Prepared]:
        detector = Detector(engine, imgsz=self.size_hw)
        return [detector.prepare(image) for image in self.images]

    @torch.no_grad()
    def _run(self, prepared: Prepared) -> NetDetections:
        valid_hw = torch.tensor([prepared.transform.resized_hw], dtype=torch.int32)
        images = torch.from_numpy(prepared.image)[None]
        detections = self.detector(images, valid_hw, CONF, IOU).detections
        return split_batch([tensor.numpy() for tensor in detections])[0]


def _infer(engine: Engine, prepared: Prepared, batch: int) -> BatchDetections:
    """Run one image in all `batch` slots of an engine."""
    images = prepared.image[None].repeat(batch, 0)
    valid_hw = np.array([prepared.transform.resized_hw], np.int32).repeat(batch, 0)
    return engine.infer(images, valid_hw, CONF, IOU)


def _ends(batch: BatchDetections) -> tuple[NetDetections, NetDetections]:
    """Return the detections in the first and in the last slot."""
    images = split_batch((batch.num_dets, batch.boxes_net, batch.scores, batch.labels))
    return images[0], images[-1]


def _differ(first: NetDetections, last: NetDetections, tolerances: Tolerances) -> bool:
    match = tolerances.match(first, last)
    return match.exchanged > tolerances.allowed_exchanges(match)


def verdict(parity: dict[str, Any]) -> str:
    """Return why a comparison fails; "" where it does not."""
    if outside := parity.get("images_outside"):
        return f"parity: {outside} of {parity['images']} images outside the tolerance"
    if differing := parity.get("slots_that_differ"):
        return f"parity: {differing} of {parity['images']} images depend on the batch slot"
    return ""
