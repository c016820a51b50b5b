"""Compare TOOD with ATSS, GFL and PAA: train small ones, time large ones, write one page.

    python benchmarks/heads.py train --work runs/heads --data bccd --epochs 30 --seeds 0 1 2
    python benchmarks/heads.py align --work runs/heads --data bccd
    python benchmarks/heads.py latency --work runs/heads --images bccd/val --imgsz 640 640
    python benchmarks/heads.py report --work runs/heads --output docs/results/heads.md

Everything goes into the folder --work. `train` skips runs that are finished and goes on with those
that were stopped; `report` takes what is there, and says of every row how much that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy import __version__
from tood_deploy.benchmark.latency.measure import LatencyPlan, speedup
from tood_deploy.benchmark.latency.worker import END_TO_END, Case
from tood_deploy.cli.eval import main as tood_eval
from tood_deploy.cli.train import main as tood_train
from tood_deploy.files import write_text
from tood_deploy.presets import PRESETS
from tood_deploy.reporter import Reporter

if TYPE_CHECKING:
    from tood_deploy.benchmark.html_report import Table

LARGE = ("r50-1x", "atss-r50-1x", "gfl-r50-1x", "paa-r50-1x")
LARGE_HW = (800, 1344)
RUNTIMES = ("eager PyTorch", "ONNX Runtime", "OpenVINO fp32", "OpenVINO int8")
REPORT = "report.json"
ALIGNMENT = "alignment"  # folder beside a training's checkpoint
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
CALIBRATION_IMAGES, SCHEME = 16, "u8s7"


@dataclass(frozen=True)
class Variant:
    """One of the trained detectors.

    Attributes:
        head: as the table names it.
        learning: how anchor points are assigned and weighed, as the table names it.
        preset: of the network.
        loss: whose loss, as of `Recipe.loss`.
        atss_throughout: whether ATSS assigns in all epochs of TOOD's loss, not in the first alone.
    """

    head: str
    learning: str
    preset: str
    loss: str = "own"
    atss_throughout: bool = False

    def arguments(self, epochs: int) -> list[str]:
        """Return what `tood-train` is given to train it."""
        loss = [] if self.loss == "own" else ["--loss", self.loss]
        return [self.preset, *loss, *(["--atss-epochs", str(epochs)] * self.atss_throughout)]


VARIANTS = {
    "tood": Variant("T-head", "task-aligned (TOOD)", "tiny"),
    "atss": Variant("parallel, centre-ness", "ATSS", "tiny-atss"),
    "gfl": Variant("parallel, distributions", "ATSS, quality focal (GFL)", "tiny-gfl"),
    "paa": Variant("parallel, overlap, box voting", "mixtures of losses (PAA)", "tiny-paa"),
    "parallel-aligned": Variant(
        "parallel, centre-ness", "task-aligned (TOOD's)", "tiny-atss", loss="tood"
    ),
    "t-head-atss": Variant("T-head", "ATSS (TOOD's first epochs)", "tiny", atss_throughout=True),
}


def run_folder(work: Path, name: str, epochs: int, seed: int) -> Path:
    """Return where one training lies.

    Args:
        work: the folder of everything.
        name: of the variant.
        epochs: of the training.
        seed: of its weights, order and augmentation.
    """
    return work / f"{name}-e{epochs}-s{seed}"


def train(arguments: argparse.Namespace) -> int:
    """Train what is not finished, seed by seed; return the exit code of the last training."""
    from tood_deploy.training.checkpoints import FINAL

    data = arguments.data
    for seed in arguments.seeds:
        for name in arguments.variants:
            output = run_folder(arguments.work, name, arguments.epochs, seed)
            if (output / FINAL).is_file():
                continue
            given = VARIANTS[name].arguments(arguments.epochs)
            for part in ("train", "val"):
                given += [f"--{part}-json", str(data / f"{part}.json")]
                given += [f"--{part}-images", str(data / part)]
            given += ["--epochs", str(arguments.epochs), "--seed", str(seed)]
            # Only the last epoch is evaluated: the best of several would be a choice by the very
            # images that AP is measured on.
            given += ["--eval-every", str(arguments.epochs), "--threads", str(arguments.threads)]
            given += ["--drops", *map(str, drops(arguments.epochs))]
            if code := tood_train([*given, "--resume", "--quiet", "--output", str(output)]):
                return code
    return 0


def align(arguments: argparse.Namespace) -> int:
    """Measure the task alignment of every finished training that has none yet; 0, or an error."""
    from tood_deploy.training.checkpoints import FINAL

    truth = ["--annotations", str(arguments.data / "val.json"), "--images"]
    truth.append(str(arguments.data / "val"))
    for final in sorted(arguments.work.glob(f"*-e*-s*/{FINAL}")):
        output = final.parent / ALIGNMENT
        if (output / REPORT).is_file():
            continue
        command = [str(final), *truth, "--output", str(output), "--quiet", "--alignment"]
        if code := tood_eval(command):
            return code
    return 0


def drops(epochs: int) -> tuple[int, ...]:
    """Return the epochs after which the learning rate drops: of 12 the published 8 and 11."""
    from tood_deploy.training.config import RECIPES

    return (8, 11) if epochs == 12 else RECIPES["tiny"].with_epochs(epochs).drops


def time_models(arguments: argparse.Namespace) -> int:
    """Make every large model for every runtime, and time all of them in one run."""
    # Only here, as what imports torch and matplotlib elsewhere: the processes that are timed
    # import this file too.
    from tood_deploy.benchmark.latency.run import run_latency

    folder = arguments.work / "models"
    folder.mkdir(parents=True, exist_ok=True)
    given = {path.name.split(".")[0]: path for path in arguments.checkpoints}
    cases = []
    for preset in LARGE:
        checkpoint = given.get(preset) or random_checkpoint(folder, preset)
        plain, quantized = make_artefacts(folder, preset, checkpoint, arguments)
        opened: tuple[tuple[Path, dict[str, Any]], ...] = (
            (checkpoint, {}),
            (plain, {"self_test": False}),
            (plain, {"self_test": False, "runtime": "openvino", "precision": "fp32"}),
            (quantized, {"self_test": False, "runtime": "openvino"}),
        )
        cases += [
            Case(
                str(path),
                f"{preset}, {runtime}",
                images=arguments.images,
                threads=arguments.threads,
                conf=arguments.conf,
                warmup_s=arguments.warmup_seconds,
                options=options,
            )
            for runtime, (path, options) in zip(RUNTIMES, opened, strict=True)
        ]
    sizes = (tuple(arguments.imgsz),)
    plan = LatencyPlan(tuple(cases), (1,), sizes, arguments.rounds, arguments.turn_seconds)
    command = f"python benchmarks/heads.py {' '.join(sys.argv[1:])}"
    output = arguments.work / "latency"
    run_latency(plan, output, ap={}, command=command, reporter=Reporter())
    write_text(output / "weights.txt", arguments.weights)
    return 0


def random_checkpoint(folder: Path, preset: str) -> Path:
    """Return a checkpoint of random weights, written once."""
    import torch

    from tood_deploy.model import build_model, save_checkpoint

    path = folder / f"{preset}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        save_checkpoint(build_model(preset), path)
    return path


def make_artefacts(
    folder: Path, preset: str, checkpoint: Path, arguments: argparse.Namespace
) -> tuple[Path, Path]:
    """Return the .onnx in float32 and in 8 bits, made where they are not there yet.

    They are not verified: where there are no trained weights nothing stands out to be compared.

    Args:
        folder: of the files.
        preset: of the network.
        checkpoint: its weights.
        arguments: with the images to calibrate on, and their size.
    """
    from tood_deploy.export.precision.calibrate import calibrate
    from tood_deploy.export.precision.quantize import calibrated_values, quantize
    from tood_deploy.export.to_onnx import onnx_from_model
    from tood_deploy.manifest import Manifest
    from tood_deploy.manifest_sections import Int8Build
    from tood_deploy.model import load_checkpoint
    from tood_deploy.onnx_file import artefact_in_memory, write_onnx

    plain, quantized = (folder / f"{preset}-{precision}.onnx" for precision in ("fp32", "int8"))
    if plain.is_file() and quantized.is_file():
        return plain, quantized
    model = load_checkpoint(checkpoint, preset=preset)
    exported, manifest = onnx_from_model(model, deform="gather"), Manifest(model.preset)
    write_onnx(artefact_in_memory(plain, exported, manifest), plain)
    height, width = arguments.imgsz
    values = calibrate(
        exported,
        calibrated_values(exported),
        arguments.images,
        replace(model.preset.sizing, imgsz=(height, width)),
        max_images=CALIBRATION_IMAGES,
        cache=folder,
    ).ranges("percentile")
    smaller = quantize(exported, values, scheme=SCHEME)
    build = replace(manifest.build, int8=Int8Build(SCHEME))
    manifest = replace(manifest, precision="int8", build=build)
    write_onnx(artefact_in_memory(quantized, smaller, manifest), quantized)
    return plain, quantized


def report(arguments: argparse.Namespace) -> int:
    """Write the page of all that the folder holds."""
    sections = ["# The heads compared", INTRODUCTION.format(version=__version__, date=today())]
    sections += ["## Average precision, `tiny` trained from random weights", SMALL_NOTE]
    sections += accuracy(arguments.work)
    sections += ["## Task alignment, of the same trainings", ALIGNMENT_NOTE]
    sections += alignment(arguments.work)
    sections += ["## Size, R50", size_table().markdown()]
    sections += ["## Latency, R50", *latency(arguments.work / "latency")]
    write_text(arguments.output, "\n\n".join(sections) + "\n")
    return 0


def today() -> str:
    """Return the date."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


