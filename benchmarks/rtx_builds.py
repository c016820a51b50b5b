"""Build every preset in every precision with TensorRT-RTX, without a GPU; print one table.

    python benchmarks/rtx_builds.py --work builds/ --output docs/results/rtx-builds.md

Weights are random and the ranges of int8 invented: neither changes what is built. Every build runs
in a process of its own. Files in the folder --work are used again, so that a run that was stopped
goes on where it stopped.
"""

import argparse
import io
import json
import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import onnx
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from tood_deploy import __version__
from tood_deploy.benchmark.latency.machine import describe_machine
from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.errors import ToodError
from tood_deploy.export.precision.half import lower_precision
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.export.tensorrt.layers import shares
from tood_deploy.export.tensorrt.options import (
    EngineOptions,
    Nms,
    Profiles,
    batch_from_text,
    shapes_from_text,
)
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.files import write_text
from tood_deploy.manifest import Manifest
from tood_deploy.model import build_model
from tood_deploy.onnx_file import artefact_in_memory, write_onnx
from tood_deploy.presets import PRESETS

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
INT8_RANGE = (-4.0, 4.0)  # of every value


@dataclass(frozen=True)
class Row:
    """One build.

    Attributes:
        preset, precision: of the network.
        onnx_mib, plan_mib: sizes of the files.
        layers: of the network as parsed.
        gmac: multiplications for one image of the first size, in 10^9.
        share: of the multiplications in the precision that was asked for, 0 to 1.
        seconds: for reading and building.
        peak_gib: highest memory of the process.
        error: why it was not built; "" where it was.
    """

    preset: str
    precision: str
    onnx_mib: float = 0.0
    plan_mib: float = 0.0
    layers: int = 0
    gmac: float = 0.0
    share: float = 0.0
    seconds: float = 0.0
    peak_gib: float = 0.0
    error: str = ""

    def cells(self) -> list[str]:
        """Return the row of the table."""
        if self.error:
            return [self.preset, self.precision, f"not built: {self.error}", *[""] * 6]
        numbers = (
            f"{self.onnx_mib:.0f}",
            f"{self.plan_mib:.0f}",
            str(self.layers),
            f"{self.gmac:.4g}",
            f"{self.share:.1%}",
        )
        return [
            self.preset,
            self.precision,
            *numbers,
            f"{self.seconds:.0f}",
            f"{self.peak_gib:.1f}",
        ]


