"""Runs one reference and one or several artefacts on the same images, and judges every artefact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.parity.attribution import Canvas, Differences, Swaps
from tood_deploy.benchmark.parity.stage_runners import (
    Subject,
    TorchStages,
    network_inputs,
    repeat_images,
)
from tood_deploy.data.coco_metrics import CocoMetrics, CocoRows, Scoring, average_precision
from tood_deploy.data.image_set import ImageEntry, ImageSet, synthetic_image
from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError
from tood_deploy.parity.deviation import Failure, RowDeviation, StageDeviations, rows_of
from tood_deploy.parity.reference import Conditioning
from tood_deploy.parity.stages import STAGES, StageRunner, Values, only_inputs
from tood_deploy.parity.tolerances import Gates
from tood_deploy.preprocess import ImageTransform, resize_and_pad
from tood_deploy.presets import SIZE_DIVISOR

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
        differences: the most different images.
        slots: the first image in every slot of a batch, against itself alone.
        sizes: by rows and columns of the input, deviations as deployed on a synthetic image.
        canvas: what padding to a fixed canvas changes; None where it was not asked for and the artefact takes every size.
        reference_rows: COCO rows of the reference on the same inputs, no more than the artefact gives.
    """

    def __init__(
        self,
        reference: TorchStages,
        subject: Subject,
        gates: Gates,
        scoring: Scoring | None,
        canvas: Canvas | None,
    ) -> None:
        self.subject, self.gates, self.scoring, self.canvas = subject, gates, scoring, canvas
        inside = subject.runner.has_stages
        self.carried = StageDeviations(gates, carried=True)
        self.alone = StageDeviations(gates, carried=False) if inside else None
        self.swaps = Swaps(reference, subject.runner, subject.engine.precision) if scoring else None
        self.differences, self.slots = Differences(), RowDeviation()
        self.sizes: dict[tuple[int, int], StageDeviations] = {}
        self.rows: CocoRows = []
        self.reference_rows: CocoRows = []

    def add(self, image: ImageEntry, transform: ImageTransform, reference: Values) -> None:
        """Adds one image; `reference` holds the network's inputs and everything the reference made of them."""
        reference = self._cut(reference)
        found = self.subject.runner.run_all(only_inputs(reference))
        pairs = add_stages(self.carried, self.subject.runner, reference, found)
        first, second = (self._detections(values, transform) for values in (reference, found))
        self.differences.add(image, first, second, pairs)
        self.rows += self._coco_rows(second, image)
        self.reference_rows += self._coco_rows(first, image)
        self._add_alone(image, transform, reference)
        if self.canvas is not None:
            self.canvas.add(image, first if self.canvas.fixed else second)

    def _add_alone(self, image: ImageEntry, transform: ImageTransform, reference: Values) -> None:
        alone: dict[str, Values] = {}
        if self.alone is not None:
            for stage in STAGES:
                alone[stage.name] = self.subject.runner.run(stage, reference)
                self.alone.add(stage, reference, alone[stage.name])
        if self.swaps is not None:
            self.swaps.add(
                reference,
                alone,
                lambda values: self._coco_rows(
                    self._detections(self._cut(values), transform), image
                ),
            )

    def add_slots(self, reference: Values) -> None:
        """Runs one image alone and in every slot of a batch, as large as the artefact takes: its rows must be the same."""
        slots = min(SLOTS, self.subject.most_batch(reference) or SLOTS)
        batch = repeat_images(only_inputs(reference), slots)
        alone = rows_of(DETECTIONS, self.subject.runner.run_all(only_inputs(reference)))
        found = self.subject.runner.run_all(batch)
        for slot in range(slots):
            self.slots.add(
                alone,
                rows_of(
                    DETECTIONS, {name: found[name][slot : slot + 1] for name in DETECTIONS.gives}
                ),
            )

    def add_size(self, net_hw: tuple[int, int], reference: Values, noise: Conditioning) -> None:
        """Adds a synthetic image of one input size, where float32 may be noisier than on images of the usual size."""
        self.sizes[net_hw] = StageDeviations(self.gates, carried=True)
        self.sizes[net_hw].allow_noise(noise)
        reference = self._cut(reference)
        add_stages(
            self.sizes[net_hw],
            self.subject.runner,
            reference,
            self.subject.runner.run_all(only_inputs(reference)),
        )

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
            yield from (
                Failure(f"{each.stage} at {height}x{width}", each.what, each.found, each.allowed)
                for each in deviations.failures()
            )

    def _cut(self, values: Values) -> Values:
        """The same with no more detections than the artefact gives."""
        return values | {"num_dets": values["num_dets"].clip(max=self.subject.manifest.max_det)}

    def _detections(self, values: Values, transform: ImageTransform) -> Detections:
        rows = rows_of(DETECTIONS, values)
        names = self.subject.manifest.preset.class_names
        return Detections(transform.boxes_to_image(rows.boxes), rows.scores, rows.labels, names)

    def _coco_rows(self, found: Detections, image: ImageEntry) -> CocoRows:
        return [] if self.scoring is None else self.scoring.rows(found, image.image_id)


