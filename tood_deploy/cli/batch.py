"""tood-batch: detects objects in more images than one machine gets through, on a Ray cluster."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import DONE, FAILED_CHECK, CommandParser, is_artefact, run_command
from tood_deploy.cli.detection import hint_options, runtime_options
from tood_deploy.cli.infer import (
    OPENCV_PIXEL_LIMIT,
    add_inference_options,
    check_bytes,
    detector_options,
)
from tood_deploy.errors import ToodError, naming_extras
from tood_deploy.reporter import Reporter

if TYPE_CHECKING:
    from tood_deploy.batch.output import BatchOutput
    from tood_deploy.batch.source import Chunk

EPILOG = """\
DIR gets Parquet files of one row an image, whatever happens to workers; an image that cannot be
read is a row with its error, and the exit code is then 1. A job that was stopped goes on with
--resume. Workers read images themselves: all machines of the cluster must see them, and have
tood_deploy installed; the model is sent to them.
"""
OF_MACHINES = ("device", "hint", "self_test", "verify")  # rows do not depend on them


def build_parser() -> argparse.ArgumentParser:
    """Return the options of tood-batch."""
    parser = CommandParser(prog="tood-batch", epilog=EPILOG)
    parser.add_argument(
        "model", metavar="MODEL", help="an artefact of tood-export (.onnx, .xml, .engine)"
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="an image, folder, glob, text file with one path a line, Parquet table of paths or of "
        "encoded images; a path, or an address such as s3://bucket/folder",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", metavar="DIR", required=True, help="new or empty folder; a path or an address"
    )
    group.add_argument(
        "--format",
        choices=("parquet", "jsonl", "coco"),
        default="parquet",
        help="write all rows as JSON lines or COCO results, too, in the end (default: parquet)",
    )
    group.add_argument(
        "--coco-annotations",
        type=Path,
        metavar="FILE",
        help="take the image and category ids of --format coco from these annotations",
    )
    group.add_argument(
        "--resume", action="store_true", help="leave out the images that DIR has rows of"
    )
    group.add_argument("--quiet", action="store_true", help="no progress, no closing lines")
    add_cluster_options(parser)
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="of Parquet tables, that holds paths or encoded images (default: bytes, else path)",
    )
    add_inference_options(parser)
    return parser


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add what to run on."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--address",
        default="local",
        metavar="ADDRESS",
        help="of a Ray cluster, HOST:PORT; auto: that of this machine; local: none, a job on this "
        "machine alone (default: local)",
    )
    group.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="the most at a time, each with an engine of its own (default: as many as there is "
        "room for)",
    )
    group.add_argument(
        "--cpus-per-worker",
        type=_positive,
        metavar="N",
        help="CPUs, and threads of its engine (default: those of the smallest machine, at most 4)",
    )
    group.add_argument(
        "--gpus-per-worker",
        type=_share,
        metavar="X",
        help="GPUs, or a part of one such as 0.5 (default: 1 with --device cuda, else 0)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not (0 < share < 1 or (share >= 1 and share == int(share) and share < 1024)):
        raise argparse.ArgumentTypeError(f"{text} is no number of GPUs: 1, 2, ... or a part of one")
    return share


def batch_command(argv: Sequence[str] | None = None) -> int:
    """Run tood-batch; errors pass through."""
    args = build_parser().parse_args(argv)
    check_options(args)
    if args.max_pixels > OPENCV_PIXEL_LIMIT:
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(args.max_pixels))
    with naming_extras("cluster"):
        from tood_deploy.batch.output import BatchOutput, RunDescription
        from tood_deploy.batch.run import ClusterOptions, check_address, run_batch
        from tood_deploy.batch.source import list_images
        from tood_deploy.batch.worker import WorkerOptions
    from tood_deploy.data.image_file import ReadOptions
    from tood_deploy.inference.address import redacted
    from tood_deploy.manifest import artefact_sha256

    check_bytes(args)
    check_address(args.address)
    reporter = Reporter(args.quiet)
    model = Path(args.model)
    options = worker_detector_options(args)
    reading = ReadOptions(args.max_pixels, args.bit_depth, args.first_page)
    listed = list_images(args.source, args.column)
    ids = coco_ids(args, listed)
    shown = {name: str(value) for name, value in options.items() if name not in OF_MACHINES}
    shown |= {"bit_depth": str(reading.bit_depth), "first_page": str(reading.first_page)}
    source = tuple(map(redacted, args.source))  # it is written down
    run = RunDescription(artefact_sha256(model), source, shown)
    output = BatchOutput(args.output, run, resume=args.resume)
    cluster = ClusterOptions(args.address, args.workers, args.cpus_per_worker, gpus_of(args))
    worker_options = WorkerOptions(model.name, options, reading, args.batch)
    progress = run_batch(model, listed, output, worker_options, cluster, reporter)
    for line in progress.stragglers():
        reporter.note(f"slow worker: {line}")
    reporter.info(f"{sum(progress.images.values())} images, {progress.state()}")
    return finish(output, listed, args.format, ids, reporter)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is imported.

    Raises:
        ToodError: it does not.
    """
    if not is_artefact(args.model):
        raise ToodError(f"{args.model}: workers run artefacts; make one with tood-export")
    if args.threads is not None:
        raise ToodError(
            "--threads: an engine has as many as its worker has CPUs; use --cpus-per-worker"
        )
    if args.gpus_per_worker and args.device != "cuda":
        raise ToodError(
            "--gpus-per-worker gives workers GPUs that they do not use; add --device cuda"
        )
    if args.coco_annotations is not None and args.format != "coco":
        raise ToodError("--coco-annotations gives ids to COCO results; add --format coco")


