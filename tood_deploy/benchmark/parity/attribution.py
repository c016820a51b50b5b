"""What each part of an artefact costs in AP when it alone takes the place of the reference's."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.evaluation.coco_metrics import CocoRows, Scoring
from tood_deploy.benchmark.parity.stage_runners import REDUCED, TorchStages, network_inputs
from tood_deploy.data.image_set import ImageEntry
from tood_deploy.detections import Detections
from tood_deploy.matching import NetDetections
from tood_deploy.parity.deviation import RowDeviation, rows_of
from tood_deploy.parity.stages import GROUPS, STAGES, StageRunner, Values
from tood_deploy.preprocess import choose_canvas, fit_imgsz, resize_and_pad


class Swaps:
    """Runs the reference with one part exchanged, and keeps the COCO rows of each such run."""

    def __init__(self, reference: TorchStages, artefact: StageRunner, precision: str) -> None:
        """Takes the two, and the precision of the artefact's arithmetic, which alone is exchanged where the artefact has no stages."""
        self.reference, self.artefact = reference, artefact
        self.reduced = (
            TorchStages(reference.detector, REDUCED[precision]) if precision in REDUCED else None
        )
        self.parts = GROUPS if artefact.has_stages else {}
        self.rows: dict[str, list[dict[str, Any]]] = {
            part: [] for part in (*self.parts, *(["precision"] if self.reduced else []))
        }

    def add(
        self,
        values: Values,
        alone: Mapping[str, Values],
        to_rows: Callable[[Values], list[dict[str, Any]]],
    ) -> None:
        """Adds one image.

        Args:
            values: the reference's, of all stages.
            alone: what each stage of the artefact made of these; empty where it has no stages.
            to_rows: COCO rows of detections.
        """
        for part, stages in self.parts.items():
            swapped = self.artefact.run_chain(stages[1:], values | alone[stages[0].name])
            same = all(np.array_equal(swapped[name], values[name]) for name in stages[-1].gives)
            self.rows[part] += to_rows(values if same else self._finish(swapped, stages[-1].name))
        if self.reduced is not None:
            network = GROUPS["network"]
            self.rows["precision"] += to_rows(
                self._finish(self.reduced.run_chain(network, values), network[-1].name)
            )

    def _finish(self, values: Values, last_done: str) -> Values:
        """The reference's stages after this one."""
        done = [stage.name for stage in STAGES].index(last_done)
        return self.reference.run_chain(STAGES[done + 1 :], values)


class Canvas:
    """Runs a detector once more, with the other padding than it is compared with: canvases, or as little as needed.

    Attributes:
        canvases_hw: rows and columns of every canvas; a image goes to the one that shrinks it least.
        fixed: whether it is compared on the canvases, since an artefact takes nothing else. Then the detector here is the reference.
        rows: COCO rows with the other padding.
        change: from as little padding as needed to the canvases, in the image's pixels.
        shrunk: images that were too tall or too wide for every canvas and were scaled down further to fit.
    """

    def __init__(
        self,
        runner: StageRunner,
        canvases_hw: Sequence[tuple[int, int]],
        fixed: bool,
        imgsz: tuple[int, int],
        conf: float,
        iou: float,
        scoring: Scoring | None,
    ) -> None:
        self.runner, self.canvases_hw, self.fixed = runner, tuple(canvases_hw), fixed
        self.imgsz, self.conf, self.iou, self.scoring = imgsz, conf, iou, scoring
        self.rows: CocoRows = []
        self.change = RowDeviation()
        self.shrunk = 0

    @property
    def title(self) -> str:
        """The canvases as text, such as "800x1344, 1344x800"."""
        return ", ".join(f"{height}x{width}" for height, width in self.canvases_hw)

    def add(self, source_image: ImageEntry, usual: Detections) -> None:
        """Adds one image; `usual` is what the detector finds in it with the padding that it is compared with."""
        image_bgr = source_image.read()
        net_hw = choose_canvas(image_bgr.shape, self.imgsz, self.canvases_hw)
        fitting = fit_imgsz(image_bgr.shape, self.imgsz, net_hw)
        self.shrunk += fitting != self.imgsz
        image, transform = (
            resize_and_pad(image_bgr, self.imgsz)
            if self.fixed
            else resize_and_pad(image_bgr, fitting, net_hw)
        )
        rows = rows_of(
            STAGES[-1], self.runner.run_all(network_inputs(image, transform, self.conf, self.iou))
        )
        other = Detections(
            transform.boxes_to_image(rows.boxes), rows.scores, rows.labels, usual.class_names
        )
        least, padded = (other, usual) if self.fixed else (usual, other)
        self.change.add(
            NetDetections(least.boxes, least.scores, least.class_ids),
            NetDetections(padded.boxes, padded.scores, padded.class_ids),
        )
        if self.scoring is not None:
            self.rows += self.scoring.rows(other, source_image.image_id)


MAX_IMAGES = 20
MOST_SCORES = 50_000


@dataclass(frozen=True, order=True)
class Difference:
    """One image and what the two runs made of it; ordered by how much they differ.

    Attributes:
        exchanged: boxes that only one of the two has.
        shift: the largest difference of a paired box's scores.
        number: of the image, negative, so that of equals the first counts as the more different.
        image: the image.
        reference, found: detections, boxes in the image's pixels.
        pairs: (P, 2) positions of paired boxes.
    """

    exchanged: int
    shift: float
    number: int
    image: ImageEntry = field(compare=False)
    reference: Detections = field(compare=False)
    found: Detections = field(compare=False)
    pairs: NDArray[np.intp] = field(compare=False)


class Differences:
    """Keeps the most different images, and the first many scores."""

    def __init__(self) -> None:
        self._heap: list[Difference] = []
        self._scores: list[NDArray[np.float32]] = []
        self._kept_scores = 0
        self._seen = 0

    def add(
        self, image: ImageEntry, reference: Detections, found: Detections, pairs: NDArray[np.intp]
    ) -> None:
        """Adds one image; `pairs` are positions of paired boxes in both."""
        both = np.stack([reference.scores[pairs[:, 0]], found.scores[pairs[:, 1]]], axis=1)
        lost, added = np.delete(reference.scores, pairs[:, 0]), np.delete(found.scores, pairs[:, 1])
        shift = float(np.abs(both[:, 0] - both[:, 1]).max(initial=0))
        difference = Difference(
            len(lost) + len(added), shift, -self._seen, image, reference, found, pairs
        )
        self._seen += 1
        push = heapq.heappush if len(self._heap) < MAX_IMAGES else heapq.heappushpop
        push(self._heap, difference)
        if self._kept_scores < MOST_SCORES:
            zeros = np.zeros_like
            self._scores += [
                both,
                np.stack([lost, zeros(lost)], axis=1),
                np.stack([zeros(added), added], axis=1),
            ]
            self._kept_scores += len(both) + len(lost) + len(added)

    @property
    def images(self) -> list[Difference]:
        """The most different images, most different first."""
        return sorted(self._heap, reverse=True)

    @property
    def scores(self) -> NDArray[np.float32]:
        """(N, 2) scores of the reference's and the other's box, 0 for the one that has none."""
        return np.concatenate([np.zeros((0, 2), np.float32), *self._scores])
