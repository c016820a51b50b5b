"""The stages of an exported .onnx artefact in ONNX Runtime.

Detections come from the shipped file itself. Everything before comes from variants made of it in memory: one with the inner values as
further outputs, and one part per stage that starts from given values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tood_deploy.benchmark.graph_parts import cut_graph
from tood_deploy.benchmark.stages import STAGES, Stage, StageRunner, Values, graph_inputs
from tood_deploy.engines.onnx_engine import OnnxEngine
from tood_deploy.export.to_onnx import with_outputs
from tood_deploy.graph_io import INNER_VALUES, OUTPUTS
from tood_deploy.onnx_session import open_session

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


class OnnxStages(StageRunner):
    """An artefact that `OnnxEngine` has open."""

    has_stages = True

    def __init__(self, engine: OnnxEngine, path: Path) -> None:
        """Takes the engine and the file that it has open.

        Raises:
            ArtefactError: the file does not name its inner values: it is of an older version.
        """
        self.engine, self.name = engine, engine.name
        model = onnx.load(path)
        self._variant = self._open(with_outputs(model, INNER_VALUES))
        typed = onnx.shape_inference.infer_shapes(model)
        self._parts = {stage.name: self._open(cut_graph(typed, stage.reads, stage.gives)) for stage in STAGES}

    def run_all(self, inputs: Values) -> Values:
        """All stages; the detections are the shipped file's own."""
        inner = self._variant.run(list(INNER_VALUES), graph_inputs(inputs))
        shipped = self.engine.session.run(list(OUTPUTS), graph_inputs(inputs))
        return inputs | _widened(INNER_VALUES, inner) | _widened(OUTPUTS, shipped)

    def run(self, stage: Stage, values: Values) -> Values:
        """One stage."""
        part = self._parts[stage.name]
        given = {value.name: values[value.name].astype(TYPES[value.type], copy=False) for value in part.get_inputs()}
        return _widened(stage.gives, part.run(list(stage.gives), given))

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        session = self.engine.session
        threads = session.get_session_options().intra_op_num_threads
        return open_session(model.SerializeToString(), provider=session.get_providers()[0], threads=threads, keeps_memory=False)


def _widened(names: Any, arrays: Any) -> Values:
    """Under their names, with every kind of floating-point number as float32."""
    return {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in zip(names, arrays, strict=True)}
