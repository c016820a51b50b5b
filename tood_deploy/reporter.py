"""The one channel to a person: talk and progress on stderr, results on stdout.

What comes in are lines, tables and counts of work done; what goes out depends on `quiet`, and on
whether stderr is a terminal, which are decided here alone. Knows nothing of detectors. Rich is
imported with the first bar or table, so that `--help` stays light.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from tood_deploy.errors import ArtefactWarning, InputWarning, OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

Item = TypeVar("Item")
Unit = Literal["", "bytes"]

# Where nothing can be overwritten (a pipe, a log file), work that is done sooner than FIRST_LINE_S
# leaves no line, and longer work leaves one every PAUSE_S.
FIRST_LINE_S, PAUSE_S = 5.0, 30.0
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
WIDTH_OF_FILES = 160  # columns of a table that is written to a file or pipe


class Reporter:
    """Lines, tables and progress for the person at the command; `Reporter.silent()` prints none.

    Attributes:
        quiet: leave out `info`, `result`, `table` and progress; warnings and other problems are
            printed all the same.
    """

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Print nothing yet.

        Args:
            quiet: see the class.
            clock: in seconds; a test gives its own.
        """
        self.quiet, self._clock = quiet, clock
        self._bars: Progress | None = None
        self._tasks: list[ProgressTask] = []
        self._next_line_s = 0.0
        self._lock = threading.RLock()

    @staticmethod
    def silent() -> Reporter:
        """Return a reporter that prints nothing at all, warnings neither."""
        return _SilentReporter(quiet=True)

    def info(self, line: str) -> None:
        """Print a line on stderr, unless quiet."""
        if not self.quiet:
            self._print(line)

    def note(self, line: str) -> None:
        """Print a remark that a result should be read with on stderr, unless quiet."""
        self.info(f"note: {line}")

    def warn(self, line: str) -> None:
        """Print a warning on stderr, quiet or not."""
        self.problem(f"warning: {line}")

    def problem(self, line: str) -> None:
        """Print a line on stderr, quiet or not."""
        self._print(line)

    def result(self, line: str) -> None:
        """Print a line of a command's result on stdout, unless quiet."""
        if not self.quiet:
            with stdout_errors():
                print(_safe(line, sys.stdout.encoding), flush=True)

    def table(self, table: RenderableType) -> None:
        """Print a rich table, or anything that rich renders, on stdout, unless quiet."""
        if self.quiet:
            return
        from rich.console import Console

        width = None if sys.stdout.isatty() else WIDTH_OF_FILES
        console = Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)
        with stdout_errors():
            console.print(table)
            sys.stdout.flush()

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield the items, and show how many of them are done.

        Args:
            items: what is worked on.
            description: of the work, such as "calibrating".
            total: number of items; where not given, their length if they have one.
        """
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.progress(description, total) as task:
            for item in items:
                yield item
                task.advance()

    def progress(self, description: str, total: int | None = None, unit: Unit = "") -> ProgressTask:
        """Show how far some work is, for as long as the block runs or until `close`.

        Several may be shown at the same time, from any thread.

        Args:
            description: of the work, such as "calibrating".
            total: how much there is to do; None where that is not known, or not yet.
            unit: of what is counted: "" for things, "bytes".
        """
        return ProgressTask(self, description, total, unit)

    def _print(self, line: str) -> None:
        """Print a line on stderr, above the bars where there are some."""
        line = _safe(line, getattr(sys.stderr, "encoding", None))
        with suppress(OSError):  # a full or closed stderr: there is nowhere else to say it
            if self._bars is None:
                if sys.stderr is not None:  # with None, print would take stdout
                    print(line, file=sys.stderr, flush=True)
            else:
                self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _open(self, task: ProgressTask) -> TaskID | None:
        """Count a task as shown; return its bar on a terminal, and None elsewhere."""
        with self._lock:
            if not self._tasks:
                self._next_line_s = self._clock() + FIRST_LINE_S
                self._bars = None if self.quiet or not sys.stderr.isatty() else _start_bars()
            self._tasks.append(task)
            if self._bars is None:
                return None
            return self._bars.add_task(task.description, total=task.total, count="", state="")

    def _show(self, task: ProgressTask, bar: TaskID | None) -> None:
        """Show what a task has done: on its bar, else as a line if the last one is long ago."""
        if self._bars is not None and bar is not None:
            self._bars.update(
                bar, completed=task.done, total=task.total, count=task.count("/"), state=task.state
            )
        elif not self.quiet and self._clock() >= self._next_line_s:
            self._next_line_s = self._clock() + PAUSE_S
            self._print_state(task)

    def _print_state(self, task: ProgressTask) -> None:
        if (line := task.line()) != task.last_line:
            task.last_line = line
            self._print(line)

    def _close(self, task: ProgressTask, bar: TaskID | None) -> None:
        """Take a task away; the bars go with the last one."""
        with self._lock:
            if task not in self._tasks:
                return
            self._tasks.remove(task)
            if self._bars is not None and bar is not None:
                self._bars.refresh()  # the end is seen, also that of quick work
                self._bars.remove_task(bar)
            elif task.last_line:  # who read that it is long work wants to know that it is done
                self._print_state(task)
            if not self._tasks and self._bars is not None:
                self._bars.stop()
                self._bars = None


class _SilentReporter(Reporter):
    """A reporter that prints nothing."""

    def _print(self, line: str) -> None:
        pass


class ProgressTask:
    """Some work that counts what is done; `Reporter.progress` makes it. A context manager.

    Attributes:
        description: of the work.
        total: how much there is to do; None where not known.
        done: how much of it is done.
        state: a few words on how it goes, such as "12.3 fps".
        last_line: what was printed last, where there is no bar.
    """

    def __init__(self, reporter: Reporter, description: str, total: int | None, unit: Unit) -> None:
        """Begin with nothing done.

        Args:
            reporter: shows it.
            description, total, unit: as `Reporter.progress` takes them.
        """
        self.description, self.total, self.unit = description, total, unit
        self.done, self.state, self.last_line = 0, "", ""
        self._reporter = reporter
        self._bar = reporter._open(self)

    def update(self, done: int, total: int | None = None, state: str = "") -> None:
        """Show that so much is done.

        Args:
            done: so far, in the task's unit.
            total: how much there is to do, if that has changed or become known.
            state: a few words on how it goes; what they were where not given.
        """
        self.done = done
        self.total = self.total if total is None else total
        self.state = state or self.state
        self._reporter._show(self, self._bar)

    def advance(self, amount: int = 1, state: str = "") -> None:
        """Show that so much more is done.

        Args:
            amount: since the last call, in the task's unit.
            state: a few words on how it goes; what they were where not given.
        """
        self.update(self.done + amount, state=state)

    def close(self) -> None:
        """Show it no longer."""
        self._reporter._close(self, self._bar)

    def count(self, separator: str) -> str:
        """Return what is done of what there is to do, such as "3/7" with the separator "/"."""
        show = _megabytes if self.unit == "bytes" else str
        return show(self.done) + (f"{separator}{show(self.total)}" if self.total else "")

    def line(self) -> str:
        """Return a line for where there are no bars."""
        return f"{self.description}: {self.count(' of ')}{', ' if self.state else ''}{self.state}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Turn what fails on stdout into the error that names it, and write nothing more there.

    Raises:
        BrokenPipeError: nobody reads it any more, as after `| head`.
        OutputError: it is closed, or its disk is full.
    """
    try:
        yield
    except BrokenPipeError:
        drop_stdout()
        raise
    except OSError as error:
        drop_stdout()
        raise OutputError(
            f"stdout: cannot be written ({error.strerror or error}); send it to a place with room, "
            "or leave it out with --quiet"
        ) from error


