"""A command and its process: signals, stdout that is full, closed, or read by nobody."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tood_deploy.cli.common import BROKEN_PIPE, run_command
from tood_deploy.errors import InputError, Stopped
from tood_deploy.files import atomic_path
from tood_deploy.reporter import Reporter

WRITER = """
import sys, time
from collections.abc import Sequence
from pathlib import Path
from tood_deploy.cli.common import (run_command,)
from tood_deploy.files import atomic_path

def work(argv):
    with atomic_path(Path(sys.argv[1])) as temporary:
        print("ready", flush=True)
        try:
            time.sleep(60)
        finally:
            time.sleep(0.3)  # what is completed takes its time
    return 0

sys.exit(run_command(work))
"""


@pytest.mark.parametrize(
    ("name", "code", "line", "times"),
    [
        ("SIGINT", 130, "interrupted\n", 2),  # a terminal and a parent process send it both
        ("SIGTERM", 143, "terminated\n", 1),
        ("SIGHUP", 129, "ended by a hang-up\n", 1),
    ],
)
def test_a_signal_ends_a_command_in_good_order(
    name: str, code: int, line: str, times: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out.json")]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(times):
            process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, line)
    assert list(tmp_path.iterdir()) == []


def test_what_a_parent_ignores_stays_ignored() -> None:
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(lambda _: os.kill(os.getpid(), signal.SIGHUP) or 0, []) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_of_a_program_come_back() -> None:
    def stop(argv: object) -> int:
        raise Stopped(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(stop, []) == 143
    assert signal.getsignal(signal.SIGTERM) == before


PRINTER = """
import sys
from tood_deploy.cli.common import (run_command,)
from tood_deploy.reporter import Reporter

def work(argv):
    for line in range(int(sys.argv[1])):
        Reporter().result(f"line {line}")
    if not int(sys.argv[1]):
        print("without a flush")
    return 0

sys.exit(run_command(work))
"""


def run_printer(lines: int, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'"$@" {redirection}'
    arguments = ["sh", "-c", command, "sh", sys.executable, "-c", PRINTER, str(lines)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        arguments, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("lines", [0, 3])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_stdout_that_takes_nothing_is_one_line(redirection: str, lines: int) -> None:
    result = run_printer(lines, redirection)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: stdout: cannot be written")


def test_a_stdout_that_nobody_reads_ends_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", PRINTER, "3"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (BROKEN_PIPE, b"")


def test_a_stderr_that_takes_nothing_changes_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    code = "from tood_deploy.reporter import Reporter; Reporter().warn('a'); print('done')"
    for redirection in ("2>/dev/full", "2>&-"):
        command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", code]
        assert subprocess.run(command, check=False).returncode == 0
    assert capfd.readouterr().out == "done\ndone\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/data/a.json"), "/data/a.json: No space left"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(argv: object) -> int:
        raise error

    assert run_command(work, []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_bug_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 // 0, [])


def test_results_and_files_come_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(argv: object) -> int:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("whole")
        Reporter().result("written")
        return 0

    assert run_command(work, []) == 0
    assert capsys.readouterr().out == "written\n"
    assert (tmp_path / "a.txt").read_text() == "whole"


NOISY = """
import os, sys
from tood_deploy.cli.common import (run_command,)
from tood_deploy.reporter import Reporter

def work(argv):
    for line in (b"libpng warning: iCCP", b"red \\x1b[31m and \\xff", b"libpng warning: iCCP"):
        os.write(2, line + b"\\n")
    Reporter().warn("ours")
    return 0

sys.exit(run_command(work))
"""


@pytest.mark.parametrize(
    ("arguments", "notes"),
    [([], {"note: libpng warning: iCCP", r"note: red \x1b[31m and \xff"}), (["--quiet"], set())],
)
def test_lines_of_libraries_are_notes(arguments: list[str], notes: set[str]) -> None:
    """Every line once, control characters escaped, beside our own lines."""
    command = [sys.executable, "-c", NOISY, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(result.stderr.splitlines()) == sorted({*notes, "warning: ours"})


def test_a_crash_leaves_its_trace() -> None:
    code = NOISY.replace('Reporter().warn("ours")', "os.abort()")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert b"in work" in result.stderr


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("Exception from src: std::bad_alloc"), "memory"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit"),
        (RuntimeError("can't start new thread"), "ulimit"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_shortage_is_one_line_and_no_file_is_to_blame_alone(
    error: Exception, named: str, wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(argv: Sequence[str] | None) -> int:
        if not wrapped:
            raise error
        raise InputError("a.mp4: damaged") from error

    assert run_command(command, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_an_error_of_another_kind_passes() -> None:
    def command(argv: Sequence[str] | None) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(command, [])