def add_stages(
    deviations: StageDeviations, runner: StageRunner, reference: Values, found: Values
) -> NDArray[np.intp]:
    """Adds all stages that the runner gives, as deployed; gives the pairs of detections."""
    for stage in STAGES[:-1] if runner.has_stages else ():
        deviations.add(stage, reference, found)
    pairs = deviations.add(DETECTIONS, reference, found)
    assert pairs is not None
    return pairs


SHOWN_AP = 0.0005  # points; less is the rounding of a score between two others, and shown as 0.000
Track = Callable[[Iterable[ImageEntry]], Iterable[ImageEntry]]


@dataclass(frozen=True)
class Settings:
    """How to compare.

    Attributes:
        imgsz: (short side, long side) that images are scaled to fit.
        conf, iou: thresholds of all detectors.
        sizes_hw: input sizes that are tried with one synthetic image each.
        net_hw: the canvas to try, None for none.
    """

    imgsz: tuple[int, int]
    conf: float = 0.05
    iou: float = 0.6
    sizes_hw: tuple[tuple[int, int], ...] = ()
    net_hw: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, value in (("conf", self.conf), ("iou", self.iou)):
            if not 0 <= value <= 1:
                raise ToodError(f"{name} is {value}; expected a number from 0 to 1")
        for height, width in self.sizes_hw:
            if not _is_padded(height, width):
                raise ToodError(
                    f"--sizes has {height}x{width}; expected multiples of {SIZE_DIVISOR}, such as 320x320"
                )
        if self.net_hw is not None and not _is_padded(*self.net_hw):
            raise ToodError(
                f"--net-size is {self.net_hw[0]} {self.net_hw[1]}; expected two multiples of {SIZE_DIVISOR}"
            )


def _is_padded(height: int, width: int) -> bool:
    return min(height, width) >= SIZE_DIVISOR and not (
        height % SIZE_DIVISOR or width % SIZE_DIVISOR
    )


@dataclass(frozen=True, eq=False)
class Result:
    """The judgement of one artefact.

    Attributes:
        comparison: all that was gathered.
        failures: every limit it passed; of those the first names the guilty stage.
        reference_metrics, metrics: COCO metrics of both; None without annotations, or where numbers were not numbers.
        swap_costs: points of AP that each part costs when it alone is swapped into the reference.
        canvas_ap: points of AP of one detector padded as little as needed, and on the canvas; None without annotations or canvas.
        images_sha256: of all images as they are scaled and padded no further than needed.
    """

    comparison: Comparison
    failures: tuple[Failure, ...]
    reference_metrics: CocoMetrics | None
    metrics: CocoMetrics | None
    swap_costs: dict[str, float]
    canvas_ap: tuple[float, float] | None
    images_sha256: str

    @property
    def passed(self) -> bool:
        """Whether it stayed within every limit."""
        return not self.failures

    @property
    def guilty(self) -> str:
        """The stage that fails; "" where none does."""
        return self.failures[0].stage if self.failures else ""

    @property
    def ap_drop(self) -> float:
        """Points of AP less than the reference; NaN without annotations."""
        return average_precision(self.reference_metrics) - average_precision(self.metrics)

    @property
    def costliest(self) -> str:
        """The part that costs most AP when it alone is swapped in; "" where none costs any that is shown, or AP is not known."""
        costs = {part: cost for part, cost in self.swap_costs.items() if cost >= SHOWN_AP}
        return max(costs, key=lambda part: costs[part]) if costs else ""


def check_subjects(reference: Subject, subjects: Sequence[Subject]) -> None:
    """Raises ToodError unless they can be compared: same number of classes, same names."""
    expected = reference.manifest.preset.class_names
    for subject in subjects:
        found = subject.manifest.preset.class_names
        if len(found) != len(expected):
            raise ToodError(
                f"{subject.name}: has {len(found)} classes, the reference {reference.name} {len(expected)}; give its own checkpoint"
            )
        if found != expected:
            one, other = next((a, b) for a, b in zip(found, expected, strict=True) if a != b)
            raise ToodError(
                f"{subject.name}: has a class {one!r} where the reference {reference.name} has {other!r}; name them with --classes"
            )


