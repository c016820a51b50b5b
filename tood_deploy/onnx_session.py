"""ONNX Runtime's sessions: set up alike wherever a graph is run. No torch."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from tood_deploy.errors import DeviceError
from tood_deploy.extras import not_installed

# Of onnxruntime and onnxruntime-gpu, which write one folder, one was removed: what is left is a folder without the module.
if not hasattr(ort, "InferenceSession"):
    raise DeviceError(not_installed("onnxruntime"))

CPU = "CPUExecutionProvider"


def open_session(
    model: Path | bytes, *, provider: str = CPU, threads: int | None = None, keeps_memory: bool = True
) -> ort.InferenceSession:
    """A session that says nothing on the terminal: what fails is raised.

    Args:
        model: an .onnx file, or its bytes.
        provider: ONNX Runtime's name of what computes.
        threads: on the CPU; the number of cores where not given.
        keeps_memory: whether what a call has used is kept for the next one; many sessions at a time would keep too much.

    Raises:
        Exception: of ONNX Runtime's own types, which share no public base, where it cannot open the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = keeps_memory
    # To plan which values share memory takes half a second, seven tenths of the time to open a ResNet-50. On the CPU that gains little:
    # calls are as fast without, and the peak is 2% higher (docs/performance.md).
    options.enable_mem_reuse = provider != CPU
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=[provider])
