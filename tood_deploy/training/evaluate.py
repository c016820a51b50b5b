"""AP of a network on COCO-format images, by pycocotools. Shared out among workers; every image counts once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tood_deploy.data.coco import Annotations, Record
from tood_deploy.detections import Detections
from tood_deploy.model.tood import FusedDetector, Tood
from tood_deploy.preprocess import ImageTransform, resize_and_pad
from tood_deploy.presets import Sizing
from tood_deploy.training.data import read_image
from tood_deploy.training.distributed import gather_objects, is_main, rank, world_size

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6
IMAGES, SHOWN_ABOVE = 4, 0.3


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a network is.

    Attributes:
        metrics: `METRICS`, 0 to 1; NaN where there is no such object; empty on all workers but the main one.
        precision: (T, 101) precision at recalls 0 to 1, the mean over classes, at overlaps of 0.50 to 0.95.
        class_ap: AP of every class.
        images: a few with detections drawn on them, (H, W, 3) uint8 RGB.
        unreadable: images that could not be read, and count as without detections.
    """

    metrics: dict[str, float]
    precision: NDArray[np.float64] | None = None
    class_ap: dict[str, float] = field(default_factory=dict)
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    unreadable: tuple[str, ...] = ()


class CocoEvaluator:
    """Runs a network over a validation set. Hand one to `fit`.

    Attributes:
        latest: what the last call gave, on the main worker.
    """

    def __init__(
        self,
        annotations: Annotations,
        device: str | torch.device = "cpu",
        batch: int = 8,
        precision: torch.dtype | None = None,
    ) -> None:
        """Reads the ground truth.

        Args:
            annotations: the validation set.
            device: to run on.
            batch: images at once, where they have one padded size.
            precision: autocast to it; None for float32.
        """
        self.annotations, self.device, self.batch, self.precision = (
            annotations,
            torch.device(device),
            batch,
            precision,
        )
        self.truth = _read_truth(annotations)
        self.latest: Evaluation | None = None

    def __call__(self, model: Tood) -> Evaluation:
        """AP of a network, at the published thresholds; leaves it in eval mode."""
        results, drawn, unreadable = self._detect_share(FusedDetector(model).to(self.device).eval())
        gathered = gather_objects((results, unreadable))
        if not is_main():
            return Evaluation({})
        rows = [row for share, _ in gathered for row in share]
        missing = tuple(name for _, share in gathered for name in share)
        self.latest = self._score(rows, drawn, missing)
        return self.latest

    def _detect_share(
        self, detector: FusedDetector
    ) -> tuple[list[dict[str, Any]], list[NDArray[np.uint8]], list[str]]:
        """COCO results of this worker's images; the first few drawn; the unreadable ones."""
        results: list[dict[str, Any]] = []
        drawn: list[NDArray[np.uint8]] = []
        share, unreadable = self.annotations.records[rank() :: world_size()], []
        for group in self._batches(share, detector.model.preset.sizing, unreadable):
            for (record, image, _, _), found in zip(
                group, self._detect(detector, group), strict=True
            ):
                results += found.to_coco(record.image_id, self.annotations.category_ids)
                if len(drawn) < IMAGES:
                    drawn.append(
                        np.asarray(
                            cv2.cvtColor(found.filter(SHOWN_ABOVE).plot(image), cv2.COLOR_BGR2RGB),
                            np.uint8,
                        )
                    )
        return results, drawn, unreadable

    def _batches(
        self, records: Sequence[Record], sizing: Sizing, unreadable: list[str]
    ) -> Iterator[list[Any]]:
        """Neighbouring images of one padded size: (record, image, network input, transform) each."""
        group: list[Any] = []
        for record in records:
            image = read_image(record)
            if image is None:
                unreadable.append(record.path.name)
                continue
            padded, transform = resize_and_pad(image, sizing)
            if group and (len(group) == self.batch or group[0][3].net_hw != transform.net_hw):
                yield group
                group = []
            group.append((record, image, padded, transform))
        if group:
            yield group

    @torch.inference_mode()
    def _detect(self, detector: FusedDetector, group: Sequence[Any]) -> list[Detections]:
        images = torch.from_numpy(np.stack([padded for _, _, padded, _ in group])).to(self.device)
        transforms: list[ImageTransform] = [transform for *_, transform in group]
        valid_hw = torch.tensor(
            [transform.resized_hw for transform in transforms],
            dtype=torch.int32,
            device=self.device,
        )
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            found = detector(images, valid_hw, SCORE_THRESHOLD, IOU_THRESHOLD).detections
        counts, boxes, scores, labels = (part.cpu().numpy() for part in found)
        names = self.annotations.class_names
        return [
            Detections(
                transform.boxes_to_image(boxes[i, :count]),
                scores[i, :count],
                labels[i, :count],
                names,
            )
            for i, (transform, count) in enumerate(zip(transforms, counts.tolist(), strict=True))
        ]

    def _score(
        self,
        rows: list[dict[str, Any]],
        drawn: list[NDArray[np.uint8]],
        unreadable: tuple[str, ...],
    ) -> Evaluation:
        from pycocotools.cocoeval import COCOeval

        names = self.annotations.class_names
        if not rows:
            return Evaluation(
                dict.fromkeys(METRICS, 0.0),
                class_ap=dict.fromkeys(names, 0.0),
                images=drawn,
                unreadable=unreadable,
            )
        with contextlib.redirect_stdout(io.StringIO()):
            scoring = COCOeval(self.truth, self.truth.loadRes(rows), "bbox")
            scoring.params.catIds = list(self.annotations.category_ids)
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
        precision = np.asarray(scoring.eval["precision"])[
            ..., 0, -1
        ]  # (T, 101, K), all sizes, 100 detections
        known = np.where(precision < 0, np.nan, precision)  # -1 marks a class without objects
        present: NDArray[np.bool_] = np.asarray(~np.isnan(known).all(axis=(0, 1)))
        class_ap = {
            name: float(known[..., k].mean()) if present[k] else float("nan")
            for k, name in enumerate(names)
        }
        metrics = {
            name: float(value) if value >= 0 else float("nan")
            for name, value in zip(METRICS, scoring.stats[:6], strict=True)
        }
        return Evaluation(metrics, known[..., present].mean(axis=2), class_ap, drawn, unreadable)


def _read_truth(annotations: Annotations) -> Any:
    """The ground truth as pycocotools takes it; fields it cannot do without are filled in."""
    from pycocotools.coco import COCO

    truth = COCO()
    content: dict[str, Any] = json.loads(annotations.path.read_text(encoding="utf-8"))
    content.setdefault("info", {})
    for number, entry in enumerate(content["annotations"], start=1):
        entry.setdefault("id", number)
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    truth.dataset = content  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
