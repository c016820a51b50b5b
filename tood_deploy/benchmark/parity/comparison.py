"""Everything that is gathered of one artefact, image by image.

What the reference gave comes in; the artefact is run on the same inputs, and `checks` and the
deviations of its stages are fed. Decides nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tood_deploy.benchmark.parity.attribution import (
    Differences,
    PaddingComparison,
    StageSubstitution,
)
from tood_deploy.benchmark.parity.checks import DetectionCheck, Float32Check, OwnLimits, check_for
from tood_deploy.benchmark.parity.stage_runners import (
    ComparedModel,
    TorchStages,
    net_size,
    repeat_images,
)
from tood_deploy.data.coco_metrics import CocoRows, Scoring
from tood_deploy.data.image_set import ImageEntry
from tood_deploy.detections import Detections
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS
from tood_deploy.matching import BoxMatches, split_batch
from tood_deploy.parity.deviation import StageDeviations
from tood_deploy.parity.reference import Conditioning
from tood_deploy.parity.stages import (
    DETECTIONS,
    STAGES,
    StageRunner,
    Values,
    detections_of,
    only_inputs,
)
from tood_deploy.parity.tolerances import Failure
from tood_deploy.preprocess import ImageTransform

SLOTS = 3  # of a batch that must give the same


@dataclass(frozen=True, eq=False)
class SizeResult:
    """How an artefact fares on a synthetic image of one input size.

    Attributes:
        deviations: as deployed.
        failures: limits that were passed; of float32 alone, lower precisions are judged on images.
    """

    deviations: StageDeviations
    failures: tuple[Failure, ...]


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """What the reference gave for one image.

    Attributes:
        runner: the reference.
        values: the network's inputs and what all stages gave.
    """

    runner: TorchStages
    values: Values

    @cached_property
    def noise(self) -> Conditioning:
        """Return how far float32 itself is off on this image; measured once."""
        return self.runner.measure_noise(only_inputs(self.values))


class Comparison:
    """Everything that is gathered of one artefact.

    Attributes:
        model: the artefact.
        own: limits that the user gave.
        check: decides whether it passes.
        scoring: against annotations, where there are any.
        deployed: deviations as deployed.
        alone: deviations of each stage by itself; None where the runtime does not give stages.
        substitution: runs with one part exchanged; None without annotations.
        rows: COCO results of the artefact.
        reference_rows: those of the reference on the same inputs, no more than the artefact gives.
        differences: the most different images.
        sizes: by rows and columns of the input.
        padding: what padding to a canvas changes; None where it was not asked for and the artefact
            takes every size.
    """

    def __init__(
        self,
        reference: TorchStages,
        model: ComparedModel,
        own: OwnLimits,
        scoring: Scoring | None,
        padding: PaddingComparison | None,
    ) -> None:
        """Begin with no image.

        Args:
            reference: the network.
            model: the artefact.
            own: limits that the user gave.
            scoring: against annotations, where there are any.
            padding: runs one of the two with another padding.
        """
        precision = model.engine.precision
        self.model, self.own, self.scoring, self.padding = model, own, scoring, padding
        self.check: Float32Check | DetectionCheck = check_for(precision, own)
        limits = own.stage_limits(precision)
        self.deployed = StageDeviations(limits, deployed=True)
        has_stages = model.runner.has_stages
        self.alone = StageDeviations(limits, deployed=False) if has_stages else None
        self.substitution = (
            StageSubstitution(reference, model.runner, precision) if scoring else None
        )
        self.differences = Differences()
        self.sizes: dict[tuple[int, int], SizeResult] = {}
        self.rows: CocoRows = []
        self.reference_rows: CocoRows = []

    def add(self, image: ImageEntry, transform: ImageTransform, reference: ReferenceRun) -> None:
        """Add one image.

        Args:
            image: which.
            transform: leads from the network's input back to it.
            reference: what the reference gave for the same input.
        """
        values = self.cut(reference.values)
        outputs = self.model.runner.run_all(only_inputs(values))
        if isinstance(self.check, Float32Check) and self.check.needs_noise:
            self._explain(self.check, reference)
        self.check.add(detections_of(values), detections_of(outputs))
        matches = add_stages(self.deployed, self.model.runner, values, outputs)
        first, second = (self._detections(given, transform) for given in (values, outputs))
        self.differences.add(image, first, second, matches.pairs)
        self.rows += self._coco_rows(second, image)
        self.reference_rows += self._coco_rows(first, image)
        self._add_alone(image, transform, values)
        if self.padding is not None:
            self.padding.add(image, first if self.padding.fixed else second)

    def _explain(self, check: Float32Check, reference: ReferenceRun) -> None:
        """Have a float32 check judge the maps of an image, and measure what float32 explains."""
        outputs = self.model.runner.run_with_maps(only_inputs(reference.values))
        maps = None if outputs is None else [outputs[name] for name in MAP_NAMES]
        check.explain(reference.noise, maps, net_size(reference.values))

    def _add_alone(self, image: ImageEntry, transform: ImageTransform, reference: Values) -> None:
        alone: dict[str, Values] = {}
        if self.alone is not None:
            for stage in STAGES:
                alone[stage.name] = self.model.runner.run(stage, reference)
                self.alone.add(stage, reference, alone[stage.name])
        if self.substitution is not None:
            self.substitution.add(
                reference,
                alone,
                lambda values: self._coco_rows(
                    self._detections(self.cut(values), transform), image
                ),
            )

    def add_slots(self, reference: Values) -> None:
        """Run one image alone and in every slot of a batch, as large as the artefact takes."""
        inputs = only_inputs(reference)
        slots = min(SLOTS, self.model.max_batch(reference) or SLOTS)
        alone = detections_of(self.model.runner.run_all(inputs))
        batch = self.model.runner.run_all(repeat_images(inputs, slots))
        self.check.add_slots(alone, split_batch([batch[name] for name in OUTPUTS]))

    def add_size(self, net_hw: tuple[int, int], reference: ReferenceRun) -> None:
        """Add a synthetic image of one input size.

        Args:
            net_hw: padded rows and columns.
            reference: what the reference gave for it.
        """
        values = self.cut(reference.values)
        outputs = self.model.runner.run_all(only_inputs(values))
        deviations = StageDeviations(self.deployed.limits, deployed=True)
        add_stages(deviations, self.model.runner, values, outputs)
        failures: list[Failure] = []
        if isinstance(self.check, Float32Check):
            known = len(self.check.judge.verdict.failed)
            self._explain(self.check, reference)
            self.check.add(detections_of(values), detections_of(outputs))
            failures = self.check.judge.verdict.failed[known:]
        self.sizes[net_hw] = SizeResult(deviations, tuple(failures))

    def own_failures(self) -> list[Failure]:
        """Return the limits of the user's own on single stages that were passed."""
        gathered = [stages for stages in (self.alone, self.deployed) if stages is not None]
        return [
            Failure(excess.stage, excess.message)
            for deviations in gathered
            for excess in deviations.excesses()
            if excess.limit_name in self.own.given()
        ]

    def guilty_stages(self) -> list[str]:
        """Return the stages that deviate by themselves, in order; none where they cannot be had."""
        if self.alone is None:
            return []
        return list(dict.fromkeys(excess.stage for excess in self.alone.excesses()))

    def cut(self, values: Values) -> Values:
        """Return the same with no more detections than the artefact gives."""
        return values | {"num_dets": values["num_dets"].clip(max=self.model.manifest.max_det)}

    def _detections(self, values: Values, transform: ImageTransform) -> Detections:
        rows = detections_of(values)
        names = self.model.manifest.preset.class_names
        return Detections(transform.boxes_to_image(rows.boxes), rows.scores, rows.labels, names)

    def _coco_rows(self, detections: Detections, image: ImageEntry) -> CocoRows:
        return [] if self.scoring is None else self.scoring.rows(detections, image.image_id)


def add_stages(
    deviations: StageDeviations, runner: StageRunner, reference: Values, outputs: Values
) -> BoxMatches:
    """Add all stages that the runner gives, as deployed.

    Args:
        deviations: to add to.
        runner: of the artefact.
        reference: what the reference gave.
        outputs: what the artefact gave.

    Returns:
        The pairs of detections.
    """
    for stage in STAGES[:-1] if runner.has_stages else ():
        deviations.add(stage, reference, outputs)
    matches = deviations.add(DETECTIONS, reference, outputs)
    assert matches is not None
    return matches
