"""`tood-bench parity` from file names to reports and verdicts."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from tood_deploy import __version__
from tood_deploy.benchmark.evaluation.coco_metrics import Scoring, average_precision
from tood_deploy.benchmark.html_report import plain
from tood_deploy.benchmark.parity.compare import Result, Settings, check_subjects, compare
from tood_deploy.benchmark.parity.report import write_reports
from tood_deploy.benchmark.parity.stage_runners import Subject, is_checkpoint, open_subject
from tood_deploy.data.coco import read_truth
from tood_deploy.data.image_set import ImageEntry, ImageSet, open_image_set
from tood_deploy.errors import ToodError
from tood_deploy.files import write_text
from tood_deploy.manifest import manifest_path
from tood_deploy.manifest_sections import BenchmarkVerdict, Parity
from tood_deploy.parity.tolerances import PRECISION_GATES, Gates
from tood_deploy.preprocess import check_imgsz

KEY = "benchmark"  # in the manifest's `parity`, beside what tood-export found


def describe(
    result: Result, reference: Subject, images: ImageSet, settings: Settings
) -> dict[str, Any]:
    """Everything that was found out about an artefact, as plain values; AP and its differences in points."""
    comparison = result.comparison
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tood_deploy": __version__,
        "artefact": {
            "sha256": comparison.subject.sha256,
            "runtime": comparison.subject.engine.name,
            "precision": comparison.subject.engine.precision,
        },
        "reference": {"sha256": reference.sha256, "runtime": reference.engine.name},
        "images": {
            "description": images.description,
            "count": len(images),
            "sha256": result.images_sha256,
        },
        "settings": asdict(settings),
        "gates": asdict(comparison.gates),
        "passed": result.passed,
        "failing_stage": result.guilty,
        "failures": [str(failure) for failure in result.failures],
        "costliest_part": result.costliest,
        "stages_alone": comparison.alone.to_dict() if comparison.alone else None,
        "stages_as_deployed": comparison.carried.to_dict(),
        "batch_slots": comparison.slots.to_dict(),
        "sizes": {
            f"{height}x{width}": deviations.to_dict()
            for (height, width), deviations in comparison.sizes.items()
        },
        "ap": _describe_ap(result),
        "canvas": _describe_canvas(result),
    }


def _describe_ap(result: Result) -> dict[str, Any] | None:
    if result.reference_metrics is None and result.metrics is None:
        return None
    return {
        "reference": average_precision(result.reference_metrics),
        "artefact": average_precision(result.metrics),
        "drop": result.ap_drop,
        "drop_by_swapped_part": result.swap_costs,
    }


def _describe_canvas(result: Result) -> dict[str, Any] | None:
    canvas = result.comparison.canvas
    if canvas is None:
        return None
    least, padded = result.canvas_ap or (float("nan"), float("nan"))
    return {
        "canvases_hw": canvas.canvases_hw,
        "fixed": canvas.fixed,
        "shrunk": canvas.shrunk,
        "change": canvas.change.to_dict(),
        "ap": padded,
        "ap_drop": least - padded,
    }


def write_verdict(subject: Subject, description: dict[str, Any]) -> Path | None:
    """Puts a verdict into the manifest beside an artefact; None for a checkpoint, which has no manifest.

    The manifest's own hash of the artefact stays as it is: a file that was changed after its export remains suspect.

    Raises:
        OutputError: the manifest cannot be written.
    """
    if subject.path is None or is_checkpoint(subject.name):
        return None
    benchmark = BenchmarkVerdict(plain(shorten(description)))
    parity = replace(subject.manifest.parity or Parity(), benchmark=benchmark)
    manifest = replace(subject.manifest, parity=parity)
    if not manifest.artefact_sha256:
        manifest = replace(manifest, artefact_sha256=subject.sha256)
    path = manifest_path(subject.path)
    write_text(path, manifest.to_json())
    return path


def shorten(description: dict[str, Any]) -> dict[str, Any]:
    """Without the deviations of single sizes, which are many."""
    return {key: value for key, value in description.items() if key != "sizes"}


@dataclass(frozen=True)
class ParityOrder:
    """What the user asked for.

    Attributes:
        reference: a checkpoint or preset.
        models: artefacts.
        images, annotations, mapping, limit: the images, their truth, and class names in terms of its categories.
        imgsz: (short side, long side); the first artefact's own where not given.
        conf, iou: thresholds of all detectors.
        sizes_hw, net_hw: further input sizes and the canvas to try.
        stages: whether to look at the stages; None for: where the runtime lets one.
        gates: limits in place of those that go with the artefact's precision.
        device, threads: to run on.
        load_options: of checkpoints.
        artefact_options: of artefacts.
        output: folder for the reports.
        keep_verdict: whether to write the verdict into each artefact's manifest; not if it was run in another precision than its own.
        command: the command line, for the report.
        quiet: no progress bar.
    """

    reference: str
    models: Sequence[str]
    output: Path
    images: Path | None = None
    annotations: Path | None = None
    mapping: Path | None = None
    limit: int | None = None
    imgsz: Sequence[int] | None = None
    conf: float = 0.05
    iou: float = 0.6
    sizes_hw: tuple[tuple[int, int], ...] = ()
    net_hw: tuple[int, int] | None = None
    stages: bool | None = None
    gates: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    load_options: dict[str, Any] = field(default_factory=dict)
    artefact_options: dict[str, Any] = field(default_factory=dict)
    keep_verdict: bool = True
    command: str = ""
    quiet: bool = False


def run_parity(order: ParityOrder) -> list[Result]:
    """Compares, writes the reports, and writes each verdict into its artefact's manifest.

    Raises:
        ToodError: bad input or wrong use.
    """
    if not is_checkpoint(order.reference):
        raise ToodError(
            f"{order.reference}: not a checkpoint or preset; the reference is PyTorch in float32, give the checkpoint of the artefacts"
        )
    if order.mapping is not None and order.annotations is None:
        raise ToodError(
            f"{order.mapping}: a mapping to categories without annotations; add --annotations FILE or leave it out"
        )
    with ExitStack() as opened:
        reference, subjects = _open_models(order, opened)
        imgsz = check_imgsz(order.imgsz) if order.imgsz else subjects[0].manifest.preset.imgsz
        settings = Settings(imgsz, order.conf, order.iou, order.sizes_hw, order.net_hw)
        truth = read_truth(order.annotations) if order.annotations else None
        images = open_image_set(order.images, truth, imgsz, order.limit)
        names = reference.manifest.preset.class_names
        scoring = Scoring.of(images.truth, names, order.mapping) if images.truth else None
        gated = [(subject, gates_of(subject, order.gates)) for subject in subjects]
        results = compare(
            reference, gated, images, settings, scoring, lambda each: _track(each, order.quiet)
        )
        _report(order, results, reference, images, settings)
    return results


def _open_models(order: ParityOrder, opened: ExitStack) -> tuple[Subject, list[Subject]]:
    options = {
        "device": order.device,
        "threads": order.threads,
        "artefact_options": order.artefact_options,
    } | order.load_options
    reference = open_subject(order.reference, stages=True, **options)
    subjects = [open_subject(model, stages=order.stages, **options) for model in order.models]
    for subject in (reference, *subjects):
        opened.callback(subject.engine.close)
    check_subjects(reference, subjects)
    return reference, subjects


def gates_of(subject: Subject, given: dict[str, float]) -> Gates:
    """The limits that go with an artefact's precision, with those the user gave in their place."""
    return replace(PRECISION_GATES[subject.engine.precision.split(",")[0]], **given)


def _track(images: Iterable[ImageEntry], quiet: bool) -> Iterable[ImageEntry]:
    console = Console(stderr=True)
    return track(
        images,
        "comparing",
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )


def _report(
    order: ParityOrder,
    results: Sequence[Result],
    reference: Subject,
    images: ImageSet,
    settings: Settings,
) -> None:
    descriptions = [describe(result, reference, images, settings) for result in results]
    facts = {
        "command": order.command,
        "date": descriptions[0]["date"],
        "reference": f"{order.reference}, {reference.runner.name}, float32",
        "artefacts": "; ".join(
            f"{result.comparison.subject.name}, {result.comparison.subject.engine.name}"
            for result in results
        ),
        "images": f"{images.description}, scaled to fit {settings.imgsz[0]} x {settings.imgsz[1]}",
        "thresholds": f"score above {settings.conf:g}, suppression at {settings.iou:g}",
        "software": f"tood_deploy {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }
    write_reports(order.output, results, descriptions, facts)
    for result, description in zip(results, descriptions, strict=True):
        engine = result.comparison.subject.engine
        if order.keep_verdict and engine.precision == engine.manifest.precision:
            write_verdict(result.comparison.subject, description)
