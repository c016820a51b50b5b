"""Measure everything on a GPU in one go.

`python -m benchmarks.gpu`; benchmarks/gpu.sh prepares a bare machine for it. A row that fails says
so in the tables, and the run goes on. Exit code 1 where one failed that should not have, 2 for
wrong use.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

from benchmarks.gpu.settings import BACKENDS, H200_TFLOPS, MODES, PRECISIONS, Mode, Settings
from tood_deploy.cli.common import run_command
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.export.tensorrt.options import shapes_from_text
from tood_deploy.presets import PRESETS


@dataclass(frozen=True)
class Defaults:
    """Defaults of the arguments that depend on the device."""

    preset: str
    sizes: str
    batches: str
    rounds: int
    seconds: float


DEFAULTS = {
    "cpu": Defaults("tiny", "64x96", "1,2", 2, 0.1),  # only the flow is of interest there
    "cuda": Defaults("r50-1x", "800x1344,640x640", "1,8,32", 5, 0.15),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments; those whose default depends on the device have none."""
    result = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network_arguments(result)
    add_variant_arguments(result)
    add_measuring_arguments(result)
    return result


def add_network_arguments(result: argparse.ArgumentParser) -> None:
    """Add the arguments that choose device, network, sizes and images."""
    add = result.add_argument
    small = "cpu runs the same flow, small, to test it"
    add("--device", choices=tuple(MODES), default="cuda", help=small)
    seeded = "whose network, with seeded weights (r50-1x; tiny on a CPU)"
    add("--preset", choices=tuple(PRESETS), help=seeded)
    add("--checkpoint", type=Path, help="weights of your own")
    add("--onnx", type=Path, help="its export in float32 (exported on the spot where not given)")
    sizes = "padded sizes, the most important first (800x1344,640x640; 64x96)"
    add("--sizes", metavar="HxW,...", help=sizes)
    batches = "images a call, the most important first (1,8,32; 1,2)"
    add("--batches", metavar="N,...", help=batches)
    images = "images for parity (synthetic ones where not given)"
    add("--images", type=Path, metavar="DIR", help=images)
    add("--image-count", type=int, default=8, help="how many of them (default: 8)")


def add_variant_arguments(result: argparse.ArgumentParser) -> None:
    """Add the arguments that choose runtimes, modes and precisions."""
    add = result.add_argument
    add("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    add("--backends", nargs="*", choices=BACKENDS, default=BACKENDS)
    modes = "of PyTorch (eager graph compiled; eager static)"
    add("--modes", nargs="*", choices=get_args(Mode), help=modes)
    every = "compile every precision in every cell, not bf16 alone after the first"
    add("--compile-all", action="store_true", help=every)


def add_measuring_arguments(result: argparse.ArgumentParser) -> None:
    """Add the arguments that say how long to measure, and where the reports go."""
    add = result.add_argument
    add("--rounds", type=int, help="in which all rows of a cell take turns (5; 2)")
    add("--seconds", type=float, help="that a row is measured for in a round (0.15; 0.1)")
    budget = "nothing further is started after so long (default: 540)"
    add("--budget-seconds", type=float, default=540.0, help=budget)
    peak = f"of the GPU in bf16, for the floor (default: {H200_TFLOPS:g}, an H200)"
    add("--peak-tflops", type=float, default=H200_TFLOPS, help=peak)
    stem, written = Path("docs/results/gpu"), "writes STEM.json and STEM.md"
    add("--output", type=Path, default=stem, metavar="STEM", help=written)


def settings_from(arguments: argparse.Namespace, folder: Path) -> Settings:
    """Return the settings of the run that the arguments ask for.

    Args:
        arguments: of the parser.
        folder: for exported and built files.

    Raises:
        ToodError: a size, batch or number that is none.
    """
    given = {field.name: getattr(arguments, field.name) for field in fields(Defaults)}
    given = {name: value for name, value in given.items() if value is not None}
    chosen = replace(DEFAULTS[arguments.device], **given)
    if min(arguments.image_count, chosen.rounds) < 1 or chosen.seconds <= 0:
        numbers = (
            f"images {arguments.image_count}, rounds {chosen.rounds}, seconds {chosen.seconds}"
        )
        raise ToodError(f"{numbers}; expected positive numbers")
    return Settings(
        device=arguments.device,
        preset=chosen.preset,
        sizes_hw=shapes_from_text(chosen.sizes),
        batches=read_batches(chosen.batches),
        folder=folder,
        checkpoint=arguments.checkpoint,
        onnx=arguments.onnx,
        precisions=tuple(arguments.precisions),
        backends=tuple(arguments.backends),
        modes=MODES[arguments.device] if arguments.modes is None else tuple(arguments.modes),
        compile_all=arguments.compile_all,
        images=arguments.images,
        image_count=arguments.image_count,
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        budget_seconds=arguments.budget_seconds,
        peak_tflops=arguments.peak_tflops,
    )


def read_batches(text: str) -> tuple[int, ...]:
    """Read batch sizes with commas between them.

    Raises:
        ToodError: one that is no positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        problem = "expected positive numbers with commas between them, for example 1,8,32"
        raise ToodError(f"batches are {text!r}; {problem}")
    return tuple(map(int, parts))


def measure(argv: Sequence[str] | None) -> int:
    """Run everything, write the reports, print what failed, and return the exit code."""
    arguments = parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        from benchmarks.gpu.run import run_all
    except ImportError as error:
        packages = "PyTorch, NumPy, OpenCV, Pillow, psutil, rich, Jinja2, imagesize and msgspec"
        raise DeviceError(
            f"{error}; this needs {packages}: set PYTHON, or give --wheels"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        command = shlex.join(["python", "-m", "benchmarks.gpu", *given])
        failures = run_all(settings_from(arguments, Path(folder)), arguments.output, command)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
