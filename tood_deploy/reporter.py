"""How far work is that counts what is done: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINES, PAUSE_S = (
    4,
    30.0,
)  # in a pipe: a line at every fourth part, and whenever so much time has passed


@contextmanager
def progress_bar(description: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how far the block is, by the function it is given: how many are done, of how many.

    Args:
        description: of the work.
        quiet: show nothing.
    """
    if quiet:
        yield lambda done, total: None
    elif not sys.stderr.isatty():
        yield ProgressLines(description, print_line)
    else:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


class Heartbeat:
    """A line now and then from work that cannot tell how much of it there is."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin to count the time.

        Args:
            say: given a line.
            clock: in seconds.
        """
        self._say, self._clock = say, clock
        self._started = self._said_at = clock()

    def __call__(self, line: str) -> None:
        """Say the line, with the time since the start, if half a minute has passed since the last one."""
        if (now := self._clock()) - self._said_at >= PAUSE_S:
            self._say(f"{line}, for {now - self._started:.0f} s")
            self._said_at = now


def print_line(line: str) -> None:
    """Print a line on stderr, to be seen at once in a pipe too."""
    print(line, file=sys.stderr, flush=True)


class ProgressLines:
    """Progress where nothing can be overwritten: whole lines, few of them."""

    def __init__(
        self,
        description: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing done.

        Args:
            description: of the work, the beginning of every line.
            say: given a line.
            clock: in seconds.
        """
        self._description, self._say, self._clock = description, say, clock
        self._total, self._part, self._said_at = -1, 0, -PAUSE_S

    def __call__(self, done: int, total: int) -> None:
        """Say so at the start, at every fourth part, and after every half a minute."""
        part = LINES * done // max(1, total)
        begins = (
            total != self._total or part < self._part
        )  # the next of several steps that share a description
        if begins or part > self._part or self._clock() - self._said_at >= PAUSE_S:
            self._say(f"{self._description}: {done} of {total}")
            self._total, self._part, self._said_at = total, part, self._clock()
