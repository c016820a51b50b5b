"""List the variants of one cell: runtime, mode and precision, and how to open each.

Settings in, variants with empty rows out; nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.artefacts import Artefacts
from benchmarks.gpu.runtime_variants import (
    check_onnx,
    check_tensorrt,
    open_onnx,
    open_tensorrt,
    resident_onnx,
    resident_tensorrt,
)
from benchmarks.gpu.settings import Cell, Mode, Precision, Row, Settings
from benchmarks.gpu.torch_variants import TITLES, open_variant, resident
from tood_deploy.engines.base import BatchDetections, Engine

Resident = Callable[
    [NDArray[np.uint8], NDArray[np.int32], float, float], Callable[[], BatchDetections]
]

# How long a variant takes to open at most on a GPU machine, until the first of its kind was timed.
# Exporting, building and compiling are part of it.
GUESSED_SECONDS = {"compiled": 90.0, "onnxruntime": 90.0, "tensorrt": 120.0}


@dataclass(frozen=True)
class Variant:
    """One row of results, and how to get them.

    Attributes:
        row: to be filled.
        kind: variants of a kind take about the same time to open.
        open: returns the engine, and a function that puts inputs on the device and returns a call
            on them.
    """

    row: Row
    kind: str
    open: Callable[[], tuple[Engine, Resident]]

    @property
    def guessed_seconds(self) -> float:
        """Return how long it may take to open."""
        return GUESSED_SECONDS.get(self.kind, 5.0)


def torch_variants(settings: Settings, artefacts: Artefacts, cell: Cell) -> list[Variant]:
    """Return what runs wherever PyTorch does, quick ones first, so that these run in any case.

    Args:
        settings: of the run.
        artefacts: has the network.
        cell: size and batch.
    """
    modes = sorted(settings.modes, key=lambda mode: mode == "compiled")
    return [
        variant for mode in modes for variant in _torch_variants(settings, artefacts, cell, mode)
    ]


def runtime_variants(settings: Settings, artefacts: Artefacts, cell: Cell) -> list[Variant]:
    """Return what needs another runtime, which may have been carried along.

    Args:
        settings: of the run.
        artefacts: files that they run, made when a runtime takes them.
        cell: size and batch.
    """
    result: list[Variant] = []
    if "onnxruntime" in settings.backends:
        result += [_onnx_variant(settings, artefacts, cell, name) for name in settings.precisions]
    if "tensorrt" in settings.backends:
        result += [_tensorrt_variant(artefacts, cell, name) for name in settings.precisions]
    return result


def _torch_variants(
    settings: Settings, artefacts: Artefacts, cell: Cell, mode: Mode
) -> Iterator[Variant]:
    if "torch" not in settings.backends:
        return
    every = mode != "compiled" or cell.first or settings.compile_all
    fastest: tuple[Precision, ...] = (
        ("bf16",) if "bf16" in settings.precisions else settings.precisions[-1:]
    )
    for precision in settings.precisions if every else fastest:
        yield _torch_variant(settings, artefacts, cell, mode, precision)


def _torch_variant(
    settings: Settings, artefacts: Artefacts, cell: Cell, mode: Mode, precision: Precision
) -> Variant:
    def open_torch() -> tuple[Engine, Resident]:
        engine = open_variant(artefacts.model, mode, precision, cell, settings.device)
        return engine, lambda *inputs: resident(engine, *inputs)

    return Variant(Row(cell, "PyTorch", TITLES[mode], precision), mode, open_torch)


def _onnx_variant(
    settings: Settings, artefacts: Artefacts, cell: Cell, precision: Precision
) -> Variant:
    def open_runtime() -> tuple[Engine, Resident]:
        check_onnx(settings.device)  # before the export, which takes half a minute
        engine = open_onnx(artefacts.onnx(precision), settings.device)
        engine.input_shapes_hw = (cell.size_hw,)
        return engine, lambda *inputs: resident_onnx(engine, *inputs)

    return Variant(
        Row(cell, "ONNX Runtime", settings.device.upper(), precision), "onnxruntime", open_runtime
    )


def _tensorrt_variant(artefacts: Artefacts, cell: Cell, precision: Precision) -> Variant:
    def open_runtime() -> tuple[Engine, Resident]:
        check_tensorrt(artefacts.settings.device)
        engine = open_tensorrt(artefacts.engine(precision))
        engine.input_shapes_hw = (cell.size_hw,)
        return engine, lambda *inputs: resident_tensorrt(engine, *inputs)

    return Variant(Row(cell, "TensorRT", "engine", precision), "tensorrt", open_runtime)
