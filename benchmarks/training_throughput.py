"""Measure training steps by preset and precision, and where the time goes; print one table.

    python benchmarks/training_throughput.py --presets tiny r50-1x --imgsz 240 320 --threads 2
    python benchmarks/training_throughput.py --against 45640f5 --steps 20 --threads 1

Images are random, with ten boxes each; the input pipeline is measured by itself on files
(`--pipeline`). Times are medians of single steps. With `--threads 1` they are the thread's own
time, so that other work on the machine hardly shows. `--against` times whole steps of this tree and
of another revision in turns, a process for each, and prints how many times as fast this tree is.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tood_deploy.demo.scenes import write_scenes
from tood_deploy.model import HeadOutput
from tood_deploy.presets import PRESETS, SIZE_DIVISOR
from tood_deploy.training.assign import AnchorGrid, Targets
from tood_deploy.training.config import RECIPES
from tood_deploy.training.data import Augment, Batch, TrainingData, epoch_batches, load_batches
from tood_deploy.training.init import new_model
from tood_deploy.training.learner import AUTOCAST, Learner
from tood_deploy.training.loss import flatten
from tood_deploy.training.losses.tood import aligned_positives
from tood_deploy.training.records import read_labelled_images

BOXES = 10
PARTS = ("forward", "assignment", "loss", "backward", "update")
WARMUP_STEPS = 2
ROOT = Path(__file__).resolve().parents[1]
# A process of one revision: a step for every line that it reads, its seconds for an answer. It
# takes nothing but what both revisions have.
STEPPER = """
import sys
from dataclasses import replace
import torch
from training_throughput import make_batch, timed
from tood_deploy.presets import PRESETS
from tood_deploy.training.config import RECIPES
from tood_deploy.training.init import new_model
from tood_deploy.training.learner import Learner

name, precision, count, height, width, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
device, preset = torch.device("cpu"), PRESETS[name]
learner = Learner(new_model(preset, 0), replace(RECIPES[name], precision=precision), device)
batch = make_batch(int(count), (int(height), int(width)), preset.num_classes)
for _ in sys.stdin:
    print(timed(lambda: learner.step([batch], 99, 1e-6), device), flush=True)
"""


def make_batch(count: int, imgsz: tuple[int, int], classes: int) -> Batch:
    """Return random images with boxes of many sizes.

    Args:
        count: of images.
        imgsz: rows and columns of the images.
        classes: number of classes.
    """
    rng = np.random.default_rng(0)
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in imgsz)
    images = torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), np.uint8))
    targets = []
    for _ in range(count):
        sides = np.exp(rng.uniform(np.log(16), np.log(min(imgsz) * 0.8), (BOXES, 2)))
        corners = rng.uniform(0, 1, (BOXES, 2)) * (np.array(imgsz[::-1]) - sides)
        boxes = torch.from_numpy(
            np.concatenate((corners, corners + sides), axis=1).astype(np.float32)
        )
        targets.append(Targets(boxes, torch.from_numpy(rng.integers(0, classes, BOXES)), imgsz))
    return Batch(
        images, torch.tensor([imgsz] * count, dtype=torch.int32), targets, list(range(count)), []
    )


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of an action, the GPU's own work included.

    With one CPU thread it is the thread's own time, whatever else the machine does.
    """
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure_step(learner: Learner, batch: Batch, precision: torch.dtype | None) -> dict[str, float]:
    """Return the seconds of every part of one task-aligned step.

    Args:
        learner: network and optimiser.
        batch: of images and targets.
        precision: of autocast; None for float32.
    """
    device, seconds = learner.device, {}
    images = learner.normalise(batch.images.to(device), batch.valid_hw.to(device))
    kept: dict[str, HeadOutput | torch.Tensor] = {}

    def forward() -> None:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            kept["out"] = learner.network(images)

    def loss() -> None:
        losses = learner.criterion(kept["out"], batch.targets, 99)  # type: ignore[arg-type]
        kept["loss"] = losses.cls + losses.box

    learner.optimiser.zero_grad(set_to_none=True)
    seconds["forward"] = timed(forward, device)
    seconds["assignment"] = timed(lambda: assign(learner, kept["out"], batch), device)  # type: ignore[arg-type]
    seconds["loss"] = max(timed(loss, device) - seconds["assignment"], 0.0)
    seconds["backward"] = timed(lambda: kept["loss"].backward(), device)  # type: ignore[union-attr]
    seconds["update"] = timed(learner.optimiser.step, device)
    return seconds


def assign(learner: Learner, out: HeadOutput, batch: Batch) -> None:
    """Do the assignment alone, which the loss does again; arguments as of `measure_step`."""
    grid = AnchorGrid.of_maps(out.scores)
    targets = [target.to(learner.device) for target in batch.targets]
    valid = torch.stack([grid.valid_mask(target.valid_hw) for target in targets])
    scores, boxes = flatten(out.scores), flatten(out.boxes_strides)
    aligned_positives(scores.detach(), boxes.detach(), grid, targets, valid)