INTRODUCTION = """\
TOOD against the detectors of its paper's comparison, and the paper's two changes, head and
learning, one at a time. Made by `benchmarks/heads.py`, tood_deploy {version}, {date}."""

SMALL_NOTE = """\
Trained by the recipe of `tiny` (docs/results/training.md), one for all, with TOOD's own four epochs
of ATSS before task-aligned learning; AP on the validation images after the last epoch. What this
can show: that each of them learns, and differences well above the spread over seeds. What it cannot
show: the paper's differences of one or two points, which are those of networks with pre-trained
backbones on COCO, 400 times the images. A row of one seed has no spread, and two rows of one seed
each should not be ranked by a point or two: three seeds of TOOD over 30 epochs lay 1.0 apart."""


ALIGNMENT_NOTE = """\
Spearman's rank correlation of score and overlap (IoU) over all true positives, a class a column,
by `tood-eval --alignment` on the validation images; of all classes together, before suppression,
the mean over the objects of the correlation among the 50 predictions that are surest of an object,
and of the overlap of the 10 surest (docs/alignment.md). Means over the seeds. What this can show:
whether a head and its learning are far apart in it. What it cannot: differences of some hundredths,
and differences in classes of some dozens of objects, which one training more may turn around."""


@dataclass(frozen=True)
class Training:
    """What a finished training gave: its variant, epochs, seed and metrics (0 to 1)."""

    variant: str
    epochs: int
    seed: int
    metrics: dict[str, float]


