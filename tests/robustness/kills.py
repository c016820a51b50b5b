"""Commands that are killed, get a signal, or run out of memory, file handles or disk.

What is looked at: how they end, what is left, and what the next run makes of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import cv2
from robustness.campaign import GOOD, Ledger, Row, processor_s
from robustness.inputs import SMALL, SOAK_FRAMES, WEIGHTS, Seeds

from tood_deploy.files import TEMPORARY
from tood_deploy.manifest import mismatch, read_manifest

SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
LIMIT_S = 400.0  # of processor time, which a busy machine does not lengthen
LIMIT_WALL_S = 3600.0  # for what waits and computes nothing
HANDLES = 12  # at most so many more than are open at the start
MEMORY = 500 * 2**20  # at most so much more address space
DISK = 2 * 2**20  # the largest file, at most
SOAK_MB, SOAK_HANDLES, SOAK_THREADS = 20, 2, 2  # between a fifth of a soak and its end


def preload() -> None:
    """Import what the commands use, and start no thread: what is forked then starts at once."""
    for name in (
        "torch onnxruntime tood_deploy.cli.eval tood_deploy.cli.export tood_deploy.cli.infer "
        "tood_deploy.cli.train tood_deploy.benchmark.evaluation.report tood_deploy.export.export "
        "tood_deploy.training.train tood_deploy.inference.run tood_deploy.training.report "
        "tood_deploy.cli.bench tood_deploy.benchmark.latency.run tood_deploy.export.to_openvino"
    ).split():
        import_module(name)


class Run:
    """A command in a fork of this process; `limit` is called in the fork."""

    def __init__(
        self, command: Sequence[object], log: Path, limit: Callable[[], None] | None = None
    ) -> None:
        self.log, self.code, self.limit = log, None, limit
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run([str(part) for part in command])

    def _run(self, command: list[str]) -> None:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(handle, number)
            faulthandler.enable()
            main = import_module(f"tood_deploy.cli.{command[0].removeprefix('tood-')}").main
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if self.limit is not None:
                self.limit()
            code = main(command[1:])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is not None

    def wait(self) -> int:
        """Return the exit code; -999 for a command that hangs, and is killed."""
        until = time.time() + LIMIT_WALL_S
        while not self.ended():
            time.sleep(0.01)
            if time.time() > until or processor_s(self.pid) > LIMIT_S:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = -999
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


@dataclass(frozen=True)
class Kind:
    """A command that is killed.

    Attributes:
        command: for an output folder.
        unreadable: says what in the folder cannot be read; "" where all can.
    """

    command: Callable[[Path], list[object]]
    unreadable: Callable[[Path], str]


def kinds(seeds: Seeds) -> dict[str, Kind]:
    """Return what is killed, by name."""
    model, images = seeds["tiny.onnx"], seeds["scenes"] / "images"
    truth = seeds["annotations.json"]
    data = ["--train-json", truth, "--train-images", images, "--imgsz", "64", "96"]

    def infer(folder: Path) -> list[object]:
        outputs = ["--json", folder / "o.json", "--jsonl", folder / "o.jsonl"]
        drawn = ["--output", folder / "o.mp4", "--crops", folder / "crops"]
        return ["tood-infer", model, seeds["long.mp4"], *outputs, *drawn, *SMALL]

    def openvino(folder: Path) -> list[object]:
        output = ["--to", "openvino", "--output", folder / "x.xml"]
        return ["tood-export", model, *output, "--quiet"]

    def triton(folder: Path) -> list[object]:
        output = ["--to", "triton", "--device", "cpu", "--output", folder / "models"]
        return ["tood-export", model, *output, "--quiet"]

    def bench(folder: Path) -> list[object]:
        short = ["--rounds", "1", "--turn-seconds", "0.05", "--warmup-seconds", "0.1"]
        size = ["--imgsz", "64", "96", "--threads", "1", "--quiet"]
        return ["tood-bench", "latency", model, "--output", folder / "report", *short, *size]

    def evaluate(folder: Path) -> list[object]:
        output = ["--output", folder / "report", "--quiet", "--threads", "1"]
        return ["tood-eval", model, "--annotations", truth, "--images", images, *output]

    def train(folder: Path) -> list[object]:
        recipe = ["--checkpoint", WEIGHTS, "--epochs", "2", "--batch", "2", "--save-every", "1"]
        place = ["--output", folder / "run", "--resume", "--threads", "1", "--quiet"]
        return ["tood-train", "tiny", *data, *recipe, *place]

    return {
        "infer": Kind(infer, _infer_outputs),
        "openvino": Kind(openvino, lambda folder: _artefact(folder / "x.xml")),
        "triton": Kind(triton, _repository),
        "bench": Kind(bench, _json_files),
        "eval": Kind(evaluate, _json_files),
        "train": Kind(train, _checkpoint),
    }


def _infer_outputs(folder: Path) -> str:
    if (folder / "o.json").exists():
        json.loads((folder / "o.json").read_text())
    if (folder / "o.jsonl").exists():
        for line in (folder / "o.jsonl").read_bytes().split(b"\n")[:-1]:
            json.loads(line)
    if (folder / "o.mp4").exists():
        capture = cv2.VideoCapture(str(folder / "o.mp4"))
        if not capture.isOpened():
            return "o.mp4 does not open"
    crops = (path for path in (folder / "crops").glob("*.jpg") if not path.name.startswith("."))
    return ", ".join(path.name for path in crops if cv2.imread(str(path)) is None)


def _json_files(folder: Path) -> str:
    for path in (path for path in folder.rglob("*.json") if not _is_hidden(path, folder)):
        json.loads(path.read_text(encoding="utf-8"))
    return ""


def _repository(folder: Path) -> str:
    """Tell whether a repository has a model of which something is missing."""
    models = folder / "models"
    for model in sorted(models.iterdir()) if models.is_dir() else []:
        versions = [*model.glob("1/model.*")]
        if not _is_hidden(model, folder) and not (versions and (model / "config.pbtxt").is_file()):
            return f"{model.name} has no model.onnx or no config.pbtxt"
    return ""


def _artefact(path: Path) -> str:
    manifest = read_manifest(path)
    return mismatch(path, manifest) if manifest else ""


def _checkpoint(folder: Path) -> str:
    from tood_deploy.training.checkpoints import read_training_state

    for name in ("last.pth", "best.pth"):
        if (folder / "run" / name).exists():
            read_training_state(folder / "run" / name)
    return ""


class Kills:
    """Kills, signals and limits, numbered from 0, in the ledger of a campaign."""

    def __init__(self, folder: Path, seeds: Seeds, ledger: Ledger) -> None:
        self.folder, self.ledger, self.kinds = folder / "kills", ledger, kinds(seeds)
        self.seeds = seeds
        self.whole_s: dict[str, float] = {}
        preload()

    def run(self, counts: dict[str, int], until_s: float = float("inf")) -> None:
        """Run what the ledger lacks.

        "kill infer/3" is a SIGKILL, "signal infer/3" another one; "memory infer/3" has a limit of
        memory, "handles" of file handles, "disk" of what a file may hold; "soak" is a long run.
        """
        for name, count in counts.items():
            for number in range(count):
                case = f"{name}/{number}"
                if case not in self.ledger.rows and time.time() < until_s:
                    self.ledger.add(self.run_case(case))

    def run_case(self, case: str) -> Row:
        """Start a command, disturb it, look at what is left, and run it again."""
        what, kind_name = case.split("/")[0].split(" ")
        started = time.perf_counter()
        if what == "soak":
            outcome, line, where = self._soak()
        else:
            kind, chance, folder = self.kinds[kind_name], random.Random(case), self._empty_folder()
            end = self._limited if what in LIMITS else self._ended
            outcome, line, where = end(what, kind_name, chance, folder)
            if outcome in GOOD:
                outcome, line = self._look_at(kind, folder, what, outcome, line)
        return Row(case, outcome, line, "", where, round(time.perf_counter() - started, 2))

    def _ended(
        self, what: str, name: str, chance: random.Random, folder: Path
    ) -> tuple[str, str, str]:
        """Start a command and end it at a random moment; return how it ended, why and when."""
        whole_s, started = self._whole_s(name), time.perf_counter()
        run = Run(self.kinds[name].command(folder), self.folder / "log")
        moment_s = chance.uniform(0.05, 1.0) * whole_s
        while not run.ended() and time.perf_counter() - started < moment_s:
            time.sleep(0.002)
        number = signal.SIGKILL if what == "kill" else chance.choice(sorted(SIGNALS))
        if not run.ended():
            run.send(number)
        code = run.wait()
        where = f"{signal.Signals(number).name} after {moment_s:.2f} of {whole_s:.2f} s"
        if code == -999:
            return "hang", "after the signal", where
        expected = (0, -9) if number == signal.SIGKILL else (0, SIGNALS[signal.Signals(number)])
        if code not in expected or "Traceback" in run.said():
            return "traceback", f"exit {code}: {run.said()[-200:]}", where
        return ("success" if code == 0 else "clean error"), "", where

    def _limited(
        self, what: str, name: str, chance: random.Random, folder: Path
    ) -> tuple[str, str, str]:
        """Run a command under a limit; return how it ended, why, and the limit."""
        limit, where = LIMITS[what](chance)
        run = Run(self.kinds[name].command(folder), self.folder / "log", limit)
        code, said = run.wait(), run.said()
        if code == -999:
            return "hang", said[-200:], where
        if code < 0:
            return "crash", f"signal {-code}: {said[-200:]}", where
        lines = [line for line in said.splitlines() if line.startswith(("error: ", "failed: "))]
        if "Traceback" in said or code not in (0, 1, 2) or (code > 0) != (len(lines) == 1):
            return "traceback", f"exit {code} with {len(lines)} lines: {said[-200:]}", where
        return ("success" if code == 0 else "clean error"), "".join(lines), where

    def _look_at(
        self, kind: Kind, folder: Path, what: str, outcome: str, line: str
    ) -> tuple[str, str]:
        """Look for what cannot be read and what is left over, and run the command again."""
        try:
            if unreadable := kind.unreadable(folder):
                return "silent", unreadable
        except Exception as error:
            return "silent", f"{type(error).__name__}: {error}"
        if what != "kill" and (left := _hidden(folder)):
            return "leftover", ", ".join(left)
        again = Run(kind.command(folder), self.folder / "log")
        if again.wait() != 0:
            return "traceback", f"the next run ends with {again.code}: {again.said()[-200:]}"
        if left := _hidden(folder):
            return "leftover", f"after the next run: {', '.join(left)}"
        return outcome, line

    def _soak(self) -> tuple[str, str, str]:
        """Run tood-infer over a long video; its memory, handles and threads must stay as they are.

        The first fifth counts as its start.
        """
        folder, clip, length = self._empty_folder(), self.seeds["soak.mp4"], SOAK_FRAMES
        out = folder / "o.jsonl"
        outputs = ["--jsonl", out, "--json", folder / "o.json", "--output", folder / "o.mp4"]
        command = ["tood-infer", self.seeds["tiny.onnx"], clip, *outputs, *SMALL]
        run, measured = Run(command, self.folder / "log"), list[tuple[int, int, int, int]]()
        until = time.time() + LIMIT_WALL_S
        while not run.ended() and time.time() < until:
            time.sleep(0.2)
            frames = out.read_bytes().count(b"\n") if out.exists() else 0
            if frames > length // 5 and (state := _state(run.pid)):
                measured.append((frames, *state))
        if run.wait() != 0 or len(measured) < 2:
            return "traceback", f"exit {run.code}: {run.said()[-200:]}", ""
        first, *_, last = measured
        where = " to ".join(
            f"{frames} frames: {mb} MB, {handles} handles, {threads} threads"
            for frames, mb, handles, threads in (first, last)
        )
        grown = [after - before for before, after in zip(first, last, strict=True)][1:]
        limits = (SOAK_MB, SOAK_HANDLES, SOAK_THREADS)
        flat = all(more <= limit for more, limit in zip(grown, limits, strict=True))
        return ("success" if flat else "memory"), "" if flat else where, where

    def _whole_s(self, name: str) -> float:
        """Return how long the command takes when nothing disturbs it."""
        if name not in self.whole_s:
            started = time.perf_counter()
            run = Run(self.kinds[name].command(self._empty_folder()), self.folder / "log")
            assert run.wait() == 0, run.said()
            self.whole_s[name] = time.perf_counter() - started
        return self.whole_s[name]

    def _empty_folder(self) -> Path:
        folder = self.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


Limit = Callable[[random.Random], tuple[Callable[[], None], str]]


def _memory(chance: random.Random) -> tuple[Callable[[], None], str]:
    more = chance.randrange(MEMORY)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + more
    return (
        lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        f"{more // 2**20} MB more",
    )


def _handles(chance: random.Random) -> tuple[Callable[[], None], str]:
    more = chance.randrange(HANDLES)

    def limit() -> None:
        count = len([*Path("/proc/self/fd").iterdir()]) + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

    return limit, f"{more} handles more"


def _disk(chance: random.Random) -> tuple[Callable[[], None], str]:
    """Limit the size of a file: writing more fails as on a full disk, Python ignores the signal."""
    size = int(4096 * (DISK / 4096) ** chance.random())  # the log needs some
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), f"files of {size} bytes"


LIMITS: dict[str, Limit] = {"memory": _memory, "handles": _handles, "disk": _disk}


def _state(pid: int) -> tuple[int, int, int] | None:
    """Return megabytes in memory, open handles and threads of a process; None where it ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return (
            int(status["VmRSS"].split()[0]) // 1024,
            len([*Path(f"/proc/{pid}/fd").iterdir()]),
            int(status["Threads"]),
        )
    except (OSError, KeyError):
        return None


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(TEMPORARY) for part in path.relative_to(folder).parts)


def _hidden(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"{TEMPORARY}*"))
