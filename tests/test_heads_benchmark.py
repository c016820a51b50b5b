"""The comparison of heads: what it trains, and what its page says of trainings that are there."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the benchmarks are no part of the package

from benchmarks import heads
from tood_deploy.benchmark.latency import peak
from tood_deploy.cli.train import parser
from tood_deploy.training.train import choose_recipe


def add_run(work: Path, name: str, seed: int, ap: float, epochs: int = 12) -> Path:
    """A finished training."""
    folder = heads.run_folder(work, name, epochs, seed)
    folder.mkdir(parents=True)
    row = {"kind": "epoch", "epoch": epochs} | dict.fromkeys(heads.METRICS, 0.5) | {"AP": ap}
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("name", heads.VARIANTS)
def test_every_variant_can_be_trained(name: str) -> None:
    given = parser().parse_args(heads.VARIANTS[name].arguments(9))
    changes = {"atss_epochs": given.atss_epochs, "loss": given.loss}
    recipe, _ = choose_recipe(given.preset, {k: v for k, v in changes.items() if v is not None})
    assert (recipe.atss_epochs == 9) == (name == "t-head-atss")
    assert (recipe.loss == "tood") == (name == "parallel-aligned")


def test_finished_trainings_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[list[str]] = []
    monkeypatch.setattr(heads, "tood_train", lambda argv: trained.append(argv) or 0)
    add_run(tmp_path, "tood", 0, 0.5)
    common = ["train", "--work", str(tmp_path), "--data", "data", "--epochs", "12"]
    assert heads.main([*common, "--seeds", "0", "--variants", "tood", "gfl"]) == 0
    assert [argv[0] for argv in trained] == ["tiny-gfl"]
    assert trained[0][-1] == str(tmp_path / "gfl-e12-s0")


def test_the_page_says_how_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "network_cost", lambda *_: (32_200_494, 210.39))
    for seed, ap in enumerate((0.5, 0.52, 0.54)):
        add_run(tmp_path, "tood", seed, ap)
    add_run(tmp_path, "parallel-aligned", 0, 0.51)
    unfinished = add_run(tmp_path, "gfl", 0, 0.6)
    (unfinished / "model.safetensors").unlink()
    assert heads.main(["report", "--work", str(tmp_path), "--output", str(tmp_path / "a.md")]) == 0
    page = (tmp_path / "a.md").read_text()
    assert "| 3 | 0.520 | 0.500 to 0.540 |" in page
    assert "| 1 | 0.510 | one seed |" in page
    assert "Not trained: atss, gfl, paa, t-head-atss." in page
    assert "| r50-1x | 32.20 | 210.4 | 42.4 |" in page
    assert "Not measured." in page


def test_alignment_is_the_mean_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[list[str]] = []
    monkeypatch.setattr(heads, "tood_eval", lambda argv: evaluated.append(argv) or 0)
    for seed, value in ((0, 0.4), (1, 0.5), (2, None)):
        folder = add_run(tmp_path, "tood", seed, 0.5) / heads.ALIGNMENT
        row = {"correlation": value, "surest_correlation": 0.6, "tight_iou": 0.7}
        values = {"classes": {"cat": row}, "together": row}
        folder.mkdir()
        (folder / heads.REPORT).write_text(json.dumps({"alignment": values}))
    missing = add_run(tmp_path, "gfl", 0, 0.5)
    (table,) = heads.alignment(tmp_path)
    assert "| tood | 12 | 3 | 0.450 | 0.450 | 0.600 | 0.700 |" in table
    assert heads.main(["align", "--work", str(tmp_path), "--data", "data"]) == 0
    assert [argv[0] for argv in evaluated] == [str(missing / "model.safetensors")]


def test_latencies_are_compared_in_one_runtime(tmp_path: Path) -> None:
    measurements = []
    for i, preset in enumerate(heads.LARGE):
        for runtime in heads.RUNTIMES:
            calls = [{"total": 10.0 + 10 * i}, {"total": 10.0 + 10 * i}]
            measurements.append(
                {
                    "model": f"{preset}, {runtime}",
                    "ms": {heads.END_TO_END: {"total": {"median": 10.0 + 10 * i}}},
                    "rounds": [{heads.END_TO_END: calls}] * 3,
                }
            )
    content = {"measurements": measurements, "facts": {"load": "low"}, "warnings": ["busy"]}
    (tmp_path / "latency.json").write_text(json.dumps(content))
    (tmp_path / "weights.txt").write_text("as given")
    table, facts = heads.latency(tmp_path)
    assert "| r50-1x | 10.0 | 10.0 | 10.0 | 10.0 |" in table
    assert "20.0 (0.50, 0.50 to 0.50)" in table
    assert facts == "- load: low\n- warning: busy"
