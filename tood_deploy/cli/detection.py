"""Options of the commands that run a detector: where, how, in what slices, above which scores.

Comes in: arguments as text. Goes out: what `Detector` and `open_engine` take. Imports nothing
heavy.
"""

import argparse
from pathlib import Path
from typing import Any

from tood_deploy.cli.common import is_artefact
from tood_deploy.engines.open import DEVICES, HINTS, RUNTIMES, runtimes_for
from tood_deploy.errors import ToodError
from tood_deploy.reporter import Reporter


def add_device(
    parser: argparse._ActionsContainer, *, default: str | None = "cpu", what: str = "where to run"
) -> None:
    """Add `--device cpu|cuda`.

    Args:
        parser: gets the option; a group will do.
        default: None for a command that has to know whether it was given.
        what: of the help.
    """
    parser.add_argument(
        "--device",
        type=device_from,
        default=default,
        metavar="{cpu,cuda}",
        help=f"{what} (default: {default or DEVICES[0]})",
    )


def device_from(text: str) -> str:
    """Return "cpu" or "cuda"; "gpu", the former name of the latter in tood-export, with a note.

    Raises:
        ArgumentTypeError: anything else.
    """
    if text == "gpu":
        Reporter().note("--device gpu is called cuda now; the next release drops the old name")
        return "cuda"
    if text not in DEVICES:
        choice = "; CUDA_VISIBLE_DEVICES chooses the GPU" if text.startswith("cuda:") else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no device; expected cpu or cuda{choice}")
    return text


def add_runtime_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of every command that chooses a runtime; None where not given."""
    parser.add_argument(
        "--runtime",
        choices=tuple(RUNTIMES),
        help="what runs an artefact (default: by its name's ending); torch runs a checkpoint in "
        "PyTorch's fast form",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="OpenVINO: of all that is not quantised (default: what the artefact was made for); "
        "PyTorch: of a checkpoint's network (default: fp32)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="PyTorch: compile kernels for each shape of images, at its first batch",
    )
    parser.add_argument(
        "--no-self-test",
        action="store_true",
        default=None,
        help="do not prove an artefact when it is first opened on this machine",
    )


def add_hint(parser: argparse._ActionsContainer, *, default: str) -> None:
    """Add --hint; None where not given.

    Args:
        parser: gets the option; a group will do.
        default: what the help says of it.
    """
    parser.add_argument(
        "--hint",
        choices=HINTS,
        help="of artefacts in ONNX Runtime and OpenVINO: all cores work on one batch, or on "
        f"several side by side, which takes more memory (default: {default})",
    )


def add_fast_decode(parser: argparse._ActionsContainer) -> None:
    """Add the option of commands that read many images; None where not given."""
    parser.add_argument(
        "--fast-decode",
        action="store_true",
        default=None,
        help="decode JPEG images at 1/2, 1/4 or 1/8 of their size where the network takes no more; "
        "scores change a little",
    )


SLICING = {  # options that need --slice, by their name in `Slicing`
    "overlap": "overlap",
    "no_whole": "whole",
    "merge": "merge",
    "merge_metric": "metric",
    "merge_threshold": "threshold",
    "merge_class_agnostic": "class_agnostic",
}


def add_slicing(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that search images in slices; None where not given."""
    group = parser.add_argument_group("slices of large images")
    group.add_argument(
        "--slice",
        nargs="+",
        type=int,
        metavar=("H", "W"),
        help="search images in overlapping windows of H x W pixels (W: as H), and merge what is in "
        "them",
    )
    group.add_argument(
        "--overlap",
        type=float,
        metavar="S",
        help="of neighbouring windows, as a share of their side, 0 to 0.9 (default: 0.2)",
    )
    group.add_argument(
        "--no-whole",
        action="store_true",
        default=None,
        help="do not search the whole image, too, for objects larger than a window",
    )
    group.add_argument(
        "--merge",
        choices=("greedy-nmm", "nmm", "nms"),
        help="join boxes to the best one they overlap, also to what these overlap, or keep the "
        "best alone (default: greedy-nmm)",
    )
    group.add_argument(
        "--merge-metric",
        choices=("ios", "iou"),
        help="overlap over the smaller box, or over the union (default: ios)",
    )
    group.add_argument(
        "--merge-threshold",
        type=float,
        metavar="T",
        help="overlap from which boxes are one object (default: 0.5)",
    )
    group.add_argument(
        "--merge-class-agnostic",
        action="store_true",
        default=None,
        help="merge boxes of different classes, too",
    )


