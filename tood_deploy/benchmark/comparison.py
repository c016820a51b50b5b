"""Gathers, picture by picture, how one artefact differs from the PyTorch reference.

Two deviations of every stage are kept: as deployed, with all that the stages before it hand on; and alone, from the reference's own
values. The second tells which stage is guilty, the first what reaches the user.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.canvas import Canvas
from tood_deploy.benchmark.differences import Differences
from tood_deploy.benchmark.matching import RowDeviation
from tood_deploy.benchmark.picture_set import Picture
from tood_deploy.benchmark.scoring import CocoRows, Scoring
from tood_deploy.benchmark.stage_deviations import Failure, StageDeviations, rows_of
from tood_deploy.benchmark.stages import STAGES, StageRunner, Values, graph_inputs
from tood_deploy.benchmark.subject import Subject, repeat_pictures
from tood_deploy.benchmark.swaps import Swaps
from tood_deploy.benchmark.torch_stages import TorchStages
from tood_deploy.detections import Detections
from tood_deploy.parity.conditioning import Conditioning
from tood_deploy.parity.tolerances import Gates
from tood_deploy.preprocess import ImageTransform

SLOTS = 3
DETECTIONS = STAGES[-1]


class Comparison:
    """Everything that is gathered of one artefact.

    Attributes:
        subject: the artefact.
        gates: its limits.
        scoring: against annotations, where there are any.
        carried: deviations as deployed.
        alone: deviations of each stage by itself; None where the runtime does not give stages.
        swaps: runs with one part exchanged; None without annotations.
        rows: COCO rows of the artefact.
        differences: the most different pictures.
        slots: the first picture in every slot of a batch, against itself alone.
        sizes: by rows and columns of the input, deviations as deployed on a synthetic picture.
        canvas: what padding to a fixed canvas changes; None where it was not asked for and the artefact takes every size.
        reference_rows: COCO rows of the reference on the same inputs, no more than the artefact gives.
    """

    def __init__(self, reference: TorchStages, subject: Subject, gates: Gates, scoring: Scoring | None, canvas: Canvas | None) -> None:
        self.subject, self.gates, self.scoring, self.canvas = subject, gates, scoring, canvas
        inside = subject.runner.has_stages
        self.carried = StageDeviations(gates, carried=True)
        self.alone = StageDeviations(gates, carried=False) if inside else None
        self.swaps = Swaps(reference, subject.runner, subject.engine.precision) if scoring else None
        self.differences, self.slots = Differences(), RowDeviation()
        self.sizes: dict[tuple[int, int], StageDeviations] = {}
        self.rows: CocoRows = []
        self.reference_rows: CocoRows = []

    def add(self, picture: Picture, transform: ImageTransform, reference: Values) -> None:
        """Adds one picture; `reference` holds the network's inputs and everything the reference made of them."""
        reference = self._cut(reference)
        found = self.subject.runner.run_all(graph_inputs(reference))
        pairs = add_stages(self.carried, self.subject.runner, reference, found)
        first, second = (self._detections(values, transform) for values in (reference, found))
        self.differences.add(picture, first, second, pairs)
        self.rows += self._coco_rows(second, picture)
        self.reference_rows += self._coco_rows(first, picture)
        self._add_alone(picture, transform, reference)
        if self.canvas is not None:
            self.canvas.add(picture, first if self.canvas.fixed else second)

    def _add_alone(self, picture: Picture, transform: ImageTransform, reference: Values) -> None:
        alone: dict[str, Values] = {}
        if self.alone is not None:
            for stage in STAGES:
                alone[stage.name] = self.subject.runner.run(stage, reference)
                self.alone.add(stage, reference, alone[stage.name])
        if self.swaps is not None:
            self.swaps.add(reference, alone, lambda values: self._coco_rows(self._detections(self._cut(values), transform), picture))

    def add_slots(self, reference: Values) -> None:
        """Runs one picture alone and in every slot of a batch, as large as the artefact takes: its rows must be the same."""
        slots = min(SLOTS, self.subject.most_batch(reference) or SLOTS)
        batch = repeat_pictures(graph_inputs(reference), slots)
        alone = rows_of(DETECTIONS, self.subject.runner.run_all(graph_inputs(reference)))
        found = self.subject.runner.run_all(batch)
        for slot in range(slots):
            self.slots.add(alone, rows_of(DETECTIONS, {name: found[name][slot : slot + 1] for name in DETECTIONS.gives}))

    def add_size(self, net_hw: tuple[int, int], reference: Values, noise: Conditioning) -> None:
        """Adds a synthetic picture of one input size, where float32 may be noisier than on pictures of the usual size."""
        self.sizes[net_hw] = StageDeviations(self.gates, carried=True)
        self.sizes[net_hw].allow_noise(noise)
        reference = self._cut(reference)
        add_stages(self.sizes[net_hw], self.subject.runner, reference, self.subject.runner.run_all(graph_inputs(reference)))

    def failures(self) -> Iterator[Failure]:
        """Every limit that a stage passed: by itself, then as deployed, then in the further checks."""
        if self.alone is not None:
            yield from self.alone.failures()
        yield from self.carried.failures()
        shared = 1 - self.slots.matched_share
        for what, found, allowed in (
            ("share of rows that depend on the slot", shared, 0.0),
            ("score differs by", self.slots.score.worst, self.gates.max_score),
            ("coordinate differs (px) by", self.slots.box_px.worst, self.gates.max_box_px),
        ):
            if found > allowed:
                yield Failure("batch slots", what, found, allowed)
        for (height, width), deviations in self.sizes.items():
            yield from (Failure(f"{each.stage} at {height}x{width}", each.what, each.found, each.allowed) for each in deviations.failures())

    def _cut(self, values: Values) -> Values:
        """The same with no more detections than the artefact gives."""
        return values | {"num_dets": values["num_dets"].clip(max=self.subject.manifest.max_det)}

    def _detections(self, values: Values, transform: ImageTransform) -> Detections:
        rows = rows_of(DETECTIONS, values)
        names = self.subject.manifest.preset.class_names
        return Detections(transform.boxes_to_image(rows.boxes), rows.scores, rows.labels, names)

    def _coco_rows(self, found: Detections, picture: Picture) -> CocoRows:
        return [] if self.scoring is None else self.scoring.rows(found, picture.image_id)


def add_stages(deviations: StageDeviations, runner: StageRunner, reference: Values, found: Values) -> NDArray[np.intp]:
    """Adds all stages that the runner gives, as deployed; gives the pairs of detections."""
    for stage in STAGES[:-1] if runner.has_stages else ():
        deviations.add(stage, reference, found)
    pairs = deviations.add(DETECTIONS, reference, found)
    assert pairs is not None
    return pairs
