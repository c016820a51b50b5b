"""The form of the graph that servers batch gives what the shipped graph gives, image by image."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import CheckFailed
from tood_deploy.export.triton.repository import check_serving_form, serving_form
from tood_deploy.graph_io import INPUTS, OUTPUTS


@pytest.fixture(scope="module")
def shipped(tiny_artefact: Path) -> onnx.ModelProto:
    return onnx.load(tiny_artefact)


@pytest.fixture(scope="module")
def sessions(shipped: onnx.ModelProto) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    shipped_session, serving_session = (
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for model in (shipped, serving_form(shipped))
    )
    return shipped_session, serving_session


def shape_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_every_input_and_output_has_the_batch_axis(shipped: onnx.ModelProto) -> None:
    before = shipped.SerializeToString()
    serving = serving_form(shipped)
    assert shipped.SerializeToString() == before
    onnx.checker.check_model(serving, full_check=True)
    assert [value.name for value in serving.graph.input] == list(INPUTS)
    assert [value.name for value in serving.graph.output] == list(OUTPUTS)
    batch = shape_of(serving.graph.input[0])[0]
    assert isinstance(batch, str)
    assert all(
        shape_of(value)[0] == batch for value in (*serving.graph.input, *serving.graph.output)
    )
    assert [shape_of(value)[1:] for value in serving.graph.input[2:]] == [[1], [1]]


@pytest.mark.parametrize("size_hw", [(64, 64), (96, 160), (224, 96)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_the_shipped_graph_in_batches(
    sessions: tuple[ort.InferenceSession, ort.InferenceSession],
    size_hw: tuple[int, int],
    batch: int,
) -> None:
    """Each image has thresholds of its own; the shipped graph runs the same batch once with each."""
    shipped, serving = sessions
    height, width = size_hw
    images = np.stack([synthetic_image(height, width, seed) for seed in range(batch)])
    feeds = {"images": images, "valid_hw": np.array([[height - 7, width - 3]] * batch, np.int32)}
    scores = np.linspace(0.0, 0.3, batch, dtype=np.float32)
    ious = np.linspace(0.8, 0.2, batch, dtype=np.float32)
    found = run(
        serving, feeds | {"score_threshold": scores[:, None], "iou_threshold": ious[:, None]}
    )
    assert found[0].shape == (batch,)
    assert found[0][0] > 0
    for i in range(batch):
        expected = run(
            shipped,
            feeds
            | {
                "score_threshold": scores[i : i + 1].reshape(()),
                "iou_threshold": ious[i : i + 1].reshape(()),
            },
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one[i], other[i])


def run(session: ort.InferenceSession, feeds: dict[str, NDArray]) -> list[NDArray]:
    found: list[NDArray] = session.run(list(OUTPUTS), feeds)  # pyright: ignore[reportAssignmentType] - no sparse tensors among them
    return found


def test_check_passes_on_the_true_form(shipped: onnx.ModelProto) -> None:
    assert check_serving_form(shipped, serving_form(shipped), "fp32") > 100


def test_check_finds_another_graph(shipped: onnx.ModelProto) -> None:
    """As if every image had the thresholds of the first."""
    serving = serving_form(shipped)
    for node in serving.graph.node:
        if node.op_type == "Greater" and "score_threshold" in node.input:
            node.input[:] = [
                name if name != "score_threshold" else "first_threshold" for name in node.input
            ]
            break
    serving.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "first"))
    serving.graph.node.insert(
        0, onnx.helper.make_node("Gather", ["score_threshold", "first"], ["first_threshold"])
    )
    with pytest.raises(CheckFailed, match="does not give what the graph gives with the thresholds"):
        check_serving_form(shipped, serving, "fp32")
