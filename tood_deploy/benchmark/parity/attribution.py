"""What a deviation costs: AP by part of the artefact and by padding; the images that differ most.

What reference and artefact gave comes in; COCO results of substituted runs, changes by padding and
the most different images go out. Knows no files and no reports.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.parity.stage_runners import REDUCED, TorchStages, network_inputs
from tood_deploy.data.coco_metrics import CocoRows, Scoring
from tood_deploy.data.image_set import ImageEntry
from tood_deploy.detections import Detections
from tood_deploy.matching import NetDetections
from tood_deploy.parity.deviation import BoxDeviation
from tood_deploy.parity.stages import GROUPS, STAGES, StageRunner, Values, detections_of
from tood_deploy.preprocess import choose_canvas, fit_imgsz, resize_and_pad

MAX_IMAGES = 20
MAX_SCORES = 50_000


class StageSubstitution:
    """Runs the reference with one part exchanged for the artefact's.

    Attributes:
        rows: COCO results of each such run, by part.
    """

    def __init__(self, reference: TorchStages, artefact: StageRunner, precision: str) -> None:
        """Run nothing yet.

        Args:
            reference: runs all but the exchanged part.
            artefact: runs that part.
            precision: of the artefact's arithmetic; where PyTorch can compute in it, the network in
                that precision is a part of its own, which needs no stages of the artefact.
        """
        self.reference, self.artefact = reference, artefact
        self._reduced = (
            TorchStages(reference.detector, REDUCED[precision]) if precision in REDUCED else None
        )
        self._parts = GROUPS if artefact.has_stages else {}
        names = (*self._parts, *(["precision"] if self._reduced else []))
        self.rows: dict[str, CocoRows] = {name: [] for name in names}

    def add(
        self, values: Values, alone: Mapping[str, Values], to_rows: Callable[[Values], CocoRows]
    ) -> None:
        """Add one image.

        Args:
            values: the reference's, of all stages.
            alone: what each stage of the artefact gave for these; empty where it has no stages.
            to_rows: returns COCO results of detections.
        """
        for part, stages in self._parts.items():
            changed = self.artefact.run_chain(stages[1:], values | alone[stages[0].name])
            same = all(np.array_equal(changed[name], values[name]) for name in stages[-1].gives)
            self.rows[part] += to_rows(values if same else self._finish(changed, stages[-1].name))
        if self._reduced is not None:
            network = GROUPS["network"]
            changed = self._reduced.run_chain(network, values)
            self.rows["precision"] += to_rows(self._finish(changed, network[-1].name))

    def _finish(self, values: Values, last_done: str) -> Values:
        """Run the reference's stages after this one."""
        done = [stage.name for stage in STAGES].index(last_done)
        return self.reference.run_chain(STAGES[done + 1 :], values)


