"""The verdict on an artefact: sound ones pass on every size, broken ones are caught and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_edits import all_nodes, edit_weight, maker
from recording import RecordingReporter

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS
from tood_deploy.parity import verify as module
from tood_deploy.parity.detection_verdict import MIN_DETECTIONS
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.parity.reference import Conditioning, Outputs, Reference, deviation_of
from tood_deploy.parity.tolerances import DetectionLimits
from tood_deploy.parity.verify import verify_detections, verify_float32
from tood_deploy.presets import Sizing

HEAD, PYRAMID, BACKBONE = (
    "detector.model.bbox_head",
    "detector.model.neck",
    "detector.model.backbone",
)
LIMITS = DetectionLimits(lost=0.05, added=0.05, score=0.1, iou=0.75, ap_drop=0.5)
Sabotage = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def reference(tiny_reference: Reference) -> Reference:
    return tiny_reference


@pytest.fixture(scope="module")
def graph(tiny_artefact: Path) -> onnx.ModelProto:
    return onnx.load(tiny_artefact)


@pytest.fixture(scope="module")
def run(graph: onnx.ModelProto) -> OnnxRunner:
    return OnnxRunner(graph)


class Changed:
    """An artefact whose outputs are changed on the way."""

    name = "changed"

    def __init__(self, run: Any, change: Callable[[Outputs], Any]) -> None:
        self.run, self.change = run, change

    def __call__(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> Outputs:
        outputs = [
            np.array(each) for each in self.run(images, valid_hw, score_threshold, iou_threshold)
        ]
        self.change(outputs)
        return outputs


def set_group_norms(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    """Changes an attribute of all group norms of the head."""
    norms = [node for node in model.graph.node if node.op_type == "GroupNormalization"]
    assert len(norms) == 8 * 5
    for node in norms:
        old = next(attribute for attribute in node.attribute if attribute.name == name)
        new = helper.make_attribute(name, change(helper.get_attribute_value(old)))
        node.attribute.remove(old)
        node.attribute.append(new)


def add_after(model: onnx.ModelProto, value: str, operator: str, constant: Any) -> None:
    """Sends a value through one more operator before anyone reads it."""
    name = f"{value}_constant"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(constant), name))
    for position, node in enumerate(model.graph.node):
        if value in node.output:
            node.output[list(node.output).index(value)] = f"{value}_before"
            model.graph.node.insert(
                position + 1, helper.make_node(operator, [f"{value}_before", name], [value])
            )
            return
    raise AssertionError(value)


def tower_weight_off_by_one_per_cent(model: onnx.ModelProto) -> None:
    """One of 36,864 numbers."""

    def edit(weight: np.ndarray) -> None:
        weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= 1.01

    edit_weight(model, f"{HEAD}.inter_convs.3.conv.weight", edit)


def half_as_many_groups(model: onnx.ModelProto) -> None:
    set_group_norms(model, "num_groups", lambda groups: groups // 2)


def tenfold_epsilon(model: onnx.ModelProto) -> None:
    set_group_norms(model, "epsilon", lambda epsilon: 10 * epsilon)


def two_channels_swapped(model: onnx.ModelProto) -> None:
    edit_weight(
        model,
        f"{PYRAMID}.lateral_convs.1.conv.weight",
        lambda weight: weight.__setitem__([3, 4], weight[[4, 3]]),
    )


def half_cell_shift(model: onnx.ModelProto) -> None:
    """Anchor points in the middle of their cells, as other detectors have them."""
    for level in range(3, 8):
        add_after(model, maker(model, f"head_boxes_p{level}").input[1], "Add", np.float32(0.5))


def stale_constant(model: onnx.ModelProto) -> None:
    """The enlargement of P5 to the size that P4 has in the landscape alone: 8 rows, 12 columns."""
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    model.graph.initializer.append(numpy_helper.from_array(np.array([8, 12], np.int64), "stale_hw"))
    maker(model, resize.input[3]).input[1] = "stale_hw"


def pooled_mean_off_by_one_per_cent(model: onnx.ModelProto) -> None:
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    add_after(model, mean.output[0], "Mul", np.float32(1.01))


def smaller_threshold(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.3, np.float32), "smaller"))
    for node in all_nodes(model.graph):
        for position, name in enumerate(node.input):
            if name == "iou_threshold":
                node.input[position] = "smaller"


class TestFloat32:
    def test_a_sound_artefact_passes_and_says_how_near_it_is(
        self, reference: Reference, run: OnnxRunner
    ) -> None:
        reporter = RecordingReporter()
        parity: Any = verify_float32(reference, run, reporter=reporter).to_dict()
        assert len(reporter.lines) == len(module.SIZES_HW)
        assert set(parity["maps"]) == set(MAP_NAMES)
        ratios = [each["rms_ratio"] for name, each in parity["maps"].items() if name != "pixels"]
        assert 0.01 < min(ratios) <= max(ratios) <= parity["limits"]["rms_of_few"]
        assert parity["detections"]["reference"] > 200
        assert parity["detections"]["matched"] == parity["detections"]["reference"]
        assert parity["images"] == 2 * len(module.SIZES_HW)

    @pytest.mark.parametrize(
        ("sabotage", "stage"),
        [
            (tower_weight_off_by_one_per_cent, "head"),
            (half_as_many_groups, "head"),
            (tenfold_epsilon, "head"),
            (two_channels_swapped, "pyramid"),
            (half_cell_shift, "head"),
            (pooled_mean_off_by_one_per_cent, "head"),
            (smaller_threshold, "detections"),
        ],
    )
    def test_what_is_broken_is_caught_and_the_stage_named(
        self, sabotage: Sabotage, stage: str, reference: Reference, graph: onnx.ModelProto
    ) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(graph)
        sabotage(broken)
        with pytest.raises(
            CheckFailed, match=rf"not equal to its reference, PyTorch .*?: {stage}: "
        ):
            verify_float32(reference, OnnxRunner(broken))

    def test_a_constant_of_one_size_is_caught_at_another(
        self, reference: Reference, graph: onnx.ModelProto
    ) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(graph)
        stale_constant(broken)
        runner = OnnxRunner(broken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SIZES_HW", {"landscape": module.SIZES_HW["landscape"]})
            verify_float32(reference, runner)
        with pytest.raises(CheckFailed, match=r"192.128"):
            verify_float32(reference, runner)

    def test_numbers_that_are_none_are_caught(self, reference: Reference, run: OnnxRunner) -> None:
        with pytest.raises(CheckFailed, match="backbone: c4 of images"):
            verify_float32(
                reference,
                Changed(run, lambda outputs: outputs[len(OUTPUTS) + 2].__setitem__(0, np.nan)),
            )

    def test_one_slot_of_a_batch_that_differs_is_caught(
        self, reference: Reference, run: OnnxRunner
    ) -> None:
        def later_slots(outputs: Outputs) -> None:
            if len(outputs[0]) == module.BATCH:
                outputs[2][1:] *= np.float32(0.9)

        with pytest.raises(CheckFailed, match="batch slots: "):
            verify_float32(reference, Changed(run, later_slots))

    def test_maps_that_say_nothing_are_named_and_left_to_the_detections(
        self, reference: Reference, run: OnnxRunner
    ) -> None:
        """At 64 x 64 a group norm of the two top levels sees two numbers."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SIZES_HW", {"smallest": (64, 64)})
            found: Any = verify_float32(reference, run).details
            assert all(
                "head" in name and name.endswith("of 64x64") for name in found["ill_conditioned"]
            )

            def noisy(*inputs: Any) -> Conditioning:
                noise = reference.measure(*inputs)
                last = replace(noise.maps[-1], rms=noise.maps[-1].spread)
                return replace(noise, maps=(*noise.maps[:-1], last))

            parity: Any = verify_float32(
                replace(reference, measure=noisy),
                Changed(run, lambda outputs: outputs[-1].__iadd__(0.1)),
            ).details
        assert "head_boxes_p7 of 64x64" in parity["ill_conditioned"]

    def test_own_images_take_part(self, reference: Reference, run: OnnxRunner) -> None:
        images = [synthetic_image(50, 90, 1), synthetic_image(200, 40, 2)]
        small = replace(reference, sizing=Sizing((96, 128)))
        assert verify_float32(small, run, images=images).images == 2 * len(module.SIZES_HW) + 2


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [synthetic_image(90, 120, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def small(reference: Reference) -> Reference:
    return replace(reference, sizing=Sizing((96, 128)))


class TestDetections:
    def test_what_is_kept_is_counted_both_ways(
        self, small: Reference, run: OnnxRunner, images: list[np.ndarray]
    ) -> None:
        verdict = verify_detections(small, run, images, LIMITS, measure_ap=lambda: (50.0, 49.75))
        parity: Any = verdict.to_dict()
        assert (parity["lost"], parity["added"], parity["images"]) == (0, 0, 3)
        assert parity["reference_detections"] >= MIN_DETECTIONS
        assert (
            abs(parity["reference_detections"] - parity["artefact_detections"]) <= 1
        )  # whose score is the threshold, but for a rounding
        assert parity["ap"] == {"reference": 50.0, "artefact": 49.75, "drop": 0.25}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda outputs: outputs[1].__imul__(2), " lost "),
            (lambda outputs: outputs[3].__iadd__(1), " lost "),
            (lambda outputs: outputs[2].__isub__(0.2), " lost "),
            (lambda outputs: outputs[0].__ifloordiv__(2), " lost "),
            (lambda outputs: outputs[2][1:].__imul__(0.1), "depend on the batch slot"),
        ],
    )
    def test_what_a_user_would_see_is_refused(
        self,
        change: Callable[[Outputs], Any],
        message: str,
        small: Reference,
        run: OnnxRunner,
        images: list[np.ndarray],
    ) -> None:
        limits = replace(LIMITS, score=0.01)
        with pytest.raises(CheckFailed, match=message):
            verify_detections(small, Changed(run, change), images, limits)

    def test_what_only_the_artefact_finds_is_refused(
        self, small: Reference, run: OnnxRunner, images: list[np.ndarray]
    ) -> None:
        with pytest.raises(CheckFailed, match=" added "):
            verify_detections(
                replace(small, run=Changed(run, _without_the_best)), run, images, LIMITS
            )

    def test_a_drop_in_ap_is_refused(
        self, small: Reference, run: OnnxRunner, images: list[np.ndarray]
    ) -> None:
        with pytest.raises(CheckFailed, match=r"AP: drops by 1\.00 points, at most 0\.5"):
            verify_detections(small, run, images, LIMITS, measure_ap=lambda: (50.0, 49.0))

    def test_nothing_to_see_is_an_error(
        self, small: Reference, run: OnnxRunner, images: list[np.ndarray]
    ) -> None:
        with pytest.raises(ToodError, match="--verify-images"):
            verify_detections(small, run, [], LIMITS)
        blind = Changed(run, lambda outputs: outputs[0].__imul__(0))
        with pytest.raises(ToodError, match="nothing is found"):
            verify_detections(replace(small, run=blind), run, images, LIMITS)


def _without_the_best(outputs: Outputs) -> None:
    for values in outputs[1:4]:
        values[:, :-5] = values[:, 5:].copy()
    outputs[0] -= 5


class TestDeviation:
    def test_shapes_and_numbers(self) -> None:
        exact = np.zeros((1, 1, 2, 2))
        assert deviation_of(np.ones((1, 1, 2, 2), np.float32), exact, None) == (1, 1)
        assert deviation_of(np.ones((1, 1, 2, 1), np.float32), exact, None) == (np.inf, np.inf)
        assert deviation_of(np.full((1, 1, 2, 2), np.nan, np.float32), exact, None) == (
            np.inf,
            np.inf,
        )

    def test_what_is_excluded_does_not_count(self) -> None:
        exact, values = np.zeros((1, 1, 1, 4)), np.array([[[[0, 3, 0, 0]]]], np.float32)
        assert deviation_of(values, exact, np.array([[[[False, True, False, False]]]])) == (0, 0)
        assert deviation_of(values, exact, None) == (1.5, 3)
