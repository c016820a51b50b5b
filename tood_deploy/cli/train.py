"""`tood-train`: trains a network, or checks the data. Parses arguments, no more."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import DONE, CommandParser, check_written, class_names_from, run_command
from tood_deploy.cli.detection import add_device
from tood_deploy.errors import ToodError
from tood_deploy.presets import PRESETS
from tood_deploy.reporter import Reporter

if TYPE_CHECKING:
    from tood_deploy.training.config import RunOptions
    from tood_deploy.training.train import DataPaths


EPILOG = """\
examples:
  tood-train r50-1x --coco /data/coco --output runs/r50 --device cuda --precision bf16
  tood-train tiny --train-json train.json --train-images train --val-json val.json --val-images val
fine-tuning:
  tood-train r50-2x --checkpoint r50-2x --train-json ... --train-images ... --output runs/tuned
several GPUs:
  torchrun --nproc-per-node 8 -m tood_deploy.cli.train r50-1x --coco /data/coco --device cuda

The recipe's defaults are those that the preset's published weights were trained by; the tiny ones
have one of their own, for small data. TOOD, ATSS, GFL and PAA can be trained.
A run goes on from its folder with --resume, exactly where it stood, also after a power cut.
"""
# Options that stand for a field of the recipe, by their type.
NUMBERS = {
    "epochs": (int, "N", "passes over the data; the drops move along unless given"),
    "batch": (
        int,
        "N",
        "images a step, of all workers together; the learning rate scales along unless given",
    ),
    "lr": (float, "RATE", "learning rate"),
    "momentum": (float, "M", "of SGD"),
    "weight_decay": (float, "W", "on every parameter"),
    "warmup_steps": (int, "N", "steps in which the learning rate grows from a thousandth"),
    "clip": (float, "NORM", "largest norm of the whole gradient"),
    "accumulate": (int, "N", "compute a step in this many parts, which saves memory"),
    "atss_epochs": (int, "N", "epochs of ATSS before task-aligned assignment, in TOOD's loss"),
    "flip": (float, "SHARE", "of images mirrored left to right"),
    "flip_vertical": (float, "SHARE", "of images mirrored top to bottom"),
    "colour": (float, "STRENGTH", "of random brightness, contrast and saturation, 0 to 1"),
    "frozen_stages": (int, "N", "backbone stages that do not learn; 0 the stem alone, -1 none"),
    "seed": (int, "N", "of weights, order and augmentation"),
}
CHOICES = {
    "optimiser": ("sgd", "adamw"),
    "schedule": ("step", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
    "loss": ("own", "tood"),
    "published": ("1x", "2x"),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    result = CommandParser(
        prog="tood-train", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "preset", choices=tuple(PRESETS), metavar="PRESET", help=f"one of {', '.join(PRESETS)}"
    )
    result.add_argument(
        "--output", type=Path, metavar="DIR", help="the run's folder (default: runs/PRESET)"
    )
    result.add_argument(
        "--resume",
        action="store_true",
        help="go on from the folder's last checkpoint, if there is one",
    )
    data = result.add_argument_group("data")
    _add_data_options(data)
    _add_image_options(data)
    _add_weight_options(
        result.add_argument_group(
            "first weights (default: the ImageNet backbone of the published recipe)"
        )
    )
    recipe = result.add_argument_group("recipe (default: the preset's)")
    _add_schedule_options(recipe)
    _add_recipe_options(recipe)
    _add_run_options(result.add_argument_group("run"))
    return result


def _add_data_options(group: Any) -> None:
    for part in ("train", "val"):
        group.add_argument(
            f"--{part}-json",
            type=Path,
            metavar="FILE",
            help=f"COCO annotations of the {part} images",
        )
        group.add_argument(
            f"--{part}-images",
            type=Path,
            metavar="DIR",
            help="the folder that their file names are relative to",
        )
    group.add_argument(
        "--coco",
        type=Path,
        metavar="DIR",
        help="COCO 2017 in its own layout, in place of the four above",
    )
    group.add_argument(
        "--classes",
        metavar="NAMES",
        help="which classes in which order: separated by commas, or a text file with one a line",
    )
    group.add_argument(
        "--check-data",
        action="store_true",
        help="report what is in the data and what is wrong with it, and train nothing",
    )


def _add_image_options(group: Any) -> None:
    group.add_argument(
        "--imgsz",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="short and long side that images are scaled to fit",
    )
    group.add_argument(
        "--slice",
        type=int,
        nargs="+",
        metavar=("H", "W"),
        help="cut images and their boxes into overlapping windows of H x W pixels (W: as H)",
    )
    group.add_argument(
        "--overlap",
        type=float,
        metavar="S",
        help="of neighbouring windows, as a share of their side, 0 to 0.9 (default: 0.2)",
    )
    group.add_argument(
        "--min-visible",
        type=float,
        metavar="S",
        help="share of a box that a window must show to have it (default: 0.1)",
    )


def _add_weight_options(group: Any) -> None:
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="fine-tune from a checkpoint of the detector, or a preset's published weights",
    )
    group.add_argument(
        "--weights-key",
        metavar="NAME",
        help="which weights, where the checkpoint holds several: ema, model, teacher, ...",
    )
    group.add_argument(
        "--backbone-weights",
        metavar="FILE|URL",
        help="ImageNet weights of the backbone, in torchvision's key names",
    )
    group.add_argument(
        "--from-scratch",
        action="store_true",
        help="all random; with --frozen-stages -1 --no-freeze-norm",
    )


def _add_schedule_options(group: Any) -> None:
    for name, (kind, metavar, text) in NUMBERS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--published",
        choices=CHOICES["published"],
        help="epochs and drops of this published schedule",
    )
    group.add_argument("--optimiser", choices=CHOICES["optimiser"])
    group.add_argument(
        "--schedule",
        choices=CHOICES["schedule"],
        help="the learning rate drops in steps or falls along a cosine",
    )
    group.add_argument(
        "--drops",
        type=int,
        nargs="+",
        metavar="EPOCH",
        help="epochs after which the learning rate drops to a tenth",
    )


def _add_recipe_options(group: Any) -> None:
    group.add_argument(
        "--loss",
        choices=CHOICES["loss"],
        help="the detector's own, or TOOD's task-aligned learning for any head (default: own)",
    )
    group.add_argument(
        "--short-sides",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="draw each image's short side from these",
    )
    group.add_argument(
        "--group-by-aspect",
        action=argparse.BooleanOptionalAction,
        help="batches of either wide or tall images",
    )
    group.add_argument(
        "--freeze-norm",
        action=argparse.BooleanOptionalAction,
        help="batch norms keep their statistics",
    )
    group.add_argument(
        "--precision",
        choices=CHOICES["precision"],
        help="of the network's arithmetic (default: fp32)",
    )
    group.add_argument(
        "--ema",
        type=float,
        nargs="?",
        const=0.9998,
        metavar="DECAY",
        help="average the weights, and evaluate and deploy the average (0.9998)",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="through torch.compile"
    )


def _add_run_options(group: Any) -> None:
    add_device(group)
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="loading processes a worker (default: 4 on cuda, 0 on the CPU)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's choice)"
    )
    group.add_argument(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="write a checkpoint this often within an epoch",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="default: 1; the last epoch is always evaluated",
    )
    group.add_argument(
        "--eval-batch",
        type=int,
        default=8,
        metavar="N",
        help="images at once in evaluation (default: 8)",
    )
    group.add_argument(
        "--stop-after",
        type=int,
        metavar="EPOCH",
        help="end this call after that epoch, to go on later with --resume",
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")


def train_command(argv: Sequence[str] | None) -> int:
    """Check the data, or train and print the summary."""
    arguments = parser().parse_args(argv)
    _check_positive(arguments)
    paths = _data_paths(arguments)
    class_names = class_names_from(arguments.classes)
    reporter = Reporter(arguments.quiet)
    if arguments.check_data and arguments.slice is not None:
        raise ToodError("--check-data looks at whole images; leave --slice out")
    if arguments.check_data:
        return _check_data(paths, class_names, Reporter())
    from tood_deploy.preprocess import check_imgsz
    from tood_deploy.training.train import FirstWeights, choose_recipe, train

    recipe, notes = choose_recipe(arguments.preset, _recipe_changes(arguments))
    options = _run_options(arguments)
    _check_output(arguments, options.output, paths)
    summary = train(
        arguments.preset,
        paths,
        recipe,
        options,
        FirstWeights(
            arguments.checkpoint,
            arguments.backbone_weights,
            arguments.from_scratch,
            arguments.weights_key,
        ),
        reporter,
        notes=notes,
        imgsz=check_imgsz(arguments.imgsz) if arguments.imgsz else None,
        class_names=class_names,
        evaluation_batch=arguments.eval_batch,
        threads=arguments.threads,
    )
    if summary is not None:
        reporter.result(summary)
    return DONE


def _run_options(arguments: argparse.Namespace) -> "RunOptions":
    """Return where and how to train."""
    from tood_deploy.training.config import RunOptions

    workers = 4 if arguments.device == "cuda" else 0
    if arguments.workers is not None:
        workers = arguments.workers
    return RunOptions(
        arguments.output or Path("runs") / arguments.preset,
        arguments.device,
        workers,
        arguments.save_every,
        arguments.eval_every,
        arguments.resume,
        arguments.stop_after,
    )


def _check_output(arguments: argparse.Namespace, output: Path, paths: "DataPaths") -> None:
    """Refuse a folder in which training would write over what it reads."""
    from tood_deploy.training.checkpoints import BEST, FINAL, LAST
    from tood_deploy.training.logger import LOG

    inputs = {
        "the data": [paths.train_json, paths.val_json],
        "a checkpoint": [arguments.checkpoint, arguments.backbone_weights],
    }
    if arguments.resume:  # the folder's own checkpoint goes first
        del inputs["a checkpoint"]
    written = [output / name for name in (LAST, BEST, FINAL, LOG)]
    check_written(arguments.classes, written, inputs)


def _check_positive(arguments: argparse.Namespace) -> None:
    for name in ("workers", "save_every", "eval_every", "eval_batch", "stop_after"):
        value, minimum = getattr(arguments, name), 0 if name == "workers" else 1
        if value is not None and value < minimum:
            raise ToodError(
                f"--{name.replace('_', '-')} is {value}; expected a whole number of at least "
                f"{minimum}"
            )


def _data_paths(arguments: argparse.Namespace) -> "DataPaths":
    from tood_deploy.training.train import DataPaths

    given = {
        name: getattr(arguments, name)
        for name in ("train_json", "train_images", "val_json", "val_images")
    }
    if arguments.coco is not None:
        if any(given.values()):
            raise ToodError(
                "--coco stands in place of --train-json, --train-images, --val-json and "
                "--val-images; give one or the other"
            )
        return DataPaths.of_coco(arguments.coco)
    if given["train_json"] is None or given["train_images"] is None:
        raise ToodError(
            "no training data; give --train-json FILE --train-images DIR, or --coco DIR"
        )
    if (given["val_json"] is None) != (given["val_images"] is None):
        raise ToodError("validation data needs both --val-json FILE and --val-images DIR")
    return DataPaths(**given)


def _recipe_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the user changes in the recipe, by field.

    Raises:
        ToodError: options of windows without --slice.
    """
    for name in ("overlap", "min_visible"):
        if getattr(arguments, name) is not None and arguments.slice is None:
            raise ToodError(
                f"--{name.replace('_', '-')} has no effect without windows; add --slice H W"
            )
    names = (
        *NUMBERS,
        *CHOICES,
        "drops",
        "short_sides",
        "slice",
        "overlap",
        "min_visible",
        "group_by_aspect",
        "freeze_norm",
        "ema",
        "compile",
    )
    values = {name: getattr(arguments, name) for name in names}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def _check_data(paths: "DataPaths", class_names: list[str] | None, reporter: Reporter) -> int:
    from tood_deploy.training.records import read_labelled_images
    from tood_deploy.training.report import check_images, data_report

    train = read_labelled_images(paths.train_json, paths.train_images, class_names)
    parts = [("training", train)]
    if paths.val_json is not None and paths.val_images is not None:
        validation = read_labelled_images(paths.val_json, paths.val_images, train.class_names)
        parts.append(("validation", validation))
    for title, labelled in parts:
        check_images(labelled, reporter)
        reporter.table(data_report(labelled, title))
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command; see `run_command` for the exit codes."""
    return run_command(train_command, argv, extras=("train",))


if __name__ == "__main__":
    sys.exit(main())
