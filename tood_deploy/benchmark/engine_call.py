"""One engine call, timed in parts: to the device, inference, back from the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines import BatchDetections, Engine

PARTS = ("h2d", "infer", "d2h")


@dataclass
class Laps:
    """Seconds of each part, taken one after another."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """What was before does not count."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap went into this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """The time since the last lap went into these parts, which somebody else measured."""
        for part, spent in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self.restart()


@runtime_checkable
class TimesItself(Protocol):
    """An engine that knows how many seconds of a call went to the device, into inference, and back."""

    def infer_in_parts(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> tuple[BatchDetections, tuple[float, float, float]]:
        """As `infer`, and those three."""
        ...


Call = Callable[[NDArray[np.uint8], NDArray[np.int32], float, float, Laps], BatchDetections]


def timed_call(engine: Engine) -> Call:
    """A function that runs the engine and notes its parts.

    On the CPU there are no transfers, only "infer". On a GPU ONNX Runtime and PyTorch are called in steps; TensorRT times itself, by the
    GPU's clock, so that nothing waits between the steps.
    """
    if engine.device == "cpu":
        return _whole_call(engine)
    if isinstance(engine, TimesItself):
        return _self_timed_call(engine)
    return _bound_call(engine) if hasattr(engine, "session") else _torch_call(engine)


def _whole_call(engine: Engine) -> Call:
    def call(images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps) -> BatchDetections:
        found = engine.infer(images, valid_hw, conf, iou)
        laps.lap("infer")
        return found

    return call


def _self_timed_call(engine: TimesItself) -> Call:
    def call(images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps) -> BatchDetections:
        found, seconds = engine.infer_in_parts(images, valid_hw, conf, iou)
        laps.add(dict(zip(PARTS, seconds, strict=True)))
        return found

    return call


def _bound_call(engine: Engine) -> Call:
    """ONNX Runtime with its inputs and outputs bound to the device."""
    import onnxruntime as ort

    from tood_deploy.engines.onnx_engine import INPUTS, OUTPUTS, OnnxEngine

    assert isinstance(engine, OnnxEngine)
    session, device = engine.session, engine.device

    def call(images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps) -> BatchDetections:
        binding = session.io_binding()
        values = (images, valid_hw, np.array(conf, np.float32), np.array(iou, np.float32))
        for name, value in zip(INPUTS, values, strict=True):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), device, 0))
        for name in OUTPUTS:
            binding.bind_output(name, device)
        binding.synchronize_inputs()
        laps.lap("h2d")
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        laps.lap("infer")
        found = BatchDetections(*binding.copy_outputs_to_cpu())
        laps.lap("d2h")
        return found

    return call


def _torch_call(engine: Engine) -> Call:
    """PyTorch, waiting for the device after each step."""
    import torch

    from tood_deploy.engines.torch_engine import TorchEngine

    assert isinstance(engine, TorchEngine)

    def wait() -> None:
        if engine.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def call(images: NDArray[np.uint8], valid_hw: NDArray[np.int32], conf: float, iou: float, laps: Laps) -> BatchDetections:
        inputs = [torch.from_numpy(array).to(engine.device) for array in (images, valid_hw)]
        wait()
        laps.lap("h2d")
        found = engine.detector(*inputs, conf, iou).detections
        wait()
        laps.lap("infer")
        arrays = BatchDetections(*(tensor.cpu().numpy() for tensor in found))
        laps.lap("d2h")
        return arrays

    return call
