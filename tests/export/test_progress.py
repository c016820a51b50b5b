"""Progress: a bar on a terminal, lines elsewhere, nothing when asked to be quiet."""

import io
import sys

import pytest

from tood_deploy.reporter import Heartbeat, ProgressLines, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("calibrating", quiet) as progress:
        progress(3, 7)
        progress(7, 7)
    return stream.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = shown(Terminal(), False, monkeypatch)
    assert "calibrating" in bar
    assert "7/7" in bar
    assert "\x1b" in bar


def test_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), False, monkeypatch) == "calibrating: 3 of 7\ncalibrating: 7 of 7\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_quiet(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shown(stream(), True, monkeypatch)


def lines_of(calls: list[tuple[float, int, int]]) -> list[str]:
    """What is said when, at these seconds, so many of so many are done."""
    said: list[str] = []
    now = [0.0]
    progress = ProgressLines("work", said.append, lambda: now[0])
    for seconds, done, total in calls:
        now[0] = seconds
        progress(done, total)
    return [line.removeprefix("work: ") for line in said]


def test_every_fourth_part_of_fast_work() -> None:
    assert lines_of([(0, done, 128) for done in range(129)]) == [
        "0 of 128",
        "32 of 128",
        "64 of 128",
        "96 of 128",
        "128 of 128",
    ]


def test_every_half_a_minute_of_slow_work() -> None:
    assert lines_of([(10 * done, done, 1000) for done in range(8)]) == [
        "0 of 1000",
        "3 of 1000",
        "6 of 1000",
    ]


def test_several_steps_under_one_description() -> None:
    assert lines_of([(0, 0, 4), (0, 4, 4), (0, 0, 4), (0, 1, 9)]) == [
        "0 of 4",
        "4 of 4",
        "0 of 4",
        "1 of 9",
    ]


def test_nothing_to_do() -> None:
    assert lines_of([(0, 0, 0)]) == ["0 of 0"]


def test_a_heartbeat_every_half_a_minute() -> None:
    said: list[str] = []
    now = [100.0]
    beat = Heartbeat(said.append, lambda: now[0])
    for step in range(8):
        now[0] = 100 + 10 * step
        beat(f"step {step}")
    assert said == ["step 3, for 30 s", "step 6, for 60 s"]
