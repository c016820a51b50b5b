"""All ways to run the detector in one cell: a row each, and how to open it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.artefacts import Artefacts
from benchmarks.gpu.runtime_ways import open_onnx, open_tensorrt, resident_onnx, resident_tensorrt
from benchmarks.gpu.settings import Cell, Mode, Precision, Row, Settings
from benchmarks.gpu.torch_ways import TITLES, TorchWay
from tood_deploy.engines.base import BatchDetections, Engine

Resident = Callable[
    [NDArray[np.uint8], NDArray[np.int32], float, float], Callable[[], BatchDetections]
]

# What opening takes at most on a GPU machine, until the first of its kind has been measured: exporting, building and compiling included.
GUESSED_SECONDS = {"compiled": 90.0, "onnxruntime": 90.0, "tensorrt": 120.0}


@dataclass(frozen=True)
class Way:
    """One row to be, and how to open it.

    Attributes:
        row: to be filled.
        kind: ways of a kind take about the same time to open.
        open: gives the engine, and a function that puts inputs on the device and returns a call on them.
    """

    row: Row
    kind: str
    open: Callable[[], tuple[Engine, Resident]]

    @property
    def guessed_seconds(self) -> float:
        """That opening may take."""
        return GUESSED_SECONDS.get(self.kind, 5.0)


def ways(settings: Settings, artefacts: Artefacts, cell: Cell) -> list[Way]:
    """In the order to be opened: the quick ones first, so that they are measured whatever time is left."""
    made = [
        way
        for mode in settings.modes
        if mode != "compiled"
        for way in _torch_ways(settings, artefacts, cell, mode)
    ]
    made += [
        _onnx_way(settings, artefacts, cell, precision)
        for precision in settings.precisions
        if "onnxruntime" in settings.backends
    ]
    made += [
        _tensorrt_way(artefacts, cell, precision)
        for precision in settings.precisions
        if "tensorrt" in settings.backends
    ]
    if "compiled" in settings.modes:
        made += _torch_ways(settings, artefacts, cell, "compiled")
    return made


def _torch_ways(settings: Settings, artefacts: Artefacts, cell: Cell, mode: Mode) -> Iterator[Way]:
    if "torch" not in settings.backends:
        return
    every = mode != "compiled" or cell.first or settings.compile_all
    fastest: tuple[Precision, ...] = (
        ("bf16",) if "bf16" in settings.precisions else settings.precisions[-1:]
    )
    for precision in settings.precisions if every else fastest:
        yield _torch_way(settings, artefacts, cell, mode, precision)


def _torch_way(
    settings: Settings, artefacts: Artefacts, cell: Cell, mode: Mode, precision: Precision
) -> Way:
    def open_way() -> tuple[Engine, Resident]:
        way = TorchWay(
            artefacts.model, mode, precision, cell, settings.device, settings.compile_mode
        )
        return way, way.resident

    return Way(Row(cell, "PyTorch", TITLES[mode], precision), mode, open_way)


def _onnx_way(settings: Settings, artefacts: Artefacts, cell: Cell, precision: Precision) -> Way:
    def open_way() -> tuple[Engine, Resident]:
        engine = open_onnx(artefacts.onnx(precision), settings.device)
        engine.input_shapes_hw = (cell.size_hw,)
        return engine, lambda *inputs: resident_onnx(engine, *inputs)

    return Way(
        Row(cell, "ONNX Runtime", settings.device.upper(), precision), "onnxruntime", open_way
    )


def _tensorrt_way(artefacts: Artefacts, cell: Cell, precision: Precision) -> Way:
    def open_way() -> tuple[Engine, Resident]:
        if artefacts.settings.device != "cuda":
            from tood_deploy.errors import DeviceError

            raise DeviceError(f"device is {artefacts.settings.device}; TensorRT runs on GPUs")
        engine = open_tensorrt(artefacts.engine(precision))
        engine.input_shapes_hw = (cell.size_hw,)
        return engine, lambda *inputs: resident_tensorrt(engine, *inputs)

    return Way(Row(cell, "TensorRT", "engine", precision), "tensorrt", open_way)
