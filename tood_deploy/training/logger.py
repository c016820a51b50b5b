"""The log of a run: values of steps and epochs in; JSON lines, TensorBoard files and progress out.

Lines and bars for a person go through the reporter. Knows nothing of learning.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from tood_deploy.errors import OutputError, not_installed
from tood_deploy.reporter import ProgressTask, Reporter
from tood_deploy.training.checkpoints import make_run_folder
from tood_deploy.training.config import LOSS_TERMS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"
STEPS_PER_ENTRY = 50

Entry = dict[str, Any]


class Journal:
    """Writes what happens in a run; without a folder, as on all workers but the main one, nothing.

    Attributes:
        output: the run's folder.
        reporter: prints lines and progress.
        every: steps between two entries.
    """

    def __init__(
        self, output: Path | None, reporter: Reporter, every: int = STEPS_PER_ENTRY
    ) -> None:
        """Write nothing yet.

        Args:
            output: the run's folder; None writes no files.
            reporter: prints lines and progress.
            every: steps between two entries.
        """
        self.output, self.reporter, self.every = output, reporter, every
        self._board: SummaryWriter | None = None
        self._task: ProgressTask | None = None

    @staticmethod
    def silent() -> Journal:
        """Return a journal that writes and prints nothing."""
        return Journal(None, Reporter.silent())

    def __enter__(self) -> Self:
        if self.output is not None:
            make_run_folder(self.output)
            self._board = _open_board(self.output, self.reporter)
            self._hook, threading.excepthook = threading.excepthook, self._heed_thread
        return self

    def _heed_thread(self, args: threading.ExceptHookArgs) -> None:
        """Leave to `write` what fails in TensorBoard's thread: it is raised again there."""
        if not issubclass(args.exc_type, OSError):
            self._hook(args)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.close()
        if self.output is not None:
            threading.excepthook = self._hook
        if self._board is not None and error is None:
            with self._board_errors():
                self._board.close()
        elif self._board is not None:
            with suppress(Exception):  # the first error is the one to tell
                self._board.close()

    @contextmanager
    def _board_errors(self) -> Iterator[None]:
        """Make what fails in TensorBoard's files one error of ours."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.output}: TensorBoard's files cannot be written ({error.strerror}); see "
                "that the folder is there and has room, then go on with --resume"
            ) from error

    def forget_after(self, step: int) -> None:
        """Drop entries of steps beyond this one, which a resumed run makes again."""
        if self.output is None or not (self.output / LOG).is_file():
            return
        lines = (self.output / LOG).read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        (self.output / LOG).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def start_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Show the progress of an epoch in place of the last one's.

        Args:
            epoch: counted from 0.
            epochs: of the run.
            steps: of the epoch.
            done: steps that an earlier call made.
        """
        if self._task is not None:
            self._task.close()
        self._task = self.reporter.progress(f"epoch {epoch + 1}/{epochs}", steps)
        self._task.update(done)

    def step(self, values: Mapping[str, float]) -> None:
        """Show that a step is done, and write every so many; `values["step"]` counts from 1."""
        losses = " ".join(f"{name} {values[name]:.3f}" for name in LOSS_TERMS if name in values)
        speed = f"{values['images_per_s']:.1f} images/s {memory_mb():.0f} MB"
        if self._task is not None:
            self._task.advance(state=f"{losses} lr {values['lr']:.2g} {speed}")
        if int(values["step"]) % self.every == 0:
            self.write("step", values)

    def write(self, kind: str, values: Mapping[str, object]) -> None:
        """Write one entry into the JSON lines, and its numbers for TensorBoard.

        Raises:
            OutputError: it cannot be written.
        """
        if self.output is None:
            return
        entry = {"kind": kind, **values, "time": round(time.time(), 3)}
        try:
            with (self.output / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.output / LOG}: cannot be written ({error.strerror}); "
                "make room, then go on with --resume"
            ) from error
        step = values.get("step", 0)
        if self._board is None:
            return
        with self._board_errors():
            for name, value in values.items():
                if (
                    name != "step"
                    and isinstance(value, int | float)
                    and isinstance(step, int | float)
                ):
                    self._board.add_scalar(f"{kind}/{name}", value, int(step))

    def images(self, images: Sequence[NDArray[np.uint8]], step: int) -> None:
        """Write validation images, (H, W, 3) uint8 RGB, with detections drawn, for TensorBoard."""
        if self._board is None:
            return
        with self._board_errors():
            for i, image in enumerate(images):
                self._board.add_image(f"validation/{i}", image, step, dataformats="HWC")


def read_log(output: Path, kind: str) -> list[Entry]:
    """Return the entries of one kind in a run's log."""
    if not (output / LOG).is_file():
        return []
    entries = (_parse(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if entry is not None and entry.get("kind") == kind]


def memory_mb() -> float:
    """Return peak memory so far in MiB: of the GPU where one is used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _parse(line: str) -> Entry | None:
    """Return an entry; None for a line that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _step_of(line: str) -> float:
    """Return the step of an entry, 0 where it has none; infinity for what is no entry."""
    entry = _parse(line)
    step = float("inf") if entry is None else entry.get("step", 0)
    return step if isinstance(step, int | float) else 0


def _open_board(output: Path, reporter: Reporter) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        missing = not_installed("tensorboard", "train")
        reporter.info(f"no files for TensorBoard are written: {missing}")
        return None
    return SummaryWriter(output / "tensorboard")
