"""Runs one reference and one or several artefacts on the same images, and judges every artefact.

Opened models and images come in, a `Result` for each artefact goes out. `checks` decides, the
deviations of the stages explain. Knows no files and no reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.parity.attribution import PaddingComparison
from tood_deploy.benchmark.parity.checks import TABLE_LIMITS, DetectionCheck, OwnLimits
from tood_deploy.benchmark.parity.comparison import Comparison, ReferenceRun
from tood_deploy.benchmark.parity.stage_runners import ComparedModel, TorchStages, network_inputs
from tood_deploy.data.coco_metrics import CocoMetrics, Scoring, average_precision
from tood_deploy.data.image_set import ImageEntry, ImageSet, synthetic_image
from tood_deploy.errors import ToodError
from tood_deploy.parity.stages import Values, detections_of
from tood_deploy.parity.tolerances import Failure, LimitRow
from tood_deploy.preprocess import ImageTransform, resize_and_pad
from tood_deploy.presets import SIZE_DIVISOR

SHOWN_AP = 0.0005  # points; less is the rounding of a score between two others, shown as 0.000

Track = Callable[[Iterable[ImageEntry]], Iterable[ImageEntry]]


@dataclass(frozen=True)
class Settings:
    """How to compare.

    Attributes:
        imgsz: (short side, long side) that images are scaled to fit.
        conf: score that detections must exceed, 0 to 1, of all detectors.
        iou: overlap above which the weaker of two boxes goes, 0 to 1, of all detectors.
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
                    f"--sizes has {height}x{width}; "
                    f"expected multiples of {SIZE_DIVISOR}, such as 320x320"
                )
        if self.net_hw is not None and not _is_padded(*self.net_hw):
            raise ToodError(
                f"--net-size is {self.net_hw[0]} {self.net_hw[1]}; "
                f"expected two multiples of {SIZE_DIVISOR}"
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
        failures: every limit it passed.
        limits: what was measured beside its limit.
        reference_metrics: COCO metrics of the reference; None without annotations, or where numbers
            were not numbers.
        metrics: the same of the artefact.
        part_costs: points of AP that each part costs when it alone is substituted in the reference.
        padding_ap: points of AP of one detector padded as little as needed, and on the canvas; None
            without annotations or canvas.
        images_sha256: of all images as they are scaled and padded no further than needed.
    """

    comparison: Comparison
    failures: tuple[Failure, ...]
    limits: tuple[LimitRow, ...]
    reference_metrics: CocoMetrics | None
    metrics: CocoMetrics | None
    part_costs: dict[str, float]
    padding_ap: tuple[float, float] | None
    images_sha256: str

    @property
    def failure_line(self) -> str:
        """Return name, guilty stage and first failure of an artefact that failed."""
        return f"{self.comparison.model.name} at the stage {self.guilty}: {self.failures[0]}"

    @property
    def passed(self) -> bool:
        """Return whether it stayed within every limit."""
        return not self.failures

    @cached_property
    def guilty(self) -> str:
        """Return the stage that fails; "" where none does.

        The first stage that deviates by itself, where the runtime gives stages.
        """
        if not self.failures:
            return ""
        stages = self.comparison.guilty_stages()
        first = self.failures[0].stage
        return stages[0] if stages and first != "batch slots" else first

    @property
    def ap_drop(self) -> float:
        """Return how many points of AP are lost; NaN without annotations."""
        return average_precision(self.reference_metrics) - average_precision(self.metrics)

    @property
    def costliest(self) -> str:
        """Return the part that costs most AP; "" where none costs any that is shown."""
        costs = {part: cost for part, cost in self.part_costs.items() if cost >= SHOWN_AP}
        return max(costs, key=lambda part: costs[part]) if costs else ""


def check_models(reference: ComparedModel, models: Sequence[ComparedModel]) -> None:
    """Raise ToodError unless they can be compared: same number of classes, same names."""
    expected = reference.manifest.preset.class_names
    for model in models:
        names = model.manifest.preset.class_names
        if len(names) != len(expected):
            raise ToodError(
                f"{model.name}: has {len(names)} classes, the reference {reference.name} "
                f"{len(expected)}; give its own checkpoint"
            )
        if names != expected:
            one, other = next((a, b) for a, b in zip(names, expected, strict=True) if a != b)
            raise ToodError(
                f"{model.name}: has a class {one!r} where the reference {reference.name} has "
                f"{other!r}; name them with --classes"
            )


def compare(
    reference: ComparedModel,
    models: Sequence[ComparedModel],
    images: ImageSet,
    settings: Settings,
    *,
    own: OwnLimits = TABLE_LIMITS,
    scoring: Scoring | None = None,
    track: Track = iter,
) -> list[Result]:
    """Compare artefacts with the reference.

    Args:
        reference: a checkpoint in PyTorch.
        models: the artefacts.
        images: to run on.
        settings: how.
        own: limits that the user gave in place of the table's.
        scoring: for AP.
        track: passes the images on, and may show progress.

    Raises:
        ToodError: they cannot be compared, or an image cannot be read.
    """
    check_models(reference, models)
    stages = reference.runner
    assert isinstance(stages, TorchStages)
    runner = stages.with_max_det(max(model.manifest.max_det for model in models))
    comparisons = [
        Comparison(runner, model, own, scoring, _padding(runner, model, settings, scoring))
        for model in models
    ]
    digest = _run_images(runner, comparisons, images, settings, track)
    _run_sizes(runner, comparisons, settings)
    for comparison in comparisons:
        _add_low_scores(runner, comparison, images, settings)
    return [
        _judge(comparison, metrics, digest)
        for comparison, metrics in zip(comparisons, _reference_metrics(comparisons), strict=True)
    ]


def _padding(
    runner: TorchStages, model: ComparedModel, settings: Settings, scoring: Scoring | None
) -> PaddingComparison | None:
    canvases = model.engine.input_shapes_hw
    if canvases and settings.net_hw is not None:
        raise ToodError(
            f"{model.name}: takes images of {len(canvases)} fixed sizes alone; "
            "leave --net-size out: what their padding costs is reported in any case"
        )
    if not canvases and settings.net_hw is None:
        return None
    return PaddingComparison(
        runner if canvases else model.runner,
        canvases or [net_hw for net_hw in (settings.net_hw,) if net_hw],
        fixed=bool(canvases),
        imgsz=settings.imgsz,
        conf=settings.conf,
        iou=settings.iou,
        scoring=scoring,
    )


def _reference_metrics(comparisons: Sequence[Comparison]) -> list[CocoMetrics | None]:
    """Return COCO metrics of the reference on each artefact's inputs.

    Computed once for artefacts that take the same inputs and give as many detections.
    """
    known: dict[Any, CocoMetrics | None] = {}
    keys = []
    for comparison in comparisons:
        model, scoring = comparison.model, comparison.scoring
        keys.append((model.engine.input_shapes_hw, model.manifest.max_det))
        if keys[-1] not in known:
            known[keys[-1]] = scoring.metrics(comparison.reference_rows) if scoring else None
    return [known[key] for key in keys]


def _run_images(
    runner: TorchStages,
    comparisons: Sequence[Comparison],
    images: ImageSet,
    settings: Settings,
    track: Track,
) -> str:
    """Run all images, and return the hash of them, scaled and padded no further than needed."""
    pixels = hashlib.sha256()
    for number, source_image in enumerate(track(images)):
        image_bgr = source_image.read()
        pixels.update(resize_and_pad(image_bgr, settings.imgsz)[0].tobytes())
        # By padded size: artefacts of the same need the reference once.
        runs: dict[tuple[int, int], ReferenceRun] = {}
        for comparison in comparisons:
            inputs, transform = _prepare(comparison.model, image_bgr, settings)
            if transform.net_hw not in runs:
                runs[transform.net_hw] = ReferenceRun(runner, runner.run_all(inputs))
            comparison.add(source_image, transform, runs[transform.net_hw])
            if number == 0:
                comparison.add_slots(runs[transform.net_hw].values)
    return pixels.hexdigest()


def _prepare(
    model: ComparedModel, image_bgr: NDArray[np.uint8], settings: Settings
) -> tuple[Values, ImageTransform]:
    image, transform = model.prepare(image_bgr, settings.imgsz)
    return network_inputs(image, transform, settings.conf, settings.iou), transform


def _run_sizes(runner: TorchStages, comparisons: Sequence[Comparison], settings: Settings) -> None:
    """Run a synthetic image of every size that was asked for, or that an artefact alone takes."""
    sizes_of = [
        comparison.model.engine.input_shapes_hw or settings.sizes_hw for comparison in comparisons
    ]
    for seed, net_hw in enumerate(dict.fromkeys(size for sizes in sizes_of for size in sizes)):
        imgsz = min(net_hw), max(net_hw)
        image, transform = resize_and_pad(synthetic_image(*net_hw, seed), imgsz)
        inputs = network_inputs(image, transform, settings.conf, settings.iou)
        run = ReferenceRun(runner, runner.run_all(inputs))
        for comparison, sizes in zip(comparisons, sizes_of, strict=True):
            if net_hw in sizes:
                comparison.add_size(net_hw, run)


def _add_low_scores(
    runner: TorchStages, comparison: Comparison, images: ImageSet, settings: Settings
) -> None:
    """Run a lower precision once more, down to score 0, where its verdict looks below `conf`.

    So it does where too few detections are above the deployment score, or `conf` is high.
    """
    check = comparison.check
    if not isinstance(check, DetectionCheck) or check.has_enough(settings.conf):
        return
    model = comparison.model
    comparison.check = DetectionCheck(comparison.own, model.engine.precision)
    for number, source_image in enumerate(images):
        inputs, _ = _prepare(model, source_image.read(), replace(settings, conf=0.0))
        expected = comparison.cut(runner.run_all(inputs))
        outputs = model.runner.run_all(inputs)
        comparison.check.add(detections_of(expected), detections_of(outputs))
        if number == 0:
            comparison.add_slots(expected)


def _judge(comparison: Comparison, reference_metrics: CocoMetrics | None, digest: str) -> Result:
    scoring, padding = comparison.scoring, comparison.padding
    metrics = scoring.metrics(comparison.rows) if scoring else None
    before, after = average_precision(reference_metrics), average_precision(metrics)
    costs: dict[str, float] = {}
    if scoring and comparison.substitution:
        costs = {
            part: before - average_precision(scoring.metrics(rows))
            for part, rows in comparison.substitution.rows.items()
        }
    ap = {"reference": before, "artefact": after, "drop": before - after} if scoring else None
    failures = (*comparison.check.failures(ap), *comparison.own_failures())
    limits = comparison.check.rows()
    if ap is not None:
        allowed = f"{comparison.check.limits.ap_drop:g}"
        limits.append(LimitRow("AP, points lost", f"{ap['drop']:.3f}", allowed))
    padding_ap = None
    if scoring and padding:
        other = average_precision(scoring.metrics(padding.rows))
        padding_ap = (other, before) if padding.fixed else (after, other)
    return Result(
        comparison, failures, tuple(limits), reference_metrics, metrics, costs, padding_ap, digest
    )
