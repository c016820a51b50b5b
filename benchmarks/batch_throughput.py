"""Compare the images a second of tood-batch on this machine with those of tood-infer.

python benchmarks/batch_throughput.py tiny.onnx --report throughput.md

Both commands run on a few and on many images, in turn. The difference of the two times is that of
working; what is left of the shorter one is that of starting.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cv2

from tood_deploy.demo.scenes import make_scene

CODE = "import sys; from tood_deploy.cli.{command} import main; sys.exit(main())"
SCENES = 50  # different images; more are copies of them


@dataclass(frozen=True)
class Rate:
    """What one command needs.

    Attributes:
        images_per_s: while it works.
        start_s: seconds before and after.
    """

    images_per_s: float
    start_s: float


def write_images(folder: Path, count: int, size_hw: tuple[int, int]) -> Path:
    """Write JPEG images, and return their folder."""
    folder.mkdir()
    files = [
        cv2.imencode(".jpg", make_scene(seed, size_hw).image_bgr)[1].tobytes()
        for seed in range(min(count, SCENES))
    ]
    for i in range(count):
        (folder / f"{i:06}.jpg").write_bytes(files[i % len(files)])
    return folder


def run_seconds(command: str, *arguments: str | Path) -> float:
    """Return how long a command of ours takes."""
    started = time.perf_counter()
    words = [sys.executable, "-c", CODE.format(command=command), *map(str, arguments), "--quiet"]
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - started


def measure(command: str, model: Path, folders: tuple[Path, Path], outputs: Path) -> Rate:
    """Run a command on few and on many images.

    Args:
        command: "infer" or "batch".
        model: an artefact.
        folders: of few and of many images.
        outputs: folder for what the commands write.
    """
    seconds, counts = [], [len(list(folder.iterdir())) for folder in folders]
    for folder in folders:
        place = outputs / f"{command}-{time.monotonic_ns()}"
        option = "--jsonl" if command == "infer" else "--output"
        seconds.append(run_seconds(command, model, folder, option, place))
    rate = (counts[1] - counts[0]) / (seconds[1] - seconds[0])
    return Rate(rate, seconds[0] - counts[0] / rate)


def report(rounds: list[dict[str, Rate]], counts: tuple[int, int], size_hw: tuple[int, int]) -> str:
    """Return the page.

    Args:
        rounds: rates by command.
        counts: of images, few and many.
        size_hw: of the images.
    """
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    ratios = [one["batch"].images_per_s / one["infer"].images_per_s for one in rounds]
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "pyarrow", "onnxruntime"))
    lines = [
        "# Throughput of tood-batch on one machine",
        "",
        f"{names[0].partition(': ')[2]}, {os.cpu_count()} cores, {platform.system()}; {versions}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; JPEG images of "
        f"{size_hw[1]} x {size_hw[0]}, {counts[0]} and {counts[1]} of them.",
        "",
        "| round | tood-infer, images/s | tood-batch, images/s | ratio | start of tood-infer, s "
        "| start of tood-batch, s |",
        "|---|---|---|---|---|---|",
    ]
    for number, (one, ratio) in enumerate(zip(rounds, ratios, strict=True), 1):
        infer, batch = one["infer"], one["batch"]
        lines.append(
            f"| {number} | {infer.images_per_s:.1f} | {batch.images_per_s:.1f} | {ratio:.2f} "
            f"| {infer.start_s:.1f} | {batch.start_s:.1f} |"
        )
    lines += ["", f"Median ratio: **{statistics.median(ratios):.2f}**."]
    return "\n".join([*lines, "", f"Made by `python {' '.join(sys.argv)}`.", ""])


def main() -> None:
    """Measure, print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", nargs=2, type=int, default=(200, 1200), metavar=("FEW", "MANY"))
    parser.add_argument("--size", nargs=2, type=int, default=(240, 320), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    size_hw = (arguments.size[0], arguments.size[1])
    few, many = arguments.images
    with tempfile.TemporaryDirectory() as place:
        folders = tuple(
            write_images(Path(place) / name, count, size_hw)
            for name, count in (("few", few), ("many", many))
        )
        rounds = []
        for _ in range(arguments.rounds):
            pair = (folders[0], folders[1])
            rounds.append(
                {
                    command: measure(command, arguments.model, pair, Path(place))
                    for command in ("infer", "batch")
                }
            )
    page = report(rounds, (few, many), size_hw)
    print(page)
    if arguments.report is not None:
        arguments.report.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
