"""From a float32 ONNX artefact to one in fp16 or bf16, with what fp16 cannot hold kept in float32."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tood_deploy.errors import ToodError
from tood_deploy.export.onnx_artefact import OnnxArtefact, read_onnx
from tood_deploy.export.precision.calibration import choose_pictures, warn_of_few
from tood_deploy.export.precision.mixed_precision import LowPrecision, half_values, lower_precision
from tood_deploy.export.precision.ranges import MOST_PICTURES, measure_ranges, values_at_risk
from tood_deploy.export.to_onnx import save_onnx
from tood_deploy.manifest import atomic_path

LARGEST_REPORTED, MOST_TOLD = 5, 10

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def low_precision_onnx(
    onnx_path: Path,
    output: Path,
    precision: LowPrecision,
    *,
    keep: Collection[str] = (),
    calib_data: Path | None = None,
    most_pictures: int = MOST_PICTURES,
    progress: Progress = lambda done, total: None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes `output` (.onnx), its metadata included, or nothing at all. No manifest beside it: parity is yet to be shown.

    Args:
        onnx_path: an .onnx artefact of tood-export in float32, or in int8: then what is not 8-bit becomes half precision.
        output: where to; a file that is there already is replaced in one step.
        precision: "fp16" or "bf16".
        keep: patterns of what stays float32, see `lower_precision`.
        calib_data: a folder of pictures. For fp16, values that it cannot hold on them stay float32; bf16 holds all.
        most_pictures: of the folder, evenly spread over it.
        progress: called after every picture with how many are done and how many there are.
        say: told warnings, and what fp16 cannot hold, a line each.

    Returns:
        What the manifest's options should say: "half_precision" with the report, and the opset.

    Raises:
        ToodError: not such an artefact, a pattern that fits nothing, or pictures that cannot be read.
    """
    artefact = read_onnx(onnx_path)
    if artefact.manifest.precision not in ("fp32", "int8"):
        raise ToodError(f"{onnx_path} is in {artefact.manifest.precision} already; start from the float32 artefact")
    wishes, found = dict.fromkeys(keep, "asked for"), {}
    if precision == "fp16" and calib_data is not None:
        if artefact.manifest.precision == "fp32":  # that of 8 bits has been told
            warn_of_few(calib_data, len(choose_pictures(calib_data, most_pictures)), say)
        risks, found = _find_risks(artefact, keep, calib_data, most_pictures, progress)
        _tell_risks(risks, found["values_measured"], say)
        wishes |= risks
    model, report = lower_precision(artefact.model, precision, keep=wishes)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    options = {**artefact.manifest.options, "opset": opset, "half_precision": report.to_dict() | found}
    named = artefact.manifest.precision if artefact.manifest.precision == "int8" else precision
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = replace(artefact.manifest, precision=named, options=options, created=created, artefact_sha256="", parity={}, self_test={})
    with atomic_path(output) as temporary:
        save_onnx(model, manifest, temporary)
    return options


def _find_risks(
    artefact: OnnxArtefact, keep: Collection[str], pictures: Path, most: int, progress: Progress
) -> tuple[dict[str, str], dict[str, Any]]:
    """Patterns of the values that fp16 cannot hold, with the reasons; and what the manifest says of the ranges."""
    names = half_values(artefact.model, keep=keep)
    ranges = measure_ranges(artefact.model, names, pictures, artefact.manifest.preset.sizing, most=most, progress=progress)
    risks = values_at_risk(ranges)
    largest = sorted(ranges, key=lambda name: -ranges[name].largest)[:LARGEST_REPORTED]
    told = {name: asdict(ranges[name]) | {"risk": risks.get(name, "")} for name in (*largest, *risks)}
    return {glob.escape(name): reason for name, reason in risks.items()}, {"values_measured": len(names), "ranges": told}


def _tell_risks(risks: Mapping[str, str], measured: int, say: Say) -> None:
    if not risks:
        say(f"fp16 holds all {measured} values that it is given on these pictures")
        return
    say(f"fp16 cannot hold {len(risks)} of {measured} values, which stay float32; the manifest has the whole list")
    for name, reason in list(risks.items())[:MOST_TOLD]:
        say(f"stays float32: {name} {reason}")
