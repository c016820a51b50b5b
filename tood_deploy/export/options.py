"""Options of `tood-export` as fields of dataclasses: what an option is, and which go together.

A field that carries an `Option` in its metadata is an option. The command makes its parser from
them, `read_options` builds the dataclass from what was given, and `check_rules` refuses what does
not go together. Knows none of the options: `export.config` holds them, and knows no parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from tood_deploy.errors import ToodError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from tood_deploy.export.config import ExportConfig

Section = TypeVar("Section", bound="DataclassInstance")
Value = TypeVar("Value")
METADATA_KEY = "option"


@dataclass(frozen=True)
class When:
    """A condition on an export that options depend on.

    Attributes:
        holds: tells whether it is met.
        text: the condition as a user writes it, such as "--to engine".
    """

    holds: Callable[[ExportConfig], bool]
    text: str


# What the options of `tood-export` depend on.
ENGINE = When(lambda config: config.to == "engine", "--to engine")
PROFILES = When(lambda config: config.to in ("engine", "triton"), "--to engine or --to triton")
TORCH = When(lambda config: config.to == "torch", "--to torch")
TRITON = When(lambda config: config.to == "triton", "--to triton")
BUILD = When(
    lambda config: config.to == "engine" or config.triton.backend == "tensorrt",
    "--to engine, or --to triton with --backend tensorrt",
)
CPU_TARGET = When(
    lambda config: not BUILD.holds(config) and config.to != "torch",
    "--to onnx, openvino, or triton with --backend onnxruntime",
)
GRAPH_SOURCE = When(
    lambda config: not config.from_engine, "a checkpoint or an .onnx; an engine is served as it is"
)
CHECKPOINT_SOURCE = When(
    lambda config: not config.from_engine and not config.from_onnx,
    "a checkpoint, the .onnx has them inside",
)
INT8 = When(lambda config: config.precision.precision == "int8", "--precision int8")
AUTO = When(lambda config: config.precision.precision == "auto", "--precision auto")
SEARCH = When(lambda config: config.precision.autotune, "--autotune-precision")
INT8_OR_SEARCH = When(
    lambda config: INT8.holds(config) or AUTO.holds(config) or SEARCH.holds(config),
    "--precision int8 or auto, or --autotune-precision",
)
CALIBRATED = When(
    lambda config: INT8_OR_SEARCH.holds(config) or config.precision.precision == "fp16",
    "--precision int8, fp16 or auto, or --autotune-precision",
)
LOWERED = When(
    lambda config: config.precision.precision != "fp32" or config.precision.max_ap_drop is not None,
    "--precision bf16, fp16, int8 or auto, or --max-ap-drop",
)
FALLBACK_TARGET = When(
    lambda config: config.precision.fallback == "fp32" or config.to in ("openvino", "engine"),
    "--to openvino or engine: ONNX Runtime gets it wrong",
)
FALLBACK_OF_SEARCH = When(
    lambda config: not config.precision.autotune or config.to == "engine",
    "--to engine when it comes with --autotune-precision",
)
AP_LIMIT = When(lambda config: config.precision.max_ap_drop is not None, "--max-ap-drop")
ANNOTATED = When(lambda config: config.precision.annotations is not None, "--annotations")
MIN_OPT_MAX = When(lambda config: config.sizes.batch is not None, "--batch")
AUTO_SHAPES = When(lambda config: config.sizes.shapes == "auto", "--shapes auto")
IMAGE_USER = When(
    lambda config: AUTO_SHAPES.holds(config) or ANNOTATED.holds(config),
    "--shapes auto or --annotations",
)


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        flag: as written, such as "--max-det".
        help: one line; ends with the default where that is not obvious.
        parse: makes the value from the text; None for a switch, which takes no text.
        metavar: name of the value in the help text.
        choices: the texts that are accepted; any where empty.
        count: number of texts that the option takes.
        group: title of its group in the help text.
        old_flag: its name in the last release.
        old_choices: values of the last release, and what each is now.
        only: conditions that must all be met, else the option means nothing and is refused.
        never: conditions under which it contradicts another option and is refused.
        required: conditions under which it must be given.
        expected: its value in words, for the message where it is missing.
        lacking: the flavour of TensorRT that has no such thing; "" where both have it.
        instead: why that flavour lacks it, and what to do.
    """

    flag: str
    help: str
    parse: Callable[[str], object] | None = str
    metavar: str | tuple[str, ...] | None = None
    choices: Sequence[str] = ()
    count: int | None = None
    group: str = ""
    old_flag: str = ""
    old_choices: tuple[tuple[str, str], ...] = ()
    only: tuple[When, ...] = ()
    never: tuple[When, ...] = ()
    required: tuple[When, ...] = ()
    expected: str = ""
    lacking: str = ""
    instead: str = ""

    @property
    def destination(self) -> str:
        """Return the attribute that the parser stores the value in."""
        return self.flag.removeprefix("--").replace("-", "_")


