"""The log of a run: files for programs, lines and progress for a person."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from recording import RecordingReporter

from tood_deploy.errors import OutputError
from tood_deploy.reporter import Reporter
from tood_deploy.training.logger import LOG, Journal, read_log


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_journal_writes_tensorboard_and_json_lines(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = {"step": 2, "cls": 1.0, "box": 2.0, "lr": 0.1, "images_per_s": 3.0}
    reporter = RecordingReporter()
    with Journal(tmp_path, reporter, every=2) as journal:
        journal.step(values | {"step": 1})
        journal.step(values)
        journal.write("epoch", {"step": 2, "epoch": 1, "AP": 0.25})
        journal.images([np.zeros((8, 8, 3), np.uint8)], 2)
    assert [entry["step"] for entry in read_log(tmp_path, "step")] == [2]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("epoch/AP")[0].value == 0.25
    assert events.Tags()["images"] == ["validation/0"]


def test_a_folder_that_goes_away_is_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard writes in a thread of its own, whose traceback nobody wants."""
    pytest.importorskip("torch.utils.tensorboard")
    output = tmp_path / "run"
    with (  # noqa: PT012
        pytest.raises(OutputError, match="TensorBoard's files cannot be written"),
        Journal(output, Reporter.silent()) as journal,
    ):
        shutil.rmtree(output)
        output.mkdir()
        for step in range(2000):
            journal.write("step", {"step": step, "cls": 1.0})
            time.sleep(0.001)
    assert "Traceback" not in capfd.readouterr().err


def test_journal_without_tensorboard_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    reporter = RecordingReporter()
    with Journal(tmp_path, reporter) as journal:
        journal.write("step", {"step": 1})
    assert "no files for TensorBoard are written" in reporter.lines[0]
    assert "[train]" in reporter.lines[0]
    assert read_log(tmp_path, "step")[0]["step"] == 1


def test_a_silent_journal_writes_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal.silent() as journal:
        journal.reporter.warn("hello")
        journal.write("step", {"step": 1})
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_on_from_what_an_earlier_call_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that jumps: where there is no terminal, long work leaves lines."""
    now = iter(range(0, 10_000, 100))
    with Journal(tmp_path, Reporter(clock=lambda: next(now))) as journal:
        journal.start_epoch(1, 12, steps=9, done=4)
        journal.step({"step": 14, "cls": 1.0, "box": 2.0, "lr": 0.1, "images_per_s": 3.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("epoch 2/12: 4 of 9")
    assert "epoch 2/12: 5 of 9, cls 1.000 box 2.000 lr 0.1 3.0 images/s" in lines[1]


def test_entries_beyond_a_step_and_cut_lines_are_forgotten(tmp_path: Path) -> None:
    with Journal(tmp_path, Reporter.silent()) as journal:
        for step in (1, 2, 3):
            journal.write("step", {"step": step})
        with (tmp_path / LOG).open("a") as file:
            file.write('{"kind": "step", "st')
        journal.forget_after(2)
    assert [entry["step"] for entry in read_log(tmp_path, "step")] == [1, 2]
    assert len((tmp_path / LOG).read_text().splitlines()) == 2
