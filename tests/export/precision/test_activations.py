"""Inner values of a graph, image by image: the same numbers as from the whole graph at once, and
not all at the same time."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tood_deploy.errors import ArtefactError
from tood_deploy.export.precision.activations import (
    IOU_THRESHOLD,
    SCORE_THRESHOLD,
    ActivationReader,
)
from tood_deploy.graph_io import HEAD_OUTPUTS
from tood_deploy.onnx_file import with_outputs

SIZE_HW = (64, 96)


@pytest.fixture(scope="module")
def names(model: onnx.ModelProto) -> list[str]:
    """Values from all over the network, and what the loop of suppression gives; not in the graph's
    order.

    None from behind the first sorting, where two numbers that are nearly equal may change places.
    """
    first = next(i for i, node in enumerate(model.graph.node) if node.op_type == "TopK")
    made = [name for node in model.graph.node[:first] for name in node.output if name]
    return sorted({*made[::27], *HEAD_OUTPUTS, "num_dets"}, key=lambda name: name[::-1])


@pytest.fixture(scope="module")
def expected(model: onnx.ModelProto, names: list[str], synth_image_bgr: Any) -> list[Any]:
    """What the whole graph gives for `names`."""
    image = synth_image_bgr(*SIZE_HW)
    thresholds = {
        "score_threshold": np.array(SCORE_THRESHOLD, np.float32),
        "iou_threshold": np.array(IOU_THRESHOLD, np.float32),
    }
    outside = [name for name in names if name != "num_dets"]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        with_outputs(model, outside).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    feeds = {"images": image[None], "valid_hw": np.array([[60, 90]], np.int32), **thresholds}
    return list(session.run(names, feeds))


@pytest.mark.parametrize("together", [1, 7, 10_000])
def test_equal_to_the_whole_graph(
    model: onnx.ModelProto,
    names: list[str],
    expected: list[Any],
    synth_image_bgr: Any,
    together: int,
) -> None:
    reader = ActivationReader(model, names, threads=1, together=together)
    read, largest = {}, 0
    for values in reader.read(synth_image_bgr(*SIZE_HW), (60, 90)):
        assert read.keys().isdisjoint(values)
        largest = max(largest, len(values))
        read.update(values)
    assert largest <= together
    assert read.keys() == set(names)
    for name, array in zip(names, expected, strict=True):
        # A group norm over a map of one cell has two values: float32 itself decides what they are.
        if array.shape[2:] == (1, 1):
            continue
        np.testing.assert_allclose(read[name], array, rtol=1e-3, atol=1e-3, err_msg=name)


def test_nothing_is_computed_beyond_the_last_wanted_value(
    model: onnx.ModelProto, synth_image_bgr: Any
) -> None:
    reader = ActivationReader(model, ["c3"], threads=1)
    (segment,) = reader._segments
    assert segment.reads == ("images", "valid_hw")
    (values,) = reader.read(synth_image_bgr(*SIZE_HW), SIZE_HW)
    assert values["c3"].shape[2:] == (8, 12)


def test_bad_input(model: onnx.ModelProto) -> None:
    with pytest.raises(ArtefactError, match="makes no values conv_of_another_graph"):
        ActivationReader(model, ["c3", "conv_of_another_graph"])