def compare(
    reference: Subject,
    subjects: Sequence[tuple[Subject, Gates]],
    images: ImageSet,
    settings: Settings,
    scoring: Scoring | None = None,
    track: Track = iter,
) -> list[Result]:
    """Compares artefacts with the reference.

    Args:
        reference: a checkpoint in PyTorch.
        subjects: artefacts and their limits.
        images: to run on.
        settings: how.
        scoring: for AP.
        track: passes the images on, and may show progress.

    Raises:
        ToodError: they cannot be compared, or a image cannot be read.
    """
    check_subjects(reference, [subject for subject, _ in subjects])
    runner = reference.runner
    assert isinstance(runner, TorchStages)
    runner.detector.max_det = max(subject.manifest.max_det for subject, _ in subjects)
    comparisons = [
        Comparison(runner, subject, gates, scoring, _canvas(runner, subject, settings, scoring))
        for subject, gates in subjects
    ]
    digest = _run_images(runner, comparisons, images, settings, track)
    _run_sizes(runner, comparisons, settings)
    return [
        _judge(comparison, metrics, digest)
        for comparison, metrics in zip(comparisons, _reference_metrics(comparisons), strict=True)
    ]


def _canvas(
    runner: TorchStages, subject: Subject, settings: Settings, scoring: Scoring | None
) -> Canvas | None:
    canvases, common = (
        subject.engine.canvases_hw,
        (settings.imgsz, settings.conf, settings.iou, scoring),
    )
    if canvases:
        if settings.net_hw is not None:
            raise ToodError(
                f"{subject.name}: takes images of {len(canvases)} fixed sizes alone; leave --net-size out: what its padding costs is told"
            )
        return Canvas(runner, canvases, True, *common)
    return Canvas(subject.runner, [settings.net_hw], False, *common) if settings.net_hw else None


def _reference_metrics(comparisons: Sequence[Comparison]) -> list[CocoMetrics | None]:
    """Of the reference on each artefact's inputs; computed once for artefacts that take the same and give as many detections."""
    known: dict[Any, CocoMetrics | None] = {}
    for comparison in comparisons:
        key = _reference_key(comparison.subject)
        if key not in known:
            known[key] = (
                comparison.scoring.metrics(comparison.reference_rows)
                if comparison.scoring
                else None
            )
    return [known[_reference_key(comparison.subject)] for comparison in comparisons]


def _reference_key(subject: Subject) -> Any:
    return subject.engine.canvases_hw, subject.manifest.max_det


def _run_images(
    runner: TorchStages,
    comparisons: Sequence[Comparison],
    images: ImageSet,
    settings: Settings,
    track: Track,
) -> str:
    """The hash of all images as they are scaled and padded no further than needed."""
    pixels = hashlib.sha256()
    for number, source_image in enumerate(track(images)):
        image_bgr = source_image.read()
        pixels.update(resize_and_pad(image_bgr, settings.imgsz)[0].tobytes())
        made: dict[
            tuple[int, int], Values
        ] = {}  # by padded size: artefacts of the same need the reference once
        for comparison in comparisons:
            image, transform = comparison.subject.prepare(image_bgr, settings.imgsz)
            if transform.net_hw not in made:
                made[transform.net_hw] = runner.run_all(
                    network_inputs(image, transform, settings.conf, settings.iou)
                )
            comparison.add(source_image, transform, made[transform.net_hw])
            if number == 0:
                comparison.add_slots(made[transform.net_hw])
    return pixels.hexdigest()


def _run_sizes(runner: TorchStages, comparisons: Sequence[Comparison], settings: Settings) -> None:
    """One synthetic image of every size that was asked for; of its own sizes where an artefact takes no others."""
    wanted = [
        comparison.subject.engine.canvases_hw or settings.sizes_hw for comparison in comparisons
    ]
    for seed, net_hw in enumerate(dict.fromkeys(size for sizes in wanted for size in sizes)):
        image, transform = resize_and_pad(
            synthetic_image(*net_hw, seed), (min(net_hw), max(net_hw))
        )
        inputs = network_inputs(image, transform, settings.conf, settings.iou)
        values, noise = runner.run_all(inputs), runner.measure_noise(inputs)
        for comparison, sizes in zip(comparisons, wanted, strict=True):
            if net_hw in sizes:
                comparison.add_size(net_hw, values, noise)


def _judge(comparison: Comparison, reference_metrics: CocoMetrics | None, digest: str) -> Result:
    scoring, swaps, canvas = comparison.scoring, comparison.swaps, comparison.canvas
    metrics = scoring.metrics(comparison.rows) if scoring else None
    reference_ap = average_precision(reference_metrics)
    costs: dict[str, Any] = {}
    if scoring and swaps:
        costs = {
            part: reference_ap - average_precision(scoring.metrics(rows))
            for part, rows in swaps.rows.items()
        }
    failures = list(comparison.failures())
    drop = reference_ap - average_precision(metrics)
    if scoring and not drop <= comparison.gates.max_ap_drop:
        failures.append(
            Failure("AP", "drop in points", drop, comparison.gates.max_ap_drop, carried=True)
        )
    canvas_ap = None
    if scoring and canvas:
        other = average_precision(scoring.metrics(canvas.rows))
        canvas_ap = (other, reference_ap) if canvas.fixed else (average_precision(metrics), other)
    return Result(comparison, tuple(failures), reference_metrics, metrics, costs, canvas_ap, digest)
