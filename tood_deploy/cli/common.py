"""What all commands share: the parser, exit codes, and the options that several of them have.

Comes in: arguments as text. Goes out: what the package's functions take. Imports nothing heavy, so
that `--help` and completion stay quick.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tood_deploy import __version__
from tood_deploy.engines.open import DEVICES, RUNTIMES, runtimes_for
from tood_deploy.errors import CheckFailed, ToodError, naming_extras
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.reporter import Reporter

COMMANDS = {
    "tood-export": "Turn a TOOD checkpoint into an artefact with pre- and post-processing inside, "
    "and prove it equal to PyTorch.",
    "tood-infer": "Find objects in images, videos, cameras and streams.",
    "tood-eval": "Measure COCO AP of a model or of its results, and report where it is wrong.",
    "tood-bench": "Measure latency, video throughput, and parity with PyTorch.",
    "tood-serve": "Serve artefacts over HTTP: encoded images and the Open Inference Protocol.",
    "tood-train": "Train a TOOD detector on COCO-format data.",
}
DONE, FAILED_CHECK, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


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
        Ctrl-C.
    """
    try:
        with naming_extras(*extras):
            return command(argv)
    except ToodError as error:
        Reporter().problem(f"error: {_one_line(error)}")
        return WRONG_USE
    except CheckFailed as error:
        Reporter().problem(f"failed: {_one_line(error)}")
        return FAILED_CHECK
    except KeyboardInterrupt:
        Reporter().problem("interrupted")
        return INTERRUPTED


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
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print wrong use as one line, and leave with its exit code."""
        self.exit(WRONG_USE, f"error: {message}; see {self.prog} --help\n")


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
    """Add the options of every command that runs an exported artefact; None where not given."""
    parser.add_argument(
        "--runtime",
        choices=tuple(RUNTIMES),
        help="what runs an artefact (default: by its name's ending)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="OpenVINO alone: of all that is not quantised "
        "(default: what the artefact was made for)",
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


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_runtime_options` was given, as `open_engine` takes it."""
    options = {
        "runtime": args.runtime,
        "precision": args.precision,
        "self_test": False if args.no_self_test else None,
    }
    return {name: value for name, value in options.items() if value is not None}


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


def class_names_from(text: str | None) -> list[str] | None:
    """Return the names of --classes; None where not given.

    Args:
        text: names separated by commas, or a text file with one name a line.

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
            f"--classes {text}: {len(names)} names, {len(set(names))} different; expected one "
            "different name for each class"
        )
    return names
