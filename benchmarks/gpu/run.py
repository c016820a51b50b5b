"""Carry out a whole run: a network, all cells, suppression alone, the reports."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.artefacts import Artefacts
from benchmarks.gpu.facts import GpuWatch, describe, floor_ms
from benchmarks.gpu.measure import Budget, Session, measure_cell
from benchmarks.gpu.nms_cost import NmsRow, candidates_of, measure_nms
from benchmarks.gpu.parity import Reference
from benchmarks.gpu.report import failures_of, write_report
from benchmarks.gpu.settings import CONF, IOU, Cell, Row, Settings, cells
from benchmarks.gpu.variants import Variant, runtime_variants, torch_variants
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.data.images import read_images
from tood_deploy.errors import DeviceError
from tood_deploy.model import build_model, load_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.preprocess import resize_and_pad
from tood_deploy.presets import get_preset

SEEDED_WEIGHTS = Path(__file__).resolve().parents[2] / "tests" / "reference" / "seeded_weights.py"
FRAME_HW = {"cuda": (1080, 1920), "cpu": (120, 180)}  # of the decoded frames
NMS_IMAGES = 4


def run_all(settings: Settings, output: Path, command: str) -> list[str]:
    """Measure everything and write the reports.

    Args:
        settings: of the run.
        output: the reports' path without suffix.
        command: as it was called, for the reports.

    Returns:
        The failures that make the run fail.

    Raises:
        ToodError: no GPU where one is asked for, a checkpoint or images that cannot be read, a
            place that cannot be written.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device cuda is not there for PyTorch {torch.__version__}; "
            "give --device cpu to test the flow"
        )
    session = Session(settings, Budget(settings.budget_seconds), GpuWatch(settings.device), _log)
    torch.backends.cudnn.benchmark = True
    # No TF32: rows that are called fp32 are fp32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = load_model(settings)
    facts = describe(settings.device) | {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": command,
        "run": _describe_run(settings, model),
    }
    artefacts = Artefacts(model, settings)
    _log(f"{facts['gpu'].get('name', 'CPU')}; {facts['versions']}")
    floors: dict[str, float] = {}
    if settings.device == "cuda":
        peak = settings.peak_tflops
        floors = {cell.name: floor_ms(model.preset, cell, peak) for cell in cells(settings)}
    rows: list[Row] = []
    nms_rows: list[NmsRow] = []
    failures: list[str] = []
    # What surely runs first, and its report: other runtimes may be refused, or not be there.
    for variants_of in (torch_variants, runtime_variants):
        for cell in cells(settings):
            rows += _measure_cell(session, variants_of(settings, artefacts, cell), cell, model)
            if cell.first and variants_of is torch_variants:
                nms_rows = _measure_suppression(settings, model, session.budget)
        failures = failures_of(rows, nms_rows)
        facts["GPU during the run"] = session.watch.to_dict()
        paths = write_report(output, rows, nms_rows, facts, floors, failures)
        _log(f"written: {', '.join(map(str, paths))}")
    print(output.with_name(f"{output.name}.md").read_text(encoding="utf-8"))
    return failures


def _measure_cell(
    session: Session, candidates: Sequence[Variant], cell: Cell, model: DenseDetector
) -> list[Row]:
    """Fill and return the rows of some variants in a cell; in the first, parity is measured, too.

    Args:
        session: of the run.
        candidates: the variants.
        cell: theirs.
        model: the network.
    """
    settings = session.settings
    if not candidates:
        return []
    frames = [synthetic_image(*FRAME_HW[settings.device], seed) for seed in range(cell.batch)]
    reference = Reference(model, _parity_images(settings), cell.size_hw) if cell.first else None
    rows = measure_cell(session, candidates, frames, reference)
    for row in rows:
        row.note = row.note.replace(f"{settings.folder}/", "")
    return rows


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_model(settings: Settings) -> DenseDetector:
    """Return the network of the checkpoint, else one with the stand-in weights of the tests.

    These find a hundred things in any image.
    """
    if settings.checkpoint:
        return load_checkpoint(settings.checkpoint).requires_grad_(False)
    weights = _load_module(SEEDED_WEIGHTS)
    with torch.device("meta"):
        model = build_model(replace(get_preset(settings.preset), weights=None))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {key: torch.as_tensor(value) for key, value in weights.fill(shapes).items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parity_images(settings: Settings) -> list[NDArray[np.uint8]]:
    if settings.images:
        return read_images(settings.images, settings.image_count)
    height, width = FRAME_HW[settings.device]
    return [
        synthetic_image(height - 10 * seed, width, 100 + seed)
        for seed in range(settings.image_count)
    ]


def _measure_suppression(settings: Settings, model: DenseDetector, budget: Budget) -> list[NmsRow]:
    if "torch" not in settings.backends or budget.left() < 0:
        left = f"{max(0.0, budget.left()):.0f} s of the budget were left"
        return [NmsRow(0, "all", "skipped", f"{left}, or PyTorch was not asked for")]
    size_hw = settings.sizes_hw[0]
    prepared = [
        resize_and_pad(synthetic_image(*size_hw, seed), (min(size_hw), max(size_hw)), size_hw)
        for seed in range(NMS_IMAGES)
    ]
    images = np.stack([image for image, _ in prepared])
    valid_hw = np.array([transform.resized_hw for _, transform in prepared], np.int32)
    candidates = candidates_of(model, images, valid_hw, settings.device)
    return measure_nms(
        candidates, settings.batches, settings.modes, settings.rounds, settings.seconds
    )


def _describe_run(settings: Settings, model: DenseDetector) -> dict[str, Any]:
    weights, images = "seeded stand-in weights", f"{settings.image_count} synthetic"
    if settings.checkpoint:
        weights = f"checkpoint {settings.checkpoint.name}"
    if settings.images:
        images = f"the first {settings.image_count} of {settings.images.name}"
    return {
        "network": f"{model.preset.name} with {weights}",
        "thresholds": f"score {CONF}, overlap {IOU}",
        "parity images": images,
        "rounds": settings.rounds,
        "TF32": "off",
        "cuDNN's search for algorithms": "on",
        "budget": f"{settings.budget_seconds:g} s",
    }
