"""The exported graph in the form that servers batch: thresholds have a batch axis, one of each for every image.

A server that joins requests to batches wants every input to have that axis, and so two clients may ask for different thresholds
within one batch. Nothing else changes; `check_serving_form` runs both graphs and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import CheckFailed
from tood_deploy.export.precision.half import emulate_low_precision
from tood_deploy.manifest import INPUTS, OUTPUTS
from tood_deploy.onnx_file import open_session

SCORE, IOU = INPUTS[2:]
PAIRS = f"{IOU}_of_pairs"  # (B, 1, 1), to be compared with the overlap of each two boxes of a image
CHECK_HW, CHECK_VALID_HW = (96, 160), (90, 150)
CHECK_THRESHOLDS = ((0.05, 0.6), (0.2, 0.3), (0.0, 0.9))  # a image each


def serving_form(shipped: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a shipped graph whose `score_threshold` and `iou_threshold` are (B, 1)."""
    model = onnx.ModelProto()
    model.CopyFrom(shipped)
    inputs = {value.name: value for value in model.graph.input}
    batch = inputs["images"].type.tensor_type.shape.dim[0]
    for name in (SCORE, IOU):
        shape = inputs[name].type.tensor_type.shape
        shape.dim.add().CopyFrom(batch)
        shape.dim.add().dim_value = 1
    for node in _nodes(model.graph):
        for i, name in enumerate(node.input):
            if name == IOU:
                node.input[i] = PAIRS
    axis = onnx.numpy_helper.from_array(np.array([2], np.int64), f"{PAIRS}_axis")
    model.graph.initializer.append(axis)
    model.graph.node.insert(
        0, onnx.helper.make_node("Unsqueeze", [IOU, axis.name], [PAIRS], name=f"node_{PAIRS}")
    )
    return model


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, those in the bodies of loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def check_serving_form(shipped: onnx.ModelProto, serving: onnx.ModelProto, precision: str) -> int:
    """Runs both in ONNX Runtime on a batch whose images have different thresholds.

    Args:
        shipped: the graph with one threshold for all.
        serving: its serving form.
        precision: of both. ONNX Runtime lacks bf16 on the CPU, so such graphs are emulated.

    Returns:
        How many detections were compared.

    Raises:
        CheckFailed: a image's detections are not, to the bit, those that the shipped graph gives with its thresholds.
    """
    height, width = CHECK_VALID_HW
    images = np.zeros((len(CHECK_THRESHOLDS), *CHECK_HW, 3), np.uint8)
    images[:, :height, :width] = [
        synthetic_image(height, width, seed) for seed in range(len(images))
    ]
    feeds = {"images": images, "valid_hw": np.array([CHECK_VALID_HW] * len(images), np.int32)}
    scores, ious = np.array(CHECK_THRESHOLDS, np.float32).T[:, :, None]
    found = _run(serving, precision, [feeds | {SCORE: scores, IOU: ious}])[0]
    one_each = [
        feeds | {SCORE: np.array(score, np.float32), IOU: np.array(iou, np.float32)}
        for score, iou in CHECK_THRESHOLDS
    ]
    for i, expected in enumerate(_run(shipped, precision, one_each)):
        if not all(
            np.array_equal(one[i], other[i]) for one, other in zip(expected, found, strict=True)
        ):
            raise CheckFailed(
                f"the serving form does not give what the graph gives with the thresholds {CHECK_THRESHOLDS[i]}"
            )
    return int(found[0].sum())


def _run(
    model: onnx.ModelProto, precision: str, feeds: list[dict[str, NDArray]]
) -> list[list[NDArray]]:
    runnable = emulate_low_precision(model) if precision == "bf16" else model
    session = open_session(runnable.SerializeToString())
    found: Any = [session.run(list(OUTPUTS), feed) for feed in feeds]
    return found
