"""What all commands share: the parser, exit codes, and the options that several of them have.

Comes in: arguments as text. Goes out: what the package's functions take. Imports nothing heavy, so
that `--help` and completion stay quick.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tood_deploy import __version__
from tood_deploy.cli.files import SHOWN_LETTERS, class_names_from
from tood_deploy.cli.process import (
    SIGNAL_EXIT,
    close_stdout,
    library_lines,
    open_standard_streams,
    stopping_signals,
)
from tood_deploy.engines.open import DEVICES, RUNTIMES, runtimes_for
from tood_deploy.errors import (
    NO_HANDLES,
    NO_MEMORY,
    CheckFailed,
    Stopped,
    ToodError,
    naming_extras,
    shortage_of,
)
from tood_deploy.files import MAX_NAME_BYTES
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.reporter import (
    Reporter,
    drop_stdout,
    printable,
    show_artefact_warnings,
    stdout_errors,
)

COMMANDS = {
    "tood-export": "Turn a TOOD checkpoint into an artefact with pre- and post-processing inside, "
    "and prove it equal to PyTorch.",
    "tood-infer": "Find objects in images, videos, cameras and streams.",
    "tood-batch": "Detect objects in more images than one machine gets through, on a Ray cluster.",
    "tood-eval": "Measure COCO AP of a model or of its results, and report where it is wrong.",
    "tood-bench": "Measure latency, video throughput, and parity with PyTorch.",
    "tood-serve": "Serve artefacts over HTTP: encoded images and the Open Inference Protocol.",
    "tood-train": "Train a TOOD detector on COCO-format data.",
}
MODELS = ("model", "models", "checkpoint", "reference", "baseline", "clip")  # files, or presets
DONE, FAILED_CHECK, WRONG_USE = 0, 1, 2
BROKEN_PIPE = 141  # as of a program that SIGPIPE ends
ENDINGS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "ended by a hang-up"}

SHORTAGE_CURES = {
    NO_MEMORY: " for this; give smaller images (--imgsz), or run it on a machine with more",
    NO_HANDLES: "; raise the limit (ulimit -n, ulimit -u), and run it again",
}


def run_command(
    command: Callable[[Sequence[str] | None], int],
    argv: Sequence[str] | None = None,
    *,
    extras: Sequence[str] = (),
) -> int:
    """Run a command: its errors become one line on stderr and an exit code.

    Args:
        command: takes the arguments, and returns the exit code.
        argv: the arguments; those of the process where not given.
        extras: all extras that the command always needs, to be named where one of their packages is
            missing.

    Returns:
        What the command returns; 1 for a failed check, 2 for wrong use or bad input, 130 for
        Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 141 where nobody reads stdout any more.
    """

    def work() -> int:
        with naming_extras(*extras):
            return command(argv)

    open_standard_streams()
    ends_process = argv is None
    with library_lines(ends_process), stopping_signals(ends_process), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # decoding says what is wrong
        show_artefact_warnings()
        try:
            code = _exit_code(work)
        except SystemExit as left:  # after --help, --version or wrong use
            raise SystemExit(_exit_code(close_stdout) or left.code) from None
        return _exit_code(close_stdout) or code


def _exit_code(work: Callable[[], int]) -> int:
    """Return the exit code of some work, and print its error, if it has one, as one line."""
    try:
        return work()
    except ToodError as error:
        line, code = _shortage_line(error) or f"error: {_one_line(error)}", WRONG_USE
    except CheckFailed as error:
        line, code = f"failed: {_one_line(error)}", FAILED_CHECK
    except KeyboardInterrupt as error:
        number = signal.Signals(error.number if isinstance(error, Stopped) else signal.SIGINT)
        line, code = ENDINGS[number.name], SIGNAL_EXIT + number
    except BrokenPipeError:
        drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = f"{place}{error.strerror or _one_line(error)}"
        line = f"error: the system refused: {reason}; see to that, and run the command again"
        line, code = _shortage_line(error) or line, WRONG_USE
    except Exception as error:
        if not (shortage := _shortage_line(error)):
            raise
        line, code = shortage, WRONG_USE
    Reporter().problem(line)
    return code


def _shortage_line(error: Exception) -> str:
    """Return the line for an error that memory, file handles or threads were too few; else ""."""
    shortage = shortage_of(error)
    if shortage == NO_MEMORY and isinstance(error, ToodError):
        return f"error: {NO_MEMORY}, or a damaged file asks for too much: {_one_line(error)}"
    return f"error: {shortage}{SHORTAGE_CURES[shortage]}" if shortage else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class CommandParser(argparse.ArgumentParser):
    """The parser of a command and of its subcommands.

    Says what the command is for, adds `--version`, answers the shell when it completes a line, and
    prints wrong use as one line.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        """Take what argparse takes.

        `prog` is a command of `COMMANDS`, or has a subcommand after it.
        """
        options.setdefault("description", COMMANDS.get(prog))
        super().__init__(prog, **options)
        command = self.prog.split()[0]
        self.add_argument(
            "--version",
            action="version",
            version=f"{command} {__version__}",
            help="print the version and leave",
        )

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride] - it has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does; where the shell asks for completions, give these and leave."""
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(self)
        parsed = super().parse_args(args, namespace)
        self._check_names(parsed)
        return parsed

    def _check_names(self, parsed: argparse.Namespace) -> None:
        """Refuse, as wrong use, texts that stand for files and can be the name of none."""
        for name, value in vars(parsed).items():
            for text in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(text, Path) and not (name in MODELS and isinstance(text, str)):
                    continue
                longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
                if longest > MAX_NAME_BYTES or "\0" in str(text):
                    self.error(
                        f"{str(text)[:SHOWN_LETTERS]}...: no file can have such a name, of "
                        f"{longest} bytes; expected {MAX_NAME_BYTES} at most"
                    )

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help and version; argparse itself passes over a stdout that takes nothing."""
        if file is not sys.stdout:
            super()._print_message(message, file)
            return
        with stdout_errors():
            print(message, end="", flush=True)

    def error(self, message: str) -> NoReturn:
        """Print wrong use as one line, and leave with its exit code."""
        self.exit(WRONG_USE, f"error: {printable(message)}; see {self.prog} --help\n")