def trainings(work: Path) -> list[Training]:
    """Return the finished trainings."""
    from tood_deploy.training.checkpoints import FINAL
    from tood_deploy.training.logger import read_log

    done = []
    for final in sorted(work.glob(f"*-e*-s*/{FINAL}")):
        name, epochs, seed = final.parent.name.rsplit("-", 2)
        last = read_log(final.parent, "epoch")[-1]
        if name in VARIANTS and "AP" in last:
            metrics = {metric: float(last[metric]) for metric in METRICS}
            done.append(Training(name, int(epochs[1:]), int(seed[1:]), metrics))
    return done


def accuracy(work: Path) -> list[str]:
    """Return a table for each number of epochs that trainings have, the longest first."""
    from tood_deploy.benchmark.html_report import Table

    done = trainings(work)
    parts = []
    for epochs in sorted({training.epochs for training in done}, reverse=True):
        own = [training for training in done if training.epochs == epochs]
        missing = [name for name in VARIANTS if not any(run.variant == name for run in own)]
        rows = [accuracy_row(name, own) for name in VARIANTS if name not in missing]
        headers = ("variant", "head", "learning", "seeds", "AP", "smallest to largest")
        dropped = " and ".join(map(str, drops(epochs)))
        absent = f" Not trained: {', '.join(missing)}." if missing else ""
        note = f"{epochs} epochs, the learning rate drops after {dropped}.{absent}"
        columns = (*headers, *(metric.replace("_", " ") for metric in METRICS[1:]))
        parts.append(Table(columns, rows, note).markdown())
    return parts or ["No training has finished."]


def accuracy_row(name: str, done: Sequence[Training]) -> list[str]:
    """Return the row of one variant, of trainings of one number of epochs."""
    own = [training.metrics for training in done if training.variant == name]
    means = {metric: statistics.fmean(run[metric] for run in own) for metric in METRICS}
    values = [run["AP"] for run in own]
    spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else "one seed"
    numbers = [f"{means[metric]:.3f}" for metric in METRICS]
    variant = VARIANTS[name]
    return [name, variant.head, variant.learning, str(len(own)), numbers[0], spread, *numbers[1:]]


def alignment(work: Path) -> list[str]:
    """Return a table of the alignment of the trainings that it was measured of, a row a variant."""
    from tood_deploy.benchmark.html_report import Table

    measured: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for training in trainings(work):
        path = run_folder(work, training.variant, training.epochs, training.seed)
        path = path / ALIGNMENT / REPORT
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))["alignment"]
            measured.setdefault((training.variant, training.epochs), []).append(values)
    if not measured:
        return ["Not measured."]
    classes = list(next(iter(measured.values()))[0]["classes"])
    rows = []
    for name, epochs in sorted(measured, key=lambda key: (-key[1], list(VARIANTS).index(key[0]))):
        runs = measured[name, epochs]
        columns = [[run["classes"][own]["correlation"] for run in runs] for own in classes]
        for key in ("correlation", "surest_correlation", "tight_iou"):
            columns.append([run["together"][key] for run in runs])
        known = ([value for value in values if value is not None] for values in columns)
        means = (f"{statistics.fmean(values):.3f}" if values else None for values in known)
        rows.append([name, str(epochs), str(len(runs)), *means])
    headers = ("variant", "epochs", "seeds", *classes, "all", "50 surest", "IoU of 10 surest")
    return [Table(headers, rows).markdown()]


