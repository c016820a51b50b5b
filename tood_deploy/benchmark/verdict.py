"""The verdict of a comparison: plain values for the report, and the same inside the artefact's manifest."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tood_deploy import __version__
from tood_deploy.benchmark.parity import Result, Settings
from tood_deploy.benchmark.picture_set import PictureSet
from tood_deploy.benchmark.report import plain
from tood_deploy.benchmark.scoring import average_precision
from tood_deploy.benchmark.subject import Subject, is_checkpoint
from tood_deploy.manifest import manifest_path, write_text

KEY = "benchmark"  # in the manifest's `parity`, beside what tood-export found


def describe(result: Result, reference: Subject, pictures: PictureSet, settings: Settings) -> dict[str, Any]:
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
        "pictures": {"description": pictures.description, "count": len(pictures), "sha256": result.pictures_sha256},
        "settings": asdict(settings),
        "gates": asdict(comparison.gates),
        "passed": result.passed,
        "failing_stage": result.guilty,
        "failures": [str(failure) for failure in result.failures],
        "costliest_part": result.costliest,
        "stages_alone": comparison.alone.to_dict() if comparison.alone else None,
        "stages_as_deployed": comparison.carried.to_dict(),
        "batch_slots": comparison.slots.to_dict(),
        "sizes": {f"{height}x{width}": deviations.to_dict() for (height, width), deviations in comparison.sizes.items()},
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
    manifest = replace(subject.manifest, parity=subject.manifest.parity | {KEY: plain(shorten(description))})
    if not manifest.artefact_sha256:
        manifest = replace(manifest, artefact_sha256=subject.sha256)
    path = manifest_path(subject.path)
    write_text(path, manifest.to_json())
    return path


def shorten(description: dict[str, Any]) -> dict[str, Any]:
    """Without the deviations of single sizes, which are many."""
    return {key: value for key, value in description.items() if key != "sizes"}
