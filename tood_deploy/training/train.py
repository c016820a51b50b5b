"""A whole training as a user asks for it: recipe, data, first weights, the run, its summary.

Paths and options in; the run's folder and a summary out. Knows no command line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import torch

from tood_deploy.errors import ToodError, not_installed
from tood_deploy.model.detector import DenseDetector
from tood_deploy.presets import Preset, get_preset
from tood_deploy.reporter import Reporter, printable
from tood_deploy.training.checkpoints import BEST, FINAL, LAST
from tood_deploy.training.config import ONE_X, RECIPES, TWO_X, Progress, Recipe, RunOptions
from tood_deploy.training.data import Augment, TrainingData
from tood_deploy.training.distributed import is_main, process_group, world_size
from tood_deploy.training.init import load_backbone, load_pretrained, new_model
from tood_deploy.training.learner import AUTOCAST
from tood_deploy.training.logger import Journal
from tood_deploy.training.loop import fit
from tood_deploy.training.records import LabelledImages, read_labelled_images, slice_images
from tood_deploy.training.report import plot_learning, plot_precision_recall

if TYPE_CHECKING:
    from tood_deploy.training.evaluate import CocoEvaluator, Evaluation

SCHEDULES = {"1x": ONE_X, "2x": TWO_X}
LEARNING_CURVE, PRECISION_RECALL = "learning.png", "precision_recall.png"
SHOWN_CLASSES = 10  # in the summary


@dataclass(frozen=True)
class DataPaths:
    """Where training and validation data lie; validation may be absent."""

    train_json: Path
    train_images: Path
    val_json: Path | None = None
    val_images: Path | None = None

    @classmethod
    def of_coco(cls, folder: Path) -> DataPaths:
        """Return COCO's own: annotations/instances_{train,val}2017.json, train2017 and val2017."""
        annotations = folder / "annotations"
        return cls(
            annotations / "instances_train2017.json",
            folder / "train2017",
            annotations / "instances_val2017.json",
            folder / "val2017",
        )


@dataclass(frozen=True)
class FirstWeights:
    """Where the first weights come from; where none is given, from the published recipe's backbone.

    Attributes:
        checkpoint: of a whole detector, a file or a preset's name.
        backbone: weights of the backbone, a file or a URL.
        from_scratch: all weights are random.
        weights_key: which weights of the checkpoint, where that holds several.
    """

    checkpoint: str | None = None
    backbone: str | None = None
    from_scratch: bool = False
    weights_key: str | None = None

    def __post_init__(self) -> None:
        if self.weights_key is not None and self.checkpoint is None:
            raise ToodError(
                "--weights-key says which weights of a checkpoint are meant; "
                "give --checkpoint too, or leave it out"
            )
        if sum((self.checkpoint is not None, self.backbone is not None, self.from_scratch)) > 1:
            raise ToodError(
                "--checkpoint, --backbone-weights and --from-scratch exclude one another; "
                "give one of them"
            )


