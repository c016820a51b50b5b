"""The pictures with the most mistakes, drawn beside the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.boxes import Boxes
from tood_deploy.benchmark.coco_ap import Matches
from tood_deploy.benchmark.results import Results
from tood_deploy.benchmark.truth import Truth
from tood_deploy.draw import class_colour, draw_boxes, line_width

WRONG, IGNORED, RIGHT = 0, 1, 2  # class numbers whose colours are red, blue, green


@dataclass(frozen=True)
class Mistakes:
    """How many objects of a picture were missed, and how many detections in it are false."""

    image_id: int
    missed: int
    false: int


class MistakeFinder:
    """Mistakes at a score threshold for each category; right is what overlaps by 0.5 (IoU)."""

    def __init__(self, truth: Truth, results: Results, matches: Matches, conf: Mapping[int, float]) -> None:
        """Takes what was matched, and the score by category id above which detections count."""
        self.truth, self.results = truth, results
        least = np.array([conf[key] for key in truth.boxes.category_ids.tolist()])
        self.truth_kind = np.where(matches.truth_ignored, IGNORED, np.where(matches.truth_scores > least, RIGHT, WRONG))
        rows = matches.rows
        counted = results.scores[rows] > np.array([conf[key] for key in results.category_ids[rows].tolist()])
        kind = np.where(matches.ignored[:, 0], IGNORED, np.where(matches.found[:, 0], RIGHT, WRONG))
        self.found_kind = np.full(len(results), -1)
        self.found_kind[rows[counted]] = kind[counted]

    def all(self) -> list[Mistakes]:
        """Of every picture, in order of the ids."""
        ids = np.array(list(self.truth.images))
        missed = np.bincount(np.searchsorted(ids, self.truth.boxes.image_ids[self.truth_kind == WRONG]), minlength=len(ids))
        false = np.bincount(np.searchsorted(ids, self.results.image_ids[self.found_kind == WRONG]), minlength=len(ids))
        return [Mistakes(*values) for values in zip(ids.tolist(), missed.tolist(), false.tolist(), strict=True)]

    def draw(self, image_id: int, image_bgr: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The picture with the truth, red where missed, and with the detections, red where false; crowds are blue.

        What is right has no label, so that mistakes stand out.
        """
        objects, found = (table.span(image_id, image_id) for table in (self.truth.boxes, self.results))
        shown = np.flatnonzero(self.found_kind[found] >= 0)
        results = self.results.pick(found).pick(shown)
        scores = [f" {score:.2f}" for score in results.scores.tolist()]
        left = self._draw(image_bgr, self.truth.boxes.pick(objects), self.truth_kind[objects], [""] * len(self.truth_kind[objects]))
        return left, self._draw(image_bgr, results, self.found_kind[found][shown], scores)

    def _draw(self, image_bgr: NDArray[np.uint8], boxes: Boxes, kinds: NDArray[np.int64], endings: list[str]) -> NDArray[np.uint8]:
        drawn = image_bgr.copy()
        xyxy = np.concatenate([boxes.boxes_xywh[:, :2], boxes.boxes_xywh[:, :2] + boxes.boxes_xywh[:, 2:]], axis=1).astype(np.float32)
        for x1, y1, x2, y2 in np.rint(xyxy[kinds == RIGHT]).astype(int).tolist():
            cv2.rectangle(drawn, (x1, y1), (x2, y2), class_colour(RIGHT), line_width((image_bgr.shape[0], image_bgr.shape[1])))
        names = [self.truth.categories[category] for category in boxes.category_ids.tolist()]
        labels = [name + ending for name, ending in zip(names, endings, strict=True)]
        labelled = np.flatnonzero(kinds != RIGHT)
        return draw_boxes(drawn, xyxy[labelled], kinds[labelled].astype(np.int32), [labels[i] for i in labelled])
