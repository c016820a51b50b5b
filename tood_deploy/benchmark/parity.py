"""Runs one reference and one or several artefacts on the same pictures, and judges every artefact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tood_deploy.benchmark.canvas import Canvas
from tood_deploy.benchmark.coco_ap import CocoMetrics
from tood_deploy.benchmark.comparison import Comparison
from tood_deploy.benchmark.gates import Failure, Gates
from tood_deploy.benchmark.picture_set import Picture, PictureSet
from tood_deploy.benchmark.scoring import CocoRows, Scoring, average_precision
from tood_deploy.benchmark.subject import Subject, network_inputs
from tood_deploy.benchmark.torch_stages import TorchStages
from tood_deploy.errors import ToodError
from tood_deploy.export.pictures import synthetic_picture
from tood_deploy.preprocess import resize_and_pad
from tood_deploy.presets import SIZE_DIVISOR

Track = Callable[[Iterable[Picture]], Iterable[Picture]]


@dataclass(frozen=True)
class Settings:
    """How to compare.

    Attributes:
        imgsz: (short side, long side) that pictures are scaled to fit.
        conf, iou: thresholds of all detectors.
        sizes_hw: input sizes that are tried with one synthetic picture each.
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
            if min(height, width) < SIZE_DIVISOR or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
                raise ToodError(f"--sizes has {height}x{width}; expected multiples of {SIZE_DIVISOR}, such as 320x320")


@dataclass(frozen=True, eq=False)
class Result:
    """The judgement of one artefact.

    Attributes:
        comparison: all that was gathered.
        failures: every limit it passed; of those the first names the guilty stage.
        reference_metrics, metrics: COCO metrics of both; None without annotations, or where numbers were not numbers.
        swap_costs: points of AP that each part costs when it alone is swapped into the reference.
        canvas_metrics: COCO metrics on the fixed canvas.
        pictures_sha256: of all network inputs.
    """

    comparison: Comparison
    failures: tuple[Failure, ...]
    reference_metrics: CocoMetrics | None
    metrics: CocoMetrics | None
    swap_costs: dict[str, float]
    canvas_metrics: CocoMetrics | None
    pictures_sha256: str

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
        """The part that costs most AP when it alone is swapped in; "" where no part costs any, or AP is not known."""
        costs = {part: cost for part, cost in self.swap_costs.items() if cost > 0}
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
    pictures: PictureSet,
    settings: Settings,
    scoring: Scoring | None = None,
    track: Track = iter,
) -> list[Result]:
    """Compares artefacts with the reference.

    Args:
        reference: a checkpoint in PyTorch.
        subjects: artefacts and their limits.
        pictures: to run on.
        settings: how.
        scoring: for AP.
        track: passes the pictures on, and may show progress.

    Raises:
        ToodError: they cannot be compared, or a picture cannot be read.
    """
    check_subjects(reference, [subject for subject, _ in subjects])
    runner = reference.runner
    assert isinstance(runner, TorchStages)
    runner.detector.max_det = max(subject.manifest.max_det for subject, _ in subjects)
    comparisons = [Comparison(runner, subject, gates, scoring, _canvas(subject, settings, scoring)) for subject, gates in subjects]
    rows, digest = _run_pictures(runner, comparisons, pictures, settings, track)
    _run_sizes(runner, comparisons, settings)
    metrics = scoring.metrics(rows) if scoring else None
    return [_judge(comparison, metrics, digest) for comparison in comparisons]


def _canvas(subject: Subject, settings: Settings, scoring: Scoring | None) -> Canvas | None:
    if settings.net_hw is None:
        return None
    return Canvas(subject.runner, settings.net_hw, settings.imgsz, settings.conf, settings.iou, scoring)


def _run_pictures(
    runner: TorchStages, comparisons: Sequence[Comparison], pictures: PictureSet, settings: Settings, track: Track
) -> tuple[CocoRows, str]:
    """COCO rows of the reference (cut to the first artefact's most detections), and the hash of all network inputs."""
    rows: CocoRows = []
    pixels = hashlib.sha256()
    for number, picture in enumerate(track(pictures)):
        image, transform = resize_and_pad(picture.read(), settings.imgsz)
        pixels.update(image.tobytes())
        values = runner.run_all(network_inputs(image, transform, settings.conf, settings.iou))
        rows += comparisons[0].reference_rows(values, transform, picture)
        for comparison in comparisons:
            comparison.add(picture, transform, values)
            if number == 0:
                comparison.add_slots(values)
    return rows, pixels.hexdigest()


def _run_sizes(runner: TorchStages, comparisons: Sequence[Comparison], settings: Settings) -> None:
    for seed, net_hw in enumerate(settings.sizes_hw):
        image, transform = resize_and_pad(synthetic_picture(*net_hw, seed), (min(net_hw), max(net_hw)))
        values = runner.run_all(network_inputs(image, transform, settings.conf, settings.iou))
        for comparison in comparisons:
            comparison.add_size(net_hw, values)


def _judge(comparison: Comparison, reference_metrics: CocoMetrics | None, digest: str) -> Result:
    scoring, swaps, canvas = comparison.scoring, comparison.swaps, comparison.canvas
    metrics = scoring.metrics(comparison.rows) if scoring else None
    reference_ap = average_precision(reference_metrics)
    costs: dict[str, Any] = {}
    if scoring and swaps:
        costs = {part: reference_ap - average_precision(scoring.metrics(rows)) for part, rows in swaps.rows.items()}
    failures = list(comparison.failures())
    drop = reference_ap - average_precision(metrics)
    if scoring and not drop <= comparison.gates.max_ap_drop:
        failures.append(Failure("AP", "drop in points", drop, comparison.gates.max_ap_drop, carried=True))
    canvas_metrics = scoring.metrics(canvas.rows) if scoring and canvas else None
    return Result(comparison, tuple(failures), reference_metrics, metrics, costs, canvas_metrics, digest)
