"""The golden self-test.

A stored image must give the stored answer, alone and in every slot of a batch.

Runs when an artefact is first opened on a machine; that it passed is kept, so that later openings
cost a hash of the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import cv2
import imagesize
import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.errors import ArtefactError, OutputError
from tood_deploy.files import home_folder, write_text
from tood_deploy.manifest import artefact_sha256, saturating_weights
from tood_deploy.manifest_sections import SelfTest, SelfTestCase
from tood_deploy.matching import NetDetections, split_batch
from tood_deploy.parity.detection_verdict import answer_deviation
from tood_deploy.parity.tolerances import AnswerTolerance, answer_tolerance

if TYPE_CHECKING:
    from tood_deploy.parity.reference import Runner


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """The answer on one canvas.

    Attributes:
        net_hw: rows and columns of the canvas.
        score_threshold: lies in a gap between the scores, so that none of them is on its edge.
        expected: what is found above it.
    """

    net_hw: tuple[int, int]
    score_threshold: float
    expected: NetDetections

    def for_manifest(self) -> SelfTestCase:
        """Return the case as the manifest holds it; a float32 survives as it is."""
        return SelfTestCase(
            self.net_hw,
            self.score_threshold,
            tuple(map(tuple, self.expected.boxes.tolist())),
            tuple(self.expected.scores.tolist()),
            tuple(self.expected.labels.tolist()),
        )

    @classmethod
    def from_manifest(cls, case: SelfTestCase) -> Self:
        """Return the case that `for_manifest` made."""
        boxes = np.array(case.boxes, np.float32).reshape(-1, 4)
        expected = NetDetections(
            boxes, np.array(case.scores, np.float32), np.array(case.labels, np.int32)
        )
        return cls(case.net_hw, case.score_threshold, expected)


@dataclass(frozen=True, eq=False)
class Golden:
    """An image and its answers.

    Attributes:
        image: (rows, columns, 3) uint8 RGB, lies at the top left of every canvas.
        iou_threshold: of the suppression.
        reference: what gave the answers, for reports.
        cases: an answer for each canvas.
    """

    image: NDArray[np.uint8]
    iou_threshold: float
    reference: str
    cases: tuple[GoldenCase, ...]

    def inputs(
        self, net_hw: tuple[int, int], batch: int = 1
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return the image in every slot of a batch on a canvas.

        `images` and `valid_hw` as an engine takes them.
        """
        rows, columns, _ = self.image.shape
        images = np.zeros((batch, *net_hw, 3), np.uint8)
        images[:, :rows, :columns] = self.image
        return images, np.array([[rows, columns]] * batch, np.int32)

    def for_manifest(self) -> SelfTest:
        """Return it as the manifest holds it; the image as PNG, which every decoder reads alike."""
        _, png = cv2.imencode(".png", self.image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        text = base64.b64encode(png.tobytes()).decode("ascii")
        cases = tuple(case.for_manifest() for case in self.cases)
        return SelfTest(text, self.iou_threshold, self.reference, cases)

    @classmethod
    def from_manifest(cls, stored: SelfTest, origin: str) -> Self:
        """Return what `for_manifest` made; `origin` names the file in errors.

        Raises:
            ArtefactError: it is damaged.
        """
        try:
            png = base64.b64decode(stored.image_png, validate=True)
            columns, rows = imagesize.get(io.BytesIO(png))
            smallest = np.min([case.net_hw for case in stored.cases], axis=0)
            if not (0 < rows <= smallest[0] and 0 < columns <= smallest[1]):
                raise ValueError(f"an image of {rows} x {columns} on a canvas of {smallest}")
            decoded = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
            image = np.ascontiguousarray(np.asarray(decoded, np.uint8)[..., ::-1])
            cases = tuple(map(GoldenCase.from_manifest, stored.cases))
            return cls(image, stored.iou_threshold, stored.reference, cases)
        except (TypeError, ValueError, IndexError, cv2.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ArtefactError(
                f"{origin}: the self-test in its manifest is damaged ({reason}); export the model "
                "again"
            ) from error


# In place of the canvases of an artefact that takes every size: not square, three levels with
# several cells.
ANY_SIZE = ((160, 224),)
IMAGE_HW = (150, 210)  # fewer rows and columns than the canvas, so that padding takes part
PADDING_HW = (10, 14)
SEED, COARSE = 3, 0xF0  # without the grain of the synthetic image its PNG takes a fifth
IOU_THRESHOLD = 0.6
MIN_DETECTIONS, MAX_DETECTIONS = (
    8,
    24,
)  # detections in an answer: enough for a verdict, few enough for a manifest
THRESHOLD_STEP = 0.02  # of the way to 1
SLOTS = 3  # of the batch, where an engine has no largest one
CPU_INFO = Path("/proc/cpuinfo")


def check_self_test(engine: Engine, artefact: Path) -> None:
    """Run the self-test that an artefact's manifest holds, unless it has passed here before.

    "Here" is all that could change its outcome.

    Raises:
        ArtefactError: an answer is not the stored one; the message says how far off.
    """
    _check_products(
        engine, artefact
    )  # not left to the record of an earlier pass, nor to a stored answer
    stored = engine.manifest.self_test
    if stored is None:
        return
    _check_labels(engine, artefact, stored)
    circumstances = _circumstances(engine, artefact, stored)
    key = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
    record = home_folder("self_tests") / f"{key[:32]}.json"
    if record.is_file():
        return
    golden = Golden.from_manifest(stored, str(artefact))
    cases = [
        case
        for case in golden.cases
        if not engine.input_shapes_hw or case.net_hw in engine.input_shapes_hw
    ]
    if not cases:
        raise ArtefactError(
            f"{artefact}: its self-test has no answer for any of its input sizes "
            f"{engine.input_shapes_hw}; export it again"
        )
    for case in cases:
        _check_case(engine, artefact, golden, case)
    passed = circumstances | {
        "path": str(artefact),
        "passed": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with suppress(OutputError):  # where nothing can be kept, the test runs again next time
        write_text(record, json.dumps(passed, indent=2))


def tolerance_of(engine: Engine, golden_reference: str = "") -> AnswerTolerance:
    """Return the tolerance between an engine's answer and the stored one.

    It depends on the precision and the device that the engine runs in, and on whether its own
    runtime gave the stored answer.
    """
    return answer_tolerance(
        engine.precision, engine.device, same_runtime=golden_reference.startswith(f"{engine.name},")
    )


def _check_products(engine: Engine, artefact: Path) -> None:
    if saturating_weights(engine.manifest) and engine.saturates():
        raise ArtefactError(
            f"{artefact}: its 8-bit weights need a CPU with VNNI instructions, and on this one "
            f"({processor()}) sums of products saturate "
            f"in {engine.name}: results would be wrong; export it again with --target-cpu "
            "portable, or run the float32 artefact"
        )


def _check_labels(engine: Engine, artefact: Path, stored: SelfTest) -> None:
    classes = engine.manifest.preset.num_classes
    if (
        largest := max((max(case.labels, default=0) for case in stored.cases), default=0)
    ) >= classes:
        raise ArtefactError(
            f"{artefact}: the self-test in its manifest has an object of class {largest}, and "
            f"there are {classes} class names; export the model again"
        )


def _check_case(engine: Engine, artefact: Path, golden: Golden, case: GoldenCase) -> None:
    tolerance = tolerance_of(engine, golden.reference)
    smallest, largest = engine.batches_at(case.net_hw)
    for batch in sorted({smallest, largest or SLOTS}):
        detections = engine.infer(
            *golden.inputs(case.net_hw, batch), case.score_threshold, golden.iou_threshold
        )
        for slot, rows in enumerate(_rows(detections)):
            if wrong := answer_deviation(case.expected, rows, tolerance):
                raise ArtefactError(
                    f"{artefact}: fails its self-test in {engine.name}, {engine.precision} on "
                    f"{engine.device}: {wrong} "
                    f"(canvas {case.net_hw[0]} x {case.net_hw[1]}, slot {slot + 1} of a batch of "
                    f"{batch}, answer of {golden.reference}); "
                    "update the runtime, export the model again, or open it all the same with "
                    "--no-self-test"
                )


def _rows(batch: BatchDetections) -> list[NetDetections]:
    return split_batch((batch.num_dets, batch.boxes_net, batch.scores, batch.labels))


def _circumstances(engine: Engine, artefact: Path, stored: SelfTest) -> dict[str, str]:
    """Return all that the outcome depends on."""
    return {
        "machine": platform.node(),
        "processor": processor(),
        "runtime": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "loaded_from": engine.loaded_from,
        "artefact_sha256": artefact_sha256(artefact),
        "self_test_sha256": hashlib.sha256(
            json.dumps(stored.to_dict(), sort_keys=True).encode()
        ).hexdigest(),
    }


def processor() -> str:
    """Return the CPU's model, as far as the system tells."""
    with suppress(OSError):
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def self_test_from(run: Runner, input_shapes_hw: Sequence[tuple[int, int]] = ()) -> SelfTest:
    """Return a built-in image and the answers to it, for `Manifest.self_test`.

    Args:
        run: the reference: the network in PyTorch, or an artefact in float32 that was proven equal
            to it.
        input_shapes_hw: the padded sizes that the artefact takes; empty where every multiple of 32
            will do.
    """
    canvases = tuple(input_shapes_hw) or ANY_SIZE
    height, width = (
        min(IMAGE_HW[axis], min(canvas[axis] for canvas in canvases) - PADDING_HW[axis])
        for axis in (0, 1)
    )
    image = np.bitwise_and(synthetic_image(height, width, SEED), COARSE, dtype=np.uint8)
    golden = Golden(image, IOU_THRESHOLD, run.name, ())
    cases = tuple(_answer(run, golden, canvas) for canvas in canvases)
    return Golden(image, IOU_THRESHOLD, run.name, cases).for_manifest()


def _answer(run: Runner, golden: Golden, net_hw: tuple[int, int]) -> GoldenCase:
    """Return what the reference finds above a threshold in the widest gap between its scores.

    Where the class score alone is held against the threshold, more is found than the scores say:
    then the threshold rises until few enough are left.
    """
    (rows,) = split_batch(run(*golden.inputs(net_hw), 0.0, golden.iou_threshold))
    if len(rows) <= MIN_DETECTIONS:
        return GoldenCase(net_hw, 0.0, rows)
    scores = rows.scores[MIN_DETECTIONS - 1 : MAX_DETECTIONS + 1].astype(np.float64)
    gap = int(((scores[:-1] - scores[1:]) / scores[:-1]).argmax())
    threshold = float(scores[gap : gap + 2].mean())
    while True:
        (rows,) = split_batch(run(*golden.inputs(net_hw), threshold, golden.iou_threshold))
        if len(rows) <= MAX_DETECTIONS:
            return GoldenCase(net_hw, threshold, rows)
        threshold += (1 - threshold) * THRESHOLD_STEP
