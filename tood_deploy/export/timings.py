"""Where an export's time goes: seconds of the wall clock and of the CPU, by step."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Timings:
    """Wall clock and CPU seconds of every step so far, in the order of their first use."""

    steps: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, step: str, wall_s: float, cpu_s: float) -> None:
        """Add to a step's seconds."""
        before = self.steps.get(step, (0.0, 0.0))
        self.steps[step] = before[0] + wall_s, before[1] + cpu_s

    def text(self) -> str:
        """Return the steps and their sum as the lines of a table."""
        console = Console(width=80, file=io.StringIO())
        with console.capture() as captured:
            console.print(self._table())
        return captured.get().rstrip()

    def _table(self) -> Table:
        result = Table("step", title="where the time went")
        for name in ("seconds", "CPU seconds", "share"):
            result.add_column(name, justify="right")
        total_wall, total_cpu = (sum(values[i] for values in self.steps.values()) for i in (0, 1))
        for step, (wall, cpu) in (*self.steps.items(), ("together", (total_wall, total_cpu))):
            result.add_row(
                step, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / total_wall if total_wall else 0:.0%}"
            )
        return result


_current: ContextVar[Timings | None] = ContextVar("timings", default=None)


@contextmanager
def record_timings() -> Iterator[Timings]:
    """Record the steps that `timed` marks inside the block."""
    token = _current.set(Timings())
    try:
        timings = _current.get()
        assert timings is not None
        yield timings
    finally:
        _current.reset(token)


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Count the block as a step, where timings are recorded; steps do not hold one another."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        if timings := _current.get():
            timings.add(step, time.perf_counter() - wall, time.process_time() - cpu)
