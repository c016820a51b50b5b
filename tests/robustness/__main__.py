"""`make robustness`: the whole campaign, or as much of it as the time allows; then its table.

    PYTHONPATH=tests python -m robustness --cases 10000 --kills 200 --minutes 40

A later call goes on where this one stopped. `--case jpg/17` runs one case again, and keeps its
files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from robustness.campaign import Campaign, run_case
from robustness.inputs import Seeds, targets
from robustness.kills import Kills
from robustness.table import failures, markdown_report, table

FOLDER = Path(".robustness")
KILL_SHARES = {"kill infer": 70, "kill openvino": 25, "kill eval": 30, "kill train": 25}
SIGNAL_SHARES = {"signal infer": 20, "signal openvino": 10, "signal eval": 10, "signal train": 10}


def main() -> int:
    parser = argparse.ArgumentParser(prog="robustness", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="mutated inputs of all kinds")
    parser.add_argument("--kills", type=int, default=200, help="kills and signals")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--case", help="run this one again, such as jpg/17")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the table there")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    os.environ |= {"TOOD_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    seeds = made_in_a_child(folder / "seeds")
    chosen = targets(seeds)
    if arguments.case:
        kept = folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        print(run_case(chosen[arguments.case.split("/")[0]][0], arguments.case, kept))
        return 0
    until_s = time.time() + 60 * arguments.minutes
    campaign = Campaign(folder, {name: target for name, (target, _) in chosen.items()})
    kills = Kills(folder, seeds, campaign.ledger)
    shares = KILL_SHARES | SIGNAL_SHARES
    kills.run(scaled(shares, arguments.kills), until_s)
    campaign.run(scaled({name: n for name, (_, n) in chosen.items()}, arguments.cases), until_s)
    rows = campaign.ledger.rows.values()
    print(table(rows))
    print(failures(rows))
    if arguments.report:
        arguments.report.write_text(markdown_report(rows), encoding="utf-8")
    return int(any(row.outcome not in ("clean error", "success") for row in rows))


def made_in_a_child(folder: Path) -> Seeds:
    """Make the seeds in a process of their own: what starts threads here cannot be forked."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Seeds(folder)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the seeds cannot be made"
    return Seeds(folder)


def scaled(shares: dict[str, int], total: int) -> dict[str, int]:
    """Return the shares of another total, at least one each."""
    return {name: max(1, round(n * total / sum(shares.values()))) for name, n in shares.items()}


if __name__ == "__main__":
    raise SystemExit(main())
