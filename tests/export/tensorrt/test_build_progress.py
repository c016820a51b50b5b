"""The bar of a build: what the builder's monitor tells is shown on a terminal, and nowhere else."""

import os
import signal
import sys
import threading
import time
from typing import Any

import pytest

from tood_deploy import reporter as progress
from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.export.tensorrt.build import build_progress, run_cancellable

pytest.importorskip("tensorrt_rtx")


def run_phases(quiet: bool = False) -> list[bool]:
    """Two phases, one in the other, of which the outer ends without the step that the inner belongs to."""
    with build_progress(load_flavour("tensorrt_rtx"), quiet) as plain:
        monitor: Any = plain
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing tactics", "Building engine", 3)
        answers = [monitor.step_complete("Timing tactics", 0)]
        monitor.phase_finish("Timing tactics")
        answers.append(monitor.step_complete("a phase that never began", 0))
        monitor.cancel()
        answers.append(monitor.step_complete("Building engine", 0))
        monitor.phase_finish("Building engine")
        monitor.phase_finish("Building engine")
    return answers


def test_cancelling_answers_no(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_phases() == [True, True, False]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_lines_elsewhere_unless_quiet(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PAUSE_S", 0.0)
    run_phases(quiet)
    assert ("building the engine: Timing tactics, step 1" in capsys.readouterr().err) is not quiet


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_on_a_terminal_unless_quiet(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_phases(quiet)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("cancelling" in shown.err) is not quiet


def test_ctrl_c_waits_for_the_builder_to_stop() -> None:
    stopped, ended = threading.Event(), []

    class Monitor:
        def cancel(self) -> None:
            stopped.set()

    def long_build() -> None:
        time.sleep(0.2)  # until the main thread waits
        os.kill(os.getpid(), signal.SIGINT)
        stopped.wait(10)
        ended.append(time.perf_counter())

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(long_build, Monitor())
    assert ended
    assert stopped.is_set()
