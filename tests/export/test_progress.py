"""The progress bar: on a terminal only, and never when asked to be quiet."""

import io
import sys

import pytest

from tood_deploy.export.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "quiet", "shown"), [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)])
def test_on_a_terminal_only(stream: type[io.StringIO], quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("calibrating", quiet) as progress:
        progress(3, 7)
        progress(7, 7)
    assert ("calibrating" in stderr.getvalue() and "7/7" in stderr.getvalue()) == shown
    assert bool(stderr.getvalue()) == shown
