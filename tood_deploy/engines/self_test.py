"""The golden self-test: a stored picture must give the stored answer, alone and in every slot of a batch.

Runs when an artefact is first opened on a machine; that it passed is kept, so that later openings cost a hash of the file.
"""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.errors import ArtefactError, OutputError
from tood_deploy.golden import Golden, GoldenCase
from tood_deploy.home import home_folder
from tood_deploy.manifest import artefact_sha256, saturating_weights, write_text
from tood_deploy.parity.tolerances import AnswerTolerance, answer_tolerance
from tood_deploy.rows import Rows, batch_rows, pair_rows, row_iou

SLOTS = 3  # of the batch, where an engine has no largest one
CPU_INFO = Path("/proc/cpuinfo")


def check_self_test(engine: Engine, artefact: Path) -> None:
    """Runs the self-test that an artefact's manifest holds, unless it has passed before with all that could change its outcome.

    Raises:
        ArtefactError: an answer is not the stored one; the message says how far off.
    """
    _check_products(engine, artefact)  # not left to the record of an earlier pass, nor to a stored answer
    if not engine.manifest.self_test:
        return
    circumstances = _circumstances(engine, artefact)
    record = home_folder("self_tests") / f"{hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:32]}.json"
    if record.is_file():
        return
    golden = Golden.from_dict(engine.manifest.self_test, str(artefact))
    cases = [case for case in golden.cases if not engine.canvases_hw or case.net_hw in engine.canvases_hw]
    if not cases:
        raise ArtefactError(f"{artefact}: its self-test has no answer for any of its input sizes {engine.canvases_hw}; export it again")
    for case in cases:
        _check_case(engine, artefact, golden, case)
    passed = circumstances | {"path": str(artefact), "passed": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(OutputError):  # where nothing can be kept, the test runs again next time
        write_text(record, json.dumps(passed, indent=2))


def tolerance_of(engine: Engine, golden_reference: str = "") -> AnswerTolerance:
    """By the precision that the engine runs in, where, and whether its own runtime gave the stored answer."""
    return answer_tolerance(engine.precision, engine.device, same_runtime=golden_reference.startswith(f"{engine.name},"))


def _check_products(engine: Engine, artefact: Path) -> None:
    if saturating_weights(engine.manifest) and engine.saturates():
        raise ArtefactError(
            f"{artefact}: its 8-bit weights need a CPU with VNNI instructions, and on this one ({processor()}) sums of products saturate "
            f"in {engine.name}: results would be wrong; export it again with --target-cpu portable, or run the float32 artefact"
        )


def _check_case(engine: Engine, artefact: Path, golden: Golden, case: GoldenCase) -> None:
    tolerance = tolerance_of(engine, golden.reference)
    least, most = engine.batches_at(case.net_hw)
    for batch in sorted({least, most or SLOTS}):
        found = engine.infer(*golden.inputs(case.net_hw, batch), case.score_threshold, golden.iou_threshold)
        for slot, rows in enumerate(_rows(found)):
            if wrong := deviation(case.expected, rows, tolerance):
                raise ArtefactError(
                    f"{artefact}: fails its self-test in {engine.name}, {engine.precision} on {engine.device}: {wrong} "
                    f"(canvas {case.net_hw[0]} x {case.net_hw[1]}, slot {slot + 1} of a batch of {batch}, answer of {golden.reference}); "
                    "update the runtime, export the model again, or open it all the same with --no-self-test"
                )


def _rows(found: BatchDetections) -> list[Rows]:
    return batch_rows((found.num_dets, found.boxes_net, found.scores, found.labels))


def deviation(expected: Rows, found: Rows, tolerance: AnswerTolerance) -> str:
    """What is wrong, as a clause; "" where the answer is within the tolerance."""
    pairs = pair_rows(expected, found)
    score_off = np.abs(expected.scores[pairs[:, 0]] - found.scores[pairs[:, 1]]) / expected.scores.max(initial=1e-9)
    iou = row_iou(expected.boxes[pairs[:, 0]], found.boxes[pairs[:, 1]])
    matched = int(((score_off <= tolerance.score) & (iou >= tolerance.iou)).sum())
    either = len(expected) + len(found) - matched
    if matched >= tolerance.matched * either:
        return ""
    return (
        f"of {len(expected)} stored detections {matched} came again, {len(found)} came in all; scores are off by up to "
        f"{score_off.max(initial=0):.2g} of the best one (allowed {tolerance.score:g}), overlaps go down to {iou.min(initial=1):.2g} "
        f"(allowed {tolerance.iou:g})"
    )


def _circumstances(engine: Engine, artefact: Path) -> dict[str, Any]:
    """All that the outcome depends on."""
    return {
        "machine": platform.node(),
        "processor": processor(),
        "runtime": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "loaded_from": engine.loaded_from,
        "artefact_sha256": artefact_sha256(artefact),
        "self_test_sha256": hashlib.sha256(json.dumps(engine.manifest.self_test, sort_keys=True).encode()).hexdigest(),
    }


def processor() -> str:
    """Return the CPU's model, as far as the system tells."""
    with suppress(OSError):
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
