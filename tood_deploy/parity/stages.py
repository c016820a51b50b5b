"""The stages of a detector, from padded images to detections, and the one face of whatever runs them.

A runner runs all stages at once, as deployed, or one alone from given values: so the deviation of a stage can be told apart from what
it was handed. Knows no runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from tood_deploy.graph_io import INPUTS, MAP_NAMES, OUTPUTS, STAGE_VALUES, graph_feeds
from tood_deploy.onnx_file import OnnxArtefact, open_session, with_outputs
from tood_deploy.parity.reference import (
    INVERSION_EDGE,
    ROUNDING,
    SAMPLES,
    Conditioning,
    Outputs,
    Reference,
    collect_noise,
)

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: "pixels", "backbone", "pyramid", "head", "candidates" or "detections".
        reads: the values of the stage before, by their names in the exported graph.
        gives: its own values.
    """

    name: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]


def _stages() -> tuple[Stage, ...]:
    gives = STAGE_VALUES | {"detections": OUTPUTS}
    reads = ((), *gives.values())
    return tuple(
        Stage(name, before, own) for before, (name, own) in zip(reads, gives.items(), strict=False)
    )


STAGES = _stages()
GROUPS = {"pre-processing": STAGES[:1], "network": STAGES[1:4], "post-processing": STAGES[4:]}


class StageRunner(ABC):
    """A detector whose stages can be looked at. Use as the engines: close it when done.

    Attributes:
        name: the runtime, for reports.
        has_stages: whether the values between the stages can be had; otherwise `run_all` gives detections alone.
    """

    name: str
    has_stages: bool

    @abstractmethod
    def run_all(self, inputs: Values) -> Values:
        """Every stage, as deployed: `inputs` (`INPUTS` of the exported graph) and what the stages give."""

    @abstractmethod
    def run(self, stage: Stage, values: Values) -> Values:
        """One stage alone.

        Args:
            stage: which.
            values: the graph's inputs, and what the stage reads.

        Returns:
            What the stage gives.
        """

    def run_chain(self, stages: Sequence[Stage], values: Values) -> Values:
        """Neighbouring stages one after another, each from what the one before gave; `values` and all of that."""
        values = dict(values)
        for stage in stages:
            values |= self.run(stage, values)
        return values


def only_inputs(values: Values) -> Values:
    """What of these values the whole graph takes."""
    return {name: values[name] for name in INPUTS}


NAME = f"ONNX Runtime {ort.__version__}, CPU"


class OnnxRunner:
    """An .onnx artefact, with the maps of all stages added as outputs in memory unless they are not wanted."""

    def __init__(
        self, artefact: Path | onnx.ModelProto, *, maps: bool = True, further: tuple[str, ...] = ()
    ) -> None:
        """Opens the artefact, a file or a graph in memory; `further` values come after the maps.

        Raises:
            ArtefactError: the graph does not hold the maps.
        """
        model = artefact if isinstance(artefact, onnx.ModelProto) else onnx.load(artefact)
        self.outputs = (*OUTPUTS, *(MAP_NAMES if maps else ()), *further)
        self.session = open_session(
            with_outputs(model, self.outputs[len(OUTPUTS) :]).SerializeToString()
        )
        self.name = NAME

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """See `Runner`."""
        found: Any = self.session.run(
            list(self.outputs), graph_feeds(images, valid_hw, score_threshold, iou_threshold)
        )
        return found


def onnx_reference(artefact: OnnxArtefact) -> Reference:
    """An .onnx artefact that was proven equal to its network when it was made."""
    run = OnnxRunner(artefact.model)
    run.name = f"{artefact.path.name} in {run.name}"
    return Reference(run, artefact.manifest.preset.sizing, OnnxConditioning(artefact.model))


class OnnxConditioning:
    """Measures the float32 noise of a graph without its network: by copies whose weights are a rounding off, in ONNX Runtime.

    ONNX Runtime has no float64 convolution, so the graph itself stands for the exact numbers; its own noise is part of what is measured.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.aligned = _values_before_restoring(model)
        self.model = model

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Conditioning:
        """Measure it on a batch; as `measure_conditioning`."""
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
    """The aligned boxes of every level before inverted ones are given back as they were; empty where the graph keeps them inverted."""
    makers = {name: node for node in model.graph.node for name in node.output}
    last = [makers[name] for name in MAP_NAMES if name.startswith("head_boxes")]
    return (
        tuple(node.input[2] for node in last)
        if all(node.op_type == "Where" for node in last)
        else ()
    )


def _rounded_weights(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """A copy whose float32 weights are each up to one rounding off."""
    generator = np.random.default_rng(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            noise = generator.uniform(-ROUNDING, ROUNDING, values.shape)
            tensor.CopyFrom(
                numpy_helper.from_array((values * (1 + noise)).astype(np.float32), tensor.name)
            )
    return copy
