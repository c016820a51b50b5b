"""Compare the hints `throughput` and `latency` on a folder of images, as tood-infer runs them.

    python benchmarks/hints.py tiny.onnx tiny-int8.xml --images coco/val2017 --rounds 8

Every model is opened with either hint, and both go through all images in turns, file to boxes, so
that other load on the machine hits both alike. Prints images a second and how many times as fast
`throughput` is, with the 95% interval of the ratio of medians, and compares what was detected.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tood_deploy import Detections, Detector, __version__
from tood_deploy.benchmark.latency.machine import describe_machine
from tood_deploy.benchmark.latency.measure import speedup
from tood_deploy.engines.open import Hint

HINTS: tuple[Hint, ...] = ("latency", "throughput")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="artefacts, .onnx or .xml")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--imgsz", type=int, nargs=2, metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=8, help="after one to warm up")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    machine = describe_machine()
    table = Table(title=f"{machine.cpu}, {machine.cores} cores, tood_deploy {__version__}")
    for column in ("model", "runtime", *(f"{hint}, images/s" for hint in HINTS), "times as fast"):
        table.add_column(column)
    for model in arguments.models:
        table.add_row(Path(model).name, *measure(model, arguments))
    Console(width=120).print(table)


def measure(model: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the runtime, the rate with either hint, and the ratio with its interval."""
    size = None if arguments.imgsz is None else tuple(arguments.imgsz)
    detectors: dict[Hint, Detector] = {
        hint: Detector(model, imgsz=size, threads=arguments.threads, hint=hint) for hint in HINTS
    }
    seconds: dict[Hint, list[list[float]]] = {hint: [] for hint in HINTS}
    results: dict[Hint, list[Detections]] = {}
    for round_ in range(arguments.rounds + 1):
        for hint, detector in detectors.items():
            start = time.perf_counter()
            results[hint] = [found for _, found in detector.stream(arguments.images)]
            if round_:
                seconds[hint].append([time.perf_counter() - start])
    check_equal(*results.values())
    count = len(results["latency"])
    rates = (f"{count / float(np.median(seconds[hint])):.1f}" for hint in HINTS)
    ratio = speedup(seconds["latency"], seconds["throughput"])
    interval = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return detectors["latency"].engine.name, *rates, interval


def check_equal(one: list[Detections], other: list[Detections]) -> None:
    """Stop where the hints do not detect the same objects, to the accuracy of a float32 sum."""
    for a, b in zip(one, other, strict=True):
        if len(a) != len(b) or not np.allclose(a.scores, b.scores, atol=1e-4):
            raise SystemExit("the hints detect different objects")


if __name__ == "__main__":
    main()