def main() -> None:
    """Build and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--shapes", default="800x1344,1344x800")
    parser.add_argument("--batch", default="1,1,8", metavar="MIN,OPT,MAX")
    parser.add_argument(
        "--nms", choices=("unrolled", "loop"), default="unrolled", help="as of tood-export"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for ONNX files and results"
    )
    parser.add_argument("--output", type=Path, help="the Markdown file; stdout where not given")
    arguments = parser.parse_args()
    profiles = Profiles(shapes_from_text(arguments.shapes), batch_from_text(arguments.batch))
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = [
        kept_row(arguments.work, preset, precision, profiles, arguments.nms)
        for preset in arguments.presets
        for precision in arguments.precisions
    ]
    text = report(rows, profiles, arguments.nms)
    if arguments.output:
        write_text(arguments.output, text)
    else:
        print(text)


def kept_row(work: Path, preset: str, precision: str, profiles: Profiles, nms: Nms) -> Row:
    """Return the row of one build, from an earlier run with the same options, or build.

    Args:
        work: folder for ONNX files and results.
        preset, precision: of the network.
        profiles: sizes and batches of the engine.
        nms: form of suppression.
    """
    batch = "-".join(map(str, profiles.batch))
    path = work / f"{preset}-{precision}-{profiles.text()}-{batch}-{nms}.json"
    if not path.is_file():
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(save_precision, work, preset, precision).result()
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            row = pool.submit(build_row, work, preset, precision, profiles, nms).result()
        write_text(path, json.dumps(asdict(row), indent=2))
    return Row(**json.loads(path.read_text(encoding="utf-8")))


def save_precision(work: Path, preset: str, precision: str) -> None:
    """Write the ONNX of one preset in one precision, unless it is there.

    It is not verified, because a network of random weights finds nothing.

    Args:
        work: folder of the file.
        preset, precision: of the network.
    """
    path = onnx_path(work, preset, precision)
    if path.is_file():
        return
    plain = onnx_path(work, preset, "fp32")
    if not plain.is_file():
        torch.manual_seed(0)
        model = build_model(preset).eval()
        exported = onnx_from_model(model, deform="gather")
        write_onnx(artefact_in_memory(plain, exported, Manifest(model.preset)), plain)
    if precision == "fp32":
        return
    exported = onnx.load(plain)
    if precision == "int8":
        exported = quantize(
            exported, dict.fromkeys(calibrated_values(exported), INT8_RANGE), scheme="s8s8"
        )
    converted, _ = lower_precision(exported, "bf16" if precision == "bf16" else "fp16")
    manifest = replace(Manifest(PRESETS[preset]), precision=precision)
    write_onnx(artefact_in_memory(path, converted, manifest), path)


def onnx_path(work: Path, preset: str, precision: str) -> Path:
    """Return the path of an ONNX file; arguments as of `save_precision`."""
    return work / f"{preset}-{precision}.onnx"


def build_row(work: Path, preset: str, precision: str, profiles: Profiles, nms: Nms) -> Row:
    """Build once, without keeping the engine; arguments as of `kept_row`."""
    source, output = onnx_path(work, preset, precision), work / "build.engine"
    try:
        built = engine_from_onnx(
            source,
            output,
            profiles=profiles,
            options=EngineOptions(nms=nms),
            flavour="tensorrt_rtx",
        )
    except ToodError as error:
        return Row(preset, precision, error=" ".join(str(error).split()))
    finally:
        for path in (output, output.with_suffix(".json")):
            path.unlink(missing_ok=True)
    by_precision = shares(built.layers.network)
    return Row(
        preset,
        precision,
        source.stat().st_size / 2**20,
        built.size_bytes / 2**20,
        len(built.layers.network),
        sum(share.macs for share in by_precision.values()) / 1e9,
        by_precision[precision].mac_share,
        built.seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def report(rows: Sequence[Row], profiles: Profiles, nms: Nms) -> str:
    """Return the table and the settings behind it, as Markdown.

    Args:
        rows: of all builds.
        profiles: sizes and batches of the engines.
        nms: form of suppression.
    """
    table = Table(box=MARKDOWN)
    for column in (
        "preset",
        "precision",
        "ONNX MiB",
        "plan MiB",
        "layers",
        "GMAC",
        "in that precision",
        "seconds",
        "peak GiB",
    ):
        table.add_column(
            column, justify="left" if column in ("preset", "precision") else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*row.cells())
    file = io.StringIO()
    Console(file=file, width=500).print(table)
    lines = [line.strip() for line in file.getvalue().splitlines() if line.strip()]
    title = (
        f"# Engines of every preset, built by {load_flavour('tensorrt_rtx').title} without a GPU"
    )
    smallest, best, largest = profiles.batch
    settings = (
        f"tood_deploy {__version__}, {datetime.now(UTC):%Y-%m-%d}. Sizes {profiles.text()}, "
        f"batches {smallest} to {largest}, fastest at {best}. Random weights, deformable "
        "convolutions as gathers, int8 with fp16 for the rest, suppression "
        f"{'without a loop' if nms == 'unrolled' else 'in a loop'}. Layers are those of the "
        "network as parsed; GMAC is for one image of the first size."
    )
    machine = describe_machine()
    hardware = f"{machine.cpu}, {machine.usable_cores} cores, {machine.memory_gib} GiB"
    where = f"Built on {hardware}, {machine.system}, Python {machine.python}.\n"
    return "\n\n".join((title, settings, "\n".join(lines), where))


if __name__ == "__main__":
    main()
