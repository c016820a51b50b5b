"""The one face of every runtime: padded images in, detections in network pixels out.

Knows no runtime; imports NumPy alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.open import HINTS
from tood_deploy.errors import ArtefactError, InputError, ToodError
from tood_deploy.manifest import Manifest
from tood_deploy.preprocess import ImageTransform
from tood_deploy.presets import SIZE_DIVISOR


@dataclass(frozen=True, eq=False)
class BatchDetections:
    """Detections of a batch, best first, rows past `num_dets` zero.

    Attributes:
        num_dets: (B,) int32.
        boxes_net: (B, D, 4) float32 xyxy, pixels of the network input.
        scores: (B, D) float32.
        labels: (B, D) int32.
    """

    num_dets: NDArray[np.int32]
    boxes_net: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]


class Engine(ABC):
    """A model loaded into one runtime. Use as a context manager, or call `close`.

    Attributes:
        manifest: what the model says of itself.
        device: where it runs: "cpu" or "cuda".
        name: the runtime and its version, for reports.
        input_shapes_hw: the padded sizes it takes, rows and columns; empty where every multiple of
            32 will do.
        max_batch: the largest batch it takes; None where there is no bound.
        notes: remarks of the runtime for the user, in the order they came up; more may come while
            it runs.
        in_flight: how many batches should be submitted before the first is collected, for
            throughput.
        loaded_from: what it was made of: "artefact", or "cache" where the runtime kept what it had
            compiled; for the self-test.
        survives_fork: whether it runs in a process that was forked after it was opened. Most
            runtimes have threads, which a fork leaves behind: the first call would wait for ever.
    """

    manifest: Manifest
    device: str
    name: str
    input_shapes_hw: tuple[tuple[int, int], ...] = ()
    max_batch: int | None = None
    notes: Sequence[str] = ()
    in_flight: int = 1
    loaded_from: str = "artefact"
    closed: bool = False
    survives_fork: bool = False
    _process: int

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Note which process opens the model."""
        engine = super().__new__(cls)
        engine._process = os.getpid()
        return engine

    @property
    def precision(self) -> str:
        """The arithmetic as it runs here, such as "fp32"; "int8, bf16" where it is mixed."""
        return self.manifest.precision

    def saturates(self) -> bool:
        """Return whether sums of 8-bit products overflow in this runtime on this machine."""
        return False

    def infer(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        """Run a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB; H and W multiples of 32.
            valid_hw: (B, 2) int32, rows and columns of each image that hold real pixels; what lies
                outside counts as padding.
            score_threshold: detections have a score above it.
            iou_threshold: of two boxes of a class that overlap by more, the lower-scored goes.

        Raises:
            InputError: shapes or types are not as above.
            ArtefactError: the model gave values that are not numbers, or classes without a name.
            ToodError: the engine was closed, or opened before this process was forked.
        """
        self._check_call(images, valid_hw)
        return self._checked(self._run(images, valid_hw, score_threshold, iou_threshold))

    def submit(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Any:
        """Start a batch, and return what `collect` takes.

        The arrays must stay as they are until then. A runtime that cannot work on several batches
        at a time runs it at once. No more than `in_flight` should be under way.

        Args:
            images, valid_hw, score_threshold, iou_threshold: as `infer` takes them.

        Raises:
            ToodError: as `infer`.
        """
        self._check_call(images, valid_hw)
        return self._submit(images, valid_hw, score_threshold, iou_threshold)

    def collect(self, ticket: Any) -> BatchDetections:
        """Wait for a batch that was submitted, and return its detections; once for each batch.

        Raises:
            ToodError: as `infer`.
        """
        return self._checked(self._collect(ticket))

    def _submit(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Any:
        return self._run(images, valid_hw, score_threshold, iou_threshold)

    def _collect(self, ticket: Any) -> BatchDetections:
        return ticket

    def _check_call(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> None:
        if self.closed:
            raise ToodError(f"{self.name}: the engine was closed; open the model again")
        if self._process != os.getpid() and not self.survives_fork:
            raise ToodError(
                f"{self.name}: the engine was opened before this process was forked, and cannot "
                "run in it; open the model in the process that uses it (multiprocessing and "
                "DataLoader: in the worker, or with the start method spawn)"
            )
        check_inputs(images, valid_hw)
        self._check_profile(images)

    def _checked(self, detections: BatchDetections) -> BatchDetections:
        if not (np.isfinite(detections.boxes_net).all() and np.isfinite(detections.scores).all()):
            raise ArtefactError(
                f"{self.name}: the model gave NaN or infinite values; check the checkpoint, or "
                "export in higher precision"
            )
        classes, labels = self.manifest.preset.num_classes, detections.labels
        if ((labels < 0) | (labels >= classes)).any():
            raise ArtefactError(
                f"{self.name}: the model found an object of class {labels.max()}, its manifest "
                f"names {classes} classes; use the manifest it was exported with"
            )
        return detections

    def batches_at(self, net_hw: tuple[int, int]) -> tuple[int, int | None]:
        """Return the smallest and the largest batch at a padded size; None for no bound."""
        return 1, self.max_batch

    def settle(self, batch: int, net_hw: tuple[int, int]) -> None:  # noqa: B027 - most do nothing
        """Do now what would else be done after many batches of one shape.

        Most runtimes have nothing to do.

        Args:
            batch: images in a batch.
            net_hw: their padded rows and columns.

        Raises:
            ToodError: as `infer`.
        """

    def _check_profile(self, images: NDArray[np.uint8]) -> None:
        batch, height, width, _ = images.shape
        if self.input_shapes_hw and (height, width) not in self.input_shapes_hw:
            takes = ", ".join(f"{rows} x {columns}" for rows, columns in self.input_shapes_hw)
            raise InputError(
                f"images are {height} x {width}, this model takes {takes}; pad to one of these, or "
                f"export with --shapes {height}x{width}"
            )
        if self.max_batch is not None and batch > self.max_batch:
            raise InputError(
                f"a batch of {batch}, this model takes at most {self.max_batch}; give a smaller "
                "--batch, or export with a larger one"
            )

    @abstractmethod
    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections: ...

    def close(self) -> None:
        """Free what the runtime holds; may be called again."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@runtime_checkable
class ResizesFrames(Protocol):
    """An engine that resizes, pads and orders the channels of frames where it runs."""

    def submit_frames(
        self,
        frames: Sequence[NDArray[np.uint8]],
        transforms: Sequence[ImageTransform],
        score_threshold: float,
        iou_threshold: float,
    ) -> Any:
        """Start a batch, and return what `collect` takes.

        Args:
            frames: (H, W, 3) uint8 BGR, of any sizes.
            transforms: of the frames, to one padded size.
            score_threshold, iou_threshold: as `Engine.infer` takes them.
        """
        ...


def check_hint(hint: str) -> None:
    """Raise ToodError unless it is a `Hint`."""
    if hint not in HINTS:
        raise ToodError(f"hint is {hint!r}; expected {' or '.join(HINTS)}")


def check_inputs(images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> None:
    """Raise InputError unless the arrays are what `Engine.infer` takes."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise InputError(
            f"images are {images.dtype} {images.shape}; expected uint8 (B, H, W, 3) in RGB order"
        )
    if images.shape[1] % SIZE_DIVISOR or images.shape[2] % SIZE_DIVISOR:
        raise InputError(
            f"images are {images.shape[1]} x {images.shape[2]}; expected multiples of "
            f"{SIZE_DIVISOR}: use resize_and_pad"
        )
    if valid_hw.shape != (len(images), 2) or valid_hw.dtype != np.int32:
        raise InputError(
            f"valid_hw is {valid_hw.dtype} {valid_hw.shape}; expected int32 ({len(images)}, 2)"
        )
