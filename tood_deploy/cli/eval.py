"""`tood-eval`: COCO AP of any model or results file, and a report on where it is wrong.

Parses arguments, no more.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import (
    DONE,
    CommandParser,
    add_model_options,
    check_written,
    is_artefact,
    model_files,
    run_command,
)
from tood_deploy.cli.detection import (
    add_device,
    add_fast_decode,
    add_hint,
    add_imgsz,
    add_iou,
    add_max_det,
    add_runtime_options,
    add_slicing,
    add_threads,
    add_thresholds,
    class_options,
    hint_options,
    slicing_options,
)
from tood_deploy.cli.infer import engine_options
from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.reporter import Reporter, printable

if TYPE_CHECKING:
    from tood_deploy.benchmark.evaluation.alignment import Alignment
    from tood_deploy.benchmark.evaluation.evaluate import DataSet, Evaluation
    from tood_deploy.benchmark.evaluation.thresholds import Wish
    from tood_deploy.inference.detector import Detector


RESULTS_SUFFIXES = (".json", ".json.gz")
MAX_CLASSES = 10  # named on stdout; the report has all
MODEL_OPTIONS = tuple(  # without effect on a results file
    "conf iou max_det imgsz batch device threads runtime precision no_self_test hint fast_decode "
    "mapping preset classes convention weights_key only exclude slice overlap no_whole merge "
    "merge_metric merge_threshold merge_class_agnostic alignment".split()
)

EPILOG = """\
The model's own evaluation is the default, as its training configuration has it; the published one
is a score above 0.05, suppression at 0.6, 100 detections an image, 1000 candidates a level.
Detections are kept in the output folder as they come: run the same command again after an
interruption, and it goes on from there.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of tood-eval's options."""
    parser = CommandParser(prog="tood-eval", epilog=EPILOG)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an exported artefact, a checkpoint, a preset's name, or a COCO results file (.json)",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="the truth, COCO JSON (needed)"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images; for a results file only to draw the worst",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the report (default: the model's name and -eval, here)",
    )
    parser.add_argument(
        "--min-ap", type=float, metavar="P", help="exit with code 1 if AP, in percent, is lower"
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="also AP and recall of the N best detections of a class in an image, and thresholds "
        "by them; COCO's own numbers count 100, and stay",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="no progress, no notes, no result on stdout: the files alone",
    )
    parser.add_argument(
        "--alignment",
        nargs="*",
        metavar="IMAGE",
        help="of a checkpoint: report how far scores and overlaps agree, and draw the maps of "
        "these images, by file name (default: four of them)",
    )
    _add_detection_options(parser.add_argument_group("detection (not for results files)"))
    add_slicing(parser)
    _add_threshold_options(parser.add_argument_group("thresholds to write (default: best F1)"))
    add_model_options(parser)
    return parser


def _add_threshold_options(group: Any) -> None:
    wish = group.add_mutually_exclusive_group()
    wish.add_argument(
        "--target-precision",
        type=float,
        metavar="P",
        help="of every class the lowest threshold with this precision, 0 to 1",
    )
    wish.add_argument(
        "--target-recall",
        type=float,
        metavar="R",
        help="of every class the highest threshold with this recall, 0 to 1",
    )
    wish.add_argument(
        "--max-miss-rate",
        type=float,
        metavar="M",
        help="of every class the highest threshold that is guaranteed to miss no more than this "
        "share of the objects, on images like these",
    )
    group.add_argument(
        "--confidence",
        type=float,
        metavar="C",
        help="of that guarantee, between 0 and 1 (default: 0.95)",
    )


def _add_detection_options(group: Any) -> None:
    add_thresholds(group, default=None, shown="the model's, 0.05 as published")
    add_iou(group)
    add_max_det(group, of="an image, or in each slice of it")
    add_imgsz(group)
    group.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="the most images, or slices of them, of one engine call (default: 1)",
    )
    add_device(group, default=None)
    add_threads(group)
    add_runtime_options(group)
    add_hint(group, default="throughput")
    add_fast_decode(group)
    group.add_argument(
        "--mapping",
        type=Path,
        metavar="FILE",
        help="JSON object: category name, or null to leave out, by class name",
    )