def slicing_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what `add_slicing` was given, as `Slicing` takes it; None without --slice.

    Raises:
        ToodError: options of slices without --slice.
    """
    given = {name: getattr(args, name) for name in SLICING if getattr(args, name) is not None}
    if args.slice is None:
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ToodError(f"{options} has no effect without slices; add --slice H W")
        return None
    options = {SLICING[name]: value for name, value in given.items()}
    if "whole" in options:
        options["whole"] = False
    if "merge" in options:
        options["merge"] = options["merge"].replace("-", "_")
    return {"size": args.slice, **options}


def add_imgsz(parser: argparse._ActionsContainer, *, default: str = "the model's") -> None:
    """Add --imgsz; the help says of the default what `default` says."""
    parser.add_argument(
        "--imgsz",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help=f"short and long side to fit images to (default: {default})",
    )


def add_iou(
    parser: argparse._ActionsContainer, *, default: str = "the model's, 0.6 as published"
) -> None:
    """Add --iou; the help says of the default what `default` says."""
    parser.add_argument(
        "--iou",
        type=float,
        help=f"overlap above which the weaker of two boxes goes, 0 to 1 (default: {default})",
    )


def add_max_det(parser: argparse._ActionsContainer, *, of: str = "an image") -> None:
    """Add --max-det; the help says `of` what it is."""
    parser.add_argument(
        "--max-det",
        type=int,
        metavar="N",
        help=f"largest number of detections in {of} (default: what the model gives, 100)",
    )


def add_threads(parser: argparse._ActionsContainer, *, of: str = "one inference") -> None:
    """Add --threads; the help says `of` what they are."""
    parser.add_argument(
        "--threads", type=int, metavar="N", help=f"CPU threads of {of} (default: all cores)"
    )


def add_thresholds(
    parser: argparse._ActionsContainer, *, default: float | None, shown: str | None = None
) -> None:
    """Add --conf, --only and --except.

    Args:
        parser: gets the options; a group will do.
        default: of --conf.
        shown: what the help says of the default, where that is not a number.
    """
    parser.add_argument(
        "--conf",
        type=conf_from,
        default=None if default is None else str(default),
        metavar="C",
        help="keep detections above this score, 0 to 1; also 0.3,person=0.5,car=0.2, or a JSON "
        f"file of thresholds as tood-eval writes (default: {shown or default})",
    )
    parser.add_argument(
        "--only", metavar="NAMES", help="detect these classes alone, separated by commas"
    )
    parser.add_argument(
        "--except",
        dest="exclude",
        metavar="NAMES",
        help="leave these classes out, separated by commas",
    )


def conf_from(text: str) -> str:
    """Return what --conf is given, which `Detector` reads, where it looks like thresholds.

    Raises:
        ArgumentTypeError: it is no number, no NAME=NUMBER and no JSON file.
    """
    try:
        float(text)
    except ValueError:
        if "=" not in text and not text.lower().endswith(".json"):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no score; expected a number, 0.3,person=0.5, or a .json file"
            ) from None
    return text


def class_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the classes of --only and --except, as `Detector` takes them."""
    given = {name: getattr(args, name) for name in ("only", "exclude")}
    return {
        name: None if text is None else [part.strip() for part in text.split(",") if part.strip()]
        for name, text in given.items()
    }


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_runtime_options` was given, as `open_engine` takes it."""
    options = {
        "runtime": args.runtime,
        "precision": args.precision,
        "compile": args.compile,
        "self_test": False if args.no_self_test else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def hint_options(model: str, args: argparse.Namespace, *, several: bool) -> dict[str, Any]:
    """Return how an engine shares its cores among batches, as `open_engine` takes it.

    Args:
        model: as given to the command.
        args: with `hint`, `runtime` and `device`, None where not given.
        several: whether nobody waits for a single image; then throughput is the default.

    Raises:
        ToodError: a hint for a checkpoint.
    """
    if args.hint is None:
        return {"hint": "throughput"} if several and takes_hint(model, args) else {}
    if not is_artefact(model):
        raise ToodError(
            f"{model}: a checkpoint is run by PyTorch, one batch after another; leave --hint out, "
            "or export it first"
        )
    return {"hint": args.hint}


def takes_hint(model: str, args: argparse.Namespace) -> bool:
    """Return whether what runs a model can work on several batches at a time.

    Args:
        model: as given to the command.
        args: with `runtime` and `device`, None where not given.
    """
    runtimes = [args.runtime] if args.runtime else runtimes_for(Path(model))
    return bool(runtimes) and (args.device or "cpu") in RUNTIMES[runtimes[0]].side_by_side_on


def check_fast_torch(model: str, chosen: dict[str, Any]) -> None:
    """Refuse runtime options that a checkpoint, which PyTorch runs, does not have.

    Args:
        model: as given to the command.
        chosen: what `runtime_options` gave.

    Raises:
        ToodError: there are such options.
    """
    if "self_test" in chosen or chosen.get("runtime", "torch") != "torch":
        raise ToodError(
            f"{model}: a checkpoint is run by PyTorch, and has no self-test; give --runtime torch "
            "or leave --runtime out, leave --no-self-test out, or export it first"
        )