class PaddingComparison:
    """Runs a detector once more, with another padding than it is compared with.

    Of an artefact that takes every size that is a canvas that the user named. One that takes
    canvases alone is compared on these; then the detector here is the reference, padded as little
    as needed.

    Attributes:
        input_shapes_hw: rows and columns; an image goes to the canvas that shrinks it least.
        fixed: whether the artefact takes nothing but the canvases.
        rows: COCO results with the other padding.
        change: from as little padding as needed to the canvases, in the image's pixels.
        shrunk: images that were too tall or too wide for every canvas and were scaled down further.
    """

    def __init__(
        self,
        runner: StageRunner,
        input_shapes_hw: Sequence[tuple[int, int]],
        *,
        fixed: bool,
        imgsz: tuple[int, int],
        conf: float,
        iou: float,
        scoring: Scoring | None,
    ) -> None:
        """Run nothing yet.

        Args:
            runner: what runs with the other padding.
            input_shapes_hw: see the class.
            fixed: see the class.
            imgsz: (short side, long side) that images are scaled to fit.
            conf: score that detections must exceed, 0 to 1.
            iou: overlap above which the weaker of two boxes goes, 0 to 1.
            scoring: against annotations, where there are any.
        """
        self.runner, self.input_shapes_hw, self.fixed = runner, tuple(input_shapes_hw), fixed
        self.imgsz, self.conf, self.iou, self.scoring = imgsz, conf, iou, scoring
        self.rows: CocoRows = []
        self.change = BoxDeviation()
        self.shrunk = 0

    @property
    def title(self) -> str:
        """Return the canvases as text, such as "800x1344, 1344x800"."""
        return ", ".join(f"{height}x{width}" for height, width in self.input_shapes_hw)

    def add(self, source_image: ImageEntry, usual: Detections) -> None:
        """Add one image; `usual` is found with the padding that the artefact is compared with."""
        other = self._detect(source_image.read(), usual.class_names)
        least, padded = (other, usual) if self.fixed else (usual, other)
        self.change.add(_in_image(least), _in_image(padded))
        if self.scoring is not None:
            self.rows += self.scoring.rows(other, source_image.image_id)

    def _detect(self, image_bgr: NDArray[np.uint8], class_names: Sequence[str]) -> Detections:
        net_hw = choose_canvas(image_bgr.shape, self.imgsz, self.input_shapes_hw)
        fitting = fit_imgsz(image_bgr.shape, self.imgsz, net_hw)
        self.shrunk += fitting != self.imgsz
        image, transform = (
            resize_and_pad(image_bgr, self.imgsz)
            if self.fixed
            else resize_and_pad(image_bgr, fitting, net_hw)
        )
        values = self.runner.run_all(network_inputs(image, transform, self.conf, self.iou))
        rows = detections_of(values)
        boxes = transform.boxes_to_image(rows.boxes)
        return Detections(boxes, rows.scores, rows.labels, tuple(class_names))


def _in_image(detections: Detections) -> NetDetections:
    """Return detections as they are matched; their boxes stay in the image's pixels."""
    return NetDetections(detections.boxes, detections.scores, detections.class_ids)


@dataclass(frozen=True, order=True)
class Difference:
    """One image and what the two runs gave for it; ordered by how much they differ.

    Attributes:
        exchanged: boxes that only one of the two has.
        shift: the largest difference of a paired box's scores.
        number: of the image, negative, so that of equals the first counts as the more different.
        image: the image.
        reference: the reference's detections, boxes in the image's pixels.
        artefact: the artefact's, likewise.
        pairs: (P, 2) positions of paired boxes.
    """

    exchanged: int
    shift: float
    number: int
    image: ImageEntry = field(compare=False)
    reference: Detections = field(compare=False)
    artefact: Detections = field(compare=False)
    pairs: NDArray[np.intp] = field(compare=False)


class Differences:
    """Keeps the most different images, and the first many scores."""

    def __init__(self) -> None:
        """Begin with no image."""
        self._heap: list[Difference] = []
        self._scores: list[NDArray[np.float32]] = []
        self._kept_scores = 0
        self._images = 0

    def add(
        self,
        image: ImageEntry,
        reference: Detections,
        artefact: Detections,
        pairs: NDArray[np.intp],
    ) -> None:
        """Add one image.

        Args:
            image: which.
            reference: the reference's detections, boxes in the image's pixels.
            artefact: the artefact's, likewise.
            pairs: (P, 2) positions of paired boxes in both.
        """
        both = np.stack([reference.scores[pairs[:, 0]], artefact.scores[pairs[:, 1]]], axis=1)
        lost = np.delete(reference.scores, pairs[:, 0])
        added = np.delete(artefact.scores, pairs[:, 1])
        shift = float(np.abs(both[:, 0] - both[:, 1]).max(initial=0))
        exchanged = len(lost) + len(added)
        difference = Difference(exchanged, shift, -self._images, image, reference, artefact, pairs)
        self._images += 1
        push = heapq.heappush if len(self._heap) < MAX_IMAGES else heapq.heappushpop
        push(self._heap, difference)
        if self._kept_scores < MAX_SCORES:
            lost_rows = np.stack([lost, np.zeros_like(lost)], axis=1)
            added_rows = np.stack([np.zeros_like(added), added], axis=1)
            self._scores += [both, lost_rows, added_rows]
            self._kept_scores += len(both) + exchanged

    @property
    def images(self) -> list[Difference]:
        """Return the most different images, most different first."""
        return sorted(self._heap, reverse=True)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Return (N, 2) scores in reference and artefact, 0 for the one that lacks the box."""
        return np.concatenate([np.zeros((0, 2), np.float32), *self._scores])
