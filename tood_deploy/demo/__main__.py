"""`python -m tood_deploy.demo`: the commands one after the other, on generated images.

From shipped weights, or a small detector that it trains first, to a verified artefact, detections,
AP and latency. Knows only the commands.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tood_deploy.cli.common import DONE, run_command

WEIGHTS = Path(__file__).parents[1] / "weights" / "tiny-demo.safetensors"
IMAGES, SEED = 40, 2026
# Of --train: enough to see objects found, in some minutes, and no more.
TRAIN_IMAGES, TRAIN_SEED, EPOCHS = 240, 1, 6

MODEL = "tiny.onnx"

Command = Callable[[Sequence[str]], int]
Step = tuple[str, Command, list[object]]


def demo_command(argv: Sequence[str] | None) -> int:
    """Run the commands one after the other, and stop at the first that fails."""
    parser = argparse.ArgumentParser("python -m tood_deploy.demo", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where everything goes (default: demo)",
    )
    parser.add_argument(
        "--train",
        metavar="PRESET",
        help="in place of the shipped weights train this one first, for some minutes: tiny, "
        "tiny-atss, tiny-gfl or tiny-paa",
    )
    args = parser.parse_args(argv)
    folder = args.output

    from tood_deploy.demo.scenes import write_scenes

    print_step(f"generating {IMAGES} images of textured shapes with known boxes in {folder}/scenes")
    annotations = write_scenes(folder / "scenes", IMAGES, SEED)
    steps, weights = [], WEIGHTS
    if args.train is not None:
        print_step(f"generating {TRAIN_IMAGES} others to learn from in {folder}/learn")
        learn = write_scenes(folder / "learn", TRAIN_IMAGES, TRAIN_SEED)
        steps, weights = _training(args.train, folder, learn, annotations)
    for name, command, arguments in steps + _steps(folder, annotations, weights):
        texts = [str(argument) for argument in arguments]
        print_step(shlex.join([name, *texts]))
        if code := command(texts):
            return code
    results = (MODEL, "found", "eval/report.html", "latency")
    print_step(f"results: {', '.join(str(folder / name) for name in results)}")
    return DONE


def _training(preset: str, folder: Path, learn: Path, annotations: Path) -> tuple[list[Step], Path]:
    """Return the command that trains, and the checkpoint that it leaves.

    Args:
        preset: to train.
        folder: of the demo.
        learn: annotations of the images to learn from.
        annotations: of the images to evaluate on.
    """
    from tood_deploy.cli.train import main as train

    data: list[object] = ["--train-json", learn, "--train-images", learn.parent / "images"]
    data += ["--val-json", annotations, "--val-images", annotations.parent / "images"]
    run = folder / "run"
    recipe = ["--from-scratch", "--epochs", EPOCHS, "--eval-every", EPOCHS, "--output", run]
    return [("tood-train", train, [preset, *data, *recipe])], run / "model.safetensors"


def _steps(folder: Path, annotations: Path, weights: Path) -> list[Step]:
    """Return name, function and arguments of every command.

    Args:
        folder: of the demo.
        annotations: of the images.
        weights: the checkpoint.
    """
    from tood_deploy.cli import bench, export, infer
    from tood_deploy.cli.eval import main as evaluate

    images, model = annotations.parent / "images", folder / MODEL
    detections = ["--output", folder / "found", "--json", folder / "found.json", "--quiet"]
    truth = ["--annotations", annotations, "--images", images, "--output", folder / "eval"]
    timing = ["--images", images, "--rounds", 3, "--turn-seconds", 0.5]
    timing += ["--output", folder / "latency"]
    return [
        ("tood-export", export.main, [weights, "--output", model, "--verify-images", images]),
        ("tood-infer", infer.main, [model, images, *detections]),
        ("tood-eval", evaluate, [model, *truth]),
        ("tood-bench", bench.main, ["latency", model, "--baseline", weights, *timing]),
    ]


def print_step(text: str) -> None:
    """Print a line between the commands' own output."""
    print(f"\n\033[1m$ {text}\033[0m" if sys.stdout.isatty() else f"\n$ {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(demo_command))
