"""What all commands share: the parser, exit codes, options of several, files beside their data.

Comes in: arguments as text. Goes out: what the package's functions take, and refusals to write over
what is read. Imports nothing heavy, so
that `--help` and completion stay quick.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tood_deploy import __version__
from tood_deploy.cli.process import (
    SIGNAL_EXIT,
    close_stdout,
    library_lines,
    open_standard_streams,
    stopping_signals,
)
from tood_deploy.errors import (
    NO_HANDLES,
    NO_MEMORY,
    CheckFailed,
    Stopped,
    ToodError,
    naming_extras,
    shortage_of,
)
from tood_deploy.files import MAX_NAME_BYTES, absent_or, check_overwrites
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.reporter import Reporter, drop_stdout, printable, show_own_warnings, stdout_errors

COMMANDS = {
    "tood-export": "Turn a checkpoint of TOOD, or of ATSS, GFL, PAA and their relatives, into an "
    "artefact with pre- and post-processing inside, and prove it equal to PyTorch.",
    "tood-infer": "Find objects in images, videos, cameras and streams.",
    "tood-batch": "Detect objects in more images than one machine gets through, on a Ray cluster.",
    "tood-eval": "Measure COCO AP of a model or of its results, and report where it is wrong.",
    "tood-bench": "Measure latency, video throughput, parity with PyTorch, and MLPerf's scenarios.",
    "tood-serve": "Serve artefacts over HTTP: encoded images and the Open Inference Protocol.",
    "tood-train": "Train a TOOD detector on COCO-format data.",
}
MODELS = ("model", "models", "checkpoint", "reference", "baseline", "clip")  # files, or presets
DONE, FAILED_CHECK, WRONG_USE = 0, 1, 2
BROKEN_PIPE = 141  # as of a program that SIGPIPE ends
SHOWN_LETTERS = 80  # of a long argument, in errors
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
        show_own_warnings()
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


def is_artefact(model: str) -> bool:
    """Return whether a model argument names an exported artefact, no checkpoint or preset."""
    return Path(model).suffix.lower() in ARTEFACT_SUFFIXES


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
    parts = _lines_of(path) if absent_or(path.is_file) else text.split(",")
    names = [part.strip() for part in parts if part.strip()]
    if not names or len(set(names)) != len(names):
        shown = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
        raise ToodError(
            f"--classes {shown}: {len(names)} names, {len(set(names))} different; expected one "
            "different name for each class"
        )
    return names


def _lines_of(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without a byte-order mark.

    Raises:
        ToodError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ToodError(
            f"--classes {path}: not in UTF-8 ({error.reason} at byte {error.start}); expected text "
            "with one name a line: save it in UTF-8"
        ) from error
    except OSError as error:
        raise ToodError(
            f"--classes {path}: cannot be read ({error.strerror}); expected text with one name a "
            "line"
        ) from error


def check_written(
    classes: str | None,
    written: Iterable[Path],
    inputs: Mapping[str, Iterable[str | Path | None]] | None = None,
) -> None:
    """Refuse to write over a file that the command reads.

    Args:
        classes: what --classes was given.
        written: files that the command writes.
        inputs: files that it reads, by what they are; None where not given.

    Raises:
        OutputError: it would.
    """
    read = {what: [path for path in paths if path] for what, paths in (inputs or {}).items()}
    named = [classes] if classes and absent_or(Path(classes).is_file) else []
    check_overwrites({**read, "the file of --classes": named}, {"--output": list(written)})


def model_files(model: str, classes: str | None = None) -> list[Path]:
    """Return the files that a command reads to open a model; none where it names a preset.

    Args:
        model: as given to the command.
        classes: what --classes was given.
    """
    path = Path(model)
    files = [path]
    if path.suffix.lower() in ARTEFACT_SUFFIXES:  # OpenVINO has a file of weights
        files += [path.with_suffix(".json"), path.with_suffix(".bin"), Path(f"{path}.data")]
    if classes is not None:
        files.append(Path(classes))
    return [file for file in files if absent_or(file.is_file)]