def measure_pipeline(imgsz: tuple[int, int], batch: int) -> tuple[float, str]:
    """Return how many images a second one core prepares, and which images these are."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_scenes(Path(folder), 64, size_hw=(480, 640))
        data = TrainingData(
            read_labelled_images(path, Path(folder) / "images").for_training(),
            Augment(imgsz),
            seed=0,
        )
        plan = epoch_batches(data.records, batch, seed=0, epoch=0, by_aspect=True)
        start = time.process_time()
        count = sum(len(part.image_ids) for part in load_batches(data, plan, 0, workers=0))
        return count / (time.process_time() - start), "generated JPEG of 640 x 480"


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Give a folder with the files of another revision, for as long as it is needed."""
    git = ("git", "-C", str(ROOT), "worktree")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "revision"
        try:
            subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=False)


def start_stepper(tree: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process that takes steps with the code in a folder; see `STEPPER`."""
    path = os.pathsep.join((str(tree), str(tree / "benchmarks")))
    return subprocess.Popen(
        [sys.executable, "-c", STEPPER, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def take_step(stepper: subprocess.Popen[str]) -> float:
    """Return the seconds of one step of a process."""
    assert stepper.stdin is not None
    assert stepper.stdout is not None
    stepper.stdin.write("\n")
    stepper.stdin.flush()
    answer = stepper.stdout.readline()
    if not answer:
        raise SystemExit(f"a process ended with exit code {stepper.wait()}; see the lines above")
    return float(answer)


def step_ratio(
    revision: str, preset: str, precision: str, arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Return how many times as fast this tree's steps are as a revision's, and 95% of the medians.

    The interval is that of the medians of pairs drawn again, 2,000 times.

    Args:
        revision: of git.
        preset: whose network learns.
        precision: of the step.
        arguments: of the command line.
    """
    settings = (arguments.batch, *arguments.imgsz, arguments.threads)
    with checked_out(revision) as other:
        trees = (other, ROOT)
        steppers = [start_stepper(tree, [preset, precision, *map(str, settings)]) for tree in trees]
        try:
            rounds = [
                [take_step(stepper) for stepper in steppers]
                for _ in range(WARMUP_STEPS + arguments.steps)
            ]
        finally:
            for stepper in steppers:
                stepper.kill()
                stepper.communicate()
    theirs, ours = np.array(rounds[WARMUP_STEPS:]).T
    drawn = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    medians = np.median((theirs / ours)[drawn], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(theirs / ours)), float(low), float(high)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script's arguments."""
    result = argparse.ArgumentParser(description="Measures training steps.")
    result.add_argument(
        "--presets", nargs="+", default=["tiny"], choices=tuple(PRESETS), metavar="NAME"
    )
    result.add_argument(
        "--precisions", nargs="+", default=["fp32"], choices=("fp32", "bf16", "fp16")
    )
    result.add_argument("--imgsz", type=int, nargs=2, default=(240, 320), metavar=("H", "W"))
    result.add_argument("--batch", type=int, default=8)
    result.add_argument("--steps", type=int, default=10, help="measured, after two that are not")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument(
        "--against", metavar="REVISION", help="compare whole steps, on the CPU, with this revision"
    )
    result.add_argument(
        "--pipeline", action="store_true", help="measure the input pipeline as well"
    )
    return result


def print_ratios(arguments: argparse.Namespace) -> None:
    """Print a row for every preset and precision: this tree against the other revision."""
    against = f"as fast as {arguments.against}"
    table = Table("preset", "precision", f"times {against}", "95%")
    for name in arguments.presets:
        for precision in arguments.precisions:
            ratio, low, high = step_ratio(arguments.against, name, precision, arguments)
            table.add_row(name, precision, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
    console = Console(width=120)
    size = " x ".join(map(str, arguments.imgsz))
    console.print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, PyTorch "
        f"{torch.__version__}; {arguments.steps} pairs of steps of {arguments.batch} x {size}"
    )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(1)
    if arguments.against is not None:
        print_ratios(arguments)
        return
    imgsz, device = (arguments.imgsz[0], arguments.imgsz[1]), torch.device(arguments.device)
    table = Table("preset", "precision", "images/s", "s a step", *(f"{part} %" for part in PARTS))
    for name in arguments.presets:
        for precision in arguments.precisions:
            learner = Learner(
                new_model(PRESETS[name], 0), replace(RECIPES[name], precision=precision), device
            )
            batch = make_batch(arguments.batch, imgsz, PRESETS[name].num_classes)
            runs = [
                measure_step(learner, batch, AUTOCAST[precision])
                for _ in range(WARMUP_STEPS + arguments.steps)
            ][WARMUP_STEPS:]
            parts = {part: statistics.median(run[part] for run in runs) for part in PARTS}
            total = sum(parts.values())
            shares = (f"{100 * seconds / total:.1f}" for seconds in parts.values())
            table.add_row(
                name, precision, f"{arguments.batch / total:.2f}", f"{total:.3f}", *shares
            )
    console = Console(width=120)
    machine = platform.processor() or platform.machine()
    threads = f"{arguments.threads} threads, {device.type}, PyTorch {torch.__version__}"
    console.print(f"{machine}, {threads}")
    images = f"batch {arguments.batch} of {imgsz[0]} x {imgsz[1]}, {BOXES} boxes an image"
    console.print(f"{images}, medians of {arguments.steps} steps")
    console.print(table)
    if arguments.pipeline:
        rate, images = measure_pipeline(imgsz, arguments.batch)
        console.print(f"input pipeline: {rate:.0f} images/s for each core ({images})")


if __name__ == "__main__":
    main()
