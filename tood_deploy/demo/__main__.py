"""`python -m tood_deploy.demo`: from shipped weights to a verified artefact, detections, AP and latency, on generated images."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tood_deploy.cli.common import DONE, run_command

WEIGHTS = Path(__file__).parents[1] / "weights" / "tiny-demo.safetensors"
IMAGES, SEED = 40, 2026


def demo_command(argv: Sequence[str] | None) -> int:
    """Runs the commands one after the other, and stops at the first that fails."""
    parser = argparse.ArgumentParser("python -m tood_deploy.demo", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where everything goes (default: demo)",
    )
    folder = parser.parse_args(argv).output

    from tood_deploy.cli import bench, export, infer
    from tood_deploy.cli.eval import main as evaluate
    from tood_deploy.demo.scenes import write_scenes

    say(f"generating {IMAGES} images of textured shapes with known boxes in {folder}/scenes")
    annotations = write_scenes(folder / "scenes", IMAGES, SEED)
    images, model = folder / "scenes" / "images", folder / "tiny.onnx"
    steps: list[tuple[str, Callable[[Sequence[str]], int], list[object]]] = [
        ("tood-export", export.main, [WEIGHTS, "--output", model, "--verify-images", images]),
        (
            "tood-infer",
            infer.main,
            [
                model,
                images,
                "--output",
                folder / "found",
                "--json",
                folder / "found.json",
                "--quiet",
            ],
        ),
        (
            "tood-eval",
            evaluate,
            [model, "--annotations", annotations, "--images", images, "--output", folder / "eval"],
        ),
        (
            "tood-bench",
            bench.main,
            [
                "latency",
                model,
                "--baseline",
                WEIGHTS,
                "--images",
                images,
                "--rounds",
                3,
                "--turn-seconds",
                0.5,
                "--output",
                folder / "latency",
            ],
        ),
    ]
    for name, command, arguments in steps:
        texts = [str(argument) for argument in arguments]
        say(shlex.join([name, *texts]))
        if code := command(texts):
            return code
    say(
        "made: "
        + ", ".join(
            str(path)
            for path in (
                model,
                folder / "found",
                folder / "eval" / "report.html",
                folder / "latency",
            )
        )
    )
    return DONE


def say(text: str) -> None:
    """One line between the commands' own output."""
    print(f"\n\033[1m$ {text}\033[0m" if sys.stdout.isatty() else f"\n$ {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(demo_command))
