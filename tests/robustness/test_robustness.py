"""A small part of the campaign, and the instrument itself. `make robustness` runs all of it."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
from robustness.campaign import GOOD, Campaign, Ledger, Prepared, Row, run_case
from robustness.mutations import mutate_bytes, mutate_tree
from robustness.table import failures, table

from tood_deploy.errors import InputError

# Of each target as many cases as two minutes allow on two cores.
CASES = {"jpg": 15, "png": 15, "tif": 10, "webp": 10, "mp4": 8, "annotations": 40, "results": 40}
CASES |= {"mapping": 20, "manifest": 60, "classes": 20, "list": 15, "pth": 15, "safetensors": 15}
CASES |= {"predictions": 20, "onnx": 8, "source": 4}


def test_a_seed_gives_one_mutation() -> None:
    data, tree = bytes(range(200)), {"a": [1, {"b": 2}], "c": "text"}
    for seed in range(50):
        twice = [mutate_bytes(data, random.Random(seed), data) for _ in range(2)]
        assert twice[0] == twice[1]
        trees = [repr(mutate_tree(tree, random.Random(seed))) for _ in range(2)]
        assert trees[0] == trees[1]
    assert tree == {"a": [1, {"b": 2}], "c": "text"}


def fails(kind: str) -> Prepared:
    def call() -> int:
        if kind == "clean error":
            raise InputError("not an image")
        if kind == "traceback":
            raise ZeroDivisionError
        if kind == "hang":
            while True:
                pass
        if kind == "crash":
            import os

            os.abort()
        return 0

    return Prepared(call, kind, lambda: "lost" if kind == "silent" else "")


@pytest.mark.parametrize("kind", ["clean error", "traceback", "silent", "success"])
def test_an_outcome_is_told_from_the_others(kind: str, tmp_path: Path) -> None:
    row = run_case(lambda folder, chance: fails(kind), "x/0", tmp_path)
    assert row.outcome == kind


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustness.campaign.HANG_S", 1.0)
    kinds = ("success", "crash", "hang", "clean error")

    def target(folder: Path, chance: random.Random) -> Prepared:
        return fails(kinds[sum(1 for _ in open(tmp_path / "ledger.jsonl"))])  # noqa: PTH123

    (tmp_path / "ledger.jsonl").touch()
    campaign = Campaign(tmp_path, {"x": target})
    campaign.run({"x": 4}, time.time() + 60)
    assert [campaign.ledger.rows[f"x/{number}"].outcome for number in range(4)] == [*kinds]
    assert "| x | 4 | 1 | 1 | 0 | 1 | 1 |" in table(campaign.ledger.rows.values())
    assert "x/1" in failures(campaign.ledger.rows.values())


def test_a_ledger_that_was_cut_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(Row("x/0", "success"))
    with ledger.path.open("a") as file:
        file.write('{"case": "x/1", "outc')
    assert list(Ledger(ledger.path).rows) == ["x/0"]


def run_small_campaign(folder: Path) -> None:
    from robustness.__main__ import made_in_a_child
    from robustness.inputs import targets

    chosen = targets(made_in_a_child(folder / "seeds"))
    campaign = Campaign(folder, {name: target for name, (target, _) in chosen.items()})
    campaign.run(CASES, time.time() + 120)


@pytest.mark.slow
def test_a_small_campaign(tmp_path: Path) -> None:
    # The campaign forks, which PyTorch's threads in this process would not survive.
    child = multiprocessing.get_context("spawn").Process(
        target=run_small_campaign, args=(tmp_path,)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    rows = Ledger(tmp_path / "ledger.jsonl").rows.values()
    assert len(rows) > 50
    bad = [row for row in rows if row.outcome not in GOOD]
    assert not bad, failures(rows)
