"""A run: epochs of steps, evaluation, checkpoints.

A network, data and a recipe in; checkpoints, a log and the run's state out. Everything that decides
what comes next is in the checkpoint or follows from (seed, epoch, step), so a run that is broken
off at any moment goes on exactly. Learning itself is the `Learner`'s; how AP is computed is handed
in.
"""

from __future__ import annotations

import copy
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from tood_deploy.errors import REPEATS_S, CheckpointError, Stopped, ToodError
from tood_deploy.files import remove_leftovers
from tood_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.reporter import Reporter
from tood_deploy.training.checkpoints import (
    BEST,
    FINAL,
    LAST,
    make_run_folder,
    read_training_state,
    write_training_checkpoint,
)
from tood_deploy.training.config import Progress, Recipe, RunOptions, Verdict, epoch_means
from tood_deploy.training.data import Batch, TrainingData, epoch_batches, load_batches
from tood_deploy.training.distributed import any_rank, barrier, is_main, rank, world_size
from tood_deploy.training.learner import Learner, NonFinite, learning_rate
from tood_deploy.training.logger import Journal

# SIGHUP, of a terminal that was closed, is not there on Windows.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopFlag:
    """While open, the first signal raises the flag; a later one interrupts at once.

    One that comes within `REPEATS_S` is the first again: a terminal and a parent process both send
    it.
    """

    def __init__(self) -> None:
        self.raised = False
        self.number: int = signal.SIGINT
        self._raised_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._raise)
                for number in SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN  # as nohup has it
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.raised and now_s - self._raised_s > REPEATS_S:
            raise Stopped(number)
        if not self.raised:
            self.raised, self.number, self._raised_s = True, number, now_s


