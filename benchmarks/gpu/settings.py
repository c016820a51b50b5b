"""Say what is measured, and what a row of results holds. Knows no runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.kernel_profile import KernelTime

Precision = Literal["fp32", "fp16", "bf16"]
Backend = Literal["torch", "onnxruntime", "tensorrt"]
Mode = Literal["eager", "static", "graph", "compiled"]
Status = Literal["ok", "absent", "refused", "skipped", "failed"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
BACKENDS: tuple[Backend, ...] = ("torch", "onnxruntime", "tensorrt")
MODES: dict[str, tuple[Mode, ...]] = {
    "cuda": ("eager", "graph", "compiled"),
    "cpu": ("eager", "static"),
}
CONF, IOU = 0.05, 0.6  # as COCO results are computed: more candidates than with a user's own
H200_TFLOPS = 790.0  # bf16 products on one H200, measured


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        device: "cuda" or "cpu".
        preset: whose network, with seeded stand-in weights where there is no checkpoint.
        checkpoint: weights of one's own.
        onnx: its export in float32; exported on the spot where not given.
        sizes_hw: padded image sizes, the most important first: parity is measured at the first.
        batches: images a call, the most important first.
        precisions: of the network.
        backends: that are tried.
        modes: how PyTorch runs the network.
        compile_all: compile every precision in every cell, not bf16 alone in those after the first.
        images: images for parity; synthetic ones where not given.
        image_count: how many of them.
        rounds: in which all rows of a cell take turns.
        seconds: each row is measured for, in every round.
        budget_seconds: after which nothing further is started.
        peak_tflops: of the GPU, for the floor.
        folder: for exported and built files.
    """

    device: str
    preset: str
    sizes_hw: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    folder: Path
    checkpoint: Path | None = None
    onnx: Path | None = None
    precisions: tuple[Precision, ...] = PRECISIONS
    backends: tuple[Backend, ...] = BACKENDS
    modes: tuple[Mode, ...] = MODES["cuda"]
    compile_all: bool = False
    images: Path | None = None
    image_count: int = 8
    rounds: int = 5
    seconds: float = 0.15
    budget_seconds: float = 540.0
    peak_tflops: float = H200_TFLOPS


@dataclass(frozen=True)
class Cell:
    """One padded size and batch; all rows of a cell are comparable."""

    size_hw: tuple[int, int]
    batch: int
    first: bool = False

    @property
    def name(self) -> str:
        """Return the cell's title in tables."""
        return f"{self.size_hw[0]}x{self.size_hw[1]}, batch {self.batch}"


@dataclass
class Row:
    """The results of one variant in one cell.

    Attributes:
        cell: size and batch.
        runtime, how, precision: of the variant.
        status: "ok"; "absent" (not installed), "refused" (by the runtime or the GPU), "skipped" (no
            time left), "failed" (a fault).
        note: why it is not "ok", or a remark.
        call_ms: times of every round: inputs on the device, detections in host memory.
        whole_ms: the same from decoded frames to detections in their pixels.
        open_seconds: for exporting, building, compiling, recording and the first call.
        memory_mib: of the device, for these at most; None where it cannot be measured.
        parity: how far from PyTorch in float32 on the CPU; empty where it was not compared.
        kernels: that take the most of a call; of PyTorch's rows in the first cell alone.
    """

    cell: Cell
    runtime: str
    how: str
    precision: str
    status: Status = "ok"
    note: str = ""
    call_ms: list[list[float]] = field(default_factory=list)
    whole_ms: list[list[float]] = field(default_factory=list)
    open_seconds: float = 0.0
    memory_mib: float | None = None
    parity: dict[str, Any] = field(default_factory=dict)
    kernels: list[KernelTime] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the row's title in tables."""
        return f"{self.runtime}, {self.how}, {self.precision}"


def cells(settings: Settings) -> list[Cell]:
    """Return every batch and size, batches first: it is the largest that runs out of time."""
    pairs = [(size, batch) for batch in settings.batches for size in settings.sizes_hw]
    return [Cell(size, batch, first=number == 0) for number, (size, batch) in enumerate(pairs)]
