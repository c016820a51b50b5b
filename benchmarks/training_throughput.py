"""Measure training steps by preset and precision, and where the time goes; print one table.

    python benchmarks/training_throughput.py --presets tiny r50-1x --imgsz 240 320 --threads 2

Images are random, with ten boxes each; the input pipeline is measured by itself on files
(`--pipeline`). Times are medians of single steps. With `--threads 1` they are the thread's own
time, so that other work on the machine hardly shows.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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
        "--pipeline", action="store_true", help="measure the input pipeline as well"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(1)
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
                for _ in range(2 + arguments.steps)
            ][2:]
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
