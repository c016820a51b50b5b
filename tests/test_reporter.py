"""The reporter: a bar on a terminal, lines elsewhere, problems alone when quiet."""

import io
import sys

import pytest
from rich.table import Table

from tood_deploy.reporter import Reporter, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest sets stderr again between the fixtures and the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def use_all(reporter: Reporter) -> None:
    reporter.info("an info")
    reporter.warn("a fault")
    reporter.result("a result")
    table = Table("a table")
    reporter.table(table)
    for _ in reporter.track(range(3), "counting"):
        pass


@pytest.mark.parametrize(
    ("reporter", "out", "err"),
    [
        (Reporter(), ["a result", "a table"], "an info\nwarning: a fault\n"),
        (Reporter(quiet=True), [], "warning: a fault\n"),
        (Reporter.silent(), [], ""),
    ],
)
def test_results_on_stdout_talk_on_stderr(
    reporter: Reporter, out: list[str], err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    use_all(reporter)
    printed = capsys.readouterr()
    assert printed.err == err
    assert all(text in printed.out for text in out)
    assert bool(printed.out) == bool(out)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with Reporter().progress("calibrating") as task:
        task.update(3, 7, "12 fps")
        task.update(7)
    shown = terminal.getvalue()
    assert all(text in shown for text in ("calibrating", "7/7", "12 fps", "\x1b"))


def test_lines_go_above_the_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = use_terminal(monkeypatch)
    reporter = Reporter()
    with reporter.progress("outer", 2) as outer, reporter.progress("inner", unit="bytes") as inner:
        inner.update(1_500_000, 3_000_000)
        reporter.warn("[not markup]")
        reporter.result("a result")
        outer.advance()
    reporter.info("after it")
    shown = terminal.getvalue()
    assert all(text in shown for text in ("outer", "1.5 MB/3.0 MB", "warning: [not markup]\n"))
    assert shown.endswith("after it\n")
    assert capsys.readouterr().out == "a result\n"  # a pipe: results stay in it


def test_an_error_takes_the_bars_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    reporter = Reporter()
    with pytest.raises(ValueError, match="stop"), reporter.progress("work", 2):
        raise ValueError("stop")
    length = len(terminal.getvalue())
    reporter.info("plain")
    assert terminal.getvalue()[length:] == "plain\n"


@pytest.mark.parametrize("reporter", [Reporter(quiet=True), Reporter.silent()])
def test_no_bar_when_quiet(reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with reporter.progress("work", 2) as task:
        task.advance()
    assert not terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "total", "expected"),
    [
        (1, 4, []),
        (2, 4, ["work: 3 of 4, well", "work: 4 of 4, well"]),
        (1, 40, ["work: 5 of 40, well", "work: 35 of 40, well", "work: 40 of 40, well"]),
        (10, 0, ["work: 1, well", "work: 4, well", "work: 5, well"]),
    ],
)
def test_lines_in_a_pipe(
    seconds: int, total: int, expected: list[str], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter(clock=clock).progress("work", total or None) as task:
        for _ in range(total or 5):
            clock.now += seconds
            task.advance(state="well")
    assert capsys.readouterr().err.splitlines() == expected


def test_tasks_share_the_pauses(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(clock=clock)
    with reporter.progress("outer", 3) as outer:
        for _ in range(3):
            for _ in reporter.track("abcd", "inner"):
                clock.now += 4
            outer.advance()
    assert capsys.readouterr().err.splitlines() == [
        "inner: 2 of 4",
        "inner: 4 of 4",
        "inner: 2 of 4",
        "inner: 4 of 4",
    ]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("traffic light", "traffic light"),
        ("\u00e9t\u00e9 \u4ea4\u901a \U0001f600", "\u00e9t\u00e9 \u4ea4\u901a \U0001f600"),
        ("$x_1$ [/] [red] :smile: <b>", "$x_1$ [/] [red] :smile: <b>"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\r\tc", r"a\x0ab\x0d\x09c"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("a\u202eb\u2028", r"a\u202eb\u2028"),
        ("\x9b2J", r"\x9b2J"),
    ],
)
def test_a_name_is_shown_literally(name: str, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_lines_of_any_text_are_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    reporter = Reporter()
    reporter.result("caf\udce9 \u4ea4 \x1b[31m\nsecond line")
    reporter.warn("caf\udce9 \u4ea4")
    for stream in (out, err):
        stream.flush()
    written = out.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]
    assert written.startswith(r"caf\xe9 ")
    assert written.count("\n") == 2
    assert "\x1b" not in written
    assert b"warning: caf" in err.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