def choose_recipe(preset: str, changes: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the preset's recipe with a user's changes, and notes on what follows from them.

    Args:
        preset: its name.
        changes: values by field of `Recipe`, and "published": "1x" or "2x". A changed number of
            epochs moves the drops along, a changed batch the learning rate, unless these are given
            too.

    Raises:
        ToodError: the preset's detector is not trained here, or has no such epochs.
    """
    changes = dict(changes)
    published = changes.pop("published", None)
    _check_trained(preset, changes)
    recipe, notes = RECIPES[preset], []
    if published is not None:
        schedule = SCHEDULES[published]
        recipe = replace(recipe, epochs=schedule.epochs, drops=schedule.drops)
    if "epochs" in changes and "drops" not in changes and changes["epochs"] != recipe.epochs:
        recipe = recipe.with_epochs(changes["epochs"])
        if changes.get("schedule", recipe.schedule) == "step":
            drops = ", ".join(map(str, recipe.drops))
            notes.append(f"the learning rate drops after epochs {drops}, in step with --epochs")
    if "batch" in changes and "lr" not in changes and changes["batch"] != recipe.batch:
        before, recipe = recipe, recipe.with_batch(changes["batch"])
        notes.append(
            f"the learning rate is {recipe.lr:g}, scaled with the batch: "
            f"{before.lr:g} is for {before.batch} images a step"
        )
    return replace(recipe, **changes), notes


def _check_trained(preset: str, changes: Mapping[str, Any]) -> None:
    """Raise ToodError for a preset without a recipe, and for epochs that its loss does not have."""
    if preset not in RECIPES:
        trained = ", ".join(dict.fromkeys(get_preset(name).detector for name in RECIPES))
        raise ToodError(
            f"{preset}: there is no training of {get_preset(preset).detector}; "
            f"choose a preset of {trained}"
        )
    own = changes.get("loss", RECIPES[preset].loss) == "own"
    if "atss_epochs" in changes and own and get_preset(preset).detector != "tood":
        raise ToodError(
            f"{preset}: atss_epochs is {changes['atss_epochs']}, which TOOD's loss alone has; "
            "leave it out, or give --loss tood"
        )


def train(
    preset_name: str,
    paths: DataPaths,
    recipe: Recipe,
    options: RunOptions,
    first: FirstWeights,
    reporter: Reporter,
    *,
    notes: Sequence[str] = (),
    imgsz: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    evaluation_batch: int = 8,
    threads: int | None = None,
) -> str | None:
    """Train, alone or as one of the workers that torchrun started.

    Args:
        preset_name: the network.
        paths: the data.
        recipe: what is learnt how.
        options: where and how; its device is "cpu" or "cuda".
        first: where the first weights come from.
        reporter: prints lines and progress, on the main worker.
        notes: lines to print first.
        imgsz: (short side, long side) of images, in place of the preset's.
        class_names: order of classes, in place of the file's.
        evaluation_batch: images at once in evaluation.
        threads: of the CPU; PyTorch's own choice where not given.

    Returns:
        The summary, on the main worker, once the last epoch is done.
    """
    with cpu_threads(threads), process_group(options.device) as device:
        options = replace(options, device=str(device))
        journal = Journal(options.output, reporter) if is_main() else Journal.silent()
        reporter = journal.reporter
        labelled, evaluator = _open_data(paths, class_names, device, evaluation_batch, recipe)
        preset = get_preset(preset_name)
        preset = replace(
            preset,
            class_names=labelled.class_names,
            imgsz=imgsz or preset.imgsz,
            weights=None,
            published_ap=None,
        )
        records = labelled.for_training()
        for line in (*notes, *_describe(preset, recipe, labelled, len(records), device)):
            reporter.info(line)
        model = new_model(preset, recipe.seed)
        if not (options.resume and (options.output / LAST).is_file()):
            reporter.info(_load_first_weights(model, first, recipe, reporter))
        augment = Augment(
            preset.imgsz, recipe.short_sides, recipe.flip, recipe.flip_vertical, recipe.colour
        )
        data = TrainingData(records, augment, recipe.seed)
        progress = fit(model, data, recipe, options, evaluate=evaluator, journal=journal)
        if not is_main():
            return None
        latest = evaluator.latest if evaluator else None
        curves = _plot(options.output, progress, latest, reporter)
        return summarise(options.output, preset, recipe, progress, latest, curves)


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch use so many threads, and OpenCV one, for as long as the block runs.

    Raises:
        ToodError: not a positive number.
    """
    if threads is not None and threads < 1:
        raise ToodError(f"threads is {threads}; expected a positive number")
    before = torch.get_num_threads(), cv2.getNumThreads()
    if threads is not None:
        torch.set_num_threads(threads)
    cv2.setNumThreads(1)  # OpenCV's threads and PyTorch's get into each other's way
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _open_data(
    paths: DataPaths,
    class_names: Sequence[str] | None,
    device: torch.device,
    batch: int,
    recipe: Recipe,
) -> tuple[LabelledImages, CocoEvaluator | None]:
    labelled = read_labelled_images(paths.train_json, paths.train_images, class_names)
    if recipe.slice is not None:
        labelled = slice_images(labelled, recipe.slice, recipe.overlap, recipe.min_visible)
    if paths.val_json is None or paths.val_images is None:
        return labelled, None
    # Only here, so that training without validation data needs no pycocotools.
    from tood_deploy.training.evaluate import CocoEvaluator

    validation = read_labelled_images(paths.val_json, paths.val_images, labelled.class_names)
    if recipe.slice is not None:
        validation = slice_images(validation, recipe.slice, recipe.overlap, recipe.min_visible)
    return labelled, CocoEvaluator(validation, device, batch, AUTOCAST[recipe.precision])


def _describe(
    preset: Preset, recipe: Recipe, labelled: LabelledImages, usable: int, device: torch.device
) -> list[str]:
    """Return in a few lines what is about to happen."""
    names = ", ".join(map(printable, preset.class_names[:4])) + (
        ", ..." if preset.num_classes > 4 else ""
    )
    rate = f"{recipe.optimiser} with learning rate {recipe.lr:g}, {recipe.schedule} schedule"
    other = recipe.loss == "tood" and preset.detector != "tood"
    workers = f"{world_size()} workers" if world_size() > 1 else "1 worker"
    slices = []
    if recipe.slice is not None:
        height, width = recipe.slice
        slices = [
            f"images are cut into windows of {height} x {width} pixels, overlap "
            f"{recipe.overlap:g}, and boxes of which {recipe.min_visible:g} or more is in them; "
            "AP is that of the windows"
        ]
    what = "images" if recipe.slice is None else "windows"
    return [
        f"{preset.name}: {preset.num_classes} classes ({names}), "
        f"{usable} {what} of {labelled.path}",
        *slices,
        *(f"left out or mended: {line}" for line in labelled.problems.lines()),
        *(["the loss is TOOD's, not the detector's own"] if other else []),
        f"{recipe.epochs} epochs of batch {recipe.batch}, {rate}, {recipe.precision}, "
        f"seed {recipe.seed}, {workers} on {device.type}",
    ]


def _load_first_weights(
    model: DenseDetector, first: FirstWeights, recipe: Recipe, reporter: Reporter
) -> str:
    if first.checkpoint is not None:
        return load_pretrained(model, first.checkpoint, first.weights_key, reporter)
    if first.from_scratch or (first.backbone is None and recipe.frozen_stages < 0):
        if recipe.frozen_stages >= 0 or recipe.freeze_norm:
            raise ToodError(
                "--from-scratch with frozen layers or batch norms would keep random ones; "
                "add --frozen-stages -1 --no-freeze-norm"
            )
        return "all weights are random"
    return load_backbone(model, first.backbone, reporter)


def summarise(
    output: Path,
    preset: Preset,
    recipe: Recipe,
    progress: Progress,
    latest: Evaluation | None,
    curves: Sequence[str] = (),
) -> str:
    """Return on one screen what came out and what to do next.

    Args:
        output: the run's folder.
        preset: the network.
        recipe: what was learnt how.
        progress: where the run stands.
        latest: the last evaluation, if there was one.
        curves: lines on the images that were drawn.
    """
    lines = [f"{len(progress.history)} of {recipe.epochs} epochs done, {progress.step} steps"]
    evaluated = [row for row in progress.history if "AP" in row]
    if evaluated:
        last, best = evaluated[-1], max(evaluated, key=lambda row: row["AP"])
        lines += [
            f"AP of the last evaluation (epoch {last['epoch']:.0f}): {_ap(last)}",
            f"AP of the best (epoch {best['epoch']:.0f}): {_ap(best)}",
        ]
    if latest is not None and latest.class_ap:
        shown = [f"{name} {ap:.3f}" for name, ap in list(latest.class_ap.items())[:SHOWN_CLASSES]]
        more = ", ..." if preset.num_classes > SHOWN_CLASSES else ""
        lines.append(f"by class: {', '.join(shown)}{more}")
    lines += curves
    if len(progress.history) < recipe.epochs:
        return "\n".join([*lines, "go on with --resume"])
    lines.append(f"{output / FINAL}: the weights of {BEST if evaluated else LAST}")
    lines.append(f"next: tood-export {output / FINAL} --output {output / 'model.onnx'}")
    return "\n".join(lines)


def _ap(row: Mapping[str, float]) -> str:
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return ", ".join(f"{name} {row[name]:.3f}" for name in names)


def _plot(
    output: Path, progress: Progress, latest: Evaluation | None, reporter: Reporter
) -> list[str]:
    """Draw the curves of a run into its folder; return a line that names them."""
    if importlib.util.find_spec("matplotlib") is None:
        reporter.problem(f"no curves are drawn: {not_installed('matplotlib', 'train')}")
        return []
    plot_learning(progress.history, output / LEARNING_CURVE)
    line = f"{output / LEARNING_CURVE}: losses and AP"
    if latest is not None and latest.precision is not None:
        plot_precision_recall(latest.precision, output / PRECISION_RECALL)
        line += f"; {output / PRECISION_RECALL}: precision over recall"
    return [line]