def gpus_of(args: argparse.Namespace) -> float:
    """Return the GPUs of a worker."""
    return args.gpus_per_worker or (1.0 if args.device == "cuda" else 0.0)


def worker_detector_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the workers' detectors take; a file of thresholds is read here."""
    from tood_deploy.inference.thresholds import thresholds_from

    options = detector_options(args) | runtime_options(args) | {"conf": thresholds_from(args.conf)}
    return options | hint_options(args.model, args, several=True)


def coco_ids(
    args: argparse.Namespace, listed: Sequence["Chunk"]
) -> tuple[dict[str, int], list[int] | None]:
    """Return the ids of images and classes for COCO results, as `tood-infer --json` has them."""
    from tood_deploy.data.coco import read_coco_ids
    from tood_deploy.errors import ArtefactError
    from tood_deploy.manifest import read_manifest

    manifest = read_manifest(Path(args.model))
    if manifest is None:
        raise ArtefactError(
            f"{args.model}: its manifest is missing, the .json beside it: copy both"
        )
    names = [name for chunk in listed for name in chunk.names]
    if args.coco_annotations is None:
        return {name: number for number, name in enumerate(names, 1)}, None
    return read_coco_ids(args.coco_annotations, names, manifest.preset.class_names)


def finish(
    output: "BatchOutput",
    listed: Sequence["Chunk"],
    form: Any,
    ids: tuple[dict[str, int], list[int] | None],
    reporter: Reporter,
) -> int:
    """Check that all is there, write the other form, and return the exit code.

    Args:
        output: of the run.
        listed: all images.
        form: of --format.
        ids: of images and classes, for COCO results.
        reporter: says where the results are.
    """
    output.check_complete([name for chunk in listed for name in chunk.names])
    place = output.where.name
    if form != "parquet":
        place = output.export(form, *ids)
    reporter.result(f"{place}: {len(output.done)} images")
    if output.failed:
        reporter.problem(
            f"failed: {output.failed} of {len(output.done)} images could not be read; the column "
            "error of their rows says why"
        )
    return FAILED_CHECK if output.failed else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run tood-batch as a command; see `run_command` for the exit codes."""
    return run_command(batch_command, argv)


if __name__ == "__main__":
    sys.exit(main())
