"""Runs cases in a worker process under a watchdog, with a ledger that a later call goes on from.

A target prepares a case in an empty folder from a seed, and gives what is to be called; out comes
one row a case: how it ended. Knows no target.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.files import TEMPORARY, remove_leftovers

HANG_S = 20.0  # of processor time, which a busy machine does not lengthen
HANG_WALL_S = 120.0  # for what waits and computes nothing
MEMORY_MB = 1500  # that one case may add to the peak
ADDRESS_SPACE = 12 * 2**30
OUTCOMES = ("clean error", "success", "traceback", "crash", "hang", "memory", "leftover", "silent")
GOOD = OUTCOMES[:2]


@dataclass(frozen=True)
class Prepared:
    """A case.

    Attributes:
        call: what is done; returns an exit code, or raises an error of ours.
        mutation: of its input, for the ledger.
        wrong: looks at what came out of a success, and says what is silently wrong; "" for nothing.
    """

    call: Callable[[], Any]
    mutation: str
    wrong: Callable[[], str] = lambda: ""


class Target(Protocol):
    def __call__(self, folder: Path, chance: random.Random) -> Prepared: ...


@dataclass(frozen=True)
class Row:
    """How a case ended; `place` is the innermost line of ours in a traceback."""

    case: str
    outcome: str
    line: str = ""
    place: str = ""
    mutation: str = ""
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)


class Ledger:
    """One JSON object a case, appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # cut by a kill
                    row = Row(**json.loads(line))
                    self.rows[row.case] = row

    def add(self, row: Row) -> None:
        self.rows[row.case] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


@contextlib.contextmanager
def captured(folder: Path) -> Iterator[list[str]]:
    """Descriptors 1 and 2 in files; the list gets what was printed on 2."""
    said: list[str] = []
    saved = os.dup(1), os.dup(2)
    paths = folder / "stdout.txt", folder / "stderr.txt"
    for number, path in zip((1, 2), paths, strict=True):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    try:
        yield said
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        for number, handle in zip((1, 2), saved, strict=True):
            os.dup2(handle, number)
            os.close(handle)
        said.append(paths[1].read_text("utf-8", "replace"))


def run_case(target: Target, case: str, folder: Path) -> Row:
    """Prepare and run a case in an empty folder."""
    chance = random.Random(case)
    inside, logs = folder / "case", folder / "logs"
    for part in (inside, logs):
        part.mkdir(parents=True)
    prepared = target(inside, chance)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    outcome, line, place = _call(prepared.call, logs)
    seconds = round(time.perf_counter() - started, 2)
    grown_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb)
    if outcome in GOOD and (left := [str(path.name) for path in inside.rglob(f"{TEMPORARY}*")]):
        outcome, line = "leftover", ", ".join(left)
    if outcome == "success" and (wrong := prepared.wrong()):
        outcome, line = "silent", wrong
    if outcome in GOOD and grown_mb > MEMORY_MB:
        outcome, line = "memory", f"{grown_mb} MB"
    return Row(case, outcome, line[:300], place, prepared.mutation, seconds)


def _call(work: Callable[[], Any], logs: Path) -> tuple[str, str, str]:
    """Return the outcome, a line that says why, and the place of a traceback."""
    of_threads: list[str] = []
    hook, threading.excepthook = (
        threading.excepthook,
        lambda args: of_threads.append(
            "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        ),
    )
    trace, code = "", 0
    try:
        with captured(logs) as said:
            try:
                code = work() or 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except (ToodError, CheckFailed) as error:
                print("error:", " ".join(str(error).split()), file=sys.stderr)
                code = 2
            except BaseException:
                trace = traceback.format_exc()
    finally:
        threading.excepthook = hook
    if trace := trace or (of_threads[0] if of_threads else ""):
        return "traceback", trace.strip().splitlines()[-1], _place(trace)
    lines = [line for line in said[0].splitlines() if line.startswith(("error: ", "failed: "))]
    if not code:
        return "success", "", ""
    if code in (1, 2) and len(lines) == 1:
        return "clean error", lines[0], ""
    return "traceback", f"exit {code} with {len(lines)} lines: {said[0][-200:]}", "no error line"


def _place(trace: str) -> str:
    frames = [line.strip() for line in trace.splitlines() if "/tood_deploy/" in line]
    return frames[-1].split("/tood_deploy/")[-1].replace('"', "") if frames else ""


class Campaign:
    """Cases of targets, numbered from 0, in a forked worker that is replaced when it dies."""

    def __init__(self, folder: Path, targets: dict[str, Target]) -> None:
        self.folder, self.targets = folder, targets
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(folder / "ledger.jsonl")

    def run(self, counts: dict[str, int], until_s: float = float("inf")) -> None:
        """Run what the ledger lacks; stop when the clock says `until_s`."""
        cases = [f"{name}/{number}" for name, count in counts.items() for number in range(count)]
        while time.time() < until_s:
            missing = [case for case in cases if case not in self.ledger.rows]
            if not missing:
                return
            self._run_in_worker(missing, until_s)
            self.ledger = Ledger(self.ledger.path)

    def _run_in_worker(self, cases: list[str], until_s: float) -> None:
        current = self.folder / "current"
        current.write_text("")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._work(cases, current)
        verdict, case, begun_s, begun_at = "", "", 0.0, time.time()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
            if (now := current.read_text()) != case:
                case, begun_s, begun_at = now, processor_s(child), time.time()
            hangs = processor_s(child) - begun_s > HANG_S or time.time() - begun_at > HANG_WALL_S
            if case and hangs:
                verdict = "hang"
            if verdict or time.time() > until_s:
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        case = current.read_text()
        if (
            case
            and case not in Ledger(self.ledger.path).rows
            and (verdict or time.time() <= until_s)
        ):
            line = f"signal {-code}" if code < 0 else f"the worker ended with {code}"
            self.ledger.add(Row(case, verdict or "crash", line))

    def _work(self, cases: list[str], current: Path) -> None:
        """Run cases one after the other; never returns."""
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            scratch = self.folder / "scratch"
            for case in cases:
                shutil.rmtree(scratch, ignore_errors=True)
                remove_leftovers.cache_clear()
                current.write_text(case)
                self.ledger.add(run_case(self.targets[case.rsplit("/", 1)[0]], case, scratch))
            current.write_text("")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def processor_s(pid: int) -> float:
    """Return the processor time of a process so far."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
