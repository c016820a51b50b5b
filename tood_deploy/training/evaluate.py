"""AP of a network while it is trained: a network in, COCO metrics and a few drawn images out.

The images are shared out among workers; every one counts once. Detects as a deployed model does;
the metric is `data.coco_metrics`. Knows no losses and no checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tood_deploy.data.coco_metrics import OVERLAPS, CocoMetrics, CocoRows, evaluate
from tood_deploy.detections import Detections
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.preprocess import ImageTransform, resize_and_pad
from tood_deploy.presets import Sizing
from tood_deploy.training.distributed import gather_objects, is_main, rank, world_size
from tood_deploy.training.records import LabelledImages, Record, read_image

METRICS = {  # the names that logs and checkpoints have, and the metric's own
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_small": "APs",
    "AP_medium": "APm",
    "AP_large": "APl",
}
SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6
DRAWN_IMAGES, DRAWN_SCORE = 4, 0.3


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a network is.

    Attributes:
        metrics: `METRICS`, 0 to 1; NaN where there is no such object; empty on all workers but the
            main one.
        precision: (T, 101) precision at recalls 0 to 1, the mean over classes, at overlaps of 0.50
            to 0.95.
        class_ap: AP of every class; NaN where it has no object.
        images: a few with detections drawn on them, (H, W, 3) uint8 RGB.
        unreadable: images that could not be read, and count as without detections.
    """

    metrics: dict[str, float]
    precision: NDArray[np.float64] | None = None
    class_ap: dict[str, float] = field(default_factory=dict)
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    unreadable: tuple[str, ...] = ()


class _Input(NamedTuple):
    """One image, (H, W, 3) uint8 BGR, and what the network is given of it."""

    record: Record
    image_bgr: NDArray[np.uint8]
    padded: NDArray[np.uint8]
    transform: ImageTransform


class CocoEvaluator:
    """Runs a network over a validation set. Hand one to `fit`.

    Attributes:
        latest: what the last call gave, on the main worker.
    """

    def __init__(
        self,
        labelled: LabelledImages,
        device: str | torch.device = "cpu",
        batch: int = 8,
        precision: torch.dtype | None = None,
    ) -> None:
        """Take the validation set and how to run.

        Args:
            labelled: the validation set.
            device: to run on.
            batch: images at once, where they have one padded size.
            precision: autocast to it; None for float32.
        """
        self.labelled, self.device = labelled, torch.device(device)
        self.batch, self.precision = batch, precision
        self.truth = labelled.annotations.only(labelled.category_ids)
        self.latest: Evaluation | None = None

    def __call__(self, model: DenseDetector) -> Evaluation:
        """Return AP of a network, at the published thresholds; leaves it in eval mode."""
        rows, drawn, unreadable = self._detect_share(FusedDetector(model).to(self.device).eval())
        shares = gather_objects((rows, unreadable))
        if not is_main():
            return Evaluation({})
        metrics = evaluate(self.truth, [row for share, _ in shares for row in share])
        names = tuple(name for _, share in shares for name in share)
        self.latest = self._summarise(metrics, drawn, names)
        return self.latest

    def _detect_share(
        self, detector: FusedDetector
    ) -> tuple[CocoRows, list[NDArray[np.uint8]], list[str]]:
        """Return COCO results of this worker's images; the first few drawn; the unreadable ones."""
        rows: CocoRows = []
        drawn: list[NDArray[np.uint8]] = []
        share, unreadable = self.labelled.records[rank() :: world_size()], []
        for group in self._batches(share, detector.model.preset.sizing, unreadable):
            for image, detections in zip(group, self._detect(detector, group), strict=True):
                rows += detections.to_coco(image.record.image_id, self.labelled.category_ids)
                if len(drawn) < DRAWN_IMAGES:
                    plotted = detections.filter(DRAWN_SCORE).plot(image.image_bgr)
                    drawn.append(np.asarray(cv2.cvtColor(plotted, cv2.COLOR_BGR2RGB), np.uint8))
        return rows, drawn, unreadable

    def _batches(
        self, records: Sequence[Record], sizing: Sizing, unreadable: list[str]
    ) -> Iterator[list[_Input]]:
        """Yield neighbouring images of one padded size.

        Args:
            records: the images.
            sizing: how the network's inputs are scaled and padded.
            unreadable: names of images that cannot be read are added.
        """
        group: list[_Input] = []
        for record in records:
            image = read_image(record)
            if image is None:
                unreadable.append(record.path.name)
                continue
            padded, transform = resize_and_pad(image, sizing)
            full = len(group) == self.batch
            if group and (full or group[0].transform.net_hw != transform.net_hw):
                yield group
                group = []
            group.append(_Input(record, image, padded, transform))
        if group:
            yield group

    @torch.inference_mode()
    def _detect(self, detector: FusedDetector, group: Sequence[_Input]) -> list[Detections]:
        images = torch.from_numpy(np.stack([image.padded for image in group])).to(self.device)
        valid_hw = torch.tensor(
            [image.transform.resized_hw for image in group], dtype=torch.int32, device=self.device
        )
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            output = detector(images, valid_hw, SCORE_THRESHOLD, IOU_THRESHOLD).detections
        counts, boxes, scores, labels = (part.cpu().numpy() for part in output)
        # A box that overflowed in half precision covers nothing: it counts as false, and the run
        # goes on.
        boxes = np.nan_to_num(boxes, nan=0.0, posinf=0.0, neginf=0.0)
        return [
            Detections(
                image.transform.boxes_to_image(boxes[i, :count]),
                scores[i, :count],
                labels[i, :count],
                self.labelled.class_names,
            )
            for i, (image, count) in enumerate(zip(group, counts.tolist(), strict=True))
        ]

    def _summarise(
        self, metrics: CocoMetrics, drawn: list[NDArray[np.uint8]], unreadable: tuple[str, ...]
    ) -> Evaluation:
        numbers = {name: _nan_if_absent(metrics.numbers[own]) for name, own in METRICS.items()}
        order = {name: k for k, name in enumerate(metrics.class_names)}
        class_ap = {
            name: _nan_if_absent(metrics.ap_of(order[name])) for name in self.labelled.class_names
        }
        precision = np.stack([metrics.curve(overlap) for overlap in OVERLAPS])
        return Evaluation(numbers, precision, class_ap, drawn, unreadable)


def _nan_if_absent(value: float) -> float:
    """Return NaN for pycocotools's -1, which marks what has no objects."""
    return value if value >= 0 else float("nan")
