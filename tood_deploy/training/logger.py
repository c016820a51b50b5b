"""What a run tells: lines on stderr, a progress bar on a terminal, JSON lines and TensorBoard files in its folder."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tood_deploy.errors import OutputError, not_installed
from tood_deploy.training.checkpoints import make_run_folder

LOG = "log.jsonl"


class Journal:
    """The main worker's voice; `Journal(None)` is silent, as the other workers are."""

    def __init__(self, output: Path | None, quiet: bool = False, every: int = 50) -> None:
        """Opens the run's log.

        Args:
            output: the run's folder; None writes and says nothing.
            quiet: no lines and no bar; the files are written all the same.
            every: steps between two entries.
        """
        self.output, self.quiet, self.every = output, quiet or output is None, every
        self.board: Any = None
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn(),
            console=Console(stderr=True), disable=self.quiet or not sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task("", state="", visible=False)

    def __enter__(self) -> Self:
        if self.output is not None:
            make_run_folder(self.output)
            self.board = _open_board(self.output, self.quiet)
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """One line on stderr."""
        if self.quiet:
            return
        if self.bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.console.print(text, highlight=False, markup=False)

    def forget_after(self, step: int) -> None:
        """Drops entries of steps beyond this one, which a resumed run makes again."""
        if self.output is None or not (self.output / LOG).is_file():
            return
        lines = (self.output / LOG).read_text(encoding="utf-8").splitlines()
        kept = [
            line
            for line in lines
            if (entry := _parse(line)) is not None and entry.get("step", 0) <= step
        ]
        (self.output / LOG).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def start_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """A fresh bar for an epoch, counted from 0."""
        self.bar.reset(
            self.task,
            total=steps,
            completed=done,
            description=f"epoch {epoch + 1}/{epochs}",
            visible=True,
        )

    def step(self, values: Mapping[str, float]) -> None:
        """After a step: the bar moves; every so often an entry is written. `values["step"]` counts from 1."""
        speed, memory = f"{values['images_per_s']:.1f} images/s", f"{memory_mb():.0f} MB"
        state = f"cls {values['cls']:.3f} box {values['box']:.3f} lr {values['lr']:.2g} {speed} {memory}"
        self.bar.update(self.task, advance=1, state=state)
        if int(values["step"]) % self.every == 0:
            self.write("step", values)
            if self.bar.disable:
                self.say(f"step {int(values['step'])}: {state}")

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """One entry in the JSON lines, and its numbers in TensorBoard."""
        if self.output is None:
            return
        entry = {"kind": kind, **values, "time": round(time.time(), 3)}
        try:
            with (self.output / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.output / LOG}: cannot be written ({error.strerror}); make room, then go on with --resume"
            ) from error
        for name, value in values.items() if self.board is not None else ():
            if name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, int(values.get("step", 0)))  # type: ignore[union-attr]

    def images(self, images: Sequence[NDArray[np.uint8]], step: int) -> None:
        """Validation images, (H, W, 3) uint8 RGB, with what was found drawn on them, for TensorBoard."""
        for i, image in enumerate(images if self.board is not None else ()):
            self.board.add_image(f"validation/{i}", image, step, dataformats="HWC")  # type: ignore[union-attr]


def read_log(output: Path, kind: str) -> list[dict[str, Any]]:
    """The entries of one kind in a run's log."""
    if not (output / LOG).is_file():
        return []
    entries = (_parse(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if entry is not None and entry.get("kind") == kind]


def memory_mb() -> float:
    """Peak memory so far in MiB: of the GPU where one is used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _parse(line: str) -> dict[str, Any] | None:
    """An entry; None for a line that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _open_board(output: Path, quiet: bool) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if not quiet:
            print(
                f"no files for TensorBoard are written: {not_installed('tensorboard', 'train')}",
                file=sys.stderr,
            )
        return None
    return SummaryWriter(output / "tensorboard")
