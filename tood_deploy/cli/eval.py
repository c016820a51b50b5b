"""tood-eval: COCO AP of any model, and a report on where it is wrong."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import (
    DONE,
    CommandParser,
    add_device,
    add_fast_decode,
    add_model_options,
    add_runtime_options,
    is_artefact,
    run_command,
    takes_hint,
)
from tood_deploy.cli.infer import engine_options
from tood_deploy.errors import CheckFailed, ToodError

if TYPE_CHECKING:
    from tood_deploy.benchmark.evaluation.evaluate import Evaluation


RESULTS_SUFFIX = ".json"
MOST_CLASSES = 10  # named on stdout; the report has all
OF_MODELS = (
    *(
        "conf",
        "iou",
        "max_det",
        "imgsz",
        "batch",
        "device",
        "threads",
        "runtime",
        "precision",
        "no_self_test",
        "fast_decode",
    ),
    *("mapping", "preset", "classes", "convention", "weights_key"),
)

EPILOG = """\
The model's own evaluation is the default, as its training configuration has it; the published one is a score above 0.05, suppression
at 0.6, 100 detections an image, 1000 candidates a level.
Detections are kept in the output folder as they come: run the same command again after an interruption, and it goes on from there.
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of tood-eval."""
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
        "--quiet",
        action="store_true",
        help="no progress, no notes, no result on stdout: the files alone",
    )
    group = parser.add_argument_group("detection (not for results files)")
    group.add_argument(
        "--conf",
        type=float,
        help="keep detections above this score, 0 to 1 (default: the model's, 0.05 as published)",
    )
    group.add_argument(
        "--iou",
        type=float,
        help="overlap above which the weaker of two boxes goes, 0 to 1 (default: the model's, 0.6 as published)",
    )
    group.add_argument(
        "--max-det",
        type=int,
        metavar="N",
        help="the most detections a image (default: what the model gives, 100)",
    )
    group.add_argument(
        "--imgsz",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="short and long side to fit images to (default: the model's)",
    )
    group.add_argument(
        "--batch", type=int, metavar="N", help="the most images of one engine call (default: 1)"
    )
    add_device(group, default=None)
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of one inference (default: all cores)"
    )
    add_runtime_options(group)
    add_fast_decode(group)
    group.add_argument(
        "--mapping",
        type=Path,
        metavar="FILE",
        help="JSON object: category name, or null to leave out, by class name",
    )
    add_model_options(parser)
    return parser


def eval_command(argv: Sequence[str] | None = None) -> int:
    """Runs tood-eval; errors pass through."""
    args = build_parser().parse_args(argv)
    check_options(args)
    folder = args.output or Path(f"{Path(args.model).stem}-eval")
    command = shlex.join(["tood-eval", *(sys.argv[1:] if argv is None else argv)])

    from tood_deploy.benchmark.evaluation.evaluate import evaluate_file, open_data_set
    from tood_deploy.benchmark.evaluation.report import HTML, write_evaluation
    from tood_deploy.inference.output_paths import check_writable

    data = open_data_set(args.annotations, args.images)
    check_writable(folder)
    if of_results(args):
        result = evaluate_file(Path(args.model), data, command, quiet=args.quiet)
    else:
        result = evaluate_detector(args, data, folder, command)
    write_evaluation(result, folder)
    if not args.quiet:
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{summary(result)}\n{folder / HTML}")
    if args.min_ap is not None and 100 * result.metrics.numbers["AP"] < args.min_ap:
        raise CheckFailed(
            f"AP is {100 * result.metrics.numbers['AP']:.2f}, expected at least {args.min_ap:g} (--min-ap)"
        )
    return DONE


def of_results(args: argparse.Namespace) -> bool:
    """Whether MODEL is a results file."""
    return args.model.lower().endswith(RESULTS_SUFFIX)


def check_options(args: argparse.Namespace) -> None:
    """Refuses what would be without effect.

    Raises:
        ToodError: no annotations, options of detection beside a results file, or a model without images.
    """
    if args.annotations is None:
        raise ToodError(
            "--annotations is missing: AP needs the truth; expected a COCO JSON of the images"
        )
    given = [f"--{name.replace('_', '-')}" for name in OF_MODELS if getattr(args, name) is not None]
    if of_results(args) and given:
        raise ToodError(
            f"{args.model}: a results file is scored as it is; leave {', '.join(given)} out, or give the model"
        )
    if not of_results(args) and args.images is None:
        raise ToodError(
            "--images is missing: a model needs the images; expected the folder that the annotations' file names start from"
        )


def evaluate_detector(
    args: argparse.Namespace, data: Any, folder: Path, command: str
) -> "Evaluation":
    """Opens the model and runs it over the images."""
    from tood_deploy.benchmark.evaluation.evaluate import evaluate_model
    from tood_deploy.inference.detector import Detector
    from tood_deploy.manifest import doubts

    options = {
        "iou": args.iou,
        "max_det": args.max_det,
        "imgsz": args.imgsz,
        "device": args.device or "cpu",
    }
    options |= {"fast_decode": bool(args.fast_decode)} | (
        {} if args.conf is None else {"conf": args.conf}
    )
    batch = 1 if args.batch is None else args.batch
    if takes_hint(args.model, args):
        options["hint"] = "throughput"
    with Detector(args.model, **options, **engine_options(args)) as detector:
        if args.conf is None:
            detector.conf = detector.engine.manifest.preset.score_threshold
        if is_artefact(args.model) and (
            doubt := doubts(Path(args.model), detector.engine.manifest)
        ):
            print(f"warning: {doubt}", file=sys.stderr)
        return evaluate_model(
            args.model,
            detector,
            data,
            folder,
            command,
            mapping=args.mapping,
            batch=batch,
            quiet=args.quiet,
        )


def summary(result: "Evaluation") -> str:
    """The COCO numbers in percent, and AP of the classes, as text."""
    numbers = result.metrics.numbers
    lines = [
        f"{name:>6} {100 * value:6.2f}" if value > -1 else f"{name:>6}      -"
        for name, value in numbers.items()
    ]
    columns = [lines[row] + lines[row + 3] + lines[row + 6] + lines[row + 9] for row in range(3)]
    best = [
        f"{name} {100 * value:.1f}"
        for name, value in sorted(result.metrics.class_ap.items(), key=lambda item: -item[1])
    ]
    shown = (
        best
        if len(best) <= MOST_CLASSES
        else [*best[: MOST_CLASSES // 2], "...", *best[-MOST_CLASSES // 2 :]]
    )
    return "\n".join([*columns, f"AP of the classes, the best first: {', '.join(shown)}"])


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of tood-eval; see `run_command` for the exit codes."""
    return run_command(eval_command, argv, extras=("eval",))
