"""Everything that is measured on a GPU, in one go: `python -m benchmarks.gpu`; benchmarks/gpu.sh prepares a bare machine for it.

A row that fails says so in the tables, and the run goes on. Exit code 1 where one failed that should not have, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.settings import BACKENDS, H200_TFLOPS, MODES, PRECISIONS, Settings
from tood_deploy.cli.common import run_command
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.export.tensorrt.options import shapes_from_text
from tood_deploy.presets import PRESETS

SMALL = {
    "preset": "tiny",
    "sizes": "64x96",
    "batches": "1,2",
    "rounds": 2,
    "seconds": 0.1,
}  # on a CPU, where the flow alone is of interest
FULL = {
    "preset": "r50-1x",
    "sizes": "800x1344,640x640",
    "batches": "1,8,32",
    "rounds": 5,
    "seconds": 0.15,
}


def parser() -> argparse.ArgumentParser:
    """The script's arguments; what has another default on a CPU has none here."""
    result = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--device",
        choices=tuple(MODES),
        default="cuda",
        help="cpu runs the same flow, small, to test it",
    )
    result.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="whose network, with seeded weights (r50-1x; tiny on a CPU)",
    )
    result.add_argument("--checkpoint", type=Path, help="weights of your own")
    result.add_argument(
        "--onnx", type=Path, help="its export in float32 (made on the spot where not given)"
    )
    result.add_argument(
        "--sizes",
        metavar="HxW,...",
        help="padded sizes, the most important first (800x1344,640x640; 64x96)",
    )
    result.add_argument(
        "--batches", metavar="N,...", help="images a call, the most important first (1,8,32; 1,2)"
    )
    result.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    result.add_argument("--backends", nargs="*", choices=BACKENDS, default=BACKENDS)
    result.add_argument(
        "--modes",
        nargs="*",
        choices=("eager", "static", "graph", "compiled"),
        help="of PyTorch (eager graph compiled; eager static)",
    )
    result.add_argument(
        "--compile-all",
        action="store_true",
        help="compile every precision in every cell, not bf16 alone after the first",
    )
    result.add_argument(
        "--compile-mode", choices=("default", "max-autotune-no-cudagraphs"), default="default"
    )
    result.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="images for parity (synthetic ones where not given)",
    )
    result.add_argument("--image-count", type=int, default=8, help="how many of them (default: 8)")
    result.add_argument("--rounds", type=int, help="in which all rows of a cell take turns (5; 2)")
    result.add_argument(
        "--seconds", type=float, help="that a row is measured for in a round (0.15; 0.1)"
    )
    result.add_argument(
        "--budget-seconds",
        type=float,
        default=540.0,
        help="nothing further is started after so long (default: 540)",
    )
    result.add_argument(
        "--peak-tflops",
        type=float,
        default=H200_TFLOPS,
        help=f"of the GPU in bf16, for the floor (default: {H200_TFLOPS:g}, an H200)",
    )
    result.add_argument(
        "--output",
        type=Path,
        default=Path("docs/results/gpu"),
        metavar="STEM",
        help="writes STEM.json and STEM.md",
    )
    return result


def settings_from(arguments: argparse.Namespace, folder: Path) -> Settings:
    """The run that was asked for.

    Raises:
        ToodError: sizes or batches that are none.
    """
    defaults = SMALL if arguments.device == "cpu" else FULL
    chosen = {
        name: getattr(arguments, name) if getattr(arguments, name) is not None else value
        for name, value in defaults.items()
    }
    batches = tuple(int(part) for part in chosen["batches"].split(",") if part.strip().isdecimal())
    if not batches or min(batches) < 1 or len(batches) != len(chosen["batches"].split(",")):
        raise ToodError(
            f"batches are {chosen['batches']!r}; expected positive numbers with commas between them, for example 1,8,32"
        )
    if min(arguments.image_count, chosen["rounds"]) < 1 or chosen["seconds"] <= 0:
        raise ToodError(
            f"images {arguments.image_count}, rounds {chosen['rounds']}, seconds {chosen['seconds']}; expected positive numbers"
        )
    return Settings(
        device=arguments.device,
        preset=chosen["preset"],
        sizes_hw=shapes_from_text(chosen["sizes"]),
        batches=batches,
        folder=folder,
        checkpoint=arguments.checkpoint,
        onnx=arguments.onnx,
        precisions=tuple(arguments.precisions),
        backends=tuple(arguments.backends),
        modes=MODES[arguments.device] if arguments.modes is None else tuple(arguments.modes),
        compile_all=arguments.compile_all,
        compile_mode=arguments.compile_mode,
        images=arguments.images,
        image_count=arguments.image_count,
        rounds=chosen["rounds"],
        seconds=chosen["seconds"],
        budget_seconds=arguments.budget_seconds,
        peak_tflops=arguments.peak_tflops,
    )


def measure(argv: Sequence[str] | None) -> int:
    """Runs, writes, and says what failed."""
    arguments = parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        from benchmarks.gpu.run import run_all
    except ImportError as error:
        raise DeviceError(
            f"{error}; this needs PyTorch, NumPy, OpenCV, psutil, rich and Jinja2: set PYTHON, or give --wheels"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        command = shlex.join(["python", "-m", "benchmarks.gpu", *given])
        failures = run_all(settings_from(arguments, Path(folder)), arguments.output, command)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    return run_command(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