def eval_command(argv: Sequence[str] | None = None) -> int:
    """Run tood-eval; errors pass through."""
    args = build_parser().parse_args(argv)
    check_options(args)
    folder = args.output or Path(f"{Path(args.model).stem}-eval")
    command = shlex.join(["tood-eval", *(sys.argv[1:] if argv is None else argv)])

    from tood_deploy.benchmark.evaluation.evaluate import RESULTS, evaluate_file, open_data_set
    from tood_deploy.benchmark.evaluation.report import HTML, JSON, MARKDOWN, write_evaluation
    from tood_deploy.files import check_writable

    reporter = Reporter(args.quiet)
    wish_from(args)  # wrong values are said before the long run
    count_from(args)
    names = (HTML, JSON, MARKDOWN) if of_results(args) else (HTML, JSON, MARKDOWN, RESULTS)
    inputs = {"the truth": [args.annotations], "a file of the model": model_files(args.model)}
    inputs["the file of --mapping"] = [args.mapping]
    check_written(args.classes, [folder / name for name in names], inputs)
    data = open_data_set(args.annotations, args.images)
    check_alignment(args, data)
    check_writable(folder)
    alignment = None
    if of_results(args):
        result = evaluate_file(
            Path(args.model), data, command, reporter, wish_from(args), count_from(args)
        )
    else:
        result, alignment = evaluate_detector(args, data, folder, command, reporter)
    write_evaluation(result, folder, alignment)
    for note in result.notes:
        reporter.note(note)
    reporter.result(f"{summary(result, alignment)}\n{folder / HTML}")
    ap = 100 * result.metrics.numbers["AP"]
    if args.min_ap is not None and ap < args.min_ap:
        raise CheckFailed(f"AP is {ap:.2f}, expected at least {args.min_ap:g} (--min-ap)")
    return DONE