def option(default: Value, flag: str, help: str, **details: Any) -> Value:
    """Return a field that is an option; see `Option` for the arguments."""
    return field(default=default, metadata={METADATA_KEY: Option(flag, help, **details)})


def options_of(section: type[DataclassInstance]) -> Iterator[tuple[str, Option]]:
    """Yield the name and the option of every field that has one.

    What a section says of all its options in `GROUP` and `ONLY` is added to each.
    """
    group, only = getattr(section, "GROUP", ""), getattr(section, "ONLY", ())
    for one in fields(section):
        if METADATA_KEY in one.metadata:
            own: Option = one.metadata[METADATA_KEY]
            yield one.name, replace(own, group=own.group or group, only=(*only, *own.only))


def flag_of(section: type[DataclassInstance], field_name: str) -> str:
    """Return how the option of a field is written, such as "--max-det"."""
    return dict(options_of(section))[field_name].flag


def read_options(section: type[Section], arguments: argparse.Namespace, **others: Any) -> Section:
    """Return a dataclass with the values that were given, and its defaults for all others.

    Args:
        section: the dataclass.
        arguments: as a parser with `add_options` gives them.
        **others: values of fields that are no options.

    Raises:
        ToodError: a value that cannot be.
    """
    values = {name: getattr(arguments, one.destination) for name, one in options_of(section)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }
    return section(**given, **others)


def given_options(
    sections: Sequence[type[DataclassInstance]], arguments: argparse.Namespace
) -> list[Option]:
    """Return the options that were given, in the order of the help text."""
    every = [one for section in sections for _, one in options_of(section)]
    return [one for one in every if getattr(arguments, one.destination) is not None]


def check_rules(config: ExportConfig, given: Collection[Option], known: Collection[Option]) -> None:
    """Refuse options that mean nothing, contradict one another, or lack another one.

    Args:
        config: built from them.
        given: the options that were given.
        known: all options.

    Raises:
        ToodError: there are such options; the message names them.
    """
    for when in _conditions(given, lambda one: one.only):
        if not when.holds(config):
            flags = [one.flag for one in given if when in one.only]
            verb = "needs" if len(flags) == 1 else "need"
            raise ToodError(f"{', '.join(flags)} {verb} {when.text}")
    for when in _conditions(given, lambda one: one.never):
        if when.holds(config):
            flags = [one.flag for one in given if when in one.never]
            raise ToodError(f"{', '.join(flags)} beside {when.text}; leave one of them out")
    for one in known:
        for when in one.required:
            if one not in given and when.holds(config):
                raise ToodError(f"{when.text} needs {one.flag} {one.expected}".rstrip())


def _conditions(
    options: Collection[Option], of: Callable[[Option], tuple[When, ...]]
) -> dict[When, None]:
    """Return the conditions of options, each once, in their order."""
    return dict.fromkeys(when for one in options for when in of(one))


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the parts of "a,b" without blanks around them; empty parts are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers_from_text(text: str) -> tuple[int, ...]:
    """Read "0,1".

    Raises:
        ToodError: not whole numbers.
    """
    parts = comma_separated(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ToodError(
            f"{text!r} is given; expected whole numbers with commas between them, such as 0,1"
        )
    return tuple(map(int, parts))


def warm_up_from_text(text: str) -> tuple[int, ...]:
    """Read the batches of a warm-up, "1,8", or "none".

    Raises:
        ToodError: not whole numbers.
    """
    return () if text == "none" else numbers_from_text(text)
