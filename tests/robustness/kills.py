"""Commands that are killed or get a signal: what is left, and what the next run makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
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
from robustness.campaign import Ledger, Row
from robustness.inputs import SMALL, WEIGHTS, Seeds

from tood_deploy.files import TEMPORARY
from tood_deploy.manifest import mismatch, read_manifest

SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
LIMIT_S = 120.0


def preload() -> None:
    """Import what the commands use, and start no thread: what is forked then starts at once."""
    for name in (
        "torch onnxruntime tood_deploy.cli.eval tood_deploy.cli.export tood_deploy.cli.infer "
        "tood_deploy.cli.train tood_deploy.benchmark.evaluation.report tood_deploy.export.export "
        "tood_deploy.training.train tood_deploy.inference.run tood_deploy.training.report"
    ).split():
        import_module(name)


class Run:
    """A command in a fork of this process."""

    def __init__(self, command: Sequence[object], log: Path) -> None:
        self.log, self.code = log, None
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
            main = import_module(f"tood_deploy.cli.{command[0].removeprefix('tood-')}").main
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
        until = time.time() + LIMIT_S
        while not self.ended():
            time.sleep(0.01)
            if time.time() > until:
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
        "eval": Kind(evaluate, lambda folder: ""),
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
    """Kills and signals, numbered from 0, in the ledger of a campaign."""

    def __init__(self, folder: Path, seeds: Seeds, ledger: Ledger) -> None:
        self.folder, self.ledger, self.kinds = folder / "kills", ledger, kinds(seeds)
        self.whole_s: dict[str, float] = {}
        preload()

    def run(self, counts: dict[str, int], until_s: float = float("inf")) -> None:
        """Run what the ledger lacks; "kill infer/3" is a SIGKILL, "signal infer/3" another one."""
        for name, count in counts.items():
            for number in range(count):
                case = f"{name}/{number}"
                if case not in self.ledger.rows and time.time() < until_s:
                    self.ledger.add(self.run_case(case))

    def run_case(self, case: str) -> Row:
        """Start a command, end it at a random moment, look at what is left, and run it again."""
        what, kind_name = case.split("/")[0].split(" ")
        kind, chance = self.kinds[kind_name], random.Random(case)
        whole_s = self._whole_s(kind_name)
        folder = self._empty_folder()
        started = time.perf_counter()
        run = Run(kind.command(folder), self.folder / "log")
        moment_s = chance.uniform(0.05, 1.0) * whole_s
        while not run.ended() and time.perf_counter() - started < moment_s:
            time.sleep(0.002)
        number = signal.SIGKILL if what == "kill" else chance.choice(sorted(SIGNALS))
        if not run.ended():
            run.send(number)
        code = run.wait()
        outcome, line = self._judge(kind, folder, run, code, number)
        where = f"{signal.Signals(number).name} after {moment_s:.2f} of {whole_s:.2f} s"
        return Row(case, outcome, line, "", where, round(time.perf_counter() - started, 2))

    def _judge(self, kind: Kind, folder: Path, run: Run, code: int, number: int) -> tuple[str, str]:
        if code == -999:
            return "hang", "after the signal"
        expected = (0, -9) if number == signal.SIGKILL else (0, SIGNALS[signal.Signals(number)])
        if code not in expected or "Traceback" in run.said():
            return "traceback", f"exit {code}: {run.said()[-200:]}"
        try:
            if unreadable := kind.unreadable(folder):
                return "silent", unreadable
        except Exception as error:
            return "silent", f"{type(error).__name__}: {error}"
        if number != signal.SIGKILL and (left := _hidden(folder)):
            return "leftover", ", ".join(left)
        again = Run(kind.command(folder), self.folder / "log")
        if again.wait() != 0:
            return "traceback", f"the next run ends with {again.code}: {again.said()[-200:]}"
        if left := _hidden(folder):
            return "leftover", f"after the next run: {', '.join(left)}"
        return ("success" if code == 0 else "clean error"), ""

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


def _hidden(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"{TEMPORARY}*"))
