"""Suppression without a loop in exported graphs: to the bit what the loop gives, or -1 as count;
never anything else."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from export.small_graph import save_small
from manifest_values import plain
from model.crowds import Boxes, chain, crowd
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.base import BatchDetections
from tood_deploy.engines.tensorrt.repair import BatchCandidates, finish_exactly
from tood_deploy.errors import ArtefactError
from tood_deploy.export.precision.half import emulate_low_precision, lower_precision
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.export.tensorrt.unroll_nms import unroll_nms
from tood_deploy.export.triton.repository import serving_form
from tood_deploy.graph_io import CANDIDATES, OUTPUTS, STAGE_VALUES
from tood_deploy.manifest_sections import Serving
from tood_deploy.model.nms import ROUNDS
from tood_deploy.onnx_file import OnnxArtefact, read_onnx

NET_HW = (96, 128)
Found = list[NDArray[Any]]


@pytest.fixture(scope="module")
def loop(tiny_artefact: Path) -> OnnxArtefact:
    return read_onnx(tiny_artefact)


@pytest.fixture(scope="module")
def unrolled(loop: OnnxArtefact) -> OnnxArtefact:
    return unroll_nms(loop)


def opened(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(
    model: onnx.ModelProto, score: Any = 0.05, iou: Any = 0.6, outputs: Sequence[str] = OUTPUTS
) -> Found:
    """Detections in three images, of which two are partly padding."""
    images = np.stack([synthetic_image(*NET_HW, seed) for seed in range(3)])
    valid_hw = np.array([NET_HW, (60, 128), (90, 31)], np.int32)
    feeds = {
        "images": images,
        "valid_hw": valid_hw,
        "score_threshold": np.array(score, np.float32),
        "iou_threshold": np.array(iou, np.float32),
    }
    return list(opened(model).run(list(outputs), feeds))  # pyright: ignore[reportReturnType] - dense tensors


class Tail:
    """The part of a graph from the candidates on."""

    def __init__(self, artefact: OnnxArtefact) -> None:
        graph = ir.from_proto(artefact.model).graph
        self.inputs = (
            *STAGE_VALUES["candidates"],
            "iou_threshold",
            "images",
        )  # the last for the batch alone
        part = ir.convenience.extract(graph, inputs=self.inputs, outputs=OUTPUTS)
        types = (
            (ir.DataType.FLOAT, ("batch", 3840, 4)),
            (ir.DataType.FLOAT, ("batch", 3840)),
            (ir.DataType.INT64, ("batch", 3840)),
        )
        for value, (dtype, shape) in zip(part.inputs, types, strict=False):
            value.dtype, value.shape = dtype, ir.Shape(shape)
        self.session = opened(ir.to_proto(ir.Model(part, ir_version=artefact.model.ir_version)))

    def __call__(self, candidates: Boxes, iou: float = 0.6) -> Found:
        """Detections among fewer candidates than the graph has."""
        spare = 3840 - candidates[1].shape[1]
        arrays = [
            np.pad(part.numpy(), ((0, 0), (0, spare), (0, 0))[: part.dim()]) for part in candidates
        ]
        images = np.zeros((len(arrays[0]), 32, 32, 3), np.uint8)
        feeds = dict(zip(self.inputs, (*arrays, np.array(iou, np.float32), images), strict=True))
        return list(self.session.run(list(OUTPUTS), feeds))  # pyright: ignore[reportReturnType] - dense tensors


@pytest.fixture(scope="module")
def tails(loop: OnnxArtefact, unrolled: OnnxArtefact) -> tuple[Tail, Tail]:
    return Tail(loop), Tail(unrolled)


def assert_same(found: Found, expected: Found) -> None:
    for name, one, other in zip(OUTPUTS, found, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name, strict=True)


class TestEqualsTheLoop:
    @pytest.mark.parametrize("iou", [0.3, 0.6])
    @pytest.mark.parametrize(("classes", "spread"), [(1, 200.0), (80, 800.0)])
    def test_on_crowds(
        self, classes: int, spread: float, iou: float, tails: tuple[Tail, Tail]
    ) -> None:
        candidates = crowd(3, 3, 3840, classes, spread, empty=0.2)
        with_loop, without = (tail(candidates, iou) for tail in tails)
        assert with_loop[0].min() > 20
        assert_same(without, with_loop)

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_on_hardly_any_candidates(self, count: int, tails: tuple[Tail, Tail]) -> None:
        candidates = crowd(5, 1, count, 1, 1000.0)
        with_loop, without = (tail(candidates) for tail in tails)
        assert with_loop[0].tolist() == [count]
        assert_same(without, with_loop)

    def test_on_images(self, loop: OnnxArtefact, unrolled: OnnxArtefact) -> None:
        expected = run(loop.model)
        assert expected[0].min() > 0
        assert_same(run(unrolled.model), expected)
        onnx.checker.check_model(unrolled.model, full_check=True)

    @pytest.mark.parametrize(
        "precision",
        ["fp16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "int8"))],
    )
    def test_in_lower_precision(
        self, precision: Literal["fp16", "bf16", "int8"], loop: OnnxArtefact
    ) -> None:
        model = loop.model
        if precision == "int8":
            model = quantize(
                model, dict.fromkeys(calibrated_values(model), (-4.0, 4.0)), scheme="s8s8"
            )
        model, _ = lower_precision(model, "bf16" if precision == "bf16" else "fp16")
        lowered = unroll_nms(replace(loop, model=model)).model
        if precision == "bf16":
            model, lowered = (emulate_low_precision(each) for each in (model, lowered))
        expected = run(model, score=0.0)
        assert expected[0].min() > 0
        assert_same(run(lowered, score=0.0), expected)

    def test_with_thresholds_for_each_image(self, loop: OnnxArtefact) -> None:
        model, column = serving_form(loop.model), lambda *values: np.array(values).reshape(3, 1)
        thresholds = column(0.05, 0.0, 0.1), column(0.6, 0.3, 0.8)
        assert_same(
            run(unroll_nms(replace(loop, model=model)).model, *thresholds), run(model, *thresholds)
        )


@pytest.fixture(scope="module")
def chained() -> Boxes:
    """Two images: a chain of 40 boxes that each cover the next, and the first three of it."""
    boxes, scores, labels = (part.repeat(2, *[1] * (part.dim() - 1)) for part in chain(40))
    scores[1, 3:] = 0
    return boxes, scores, labels


class TestTooFewRounds:
    def test_the_count_is_minus_one_and_there_are_no_detections(
        self, chained: Boxes, tails: tuple[Tail, Tail]
    ) -> None:
        with_loop, without = (tail(chained, 0.3) for tail in tails)
        assert with_loop[0].tolist() == [20, 2]
        assert without[0].tolist() == [-1, 2]
        assert not any(rows[0].any() for rows in without[1:])
        assert_same([rows[1:] for rows in without], [rows[1:] for rows in with_loop])

    @pytest.mark.slow
    def test_more_rounds_are_enough(
        self, chained: Boxes, loop: OnnxArtefact, tails: tuple[Tail, Tail]
    ) -> None:
        artefact = unroll_nms(loop, 41)
        assert plain(artefact.manifest)["options"]["nms_rounds"] == 41
        assert_same(Tail(artefact)(chained, 0.3), tails[0](chained, 0.3))


class TestCandidates:
    """The graph gives what its suppression reads, for images that need more."""

    def test_the_cpu_finds_what_one_round_does_not(self, loop: OnnxArtefact) -> None:
        model = unroll_nms(loop, 1).model
        assert [value.name for value in model.graph.output] == [*OUTPUTS, *CANDIDATES]
        results = run(model, outputs=(*OUTPUTS, *CANDIDATES))
        detections = BatchDetections(*results[:4])
        assert (detections.num_dets == -1).any()
        candidates = BatchCandidates(*results[4:])
        finished = finish_exactly(detections, candidates, 0.6, voting=False)
        assert_same(list(vars(finished).values()), run(loop.model))

    def test_a_graph_for_a_server_gives_none_and_looks_at_all(self, loop: OnnxArtefact) -> None:
        build = replace(loop.manifest.build, serving=Serving("0" * 64, 1))
        served = replace(loop, manifest=replace(loop.manifest, build=build))
        model = unroll_nms(served).model
        assert [value.name for value in model.graph.output] == list(OUTPUTS)
        products, fewer = (
            sum(node.op_type == "MatMul" for node in graph.node)
            for graph in (model.graph, unroll_nms(loop).model.graph)
        )
        assert products - fewer == 2 * ROUNDS


class TestGraph:
    def test_holds_no_loop(self, loop: OnnxArtefact, unrolled: OnnxArtefact) -> None:
        kinds = [
            {node.op_type for node in artefact.model.graph.node} for artefact in (loop, unrolled)
        ]
        assert {"Loop"} & kinds[0]
        assert not {"Loop", "Scan", "If", "ScatterElements", "NonZero"} & kinds[1]

    def test_its_manifest_says_the_rounds_and_the_file_is_as_it_was(
        self, loop: OnnxArtefact, unrolled: OnnxArtefact
    ) -> None:
        assert unrolled.manifest.build == replace(loop.manifest.build, nms_rounds=ROUNDS)
        assert (unrolled.path, unrolled.sha256) == (loop.path, loop.sha256)
        assert read_onnx(loop.path).model == loop.model

    def test_a_graph_without_suppression_is_refused(self, tmp_path: Path) -> None:
        artefact = read_onnx(save_small(tmp_path / "a.onnx"))
        with pytest.raises(
            ArtefactError,
            match=r"a\.onnx: the graph holds suppression .* 0 times, expected once; .*--nms loop",
        ):
            unroll_nms(artefact)

    def test_a_graph_with_two_is_refused(self, loop: OnnxArtefact) -> None:
        model = onnx.ModelProto.FromString(loop.model.SerializeToString())
        (node,) = (node for node in model.graph.node if node.op_type == "Loop")
        twin = model.graph.node.add()
        twin.CopyFrom(node)
        twin.name = "twin"
        for place, name in enumerate(twin.output):
            twin.output[place] = f"{name}_twin"
        with pytest.raises(ArtefactError, match="2 times, expected once"):
            unroll_nms(replace(loop, model=model))
