"""What a command does with its process: signals, closed or full pipes, lines of libraries.

Comes in: the descriptors and signals that a process starts with. Goes out: exceptions that the
commands handle as they handle Ctrl-C, and lines of a reporter. Knows no command.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tood_deploy.errors import REPEATS_S, Stopped
from tood_deploy.reporter import Reporter, stdout_errors

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # SIGHUP: not on Windows
MAX_LINES = 1000  # of libraries, that differ
READER_LIMIT_S = 1.0  # a child process may still hold the pipe
SIGNAL_EXIT = 128  # plus the signal's number is the exit code of what a signal ended


@contextmanager
def stopping_signals(ends_process: bool) -> Iterator[None]:
    """Make SIGTERM and SIGHUP what Ctrl-C is: an exception in the main thread.

    A terminal, `docker stop` and systemd may send a signal to a process and to its parent, which
    sends it on: what comes again at once would interrupt the completing of the outputs, and is left
    out. Signals that the parent had ignored, as nohup does, stay ignored.

    Args:
        ends_process: whether the process ends with the block: signals that come while Python takes
            itself down then end it without a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last_s = -REPEATS_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last_s
        before_s, last_s = last_s, time.monotonic()
        if last_s - before_s >= REPEATS_S:
            raise Stopped(number)

    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, signal.SIG_DFL if ends_process else handler)


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr one that takes nothing.

    Else the next file that is opened would get the number, and what libraries print. Writing to a
    closed stdout stays an error.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


@contextmanager
def library_lines(ends_process: bool) -> Iterator[None]:
    """Print what libraries write on stderr as notes: every line once, control characters escaped.

    Their lines come from below Python (libpng, libjpeg, FFmpeg, NCCL), through a pipe in the place
    of descriptor 2; `sys.stderr` keeps the terminal, and so does the trace of a crash.

    Args:
        ends_process: whether the process ends with the block; otherwise nothing is done, as the
            descriptor is a caller's.
    """
    if not ends_process:
        yield
        return
    read, write = os.pipe()
    terminal = os.dup(2)
    before, sys.stderr = sys.stderr, os.fdopen(terminal, "w", 1, errors="backslashreplace")
    os.dup2(write, 2)
    os.close(write)
    if traces := not faulthandler.is_enabled():
        faulthandler.enable(sys.stderr)
    reader = threading.Thread(target=_print_lines, args=(read,), daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # the last writer of the pipe is gone, and the reader ends
        reader.join(READER_LIMIT_S)
        if traces:
            faulthandler.disable()
        own, sys.stderr = sys.stderr, before
        own.close()


def _print_lines(descriptor: int) -> None:
    """Print the lines of a pipe as notes, until nobody can write into it any more."""
    reporter, printed = Reporter(quiet="--quiet" in sys.argv), set[bytes]()
    with open(descriptor, "rb") as lines:
        for line in lines:
            if line.strip() and line not in printed and len(printed) < MAX_LINES:
                printed.add(line)
                text = line.strip().decode(errors="backslashreplace")
                reporter.note("".join(map(_visible, text)))


def _visible(character: str) -> str:
    """Return a character as it may stand on a terminal."""
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode()


def close_stdout() -> int:
    """Write what stdout still holds, and return 0.

    After a failure Python would try again at its end, and print a traceback.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OutputError: it cannot be written.
    """
    with suppress(ValueError), stdout_errors():  # ValueError: the command has closed it
        sys.stdout.flush()
    return 0
