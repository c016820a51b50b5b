"""What all commands share: exit codes, and the options that several of them have. Imports nothing heavy."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tood_deploy.errors import CheckFailed, ToodError, naming_extras

DONE, FAILED_CHECK, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def run_command(
    command: Callable[[Sequence[str] | None], int],
    argv: Sequence[str] | None = None,
    *,
    extras: Sequence[str] = (),
) -> int:
    """Runs a command: its errors become one line on stderr and an exit code.

    Args:
        command: takes the arguments, and returns the exit code.
        argv: the arguments; those of the process where not given.
        extras: all extras that the command always needs, to be named where one of their packages is missing.

    Returns:
        What the command returns; 1 for a failed check, 2 for wrong use or bad input, 130 for Ctrl-C.
    """
    try:
        with naming_extras(*extras):
            return command(argv)
    except ToodError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return WRONG_USE
    except CheckFailed as error:
        print(f"failed: {_one_line(error)}", file=sys.stderr)
        return FAILED_CHECK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that opens a checkpoint."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--preset", metavar="NAME", help="the configuration, where the checkpoint does not tell it"
    )
    group.add_argument(
        "--classes",
        metavar="NAMES",
        help="class names, separated by commas, or a text file with one name a line",
    )
    group.add_argument(
        "--convention",
        choices=("mmdet", "authors"),
        help="whose test-time behaviour to follow (default: by the checkpoint's origin)",
    )
    group.add_argument(
        "--weights-key",
        metavar="NAME",
        help="which weights, where the file holds several: ema, model, teacher, ...",
    )


def add_runtime_options(parser: argparse._ActionsContainer) -> None:
    """Options of every command that runs an exported artefact; all None where not given."""
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "openvino", "tensorrt"),
        help="what runs an artefact (default: by its name's ending)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="OpenVINO alone: of all that is not quantised (default: what the artefact was made for)",
    )
    parser.add_argument(
        "--no-self-test",
        action="store_true",
        default=None,
        help="do not prove an artefact when it is first opened on this machine",
    )


def add_fast_decode(parser: argparse._ActionsContainer) -> None:
    """The option of commands that read many images; None where not given."""
    parser.add_argument(
        "--fast-decode",
        action="store_true",
        default=None,
        help="decode JPEG images at 1/2, 1/4 or 1/8 of their size where the network takes no more; scores change a little",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_runtime_options` was given, as `open_engine` takes it."""
    options = {
        "runtime": args.runtime,
        "precision": args.precision,
        "self_test": False if args.no_self_test else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def is_artefact(model: str) -> bool:
    """Whether a model argument names an exported artefact, not a checkpoint or preset."""
    from tood_deploy.graph_io import ARTEFACT_SUFFIXES

    return Path(model).suffix.lower() in ARTEFACT_SUFFIXES


def takes_hint(model: str, args: argparse.Namespace) -> bool:
    """Whether what runs a model can work on several batches at a time: OpenVINO, and ONNX Runtime on the CPU."""
    runtime = args.runtime or {".xml": "openvino", ".onnx": "onnxruntime"}.get(
        Path(model).suffix.lower()
    )
    return runtime == "openvino" or (runtime == "onnxruntime" and args.device in (None, "cpu"))


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_checkpoint` takes beside the file, as far as given; see `add_model_options`."""
    described = {
        "preset": args.preset,
        "class_names": class_names_from(args.classes),
        "convention": args.convention,
    }
    described["weights_key"] = args.weights_key
    return {name: value for name, value in described.items() if value is not None}


def class_names_from(text: str | None) -> list[str] | None:
    """The value of --classes: names separated by commas, or the lines of a text file; None where not given.

    Raises:
        ToodError: names are empty or stand twice.
    """
    if text is None:
        return None
    path = Path(text)
    parts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    names = [part.strip() for part in parts if part.strip()]
    if not names or len(set(names)) != len(names):
        raise ToodError(
            f"--classes {text}: {len(names)} names, {len(set(names))} different; expected one different name for each class"
        )
    return names