class _OldName(argparse.Action):
    """An option's former name: does what the option does, and says what it is called now."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, now: argparse.Action) -> None:
        super().__init__(
            option_strings,
            dest,
            nargs=now.nargs,
            const=now.const,
            default=argparse.SUPPRESS,  # the option itself has the default
            type=now.type,  # pyright: ignore[reportArgumentType] - a registered name is a str
            choices=now.choices,
            help=argparse.SUPPRESS,
            metavar=now.metavar,
        )
        self.now = now

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name = self.now.option_strings[-1]
        Reporter().note(
            f"{option_string} is called {name} now; the next release drops the old name"
        )
        self.now(parser, namespace, values, option_string)


def accept_old_name(
    parser: argparse._ActionsContainer, old_name: str, option: argparse.Action
) -> None:
    """Take an option by its former name, too, for one release; `--help` leaves that name out.

    Args:
        parser: that has the option; a group will do.
        old_name: such as "--rest".
        option: what `add_argument` returned for its new name.
    """
    parser.add_argument(old_name, action=_OldName, dest=option.dest, now=option)


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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that opens a checkpoint."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--preset", metavar="NAME", help="the configuration, where the checkpoint does not state it"
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


def is_artefact(model: str) -> bool:
    """Return whether a model argument names an exported artefact, no checkpoint or preset."""
    return Path(model).suffix.lower() in ARTEFACT_SUFFIXES


def takes_hint(model: str, args: argparse.Namespace) -> bool:
    """Return whether what runs a model can work on several batches at a time.

    Args:
        model: as given to the command.
        args: with `runtime` and `device`, None where not given.
    """
    runtimes = [args.runtime] if args.runtime else runtimes_for(Path(model))
    return bool(runtimes) and (args.device or "cpu") in RUNTIMES[runtimes[0]].side_by_side_on


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_model_options` was given, as `load_checkpoint` takes it."""
    described = {
        "preset": args.preset,
        "class_names": class_names_from(args.classes),
        "convention": args.convention,
    }
    described["weights_key"] = args.weights_key
    return {name: value for name, value in described.items() if value is not None}
