"""How far each way is from PyTorch in float32 on the CPU, on the same padded images."""

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
from tood_deploy.model.tood import FusedDetector, Tood
from tood_deploy.parity.tolerances import DETECTION_LIMITS

EXCHANGES = 2  # detections of a image that a decision on the very edge of a threshold may exchange


@dataclass(frozen=True)
class Tolerances:
    """How far the detections of one image may be apart.

    Attributes:
        scores: of a pair.
        boxes_px: of a pair's coordinates; None where boxes match that overlap by `iou`.
        iou: see there.
        exchanged_share: share of a image's detections that may be exchanged, if that is more than `EXCHANGES`.
    """

    scores: float
    boxes_px: float | None
    iou: float
    exchanged_share: float

    def match(self, reference: NetDetections, found: NetDetections) -> MatchCounts:
        """The detections of both that agree."""
        if self.boxes_px is not None:
            return match_boxes(
                reference,
                found,
                min_iou=0,
                max_score_difference=self.scores,
                max_box_difference_px=self.boxes_px,
            ).counts
        return match_boxes(
            reference, found, min_iou=self.iou, max_score_difference=self.scores
        ).counts

    def allowed_exchanges(self, match: MatchCounts) -> float:
        """How many detections of a image may be exchanged."""
        return max(EXCHANGES, self.exchanged_share * match.reference)


# On a GPU float32 is summed up in other orders, by other algorithms of convolution, than on the CPU.
GPU_FP32 = Tolerances(1e-3, 0.5, 0.0, 0.02)


def tolerances_of(precision: str) -> Tolerances:
    """Return the tolerances of a precision."""
    if precision == "fp32":
        return GPU_FP32
    limits = DETECTION_LIMITS[precision]
    return Tolerances(limits.score, None, limits.iou, limits.lost)


class Reference:
    """The network in PyTorch, float32, on the CPU, and what it finds."""

    def __init__(
        self, model: Tood, images: Sequence[NDArray[np.uint8]], size_hw: tuple[int, int]
    ) -> None:
        self.detector, self.size_hw = FusedDetector(model).eval(), size_hw
        self.images = images
        self._expected: list[NetDetections] | None = None

    def compare(self, engine: Engine, batch: int, precision: str) -> dict[str, Any]:
        """Runs every image through an engine, in all slots of a batch.

        Returns:
            The correspondence of the detections, what was allowed, the images on which it was not kept, and slots that differ.
        """
        prepared = self._prepare(engine)
        if self._expected is None:
            self._expected = [self._run(each) for each in prepared]
        tolerances = tolerances_of(precision)
        total, worst, outside, slots = MatchCounts(), 0, 0, 0
        for each, expected in zip(prepared, self._expected, strict=True):
            first, last = _ends(_infer(engine, each, batch))
            match = tolerances.match(expected, first)
            total, worst = total + match, max(worst, match.exchanged)
            outside += match.exchanged > tolerances.allowed_exchanges(match)
            slots += _differ(first, last, tolerances)
        found = {
            "images": len(prepared),
            "images_outside": outside,
            "worst_exchanges": worst,
            "slots_that_differ": slots,
        }
        return asdict(total) | found | {"tolerances": asdict(tolerances)}

    def _prepare(self, engine: Engine) -> list[Prepared]:
        detector = Detector(engine, imgsz=self.size_hw)
        return [detector.prepare(image) for image in self.images]

    @torch.no_grad()
    def _run(self, prepared: Prepared) -> NetDetections:
        valid_hw = torch.tensor([prepared.transform.resized_hw], dtype=torch.int32)
        found = self.detector(
            torch.from_numpy(prepared.image)[None], valid_hw, CONF, IOU
        ).detections
        return split_batch([tensor.numpy() for tensor in found])[0]


def _infer(engine: Engine, prepared: Prepared, batch: int) -> BatchDetections:
    images = prepared.image[None].repeat(batch, 0)
    return engine.infer(
        images, np.array([prepared.transform.resized_hw], np.int32).repeat(batch, 0), CONF, IOU
    )


def _ends(found: BatchDetections) -> tuple[NetDetections, NetDetections]:
    rows = split_batch((found.num_dets, found.boxes_net, found.scores, found.labels))
    return rows[0], rows[-1]


def _differ(first: NetDetections, last: NetDetections, tolerances: Tolerances) -> bool:
    match = tolerances.match(first, last)
    return match.exchanged > tolerances.allowed_exchanges(match)


def verdict(parity: dict[str, Any]) -> str:
    """Why a comparison fails; "" where it does not."""
    if parity.get("images_outside"):
        return (
            f"parity: {parity['images_outside']} of {parity['images']} images outside the tolerance"
        )
    if parity.get("slots_that_differ"):
        return f"parity: {parity['slots_that_differ']} of {parity['images']} images depend on the batch slot"
    return ""
