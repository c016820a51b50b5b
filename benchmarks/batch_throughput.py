"""Compare the images a second of tood-batch on this machine with those of tood-infer.

python benchmarks/batch_throughput.py tiny.onnx --source coco/images --report throughput.md

Both commands run on a few and on many images, in turn, so that other load on the machine hits both
alike. The difference of the two times is that of working; what is left of the shorter one is that
of starting. CPU time, of a command and all processes that it starts, is disturbed least.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cv2
import psutil

from tood_deploy.data.images import IMAGE_SUFFIXES
from tood_deploy.demo.scenes import make_scene

CODE = "import sys; from tood_deploy.cli.{command} import main; sys.exit(main())"
SCENES, SCENE_HW = 50, (240, 320)  # images where no folder is given
SAMPLING_S = 0.2
HEADER = """
| round | tood-infer, images/s | tood-batch, images/s | ratio | tood-infer, CPU ms an image \
| tood-batch, CPU ms an image | ratio | start of tood-infer, s (CPU s) | start of tood-batch, s \
(CPU s) |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Run:
    """What one run of a command took.

    Attributes:
        seconds: from its start to its end.
        cpu_s: of a core, by its process and all that it started.
    """

    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class Rate:
    """What one command needs.

    Attributes:
        images_per_s: while it works.
        cpu_ms: milliseconds of a core an image.
        start_s, start_cpu_s: before and after.
    """

    images_per_s: float
    cpu_ms: float
    start_s: float
    start_cpu_s: float

    @property
    def start(self) -> str:
        """Seconds and CPU seconds of starting."""
        return f"{self.start_s:.1f} ({self.start_cpu_s:.1f})"


def write_scenes(folder: Path) -> list[Path]:
    """Write generated images as JPEG files."""
    folder.mkdir()
    paths = [folder / f"scene{seed:02}.jpg" for seed in range(SCENES)]
    for seed, path in enumerate(paths):
        cv2.imwrite(str(path), make_scene(seed, SCENE_HW).image_bgr)
    return paths


def link_images(folder: Path, images: Sequence[Path], count: int) -> Path:
    """Fill a folder with links to images, again and again the same where there are too few."""
    folder.mkdir()
    for i, path in zip(range(count), itertools.cycle(images), strict=False):
        (folder / f"{i:06}{path.suffix}").symlink_to(path.resolve())
    return folder


def run_command(command: str, *arguments: str | Path) -> Run:
    """Run a command of ours to its end."""
    started, cpu_s = time.perf_counter(), dict[tuple[int, float], float]()
    words = [sys.executable, "-c", CODE.format(command=command), *map(str, arguments), "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as job:
        root = psutil.Process(job.pid)
        while job.poll() is None:
            cpu_s |= sample_cpu(root)
            time.sleep(SAMPLING_S)
    seconds = time.perf_counter() - started
    if job.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {job.returncode}")
    return Run(seconds, sum(cpu_s.values()))


def sample_cpu(root: psutil.Process) -> dict[tuple[int, float], float]:
    """Return the CPU seconds of a process and its descendants, by number and start."""
    sampled = {}
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for process in processes:
        try:
            times = process.cpu_times()
            sampled[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:  # it has just ended
            continue
    return sampled


def measure(command: str, model: Path, folders: Sequence[Path], outputs: Path) -> Rate:
    """Run a command on few and on many images.

    Args:
        command: "infer" or "batch".
        model: an artefact.
        folders: of few and of many images.
        outputs: folder for what the commands write.
    """
    counts = [len(list(folder.iterdir())) for folder in folders]
    option = "--jsonl" if command == "infer" else "--output"
    few, many = (
        run_command(command, model, folder, option, outputs / f"{command}-{time.monotonic_ns()}")
        for folder in folders
    )
    images = counts[1] - counts[0]
    image_s, image_cpu_s = (many.seconds - few.seconds) / images, (many.cpu_s - few.cpu_s) / images
    return Rate(
        1 / image_s,
        1000 * image_cpu_s,
        few.seconds - counts[0] * image_s,
        few.cpu_s - counts[0] * image_cpu_s,
    )


def report(rounds: Sequence[dict[str, Rate]], counts: Sequence[int], images: str) -> str:
    """Return the page.

    Args:
        rounds: rates by command.
        counts: of images, few and many.
        images: what they are.
    """
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next(line.partition(": ")[2] for line in cpus if line.startswith("model name"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "pyarrow", "onnxruntime"))
    lines = [
        "# tood-batch on one machine",
        "",
        f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, "
        f"{versions}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {counts[0]} and {counts[1]} "
        f"{images}; load of the machine in the end, this job's included: {os.getloadavg()[1]:.1f}.",
        HEADER,
    ]
    rates, cpu_ratios = [], []
    for number, one in enumerate(rounds, 1):
        infer, batch = one["infer"], one["batch"]
        rates.append(batch.images_per_s / infer.images_per_s)
        cpu_ratios.append(infer.cpu_ms / batch.cpu_ms)
        lines.append(
            f"| {number} | {infer.images_per_s:.1f} | {batch.images_per_s:.1f} | {rates[-1]:.2f} "
            f"| {infer.cpu_ms:.1f} | {batch.cpu_ms:.1f} | {cpu_ratios[-1]:.2f} "
            f"| {infer.start} | {batch.start} |"
        )
    lines += [
        "",
        f"Median ratio of the rates: **{statistics.median(rates):.2f}**; of the images that a "
        f"second of a core is enough for: **{statistics.median(cpu_ratios):.2f}**.",
    ]
    return "\n".join([*lines, "", f"Made by `python {' '.join(sys.argv)}`.", ""])


def main() -> None:
    """Measure, print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--source", type=Path, help="folder of images (default: generated ones)")
    parser.add_argument("--images", nargs=2, type=int, default=(200, 1200), metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if arguments.source is None:
            images, kind = write_scenes(place / "scenes"), f"generated images, {SCENES} of them new"
        else:
            listed = sorted(arguments.source.iterdir())
            images = [path for path in listed if path.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                raise SystemExit(f"{arguments.source}: holds no image")
            kind = f"images, links to {len(images)} different ones"
        folders = [link_images(place / str(n), images, n) for n in arguments.images]
        rounds = [
            {name: measure(name, arguments.model, folders, place) for name in ("infer", "batch")}
            for _ in range(arguments.rounds)
        ]
    page = report(rounds, arguments.images, kind)
    print(page)
    if arguments.report is not None:
        arguments.report.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