def fit(
    model: DenseDetector,
    data: TrainingData,
    recipe: Recipe,
    options: RunOptions,
    *,
    evaluate: Callable[[DenseDetector], Verdict] | None = None,
    journal: Journal | None = None,
) -> Progress:
    """Train a network.

    Args:
        model: with its first weights; it is changed.
        data: the augmented images.
        recipe: what is learnt how.
        options: where and how it runs.
        evaluate: AP of a network; called on all workers.
        journal: logs everything; silent where not given.

    Returns:
        Where the run stands at its end. The folder holds `last.pth`, `best.pth` and
        `model.safetensors`.

    Raises:
        CheckpointError: the folder's checkpoint cannot be gone on from.
        CheckFailed: the loss or its gradient is not finite.
        OutputError: a checkpoint cannot be written.
        Stopped: Ctrl-C, SIGTERM or SIGHUP; the state is saved.
    """
    with StopFlag() as flag, journal or Journal.silent() as opened:
        run = _Run(model, data, recipe, options, evaluate, opened, flag)
        run.start()
        end = min(recipe.epochs, options.stop_after or recipe.epochs)
        for epoch in range(len(run.progress.history), end):
            run.train_epoch(epoch)
            run.close_epoch(epoch)
        run.finish()
        return run.progress


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        model: DenseDetector,
        data: TrainingData,
        recipe: Recipe,
        options: RunOptions,
        evaluate: Callable[[DenseDetector], Verdict] | None,
        journal: Journal,
        flag: StopFlag,
    ) -> None:
        self.data, self.recipe, self.options = data, recipe, options
        self.evaluate, self.journal, self.flag = evaluate, journal, flag
        self.reporter = journal.reporter
        self.device = torch.device(options.device)
        self.learner = Learner(model, recipe, self.device)
        self.progress = Progress()
        self.steps_per_epoch = len(self._plan(0))
        # Of the steps of this epoch that this call made.
        self.epoch_values: list[dict[str, float]] = []

    def start(self) -> None:
        """Go on from the folder's checkpoint, or make sure that there is none to overwrite."""
        last = self.options.output / LAST
        if is_main():
            make_run_folder(self.options.output)
            remove_leftovers(self.options.output)
        if not last.is_file():
            return
        if not self.options.resume:
            raise ToodError(
                f"{self.options.output}: holds a run already; "
                "add --resume to go on with it, or choose another --output"
            )
        self._restore(read_training_state(last), last)
        if is_main():
            self.journal.forget_after(self.progress.step)
        epoch = len(self.progress.history) + 1
        self.reporter.info(f"going on from {last}: epoch {epoch}, step {self.progress.step}")

    def train_epoch(self, epoch: int) -> None:
        """Make the steps of an epoch that are not done yet."""
        self.learner.prepare()
        self.epoch_values = []
        plan = self._plan(epoch)
        done = self.progress.step - epoch * self.steps_per_epoch
        self.journal.start_epoch(epoch, self.recipe.epochs, len(plan), done)
        batches = self._load(plan[done:], epoch)
        for number in range(done + 1, len(plan) + 1):
            self._train_step(batches, epoch)
            every = self.options.save_every
            if every and self.progress.step % every == 0 and number < len(plan):
                self.save(LAST)
            self._stop_if_asked()

    def close_epoch(self, epoch: int) -> None:
        """Evaluate, log and write checkpoints at the end of an epoch."""
        last_one = epoch + 1 == self.recipe.epochs
        row: dict[str, float] = {
            "step": self.progress.step,
            "epoch": epoch + 1,
            **epoch_means(self.epoch_values),
        }
        is_due = last_one or (epoch + 1) % self.options.evaluate_every == 0
        if self.evaluate is not None and is_due:
            start = time.perf_counter()
            verdict = self.evaluate(self.deployed())
            row |= verdict.metrics | {"evaluation_s": time.perf_counter() - start}
            self.journal.images(verdict.images, self.progress.step)
        self.progress.history.append(row)
        self.journal.write("epoch", row)
        if "AP" in row:
            values = [f"{name} {row[name]:.3f}" for name in row if name.startswith("AP")]
            self.reporter.info(f"epoch {epoch + 1}: {', '.join(values)}")
        better = row.get("AP", -1.0) > self.progress.best_ap
        if better:
            self.progress.best_ap = row["AP"]
        self.save(LAST)
        if better:
            self.save(BEST)
        self._stop_if_asked()

    def finish(self) -> None:
        """Write the best weights as a plain model file; the last ones where none were evaluated."""
        output = self.options.output
        if is_main() and len(self.progress.history) == self.recipe.epochs:
            best = output / BEST
            save_checkpoint(
                load_checkpoint(best if best.is_file() else output / LAST), output / FINAL
            )
        barrier()

    def save(self, name: str) -> None:
        """Write a checkpoint, on the main worker."""
        if not is_main():
            return
        training = self.learner.state() | {
            "step": self.progress.step,
            "history": json.dumps(self.progress.history),
            "best_ap": self.progress.best_ap,
            "steps_per_epoch": self.steps_per_epoch,
            "recipe": json.dumps(self.recipe.to_dict()),
        }
        preset = self.learner.model.preset
        write_training_checkpoint(
            self.options.output / name, preset, self.learner.deployed_weights(), training
        )

    def deployed(self) -> DenseDetector:
        """Return the network with the weights to deploy, in eval mode."""
        if self.learner.average is None:
            return self.learner.model.eval()
        model = copy.deepcopy(self.learner.model)
        model.load_state_dict(self.learner.average.state)
        return model.eval()

    def _plan(self, epoch: int) -> list[list[int]]:
        recipe = self.recipe
        return epoch_batches(
            self.data.records,
            recipe.batch,
            seed=recipe.seed,
            epoch=epoch,
            by_aspect=recipe.group_by_aspect,
            at_least=world_size() * recipe.accumulate,
        )

    def _load(self, plan: Sequence[Sequence[int]], epoch: int) -> Iterator[Batch]:
        """Load this worker's part of every step, in as many parts as the recipe accumulates."""
        parts = world_size() * self.recipe.accumulate
        starts = range(rank(), parts, world_size())  # of this worker's parts of a step
        mine = [step[start::parts] for step in plan for start in starts]
        return load_batches(
            self.data, mine, epoch, self.options.workers, pin=self.device.type == "cuda"
        )

    def _train_step(self, batches: Iterator[Batch], epoch: int) -> None:
        start = time.perf_counter()
        parts = self._next_parts(batches)
        loaded = time.perf_counter()
        rate = learning_rate(self.recipe, self.progress.step, self.steps_per_epoch)
        try:
            result = self.learner.step(parts, epoch, rate)
        except NonFinite as error:
            raise NonFinite(
                f"step {self.progress.step + 1}: {error}; {self._last_good()}; "
                "try a smaller --lr, or --clip"
            ) from error
        self.progress.step += 1
        for name in (name for part in parts for name in part.unreadable):
            self.reporter.warn(f"{name} cannot be read, another image took its place")
            self.journal.write("unreadable", {"step": self.progress.step, "file": name})
        seconds = time.perf_counter() - start
        speed = sum(len(part.image_ids) for part in parts) * world_size() / seconds
        values = {
            "step": self.progress.step,
            "lr": rate,
            "images_per_s": speed,
            "seconds": seconds,
            "data_seconds": loaded - start,
        }
        gradient = {"grad_norm": result.grad_norm, "positives": result.positives}
        self.epoch_values.append(result.losses | gradient | values)
        self.journal.step(self.epoch_values[-1])

    def _next_parts(self, batches: Iterator[Batch]) -> list[Batch]:
        try:
            return [next(batches) for _ in range(self.recipe.accumulate)]
        except RuntimeError:  # systemd sends SIGTERM to the loading processes as well
            self._stop_if_asked()
            raise

    def _last_good(self) -> str:
        last = self.options.output / LAST
        return (
            f"the last good checkpoint is {last}"
            if last.is_file()
            else "no checkpoint was written yet"
        )

    def _stop_if_asked(self) -> None:
        if any_rank(self.flag.raised, self.device):
            self.save(LAST)
            self.reporter.info(
                f"stopped at step {self.progress.step}, all is saved in "
                f"{self.options.output / LAST}; go on with --resume"
            )
            raise Stopped(self.flag.number)

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        training, preset = content["training"], self.learner.model.preset
        before = json.loads(content["tood_deploy"])
        # The weights do not show it: ATSS and PAA are one network.
        if (detector := before.get("detector", "tood")) != preset.detector:
            raise CheckpointError(
                f"{path}: was trained as {detector}, the preset {preset.name} is "
                f"{preset.detector}; use the same preset"
            )
        if tuple(before["class_names"]) != preset.class_names:
            names = ", ".join(preset.class_names[:5])
            raise CheckpointError(
                f"{path}: was trained on other classes; expected {names}: use the same data"
            )
        if training["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{path}: its epochs have {training['steps_per_epoch']} steps, with this data and "
                f"batch they have {self.steps_per_epoch}; use the same data and --batch"
            )
        _note_changes(Recipe.from_dict(json.loads(training["recipe"])), self.recipe, self.reporter)
        try:
            self.learner.restore(content["state_dict"], training)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path}: does not fit this run ({reason}); use the same preset and options"
            ) from error
        self.progress = Progress(
            training["step"], json.loads(training["history"]), training["best_ap"]
        )


def _note_changes(before: Recipe, now: Recipe, reporter: Reporter) -> None:
    """Note what differs from the recipe that the run began with; it is done as asked now."""
    old, new = before.to_dict(), now.to_dict()
    for name in new:
        if old[name] != new[name]:
            reporter.note(f"{name} is {new[name]} from here on, it was {old[name]}")
