"""The demo: which commands it runs, and on what."""

from pathlib import Path

import pytest

from tood_deploy.cli import bench, export, infer, train
from tood_deploy.cli import eval as evaluation
from tood_deploy.demo import __main__ as demo

COMMANDS = {
    "tood-train": train,
    "tood-export": export,
    "tood-infer": infer,
    "tood-eval": evaluation,
    "tood-bench": bench,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Arguments by command, of stand-ins that do nothing."""
    given: dict[str, list[str]] = {}
    for name, module in COMMANDS.items():
        monkeypatch.setattr(
            module, "main", lambda argv, name=name: given.update({name: list(argv)}) or 0
        )
    for name in ("IMAGES", "TRAIN_IMAGES"):
        monkeypatch.setattr(demo, name, 2)
    return given


def test_it_runs_shipped_weights(calls: dict[str, list[str]], tmp_path: Path) -> None:
    assert demo.demo_command(["--output", str(tmp_path)]) == 0
    assert list(calls) == list(COMMANDS)[1:]
    assert calls["tood-export"][0] == str(demo.WEIGHTS)
    assert demo.WEIGHTS.is_file()
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 2


def test_it_trains_another_detector_first(calls: dict[str, list[str]], tmp_path: Path) -> None:
    assert demo.demo_command(["--output", str(tmp_path), "--train", "tiny-gfl"]) == 0
    assert list(calls) == list(COMMANDS)
    assert calls["tood-train"][0] == "tiny-gfl"
    train.parser().parse_args(calls["tood-train"])
    checkpoint = str(Path(calls["tood-train"][-1]) / "model.safetensors")
    assert calls["tood-export"][0] == checkpoint
    assert checkpoint in calls["tood-bench"]


def test_it_stops_at_the_first_that_fails(
    calls: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "main", lambda argv: 2)
    assert demo.demo_command(["--output", str(tmp_path)]) == 2
    assert list(calls) == ["tood-export"]