def size_table() -> Table:
    """Return parameters and multiply-adds of the large networks."""
    from tood_deploy.benchmark.html_report import Table
    from tood_deploy.benchmark.latency.peak import network_cost

    rows = []
    for preset in LARGE:
        parameters, gmacs = network_cost(PRESETS[preset], LARGE_HW)
        published = f"{PRESETS[preset].published_ap:.1f}"
        rows.append([preset, f"{parameters / 1e6:.2f}", f"{gmacs:.1f}", published])
    note = (
        f"GMACs at {LARGE_HW[0]}x{LARGE_HW[1]}: convolutions and matrix products of the network. "
        "AP as MMDetection publishes it for COCO, not measured here."
    )
    return Table(("preset", "parameters, millions", "GMACs", "published AP"), rows, note)


def latency(folder: Path) -> list[str]:
    """Return a table of what `latency` measured, a row a detector, and how it was measured."""
    from tood_deploy.benchmark.html_report import Table

    path = folder / "latency.json"
    if not path.is_file():
        return ["Not measured."]
    content = json.loads(path.read_text(encoding="utf-8"))
    measured = {each["model"]: each for each in content["measurements"]}
    rows = []
    for preset in LARGE:
        pairs = [(f"{LARGE[0]}, {runtime}", f"{preset}, {runtime}") for runtime in RUNTIMES]
        rows.append([preset, *(cell(measured[base], measured[own]) for base, own in pairs)])
    note = (
        "Median milliseconds of a call, end to end, batch 1; in brackets how many times as fast as "
        f"{LARGE[0]} in the same runtime, with its 95% interval. All took turns in one run. "
        f"Weights: {(folder / 'weights.txt').read_text(encoding='utf-8')}."
    )
    facts = [f"- {name}: {value}" for name, value in content["facts"].items()]
    facts += [f"- warning: {warning}" for warning in content["warnings"]]
    return [Table(("preset", *RUNTIMES), rows, note).markdown(), "\n".join(facts)]


def cell(base: dict[str, Any], own: dict[str, Any]) -> str:
    """Return the median of a measurement, and its ratio to another, as latency.json has them."""
    median = own["ms"][END_TO_END]["total"]["median"]
    if own is base:
        return f"{median:.1f}"
    ratio = speedup(rounds_ms(base), rounds_ms(own))
    return f"{median:.1f} ({ratio.value:.2f}, {ratio.low:.2f} to {ratio.high:.2f})"


def rounds_ms(measured: dict[str, Any]) -> list[list[float]]:
    """Return the milliseconds of every end-to-end call, round by round."""
    return [[call["total"] for call in turn[END_TO_END]] for turn in measured["rounds"]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    steps = (("train", train), ("align", align), ("latency", time_models), ("report", report))
    for name, action in steps:
        command = commands.add_parser(name, help=str(action.__doc__).splitlines()[0])
        command.set_defaults(run=action)
        command.add_argument("--work", type=Path, required=True, metavar="DIR")
        if name in ("train", "align"):
            command.add_argument(
                "--data", type=Path, required=True, metavar="DIR", help="train.json, train, val..."
            )
        if name == "train":
            command.add_argument("--epochs", type=int, default=30, metavar="N")
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
            command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
            command.add_argument("--threads", type=int, default=1, metavar="N")
        elif name == "latency":
            _add_latency(command)
        elif name == "report":
            command.add_argument("--output", type=Path, required=True, metavar="FILE")
    return parser.parse_args(argv)


def _add_latency(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoints",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"named as {', '.join(LARGE)} (default: random weights)",
    )
    command.add_argument(
        "--weights", default="random", metavar="TEXT", help="what the page calls the weights"
    )
    command.add_argument("--images", type=Path, required=True, metavar="DIR")
    command.add_argument("--imgsz", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    command.add_argument("--rounds", type=int, default=6, metavar="N")
    command.add_argument("--turn-seconds", type=float, default=2.0, metavar="S")
    command.add_argument("--warmup-seconds", type=float, default=10.0, metavar="S")
    command.add_argument("--threads", type=int, metavar="N")
    command.add_argument("--conf", type=float, default=0.05, metavar="P")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; return the exit code."""
    arguments = parse(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
