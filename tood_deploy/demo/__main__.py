"""`python -m tood_deploy.demo`: the commands one after the other, on generated images.

From shipped weights to a verified artefact, detections, AP and latency. Knows only the commands.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tood_deploy.cli.common import DONE, run_command

WEIGHTS = Path(__file__).parents[1] / "weights" / "tiny-demo.safetensors"
IMAGES, SEED = 40, 2026

Command = Callable[[Sequence[str]], int]


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
    folder = parser.parse_args(argv).output

    from tood_deploy.demo.scenes import write_scenes

    print_step(f"generating {IMAGES} images of textured shapes with known boxes in {folder}/scenes")
    annotations = write_scenes(folder / "scenes", IMAGES, SEED)
    for name, command, arguments in _steps(folder, annotations):
        texts = [str(argument) for argument in arguments]
        print_step(shlex.join([name, *texts]))
        if code := command(texts):
            return code
    results = ("tiny.onnx", "found", "eval/report.html", "latency")
    print_step(f"results: {', '.join(str(folder / name) for name in results)}")
    return DONE


def _steps(folder: Path, annotations: Path) -> list[tuple[str, Command, list[object]]]:
    """Return name, function and arguments of every command."""
    from tood_deploy.cli import bench, export, infer
    from tood_deploy.cli.eval import main as evaluate

    images, model = annotations.parent / "images", folder / "tiny.onnx"
    detections = ["--output", folder / "found", "--json", folder / "found.json", "--quiet"]
    truth = ["--annotations", annotations, "--images", images, "--output", folder / "eval"]
    timing = ["--images", images, "--rounds", 3, "--turn-seconds", 0.5]
    timing += ["--output", folder / "latency"]
    return [
        ("tood-export", export.main, [WEIGHTS, "--output", model, "--verify-images", images]),
        ("tood-infer", infer.main, [model, images, *detections]),
        ("tood-eval", evaluate, [model, *truth]),
        ("tood-bench", bench.main, ["latency", model, "--baseline", WEIGHTS, *timing]),
    ]


def print_step(text: str) -> None:
    """Print a line between the commands' own output."""
    print(f"\n\033[1m$ {text}\033[0m" if sys.stdout.isatty() else f"\n$ {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(demo_command))
