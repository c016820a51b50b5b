"""Parity between checkpoints, which needs no export: networks, AP, canvases, verdicts, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifest_values import changed, plain
from numpy.typing import NDArray

from tood_deploy.benchmark.parity.checks import OwnLimits, check_for
from tood_deploy.benchmark.parity.compare import Result, Settings, check_models, compare
from tood_deploy.benchmark.parity.report import ap_table, verdict_line, write_reports
from tood_deploy.benchmark.parity.run import describe, write_verdict
from tood_deploy.benchmark.parity.stage_runners import (
    ComparedModel,
    DetectionsOnly,
    TorchStages,
    network_inputs,
    open_compared,
)
from tood_deploy.data.coco import read_annotations
from tood_deploy.data.coco_metrics import Scoring, average_precision
from tood_deploy.data.image_set import open_image_set
from tood_deploy.engines import BatchDetections
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.errors import ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import Manifest, doubts, manifest_path, read_manifest
from tood_deploy.model.detector import DenseDetector, build_model
from tood_deploy.parity.stages import STAGES
from tood_deploy.preprocess import fit_imgsz, fit_size
from tood_deploy.presets import PRESETS

IMGSZ = (60, 90)
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(seeded_fill: Callable) -> DenseDetector:
    """`tiny` with three classes and stand-in weights, which find boxes."""
    made = build_model(replace(PRESETS["tiny"], class_names=CLASSES))
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    made.load_state_dict(
        {key: torch.from_numpy(value) for key, value in seeded_fill(shapes).items()}
    )
    with torch.no_grad():
        for layer in ("tood_cls", "cls_prob_module.2"):
            made.get_parameter(f"bbox_head.{layer}.bias").add_(
                2
            )  # so that scores go beyond the threshold
    return made


class FixedEngine(TorchEngine):
    """Takes two or three images of 128 x 128."""

    input_shapes_hw = ((128, 128),)
    max_batch = 3

    def batches_at(self, net_hw: tuple[int, int]) -> tuple[int, int | None]:
        return 2, 3

    def infer(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        assert len(images) in (2, 3)
        return super().infer(images, valid_hw, score_threshold, iou_threshold)


def compared(
    model: DenseDetector, name: str = "model.pth", path: Path | None = None
) -> ComparedModel:
    engine = TorchEngine(model)
    return ComparedModel(name, path, engine, TorchStages(engine.detector), "abc")


def broken(model: DenseDetector, edit: Callable[[DenseDetector], object]) -> ComparedModel:
    copy = build_model(model.preset)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        edit(copy)
    return compared(copy, "broken.pth")


def run(
    model: DenseDetector,
    artefact: ComparedModel,
    scoring: Scoring | None = None,
    own: OwnLimits | None = None,
    settings: Settings | None = None,
) -> Result:
    images = open_image_set(None, None, IMGSZ, 2)
    return compare(
        compared(model),
        [artefact],
        images,
        settings or Settings(IMGSZ),
        own=own or OwnLimits(),
        scoring=scoring,
    )[0]


@pytest.fixture(scope="module")
def scoring(model: DenseDetector, tmp_path_factory: pytest.TempPathFactory) -> Scoring:
    """The truth is what the model itself finds with a score above 0.08."""
    images = open_image_set(None, None, IMGSZ, 2)
    detector = Detector(TorchEngine(model), conf=0.08, imgsz=IMGSZ)
    rows = [row for image in images for row in detector(image.read()).to_coco(image.image_id)]
    content = {
        "images": [{"id": image.image_id, "file_name": image.name} for image in images],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)],
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
    }
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    path.write_text(json.dumps(content))
    return Scoring.of(read_annotations(path), CLASSES, None)


def test_the_stages_one_after_another_are_the_whole(model: DenseDetector) -> None:
    artefact = compared(model)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    inputs = {"images": image, "valid_hw": np.array([[60, 90]], np.int32)}
    inputs |= {
        "score_threshold": np.array(0.05, np.float32),
        "iou_threshold": np.array(0.6, np.float32),
    }
    whole, chained = artefact.runner.run_all(inputs), artefact.runner.run_chain(STAGES, inputs)
    assert whole.keys() == chained.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], chained[name], err_msg=name)


def test_the_reference_rounds_nothing_to_tf32(model: DenseDetector) -> None:
    assert torch.backends.cudnn.allow_tf32
    artefact, seen = compared(model), []
    hook = model.backbone.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    image = open_image_set(None, None, IMGSZ, 1).images[0].read()
    values = artefact.runner.run_all(network_inputs(*artefact.prepare(image, IMGSZ), 0.05, 0.6))
    artefact.runner.run(STAGES[1], values)
    hook.remove()
    assert seen == [False, False]


def test_a_network_equals_itself(model: DenseDetector, scoring: Scoring) -> None:
    result = run(
        model, compared(model), scoring, settings=Settings(IMGSZ, sizes_hw=((64, 64), (96, 32)))
    )
    assert result.passed
    assert result.guilty == ""
    assert result.comparison.deployed.rows["detections"].counts.reference > 10
    assert result.ap_drop == 0
    assert set(result.part_costs.values()) == {0}
    assert result.comparison.check.batch_slots.reference > 0
    assert set(result.comparison.sizes) == {(64, 64), (96, 32)}


@pytest.mark.parametrize(
    ("edit", "stage"),
    [
        (lambda model: model.backbone.layer2[0].conv1.weight[3].zero_(), "backbone"),
        (lambda model: model.neck.lateral_convs[1].conv.bias.add_(0.5), "pyramid"),
        (lambda model: model.get_parameter("bbox_head.tood_reg.bias").add_(0.01), "head"),
    ],
)
def test_the_guilty_stage_of_a_broken_network(
    model: DenseDetector, scoring: Scoring, edit: Callable, stage: str
) -> None:
    result = run(model, broken(model, edit), scoring)
    assert result.guilty == stage
    assert result.comparison.guilty_stages() == [stage]
    assert result.costliest in ("network", "")
    assert f"FAILED at the stage {stage}" in verdict_line(result)


def test_wider_limits_let_it_pass(model: DenseDetector) -> None:
    artefact = broken(model, lambda copy: copy.get_parameter("bbox_head.tood_reg.bias").add_(1e-3))
    assert not run(model, artefact).passed
    assert run(
        model, artefact, own=OwnLimits(max_box_strides=1, max_box_px=20, min_matched=0.5)
    ).passed


def test_an_ap_drop_alone_fails(model: DenseDetector, scoring: Scoring) -> None:
    artefact = broken(model, lambda copy: copy.get_parameter("bbox_head.tood_reg.bias").add_(0.3))
    wide = OwnLimits(10, 10, 10, 1e6, 1e6, 0, max_ap_drop=0.1)
    result = run(model, artefact, scoring, wide)
    assert result.guilty == "AP"
    assert result.ap_drop > 0.1
    assert result.costliest == "network"
    assert "FAILED at the stage AP; in AP, its network costs most" in verdict_line(result)
    passed = run(model, artefact, scoring, replace(wide, max_ap_drop=100))
    assert (
        verdict_line(passed)
        == "equal to the PyTorch reference within its limits; in AP, its network costs most"
    )


@pytest.mark.parametrize("branch", ["tood_cls", "tood_reg"])
def test_not_a_number_is_reported_not_dropped(
    model: DenseDetector, scoring: Scoring, branch: str, tmp_path: Path
) -> None:
    artefact = broken(
        model,
        lambda copy: getattr(copy.bbox_head, branch).get_parameter("bias").fill_(float("nan")),
    )
    result = run(model, artefact, scoring)
    assert result.guilty == "head"
    assert "NaN" in str(result.failures[0])
    description = describe(
        result, compared(model), open_image_set(None, None, IMGSZ, 2), Settings(IMGSZ)
    )
    write_reports(tmp_path, [result], [description], {"command": "c"})
    assert "NaN" in (tmp_path / "parity.html").read_text()
    assert (
        result.comparison.deployed.to_dict()[
            f"head_{'scores' if branch == 'tood_cls' else 'boxes'}_p3"
        ]["not_numbers"]
        > 0
    )


def test_detections_alone(model: DenseDetector, tmp_path: Path) -> None:
    artefact = replace(compared(model), runner=DetectionsOnly(TorchEngine(model)))
    result = run(model, artefact)
    assert result.passed
    assert result.comparison.alone is None
    assert not result.part_costs
    reference = compared(model)
    description = describe(result, reference, open_image_set(None, None, IMGSZ, 2), Settings(IMGSZ))
    assert description["stages_alone"] is None
    write_reports(tmp_path, [result], [description], {"command": "c"})
    assert "detections" in (tmp_path / "parity.md").read_text()


class TestCanvas:
    def test_what_padding_changes_is_counted(self, model: DenseDetector, scoring: Scoring) -> None:
        result = run(model, compared(model), scoring, settings=Settings(IMGSZ, net_hw=(128, 128)))
        padding = result.comparison.padding
        assert padding is not None
        assert result.passed  # a canvas is looked at, not judged
        assert padding.change.counts.reference > 0
        assert padding.change.score.worst > 1e-6
        assert padding.shrunk == 0

    def test_a_canvas_that_fits_exactly_changes_nothing(self, model: DenseDetector) -> None:
        result = run(model, compared(model), settings=Settings(IMGSZ, net_hw=(64, 96)))
        assert result.comparison.padding is not None
        assert result.comparison.padding.change.counts.matched_share == 1
        assert result.comparison.padding.change.score.worst == 0

    def test_what_it_costs_in_ap_is_against_the_same_detector(
        self, model: DenseDetector, scoring: Scoring
    ) -> None:
        found = run(
            model, compared(model), scoring, settings=Settings(IMGSZ, net_hw=(128, 128))
        ).padding_ap
        assert found is not None
        assert found[0] == 100  # the truth is what it finds with the least padding
        assert found[1] < 100

    def test_not_a_multiple_of_32(self) -> None:
        with pytest.raises(ToodError, match=r"--net-size is 100 160.*multiples of 32"):
            Settings(IMGSZ, net_hw=(100, 160))

    @pytest.mark.parametrize("image_hw", [(480, 640), (640, 480), (100, 1000), (33, 47)])
    def test_every_image_fits(self, image_hw: tuple[int, int]) -> None:
        height, width = fit_size(image_hw, fit_imgsz(image_hw, (240, 320), (256, 320)))
        assert height <= 256
        assert width <= 320


class TestFixedShapes:
    """Artefacts that take images of some padded sizes alone, as TensorRT engines do."""

    @pytest.fixture
    def fixed(self, model: DenseDetector) -> ComparedModel:
        engine = FixedEngine(model)
        return ComparedModel("fixed.engine", None, engine, DetectionsOnly(engine), "abc")

    def test_both_run_on_its_canvas_and_what_that_costs_is_told(
        self, model: DenseDetector, scoring: Scoring, fixed: ComparedModel
    ) -> None:
        result = run(model, fixed, scoring, settings=Settings(IMGSZ, sizes_hw=((64, 64),)))
        assert result.passed
        assert result.ap_drop == 0
        assert list(result.comparison.sizes) == [(128, 128)]
        assert result.comparison.check.batch_slots.matched_share == 1
        assert result.comparison.padding is not None
        assert result.comparison.padding.change.score.worst > 1e-6
        least, padded = result.padding_ap or (0, 0)
        assert least == 100  # the truth is what the reference finds with the least padding
        assert padded < 100
        assert "PyTorch, padded to 128x128" in ap_table(result).markdown()

    def test_beside_one_that_takes_every_size(
        self, model: DenseDetector, scoring: Scoring, fixed: ComparedModel
    ) -> None:
        images = open_image_set(None, None, IMGSZ, 2)
        artefacts = [fixed, compared(model)]
        first, second = compare(
            compared(model),
            artefacts,
            images,
            Settings(IMGSZ, sizes_hw=((64, 64),)),
            scoring=scoring,
        )
        assert first.passed
        assert second.passed
        assert average_precision(first.reference_metrics) < average_precision(
            second.reference_metrics
        )
        assert list(second.comparison.sizes) == [(64, 64)]
        assert second.padding_ap is None

    def test_another_canvas_cannot_be_tried(
        self, model: DenseDetector, fixed: ComparedModel
    ) -> None:
        with pytest.raises(
            ToodError,
            match=r"fixed.engine: takes images of 1 fixed sizes alone; leave --net-size out",
        ):
            run(model, fixed, settings=Settings(IMGSZ, net_hw=(96, 96)))


def test_precision_alone_is_known_without_stages(model: DenseDetector, scoring: Scoring) -> None:
    engine = TorchEngine(model)
    engine.manifest = replace(engine.manifest, precision="bf16")
    result = run(
        model, ComparedModel("m.xml", None, engine, DetectionsOnly(engine), "abc"), scoring
    )
    assert set(result.part_costs) == {"precision"}
    assert "run by PyTorch in bf16" in ap_table(result).note
    assert "Swapped" in ap_table(result).note


@pytest.mark.parametrize(
    ("precision", "words"),
    [("fp32", "Precision costs nothing"), ("int8, bf16", "cannot run the network in int8, bf16")],
)
def test_what_is_said_of_precision_is_of_the_arithmetic_as_it_runs(
    model: DenseDetector,
    scoring: Scoring,
    precision: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TorchEngine, "precision", precision)
    engine = TorchEngine(model)
    note = ap_table(
        run(model, ComparedModel("m.xml", None, engine, DetectionsOnly(engine), "abc"), scoring)
    ).note
    assert words in note
    assert "Swapped" not in note


class TestVerdict:
    def test_it_goes_into_the_manifest(self, model: DenseDetector, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(b"an artefact")
        manifest = changed(Manifest(model.preset), parity={"exported": 1}).with_artefact(path)
        manifest_path(path).write_text(manifest.to_json())
        artefact = broken(
            model, lambda copy: copy.get_parameter("bbox_head.tood_reg.bias").add_(0.1)
        )
        artefact = replace(artefact, name=str(path), path=path, sha256=manifest.artefact_sha256)
        artefact.engine.manifest = manifest
        result = run(model, artefact)
        images = open_image_set(None, None, IMGSZ, 2)
        assert write_verdict(
            artefact, describe(result, compared(model), images, Settings(IMGSZ))
        ) == manifest_path(path)
        found = read_manifest(path)
        assert found is not None
        verdict = plain(found)["parity"]["benchmark"]
        assert plain(found)["parity"]["exported"] == 1
        assert verdict["passed"] is False
        assert verdict["failing_stage"] == "head"
        assert verdict["artefact"]["sha256"] == manifest.artefact_sha256
        assert verdict["reference"]["sha256"] == "abc"
        assert len(verdict["images"]["sha256"]) == 64
        assert verdict["date"].endswith("+00:00")
        assert verdict["limits"]["ap_drop"] == 0.1
        assert verdict["measured"]
        assert "failed its comparison with PyTorch at the stage head" in doubts(path, found)

    def test_a_checkpoint_has_no_manifest(self, model: DenseDetector, tmp_path: Path) -> None:
        artefact = replace(compared(model), path=tmp_path / "model.pth")
        assert write_verdict(artefact, {}) is None
        assert list(tmp_path.iterdir()) == []


def test_reports(model: DenseDetector, scoring: Scoring, tmp_path: Path) -> None:
    artefact = broken(model, lambda copy: copy.get_parameter("bbox_head.tood_cls.bias").add_(1.0))
    result = run(
        model, artefact, scoring, settings=Settings(IMGSZ, sizes_hw=((64, 64),), net_hw=(128, 128))
    )
    settings = Settings(IMGSZ)
    description = describe(result, compared(model), open_image_set(None, None, IMGSZ, 2), settings)
    write_reports(
        tmp_path, [result, result], [description, description], {"command": "tood-bench parity"}
    )
    text, page = (tmp_path / "parity.md").read_text(), (tmp_path / "parity.html").read_text()
    for word in (
        "FAILED at the stage head",
        "| pixels |",
        "| head: boxes |",
        "padded to 128x128",
        "64 x 64",
        "| a |",
    ):
        assert word in text
    assert page.count("<img ") >= 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    values = json.loads((tmp_path / "parity.json").read_text())
    assert values["models"]["broken.pth"]["failing_stage"] == "head"


class TestBadInput:
    def test_another_number_of_classes(self, model: DenseDetector) -> None:
        other = compared(build_model(replace(model.preset, class_names=("a", "b"))), "two.onnx")
        with pytest.raises(ToodError, match=r"two.onnx: has 2 classes, the reference model.pth 3"):
            check_models(compared(model), [other])

    def test_other_names(self, model: DenseDetector) -> None:
        other = compared(build_model(replace(model.preset, class_names=("a", "x", "c"))), "x.onnx")
        with pytest.raises(ToodError, match=r"'x' where the reference model.pth has 'b'"):
            check_models(compared(model), [other])

    @pytest.mark.parametrize(
        "values", [{"min_matched": 1.5}, {"max_score": -1}, {"max_ap_drop": float("nan")}]
    )
    def test_senseless_limits(self, values: dict[str, Any]) -> None:
        with pytest.raises(ToodError, match="expected a number"):
            OwnLimits(**values)

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int8, bf16"])
    def test_own_limits_take_the_place_of_every_precision_s(self, precision: str) -> None:
        own = OwnLimits(max_map=0.5, max_ap_drop=7)
        assert check_for(precision, own).limits.ap_drop == 7
        assert own.stage_limits(precision).max_map == 0.5

    def test_stages_of_a_model_that_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from inference.fakes import RedEngine

        from tood_deploy.benchmark.parity import stage_runners as runners

        monkeypatch.setattr(runners, "open_engine", lambda *_, **__: RedEngine())
        assert not open_compared(
            "m.plan", device="cpu", threads=None, stages=None
        ).runner.has_stages
        with pytest.raises(ToodError, match="leave --stages out"):
            open_compared("m.plan", device="cpu", threads=None, stages=True)
