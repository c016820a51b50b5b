"""Choose the precision that runs fastest on this machine, among those within their limits.

Comes in: what is asked for, and artefacts of every candidate. Goes out: their times, and a choice.
Knows OpenVINO's precisions and no graph.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from tood_deploy.engines import open_engine
from tood_deploy.engines.openvino_runtime import has_bf16
from tood_deploy.errors import CheckFailed
from tood_deploy.export.config import ExportConfig, PrecisionOptions
from tood_deploy.export.precision.convert import images_to_verify
from tood_deploy.export.result import ExportResult, timed
from tood_deploy.files import atomic_paths
from tood_deploy.graph_io import OPENVINO_SUFFIX, OPENVINO_WEIGHTS_SUFFIX
from tood_deploy.manifest import manifest_path
from tood_deploy.parity.verify import prepare
from tood_deploy.preprocess import ImageSize
from tood_deploy.reporter import Reporter

ROUNDS = 8
TURN_S = 0.15  # of each model in a round; at least one call
MIN_SPEEDUP = 1.05  # that a lower precision must bring, or the higher one is kept
SCORE_THRESHOLD = 0.3


def candidate_precisions(
    asked: PrecisionOptions, *, has_bf16: bool, reporter: Reporter
) -> dict[str, PrecisionOptions]:
    """Return what may be fastest in OpenVINO on a CPU, from the most precise on, by its name.

    Args:
        asked: the options of the export, with `precision` "auto".
        has_bf16: whether the CPU computes in bf16.
        reporter: says what is left out, and why.
    """
    exact = replace(asked, precision="fp32", fallback=None)
    candidates = {"fp32": exact}
    if has_bf16:
        candidates["bf16"] = replace(exact, precision="bf16")
    else:
        reporter.info("bf16 is left out: this CPU has no bf16 instructions")
    if asked.calib_data is None:
        reporter.info("int8 is left out: it needs --calib-data DIR")
        return candidates
    candidates["int8 beside fp32"] = replace(exact, precision="int8", fallback="fp32")
    if has_bf16:
        candidates["int8 beside bf16"] = replace(exact, precision="int8", fallback="bf16")
    return candidates


def time_engines(
    artefacts: Mapping[str, Path], image: NDArray[np.uint8], sizing: ImageSize
) -> dict[str, list[float]]:
    """Return the milliseconds of single inferences by artefact, all taking turns.

    Args:
        artefacts: by name.
        image: (H, W, 3) uint8 BGR, like those to come.
        sizing: what it is scaled to.

    Raises:
        ToodError: an artefact cannot be opened.
    """
    images, valid_hw = prepare([image], sizing)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(open_engine(path, self_test=False))
            for name, path in artefacts.items()
        }
        for engine in engines.values():
            engine.infer(images, valid_hw, SCORE_THRESHOLD, engine.manifest.preset.iou_threshold)
            engine.settle(1, (images.shape[1], images.shape[2]))
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                end = time.perf_counter() + TURN_S
                iou = engine.manifest.preset.iou_threshold
                # The first call of a turn finds the caches as the others left them: not counted.
                engine.infer(images, valid_hw, SCORE_THRESHOLD, iou)
                while True:
                    start = time.perf_counter()
                    engine.infer(images, valid_hw, SCORE_THRESHOLD, iou)
                    times[name].append((time.perf_counter() - start) * 1000)
                    if time.perf_counter() >= end:
                        break
    return times


def choose_fastest(times_ms: Mapping[str, Sequence[float]]) -> str:
    """Return the name of the fastest, by medians; a lower precision must be worth it.

    Args:
        times_ms: of single inferences by name, from the most precise on.
    """
    medians = {name: statistics.median(times) for name, times in times_ms.items()}
    chosen = next(iter(medians))
    for name, median in medians.items():
        if median * MIN_SPEEDUP <= medians[chosen]:
            chosen = name
    return chosen


def choice_table(
    times_ms: Mapping[str, Sequence[float]], refused: Mapping[str, str], chosen: str
) -> Table:
    """Return every candidate with its time or what spoke against it.

    Args:
        times_ms: of single inferences by name, from the most precise on.
        refused: why the others are out, by name.
        chosen: the name of the choice.
    """
    table = Table("precision", "median ms", "times faster", "", title="on this machine, batch 1")
    first = statistics.median(next(iter(times_ms.values())))
    for name, times in times_ms.items():
        median = statistics.median(times)
        table.add_row(
            name, f"{median:.1f}", f"{first / median:.2f}", "chosen" if name == chosen else ""
        )
    for name, reason in refused.items():
        table.add_row(name, "-", "-", reason)
    return table


def export_fastest(
    config: ExportConfig,
    export: Callable[[ExportConfig], ExportResult],
    *,
    sizing: ImageSize,
    images: Sequence[NDArray[np.uint8]] = (),
    reporter: Reporter,
) -> ExportResult:
    """Write OpenVINO's fastest precision on this machine, of those within their limits.

    Args:
        config: what is asked for.
        export: makes and proves one candidate.
        sizing: what images are scaled to.
        images: (H, W, 3) uint8 BGR, given to verify on.
        reporter: of every step.

    Raises:
        ToodError: the place cannot be written.
        CheckFailed: the float32 artefact deviates from its reference; nothing is left behind.
    """
    candidates = candidate_precisions(config.precision, has_bf16=has_bf16(), reporter=reporter)
    results: dict[str, ExportResult] = {}
    refused: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        for name, precision in candidates.items():
            place = Path(folder) / f"{name.replace(' ', '-')}{OPENVINO_SUFFIX}"
            try:
                results[name] = export(replace(config, output=place, precision=precision))
            except CheckFailed as error:
                if name == "fp32":  # what all others are measured by
                    raise
                refused[name] = str(error)
        image = images_to_verify(config.precision.calib_data, images)[0]
        reporter.info("timing the candidates, all taking turns")
        with timed("choice"):
            paths = {name: result.path for name, result in results.items()}
            times_ms = time_engines(paths, image, sizing)
        chosen = choose_fastest(times_ms)
        reporter.table(choice_table(times_ms, refused, chosen))
        _copy_artefact(paths[chosen], config.place)
        return replace(results[chosen], path=config.place)


def _copy_artefact(source: Path, place: Path) -> None:
    """Copy an OpenVINO artefact and its manifest: all of it or nothing.

    Raises:
        OutputError: it cannot be written.
    """

    def files(xml: Path) -> tuple[Path, Path, Path]:
        # The manifest, which says that all three belong together, comes last.
        return xml.with_suffix(OPENVINO_WEIGHTS_SUFFIX), xml, manifest_path(xml)

    with atomic_paths(*files(place)) as new_paths:
        for old, new in zip(files(source), new_paths, strict=True):
            shutil.copyfile(old, new)
