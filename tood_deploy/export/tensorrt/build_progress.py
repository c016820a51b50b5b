"""A build under way: a progress bar from TensorRT's own monitor, the inner phases below the outer, and Ctrl-C."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tood_deploy.export.progress import Heartbeat, print_line
from tood_deploy.tensorrt_flavour import Flavour

Result = TypeVar("Result")


class Monitor(Protocol):
    """The library's `IProgressMonitor`, for a builder configuration."""

    def cancel(self) -> None:
        """The build stops at the end of the step it is at."""
        ...


@contextmanager
def build_progress(flavour: Flavour, quiet: bool = False) -> Iterator[Monitor]:
    """Shows, while the block runs, how far a build is that is given the monitor: bars on a terminal, elsewhere a line now and then."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        yield _new_monitor(flavour.module, bar, Heartbeat(print_line) if not quiet and not sys.stderr.isatty() else lambda line: None)


def run_cancellable(build: Callable[[], Result], monitor: Monitor) -> Result:
    """Runs `build` in a thread of its own, and cancels it on Ctrl-C.

    Python hears of Ctrl-C between two steps of the main thread. A build is one long step, and the steps within it, where the library calls
    back, swallow the interrupt.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(build).result()
        except KeyboardInterrupt:
            monitor.cancel()
            raise  # on leaving the block, once the builder has stopped


def _new_monitor(module: Any, bar: Progress, say: Callable[[str], None]) -> Monitor:
    """A subclass of that library's own IProgressMonitor. The library calls it from threads of its own."""

    class BuildMonitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._tasks: dict[str, TaskID] = {}
            self._cancelled = threading.Event()

        def cancel(self) -> None:
            self._cancelled.set()
            bar.update(bar.add_task("cancelling, TensorRT stops at the end of this step", total=None))

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tasks[phase_name] = bar.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._tasks:
                bar.update(self._tasks[phase_name], completed=step + 1)
                say(f"building the engine: {phase_name}, step {step + 1}")
            return not self._cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._tasks:
                bar.remove_task(self._tasks.pop(phase_name))

    return BuildMonitor()