def of_results(args: argparse.Namespace) -> bool:
    """Tell whether MODEL is a results file."""
    return args.model.lower().endswith(RESULTS_SUFFIXES)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what would be without effect.

    Raises:
        ToodError: no annotations, options of detection beside a results file, or a model without
            images.
    """
    if args.annotations is None:
        raise ToodError(
            "--annotations is missing: AP needs the truth; expected a COCO JSON of the images"
        )
    given = [
        f"--{name.replace('_', '-').replace('exclude', 'except')}"
        for name in MODEL_OPTIONS
        if getattr(args, name) is not None
    ]
    if of_results(args) and given:
        raise ToodError(
            f"{args.model}: a results file is scored as it is; "
            f"leave {', '.join(given)} out, or give the model"
        )
    if not of_results(args) and args.images is None:
        raise ToodError(
            "--images is missing: a model needs the images; "
            "expected the folder that the annotations' file names start from"
        )


def check_alignment(args: argparse.Namespace, data: "DataSet") -> None:
    """Refuse --alignment where there are no maps to read, or not of what is detected.

    Raises:
        ToodError: an artefact, options that change what is computed, or an image that the
            annotations do not have.
    """
    if args.alignment is None:
        return
    if is_artefact(args.model):
        from tood_deploy.manifest import read_manifest

        manifest = read_manifest(Path(args.model))
        known = manifest is not None and manifest.checkpoint_sha256
        of_hash = f" (SHA-256 {known})" if known else ""
        raise ToodError(
            f"{args.model}: an artefact gives no maps to draw for --alignment; give the checkpoint "
            f"that it was made of{of_hash} in its place"
        )
    for name, maps in (
        ("slice", "of whole images"),
        ("runtime", "of the network as it is"),
        ("precision", "of the network in float32"),
        ("compile", "of the network as it is"),
    ):
        if getattr(args, name) not in (None, False):
            raise ToodError(f"--alignment reads the maps {maps}; leave --{name} out")
    from tood_deploy.benchmark.evaluation.alignment import choose_images

    choose_images(data.truth, args.alignment)


def evaluate_detector(
    args: argparse.Namespace, data: "DataSet", folder: Path, command: str, reporter: Reporter
) -> "tuple[Evaluation, Alignment | None]":
    """Open the model and run it over the images; measure its alignment where asked for.

    Args:
        args: the command's arguments.
        data: annotations with their images.
        folder: for the report.
        command: as it was called, for the report.
        reporter: shows how far it is.
    """
    from tood_deploy.benchmark.evaluation.evaluate import evaluate_model
    from tood_deploy.inference.detector import Detector
    from tood_deploy.inference.slicing import Slicing
    from tood_deploy.manifest import doubts

    options = {name: getattr(args, name) for name in ("iou", "max_det", "imgsz")}
    options |= {"device": args.device or "cpu", "fast_decode": bool(args.fast_decode)}
    slicing = slicing_options(args)
    options |= class_options(args) | {"slicing": None if slicing is None else Slicing(**slicing)}
    if args.conf is not None:
        options["conf"] = args.conf
    options |= hint_options(args.model, args, several=True)
    if is_artefact(args.model):
        options["verify"] = "off"  # compared below
    with Detector(args.model, **options, **engine_options(args)) as detector:
        if args.conf is None:
            detector.set_conf(detector.engine.manifest.preset.score_threshold)
        if is_artefact(args.model) and (
            doubt := doubts(Path(args.model), detector.engine.manifest)
        ):
            reporter.warn(doubt)
        result = evaluate_model(
            args.model,
            detector,
            data,
            folder,
            command,
            reporter,
            mapping=args.mapping,
            batch=1 if args.batch is None else args.batch,
            wish=wish_from(args),
            count=count_from(args),
        )
        return result, alignment_of(args, detector, result, reporter)


def alignment_of(
    args: argparse.Namespace, detector: "Detector", result: "Evaluation", reporter: Reporter
) -> "Alignment | None":
    """Return the alignment where it was asked for.

    Args:
        args: the command's arguments.
        detector: in PyTorch.
        result: its evaluation.
        reporter: shows how far it is.
    """
    if args.alignment is None:
        return None
    from tood_deploy.benchmark.evaluation.alignment import measure_alignment

    return measure_alignment(detector, result, args.alignment, reporter, args.mapping)


def count_from(args: argparse.Namespace) -> int:
    """Return how many detections of a class in an image count.

    Raises:
        ToodError: fewer than COCO's own numbers count.
    """
    from tood_deploy.data.coco_metrics import STANDARD_COUNT, check_count

    return STANDARD_COUNT if args.count is None else check_count(args.count)


def wish_from(args: argparse.Namespace) -> "Wish | None":
    """Return what thresholds shall do; None where nothing is asked for.

    Raises:
        ToodError: a value outside 0 to 1, or a confidence without a bound.
    """
    from tood_deploy.benchmark.evaluation.thresholds import DEFAULT_CONFIDENCE, Wish

    if args.confidence is not None and args.max_miss_rate is None:
        raise ToodError("--confidence is that of a bound; add --max-miss-rate M, or leave it out")
    if args.target_precision is not None:
        return Wish("precision", args.target_precision)
    if args.target_recall is not None:
        return Wish("recall", args.target_recall)
    if args.max_miss_rate is not None:
        confidence = DEFAULT_CONFIDENCE if args.confidence is None else args.confidence
        return Wish("miss_rate", args.max_miss_rate, confidence)
    return None


def summary(result: "Evaluation", alignment: "Alignment | None" = None) -> str:
    """Return the COCO numbers in percent, AP of the classes and the alignment, as text."""
    numbers = result.metrics.numbers
    lines = [
        f"{name:>6} {100 * value:6.2f}" if value > -1 else f"{name:>6}      -"
        for name, value in numbers.items()
    ]
    columns = [lines[row] + lines[row + 3] + lines[row + 6] + lines[row + 9] for row in range(3)]
    best = [
        f"{printable(name)} {100 * value:.1f}"
        for name, value in sorted(result.metrics.class_ap.items(), key=lambda item: -item[1])
    ]
    if len(best) > MAX_CLASSES:
        best = [*best[: MAX_CLASSES // 2], "...", *best[-MAX_CLASSES // 2 :]]
    lines = [*columns, f"AP of the classes, the best first: {', '.join(best)}"]
    if result.metrics.counts_more:
        counted = result.metrics.counted.items()
        more = ", ".join(f"{name} {100 * value:.2f}" for name, value in counted if value > -1)
        lines.append(f"Of {result.metrics.count} detections of a class in an image: {more}")
    if alignment is not None:
        row = alignment.together
        lines.append(
            f"rank correlation of score and overlap: {row.correlation:.2f} of "
            f"{row.true_positives} true positives, {row.surest_correlation:.2f} of the surest "
            f"predictions of {row.objects} objects"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command; see `run_command` for the exit codes."""
    return run_command(eval_command, argv, extras=("eval",))


if __name__ == "__main__":
    sys.exit(main())
