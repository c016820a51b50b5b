"""`make robustness`: the whole campaign, or as much of it as the time allows; then its table.

    PYTHONPATH=tests python -m robustness --cases 10000 --kills 200 --minutes 40

A later call goes on where this one stopped. `--case jpg/17` runs one case again, and keeps its
files; `--only "kill triton,jpg"` runs these rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from robustness.campaign import Campaign, run_case
from robustness.inputs import Seeds, targets
from robustness.kills import LIMITS, Kills
from robustness.table import failures, markdown_report, table

FOLDER = Path(".robustness")
COMMANDS = {"infer": 60, "openvino": 15, "triton": 40, "eval": 40, "train": 35, "bench": 10}
KILL_SHARES = {f"kill {name}": share for name, share in COMMANDS.items()}
KILL_SHARES |= {f"signal {name}": share // 3 for name, share in COMMANDS.items()}
LIMIT_SHARES = {f"{limit} {name}": 1 for limit in LIMITS for name in COMMANDS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="robustness", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="mutated inputs of all kinds")
    parser.add_argument("--kills", type=int, default=200, help="kills and signals")
    parser.add_argument("--limits", type=int, default=90, help="limits of memory, handles, disk")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--only", help="these rows of the table alone, by commas")
    parser.add_argument("--case", help="run this one again, such as jpg/17")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the table there")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    os.environ |= {"TOOD_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    seeds = made_in_a_child(folder / "seeds")
    chosen = targets(seeds)
    until_s = time.time() + 60 * arguments.minutes
    campaign = Campaign(folder, {name: target for name, (target, _) in chosen.items()})
    if arguments.case:
        kept, name = folder / "kept", arguments.case.split("/")[0]
        shutil.rmtree(kept, ignore_errors=True)
        if name in chosen:
            print(run_case(chosen[name][0], arguments.case, kept))
        else:
            print(Kills(folder, seeds, campaign.ledger).run_case(arguments.case))
        return 0
    counts = scaled({name: share for name, (_, share) in chosen.items()}, arguments.cases)
    ends = scaled(KILL_SHARES, arguments.kills) | scaled(LIMIT_SHARES, arguments.limits)
    ends |= {"soak infer": 1}
    if arguments.only:
        only = set(arguments.only.split(","))
        counts, ends = ({k: n for k, n in d.items() if k in only} for d in (counts, ends))
    if ends:
        Kills(folder, seeds, campaign.ledger).run(ends, until_s)
    campaign.run(counts, until_s)
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
