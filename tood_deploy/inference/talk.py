"""What a run says on stderr: problems as they happen, remarks of the runtime, a progress bar on a terminal, a closing line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from tood_deploy.inference.frame import Source
from tood_deploy.inference.timings import Timings


class Talk:
    """Follows one run. Quiet: only problems are told."""

    def __init__(self, source: Source, timings: Timings, quiet: bool, notes: Sequence[str] = ()) -> None:
        self.source, self.timings, self.quiet, self.notes = source, timings, quiet, notes
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Progress(
            *columns,
            console=self.console,
            disable=quiet or not sys.stderr.isatty(),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # results that go into a pipe or file must stay there
        )
        self.task = self.bar.add_task("frames", total=source.length, rate="")
        self._told = self._noted = 0

    def advance(self) -> None:
        """One more frame is done."""
        dropped = f", {self.source.dropped} dropped" if self.source.kind == "live" else ""
        self.bar.update(self.task, advance=1, rate=f"{self.timings.fps:.1f} fps{dropped}")
        self._tell_problems()

    def _tell_problems(self) -> None:
        for problem in self.source.problems[self._told :]:
            self.console.print(f"warning: {problem}")
            self._told += 1
        for note in () if self.quiet else self.notes[self._noted :]:
            self.console.print(f"note: {note}")
            self._noted += 1

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        self._tell_problems()
        if not self.quiet and (error is None or isinstance(error, KeyboardInterrupt)):
            self.console.print(self.timings.summary() + self._live_summary())

    def _live_summary(self) -> str:
        if self.source.kind != "live":
            return ""
        median, p95 = (self.timings.percentile_ms("end_to_end", percent) for percent in (50, 95))
        return f"; results were {median:.0f} ms old (p95 {p95:.0f}), {self.source.dropped} frames dropped"
