"""tood-export and tood-bench parity pass and refuse the same artefacts, on the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tood_deploy.benchmark.parity.compare import Settings, compare
from tood_deploy.benchmark.parity.stage_runners import ComparedModel, DetectionsOnly, TorchStages
from tood_deploy.data.image_set import ImageEntry, ImageSet, synthetic_image
from tood_deploy.engines import BatchDetections
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.errors import CheckFailed
from tood_deploy.model.detector import DenseDetector, build_model
from tood_deploy.parity import verify
from tood_deploy.parity.reference import Conditioning, Outputs, Reference
from tood_deploy.parity.tolerances import DETECTION_LIMITS, STAGE_LIMITS
from tood_deploy.parity.torch_reference import TorchRunner, torch_reference
from tood_deploy.presets import PRESETS

IMGSZ = (60, 90)
IMAGES = [synthetic_image(*IMGSZ, seed) for seed in range(3)]
PRECISIONS = ("fp32", *DETECTION_LIMITS)
Change = Callable[[Outputs], None]


def keep_30(outputs: Outputs) -> None:
    outputs[0][:] = np.minimum(outputs[0], 30)


def move_boxes(outputs: Outputs) -> None:
    outputs[1] += 20


def rename_classes(outputs: Outputs) -> None:
    outputs[3][:] = (outputs[3] + 1) % 3


def depend_on_the_slot(outputs: Outputs) -> None:
    outputs[0][1:] = 0


def nothing(outputs: Outputs) -> None:
    """A sound artefact."""


@pytest.fixture(scope="module")
def model(seeded_fill: Callable) -> DenseDetector:
    """`tiny` with stand-in weights, which finds a hundred boxes above 0.3 in a small image."""
    network = build_model(replace(PRESETS["tiny"], class_names=("a", "b", "c"), imgsz=IMGSZ))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(
        {key: torch.from_numpy(value) for key, value in seeded_fill(shapes).items()}
    )
    with torch.no_grad():
        for layer in ("tood_cls", "cls_prob_module.2"):
            network.get_parameter(f"bbox_head.{layer}.bias").add_(8)
    return network


@pytest.fixture(scope="module")
def reference(model: DenseDetector) -> Reference:
    """The network; what is measured of an input is measured once."""
    measured: dict[bytes, Conditioning] = {}
    reference = torch_reference(model, 100)

    def measure(images: np.ndarray, *others: Any) -> Conditioning:
        key = images.tobytes()
        if key not in measured:
            measured[key] = reference.measure(images, *others)
        return measured[key]

    return replace(reference, measure=measure)


class ChangedRunner:
    """The artefact as tood-export runs it."""

    name = "changed"

    def __init__(self, model: DenseDetector, change: Change) -> None:
        self.run, self.change = TorchRunner(TorchEngine(model).detector), change

    def __call__(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> Outputs:
        inputs = images, valid_hw, score_threshold, iou_threshold
        outputs = [np.array(values) for values in self.run(*inputs)]
        self.change(outputs)
        return outputs


class ChangedEngine(TorchEngine):
    """The same artefact as tood-bench opens it."""

    def __init__(self, model: DenseDetector, change: Change, precision: str) -> None:
        super().__init__(model)
        self.manifest = replace(self.manifest, precision=precision)
        self.change = change

    def _run(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> BatchDetections:
        batch = super()._run(images, valid_hw, score_threshold, iou_threshold)
        outputs = [batch.num_dets, batch.boxes_net, batch.scores, batch.labels]
        self.change(copies := [np.array(values) for values in outputs])
        return BatchDetections(*copies)


def passes_export(
    model: DenseDetector, reference: Reference, change: Change, precision: str
) -> bool:
    run = ChangedRunner(model, change)
    try:
        if precision == "fp32":
            verify.verify_float32(reference, run, images=IMAGES)
        else:
            limits = DETECTION_LIMITS[precision]
            verify.verify_detections(reference, run, IMAGES, limits)
    except CheckFailed:
        return False
    return True


def passes_bench(model: DenseDetector, change: Change, precision: str, conf: float = 0.05) -> bool:
    engine = TorchEngine(model)
    reference = ComparedModel("m.pth", None, engine, TorchStages(engine.detector), "")
    changed = ChangedEngine(model, change, precision)
    artefact = ComparedModel("m.onnx", None, changed, DetectionsOnly(changed), "")
    entries = [ImageEntry(str(i), i, lambda image=image: image) for i, image in enumerate(IMAGES)]
    images = ImageSet("three", tuple(entries))
    return compare(reference, [artefact], images, Settings(IMGSZ, conf))[0].passed


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        *((nothing, precision) for precision in PRECISIONS),
        *((keep_30, precision) for precision in PRECISIONS),
        # Lower precisions are judged alike, by other limits.
        *((move_boxes, precision) for precision in ("fp32", "int8")),
        *((rename_classes, precision) for precision in ("fp32", "int8")),
        *((depend_on_the_slot, precision) for precision in ("fp32", "int8")),
    ],
)
def test_both_judge_alike(
    change: Change,
    precision: str,
    model: DenseDetector,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "SIZES_HW", {"small": (96, 64)})
    passes = change is nothing
    assert passes_export(model, reference, change, precision) is passes
    assert passes_bench(model, change, precision) is passes


@pytest.mark.parametrize(("change", "passes"), [(nothing, True), (keep_30, False)])
def test_a_high_score_threshold_changes_no_verdict(
    change: Change, passes: bool, model: DenseDetector
) -> None:
    """What lies between the deployment score and `conf` is looked at all the same."""
    assert passes_bench(model, change, "int8", conf=0.9) is passes


def test_every_precision_has_its_stages() -> None:
    assert set(STAGE_LIMITS) == set(PRECISIONS)
