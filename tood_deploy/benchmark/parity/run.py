"""`tood-bench parity` from file names to reports and verdicts.

A `ParityConfig` comes in; reports, verdicts in the artefacts' manifests, and results go out.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tood_deploy import __version__
from tood_deploy.benchmark.html_report import plain
from tood_deploy.benchmark.parity.checks import TABLE_LIMITS, OwnLimits
from tood_deploy.benchmark.parity.compare import Result, Settings, check_models, compare
from tood_deploy.benchmark.parity.report import limits_table, verdict_line, write_reports
from tood_deploy.benchmark.parity.stage_runners import ComparedModel, is_checkpoint, open_compared
from tood_deploy.data.coco import read_annotations
from tood_deploy.data.coco_metrics import Scoring, average_precision
from tood_deploy.data.image_set import ImageEntry, ImageSet, open_image_set, photograph_crops
from tood_deploy.errors import ToodError
from tood_deploy.files import write_text
from tood_deploy.manifest import manifest_path
from tood_deploy.manifest_sections import BenchmarkVerdict, Parity
from tood_deploy.preprocess import check_imgsz
from tood_deploy.reporter import Reporter

PHOTOGRAPHS = 16  # crops of the built-in photograph, as tood-export takes without images


@dataclass(frozen=True)
class ParityConfig:
    """What the user asked for.

    Attributes:
        reference: a checkpoint or preset.
        models: artefacts.
        output: folder for the reports.
        images: folder of images; crops of a built-in photograph where not given.
        annotations: their truth, COCO JSON.
        mapping: JSON file: class names in terms of the truth's categories.
        limit: take the first so many images only.
        imgsz: (short side, long side); the first artefact's own where not given.
        conf: score that detections must exceed, 0 to 1; the checkpoint's own where not given.
        iou: overlap above which the weaker of two boxes goes, 0 to 1; likewise.
        sizes_hw: further input sizes to try.
        net_hw: canvas to try.
        stages: whether to look at the stages; None for: where the runtime lets one.
        own: limits in place of those that go with the artefact's precision.
        device: "cpu" or "cuda".
        threads: of the CPU; the runtime's own choice where not given.
        load_options: of checkpoints.
        artefact_options: of artefacts.
        keep_verdict: whether to write the verdict into each artefact's manifest; never if it was
            run in another precision than its own.
        command: the command line, for the report.
    """

    reference: str
    models: Sequence[str]
    output: Path
    images: Path | None = None
    annotations: Path | None = None
    mapping: Path | None = None
    limit: int | None = None
    imgsz: Sequence[int] | None = None
    conf: float | None = None
    iou: float | None = None
    sizes_hw: tuple[tuple[int, int], ...] = ()
    net_hw: tuple[int, int] | None = None
    stages: bool | None = None
    own: OwnLimits = TABLE_LIMITS
    device: str = "cpu"
    threads: int | None = None
    load_options: Mapping[str, Any] = field(default_factory=dict)
    artefact_options: Mapping[str, Any] = field(default_factory=dict)
    keep_verdict: bool = True
    command: str = ""

    def __post_init__(self) -> None:
        if not is_checkpoint(self.reference):
            raise ToodError(
                f"{self.reference}: not a checkpoint or preset; the reference is PyTorch in "
                "float32, give the checkpoint of the artefacts"
            )
        if self.annotations is not None and self.images is None:
            raise ToodError(
                f"{self.annotations}: annotations without their images; add --images DIR"
            )
        if self.mapping is not None and self.annotations is None:
            raise ToodError(
                f"{self.mapping}: a mapping to categories without annotations; "
                "add --annotations FILE or leave it out"
            )


def run_parity(config: ParityConfig, reporter: Reporter) -> list[Result]:
    """Compare, write the reports, and write each verdict into its artefact's manifest.

    Args:
        config: what to compare.
        reporter: shows progress, the verdicts and their limits.

    Raises:
        ToodError: bad input or wrong use.
    """
    with ExitStack() as opened:
        reference, models = _open_models(config, opened)
        settings = _settings(config, reference, models[0])
        truth = read_annotations(config.annotations) if config.annotations else None
        images = (
            open_image_set(config.images, truth, settings.imgsz, config.limit)
            if config.images
            else photographs(config.limit)
        )
        names = reference.manifest.preset.class_names
        scoring = Scoring.of(images.truth, names, config.mapping) if images.truth else None
        results = compare(
            reference,
            models,
            images,
            settings,
            own=config.own,
            scoring=scoring,
            track=lambda items: reporter.track(items, "comparing"),
        )
        _report(config, results, reference, images, settings)
    for result in results:
        reporter.result(f"{result.comparison.model.name}: {verdict_line(result)}")
        reporter.table(limits_table(result).rich())
    return results


def _open_models(
    config: ParityConfig, opened: ExitStack
) -> tuple[ComparedModel, list[ComparedModel]]:
    def open_one(model: str, stages: bool | None) -> ComparedModel:
        compared = open_compared(
            model,
            device=config.device,
            threads=config.threads,
            stages=stages,
            artefact_options=config.artefact_options,
            **config.load_options,
        )
        opened.callback(compared.engine.close)
        return compared

    reference = open_one(config.reference, True)
    models = [open_one(model, config.stages) for model in config.models]
    check_models(reference, models)
    return reference, models


def _settings(config: ParityConfig, reference: ComparedModel, first: ComparedModel) -> Settings:
    own = reference.manifest.preset
    return Settings(
        check_imgsz(config.imgsz) if config.imgsz else first.manifest.preset.imgsz,
        own.score_threshold if config.conf is None else config.conf,
        own.iou_threshold if config.iou is None else config.iou,
        config.sizes_hw,
        config.net_hw,
    )


def photographs(limit: int | None = None) -> ImageSet:
    """Return crops of the built-in photograph, those that tood-export verifies on without images.

    Args:
        limit: take the first so many only.

    Raises:
        ToodError: the limit is not positive, or the photograph is not there.
    """
    if limit is not None and limit < 1:
        raise ToodError(f"--limit is {limit}; expected a positive number of images")
    crops = photograph_crops(PHOTOGRAPHS)[:limit]
    entries = [
        ImageEntry(f"crop {number}", number, lambda crop=crop: crop)
        for number, crop in enumerate(crops, 1)
    ]
    return ImageSet(f"{len(entries)} crops of the built-in photograph", tuple(entries))


def _report(
    config: ParityConfig,
    results: Sequence[Result],
    reference: ComparedModel,
    images: ImageSet,
    settings: Settings,
) -> None:
    descriptions = [describe(result, reference, images, settings) for result in results]
    models = [result.comparison.model for result in results]
    imgsz = f"{settings.imgsz[0]} x {settings.imgsz[1]}"
    facts = {
        "command": config.command,
        "date": descriptions[0]["date"],
        "reference": f"{config.reference}, {reference.runner.name}, float32",
        "artefacts": "; ".join(f"{model.name}, {model.engine.name}" for model in models),
        "images": f"{images.description}, scaled to fit {imgsz}",
        "thresholds": f"score above {settings.conf:g}, suppression at {settings.iou:g}",
        "software": f"tood_deploy {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
    }
    write_reports(config.output, results, descriptions, facts)
    for model, description in zip(models, descriptions, strict=True):
        if config.keep_verdict and model.engine.precision == model.manifest.precision:
            write_verdict(model, description)


def describe(
    result: Result, reference: ComparedModel, images: ImageSet, settings: Settings
) -> dict[str, Any]:
    """Return everything that is known of an artefact, as plain values; AP in points.

    Args:
        result: of the artefact.
        reference: that it was compared with.
        images: that both were run on.
        settings: how they were compared.
    """
    comparison = result.comparison
    model = comparison.model
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tood_deploy": __version__,
        "artefact": {
            "sha256": model.sha256,
            "runtime": model.engine.name,
            "precision": model.engine.precision,
        },
        "reference": {"sha256": reference.sha256, "runtime": reference.engine.name},
        "images": {
            "description": images.description,
            "count": len(images),
            "sha256": result.images_sha256,
        },
        "settings": asdict(settings),
        "limits": asdict(comparison.check.limits),
        "own_limits": comparison.own.given(),
        "measured": [asdict(row) for row in result.limits],
        "passed": result.passed,
        "failing_stage": result.guilty,
        "failures": [str(failure) for failure in result.failures],
        "costliest_part": result.costliest,
        "stages_alone": comparison.alone.to_dict() if comparison.alone else None,
        "stages_as_deployed": comparison.deployed.to_dict(),
        "batch_slots": asdict(comparison.check.batch_slots),
        "sizes": {
            f"{height}x{width}": size.deviations.to_dict()
            for (height, width), size in comparison.sizes.items()
        },
        "ap": _describe_ap(result),
        "canvas": _describe_padding(result),
    }


def _describe_ap(result: Result) -> dict[str, Any] | None:
    if result.reference_metrics is None and result.metrics is None:
        return None
    return {
        "reference": average_precision(result.reference_metrics),
        "artefact": average_precision(result.metrics),
        "drop": result.ap_drop,
        "drop_by_swapped_part": result.part_costs,
    }


def _describe_padding(result: Result) -> dict[str, Any] | None:
    padding = result.comparison.padding
    if padding is None:
        return None
    least, padded = result.padding_ap or (float("nan"), float("nan"))
    return {
        "canvases_hw": padding.input_shapes_hw,
        "fixed": padding.fixed,
        "shrunk": padding.shrunk,
        "change": padding.change.to_dict(),
        "ap": padded,
        "ap_drop": least - padded,
    }


def write_verdict(model: ComparedModel, description: dict[str, Any]) -> Path | None:
    """Write a verdict into the manifest beside an artefact; None for a checkpoint, which has none.

    The manifest's own hash of the artefact stays as it is: a file that was changed after its export
    remains suspect.

    Args:
        model: the artefact.
        description: what `describe` returned; deviations of single sizes, which are many, are left
            out.

    Raises:
        OutputError: the manifest cannot be written.
    """
    if model.path is None or is_checkpoint(model.name):
        return None
    short = {key: value for key, value in description.items() if key != "sizes"}
    parity = replace(model.manifest.parity or Parity(), benchmark=BenchmarkVerdict(plain(short)))
    manifest = replace(model.manifest, parity=parity)
    if not manifest.artefact_sha256:
        manifest = replace(manifest, artefact_sha256=model.sha256)
    path = manifest_path(model.path)
    write_text(path, manifest.to_json())
    return path
