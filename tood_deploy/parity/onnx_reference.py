"""An .onnx artefact in ONNX Runtime: what is compared, or what others are compared with.

A graph comes in; its maps and detections, and the float32 noise of every map, go out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from tood_deploy.errors import ArtefactError
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS, graph_feeds
from tood_deploy.onnx_file import (
    OnnxArtefact,
    first_line,
    needs_float_arithmetic,
    open_session,
    run_session,
    with_outputs,
)
from tood_deploy.parity.reference import (
    INVERSION_EDGE,
    ROUNDING,
    Conditioning,
    Outputs,
    Reference,
    collect_noise,
)

SAMPLES = 4  # copies of the graph that its noise is measured with


class OnnxRunner:
    """An .onnx artefact in ONNX Runtime on the CPU; a `Runner`.

    Attributes:
        outputs: names of what a call returns, in order.
        name: runtime, version and device.
    """

    def __init__(
        self, artefact: Path | onnx.ModelProto, *, maps: bool = True, further: tuple[str, ...] = ()
    ) -> None:
        """Open the artefact.

        What is quantised for TensorRT is computed in float32, see `needs_float_arithmetic`; then
        the name says so.

        Args:
            artefact: a file, or a graph in memory.
            maps: whether the maps of all stages are added as outputs, in memory.
            further: names of further inner values that are added after the maps.

        Raises:
            ArtefactError: the graph does not hold the maps, or ONNX Runtime cannot open it.
        """
        model = artefact if isinstance(artefact, onnx.ModelProto) else onnx.load(artefact)
        added = (*(MAP_NAMES if maps else ()), *further)
        self.outputs = (*OUTPUTS, *added)
        in_float = needs_float_arithmetic(model)
        graph = with_outputs(model, added).SerializeToString()
        try:
            self.session = open_session(graph, float_arithmetic=in_float)
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise ArtefactError(
                f"ONNX Runtime {ort.__version__} cannot open the graph ({first_line(error)}); "
                "export the model again"
            ) from error
        arithmetic = " (8-bit layers in float32 arithmetic)" if in_float else ""
        self.name = f"ONNX Runtime {ort.__version__}{arithmetic}, CPU"

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """Run a batch, see `Runner`."""
        feeds = graph_feeds(images, valid_hw, score_threshold, iou_threshold)
        return run_session(self.session, self.outputs, feeds)


def onnx_reference(artefact: OnnxArtefact) -> Reference:
    """Return an .onnx artefact, proven equal to its network when it was made, as a reference."""
    run = OnnxRunner(artefact.model)
    run.name = f"{artefact.path.name} in {run.name}"
    preset = artefact.manifest.preset
    noise = OnnxConditioning(artefact.model)
    return Reference(run, preset.sizing, noise, preset.iou_threshold)


class OnnxConditioning:
    """Measures the float32 noise of a graph without its network, in ONNX Runtime.

    It runs copies whose weights are a rounding off. ONNX Runtime has no float64 convolution, so the
    graph itself stands for the exact numbers; its own noise is part of what is measured.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Keep the graph; nothing runs yet."""
        self.aligned = _values_before_restoring(model)
        self.model = model

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Conditioning:
        """Measure it on a batch; takes what `Runner` takes."""
        inputs = images, valid_hw, score_threshold, iou_threshold
        count = len(OUTPUTS) + len(MAP_NAMES)
        plain = OnnxRunner(self.model, further=self.aligned)(*inputs)
        excluded: list[NDArray[np.bool_] | None] = [None] * len(MAP_NAMES)
        for number, aligned in enumerate(plain[count:], len(MAP_NAMES) - len(self.aligned)):
            sides = (aligned[:, 2:] - aligned[:, :2]).min(axis=1, keepdims=True)
            excluded[number] = np.broadcast_to(np.abs(sides) < INVERSION_EDGE, aligned.shape)
        exact = [values.astype(np.float64) for values in plain[len(OUTPUTS) : count]]
        runs = (OnnxRunner(_rounded_weights(self.model, seed))(*inputs) for seed in range(SAMPLES))
        return collect_noise(
            exact, excluded, ((run[: len(OUTPUTS)], run[len(OUTPUTS) :]) for run in runs)
        )


def _values_before_restoring(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the aligned boxes of every level, before inverted ones are restored.

    Empty where the graph keeps boxes inverted.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    last = [makers[name] for name in MAP_NAMES if name.startswith("head_boxes")]
    restores = all(node.op_type == "Where" for node in last)
    return tuple(node.input[2] for node in last) if restores else ()


def _rounded_weights(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Return a copy whose float32 weights are each up to one rounding off."""
    generator = np.random.default_rng(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            noise = generator.uniform(-ROUNDING, ROUNDING, values.shape)
            rounded = (values * (1 + noise)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return copy