def drop_stdout() -> None:
    """Let what is still written to stdout go nowhere; Python itself writes its rest at the end."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def show_own_warnings() -> None:
    """Print our own warnings of this process as lines of a reporter, not as Python does."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, ArtefactWarning | InputWarning):
            Reporter().warn(str(message))
        else:
            before(message, category, *place, **more)

    warnings.showwarning = show


def printable(text: str) -> str:
    r"""Return a name as it is, but for what would act on a terminal or break a line.

    Control characters, line ends, marks that turn the direction of text, and bytes that are no text
    become escapes, such as \x1b.
    """
    return "".join(letter if _is_shown(letter) else _escaped(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    return letter == " " or (
        unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and letter not in TURNING
    )


def _escaped(letter: str) -> str:
    """Return an escape for a letter; the one of its byte where a name's byte is no text."""
    number = ord(letter)
    byte = number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else number
    return f"\\x{byte:02x}" if byte < 256 else f"\\u{byte:04x}"


def _safe(line: str, encoding: str | None) -> str:
    """Return what is printed of a line, in a stream of that encoding."""
    shown = "\n".join(map(printable, line.split("\n")))
    return shown.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _start_bars() -> Progress:
    """Show bars at the end of the terminal on stderr, above which lines go."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # results that go into a pipe or file must stay there
    )
    bars.start()
    return bars
