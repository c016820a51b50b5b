"""`tood-export`: makes the parser from the options of an export, and starts what was asked for.

Comes in: arguments as text. Goes out: an `ExportConfig`, and what measures on annotated images or
searches a mixture of precisions. Knows nothing of how an export is made.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import (
    DONE,
    CommandParser,
    accept_old_name,
    add_model_options,
    check_written,
    load_options,
    run_command,
)
from tood_deploy.errors import DeviceError, InputError, ToodError, not_installed
from tood_deploy.export.config import SECTIONS, CheckpointOptions, ExportConfig, PrecisionOptions
from tood_deploy.export.options import (
    Option,
    check_rules,
    flag_of,
    given_options,
    options_of,
    read_options,
)
from tood_deploy.export.tensorrt.options import EngineOptions, SizeOptions
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.graph_io import OVMS
from tood_deploy.reporter import Reporter

if TYPE_CHECKING:
    from pathlib import Path

    from tood_deploy.benchmark.evaluation.evaluate import DataSet
    from tood_deploy.benchmark.precision_search import ApDrop, PrecisionSearch
    from tood_deploy.data.images import ImagesToCheck
    from tood_deploy.export.ovms import OvmsModel
    from tood_deploy.onnx_file import OnnxArtefact

# Extras that bring a package; "export" where not named.
EXTRAS = {"openvino": ("export", "openvino"), "pycocotools": ("export", "eval")}
PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "safetensors", "filelock")

EPILOG = """\
what comes out:
  --to onnx (the default)  one .onnx for ONNX Runtime, with pre- and post-processing inside; all
                           other targets but torch are made from it
  --to openvino            .xml and .bin for OpenVINO on CPUs
  --to ovms                the same in a folder of OpenVINO Model Server (docs/serving.md)
  --to engine              a TensorRT or TensorRT-RTX engine; the precision is written into the
                           graph, the network strongly typed
  --to torch               a .pt2 for PyTorch on GPUs and CPUs (docs/torch.md); made from the
                           checkpoint itself, in fp32, bf16 or fp16
  --to triton              a model in a repository of NVIDIA Triton Inference Server
                           (docs/serving.md)

precision:
  bf16 and fp16 keep normalisation, decoding, scores and suppression in float32. In OpenVINO bf16 is
  a property of the run. ONNX Runtime on CPUs does not open an .onnx in bf16 and only emulates fp16:
  they are for engines, OpenVINO (bf16) and GPUs (fp16). int8 needs images like those to come
  (--calib-data); --max-ap-drop with --annotations and --images, or --max-drop without annotations,
  keeps layers that cost too much in float32. --autotune-precision measures instead which mixture of
  precisions is fastest within that.

checkpoints:
  Files of MMDetection 2.x and 3.x, of the TOOD authors, and our own (.pth, .pt, .safetensors) load
  as they are. A preset's name in place of a file downloads its published weights once. An .onnx of
  tood-export is taken further.

class counts:
  Any number of classes works: the count is read from the weights, the names from the file's
  metadata. Where the metadata has no names, classes are numbered; name them with
  --classes person,car,dog or --classes names.txt (one a line).

anchor-free or anchor-based:
  Both kinds have the same weights. Where a file's metadata does not tell them apart (a bare
  state_dict), name the kind with --preset r50-1x or --preset r50-anchor-1x.
"""


def parser() -> CommandParser:
    """Return the command's parser; a value is None where its option is not given."""
    result = CommandParser(
        "tood-export", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "checkpoint",
        metavar="MODEL",
        help="a checkpoint file, the name of a preset, or an .onnx of tood-export",
    )
    groups: dict[str, argparse._ActionsContainer] = {"": result}
    for section in SECTIONS:
        for _, option in options_of(section):
            if option.group not in groups:
                groups[option.group] = result.add_argument_group(option.group)
            _add_option(groups[option.group], option)
    add_model_options(result)
    return result


def _add_option(group: argparse._ActionsContainer, option: Option) -> None:
    """Add an option, and its old name where it had another one."""
    details: dict[str, Any] = {"dest": option.destination, "default": None, "help": option.help}
    if option.parse is None:
        details["action"] = "store_true"
    else:
        details |= {"type": partial(_parse, option), "nargs": option.count}
        details |= {"metavar": option.metavar, "choices": option.choices or None}
    action = group.add_argument(option.flag, **details)
    if option.old_flag:
        accept_old_name(group, option.old_flag, action)


def _parse(option: Option, text: str) -> object:
    """Return the value of an option; one of the last release becomes today's, with a note.

    Raises:
        ToodError: a text that cannot be; the message names the option.
    """
    for old, now in option.old_choices:
        if text == old:
            Reporter().note(
                f"{option.flag} {old} is called {now} now; the next release drops {old}"
            )
            text = now
    assert option.parse is not None
    try:
        return option.parse(text)
    except ToodError as error:
        raise ToodError(f"{option.flag}: {error}") from error
    except ValueError as error:  # of int and float, whose names argparse would take from here
        expected = {int: "a whole number", float: "a number"}.get(option.parse, "another value")
        message = f"found {text!r}; expected {expected}"
        raise argparse.ArgumentTypeError(message) from error


def export_command(argv: Sequence[str] | None) -> int:
    """Check all that the export needs first, then run it and print what came of it."""
    arguments = parser().parse_args(argv)
    command = shlex.join(["tood-export", *(sys.argv[1:] if argv is None else argv)])
    served = take_ovms(arguments)
    config = config_from(arguments, command)
    _check_packages(config)
    reporter = Reporter(config.quiet)
    annotated = open_annotated(config)
    from tood_deploy.export.preflight import check_export, written_files

    check_written(arguments.classes, itertools.chain(*written_files(config).values()))
    for note in check_export(config, annotated):
        reporter.note(note)
    reporter.info(f"{config.source}: checked all that its export needs; starting PyTorch")
    from tood_deploy.export.export import run_export
    from tood_deploy.export.result import record_timings

    with record_timings() as timings:
        search = search_from(config, annotated)
        result = run_export(config, annotated=annotated, search=search, reporter=reporter)
    if config.timings:
        reporter.info(timings.text())
    result.print(reporter, list_layers=config.list_layers)
    if served is not None:
        reporter.info(f"{served.write_config()}: lists every model of its folder")
    return DONE


def take_ovms(arguments: argparse.Namespace) -> OvmsModel | None:
    """Make of --to ovms the --to openvino that it is, into the model server's folder.

    Args:
        arguments: of the command; changed.

    Returns:
        The model's place; None for another target.

    Raises:
        ToodError: a name or a place that cannot be.
    """
    if arguments.to != OVMS:
        return None
    from tood_deploy.export.ovms import plan_ovms

    served = plan_ovms(arguments.checkpoint, arguments.output, arguments.name)
    arguments.to, arguments.output, arguments.name = "openvino", served.path, None
    return served


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script."""
    return run_command(export_command, argv)


def config_from(arguments: argparse.Namespace, command: str = "") -> ExportConfig:
    """Return what is asked for. Imports nothing heavy.

    Args:
        arguments: of the command.
        command: makes the same again.

    Raises:
        ToodError: a value that cannot be, or options that do not go together.
    """
    load = load_options(arguments)
    config = read_options(
        ExportConfig,
        arguments,
        source=arguments.checkpoint,
        checkpoint=read_options(CheckpointOptions, arguments, load=load),
        precision=read_options(PrecisionOptions, arguments),
        sizes=read_options(SizeOptions, arguments),
        engine=read_options(EngineOptions, arguments),
        triton=read_options(TritonOptions, arguments),
        command=command,
    )
    every = [option for section in SECTIONS for _, option in options_of(section)]
    check_rules(config, [*given_options(SECTIONS, arguments), *_model_options(arguments)], every)
    return config


def _model_options(arguments: argparse.Namespace) -> list[Option]:
    """Return those of `add_model_options` that were given, which only a checkpoint takes."""
    shared = argparse.ArgumentParser(add_help=False)
    add_model_options(shared)
    return [
        Option(action.option_strings[0], "", only=CheckpointOptions.ONLY)
        for action in shared._actions
        if getattr(arguments, action.dest) is not None
    ]


def _check_packages(config: ExportConfig) -> None:
    """Refuse to begin where a package is missing that is needed later, before any is imported."""
    precision = config.precision
    needed = [*PACKAGES]
    if config.to == "openvino":
        needed.append("openvino")
    if precision.annotations:
        needed.append("pycocotools")
    if precision.precision in ("bf16", "fp16", "auto") and not (
        precision.calib_data or config.verify_images
    ):
        needed.append("matplotlib")  # its photograph is what the artefact is verified on
    for name in needed:
        if not is_installed(name):
            raise DeviceError(not_installed(name, *EXTRAS.get(name, ("export",))))


def is_installed(name: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


@dataclass(frozen=True)
class AnnotatedData:
    """Annotated images that an export is measured on; `export.export.AnnotatedImages`.

    Attributes:
        data: the annotations, with the files of their images.
        quiet: show no progress.
    """

    data: DataSet
    quiet: bool

    @property
    def images(self) -> ImagesToCheck:
        """Return the images, to be looked at before the long work."""
        from tood_deploy.data.images import ImagesToCheck

        return ImagesToCheck(
            flag_of(ExportConfig, "images"), tuple(self.data.files.values()), _decode_annotated
        )

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Refuse class names that are not the categories of the annotations.

        Raises:
            ToodError: they are not.
        """
        from tood_deploy.data.categories import map_categories

        map_categories(class_names, self.data.truth)

    def measure(self, artefact: OnnxArtefact) -> ApDrop:
        """Return what measures the AP that graphs lose against a float32 artefact."""
        from tood_deploy.benchmark.precision_search import ApDrop

        return ApDrop(self.data, artefact, quiet=self.quiet)


def _decode_annotated(path: Path) -> object:
    """Decode an image as an evaluation does.

    Raises:
        InputError: it cannot be read.
    """
    from tood_deploy.data.image_file import decode_image

    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image") from error


def open_annotated(config: ExportConfig) -> AnnotatedData | None:
    """Read the annotations that AP is measured by, with their images; None without any.

    Raises:
        InputError: the annotations cannot be read, or an image is missing.
    """
    if config.precision.annotations is None:
        return None
    from tood_deploy.benchmark.evaluation.evaluate import open_data_set

    return AnnotatedData(open_data_set(config.precision.annotations, config.images), config.quiet)


def search_from(config: ExportConfig, annotated: AnnotatedData | None) -> PrecisionSearch | None:
    """Return the search for a mixture of precisions; None where none is asked for.

    Raises:
        ToodError: the target's runtime or its device is not there.
    """
    wanted = config.precision
    if not wanted.autotune:
        return None
    from tood_deploy.benchmark.precision_search import Opener, PrecisionSearch
    from tood_deploy.export.precision.convert import int8_options

    half: Any = None
    if config.to == "engine" and wanted.fallback != "fp32":
        half = wanted.fallback or "fp16"
    target: Any = config.to  # a rule keeps triton out
    assert wanted.calib_data is not None
    return PrecisionSearch(
        Opener(target, config.engine, config.flavour),
        wanted.calib_data,
        int8_options(wanted, config.int8_scheme),
        half,
        annotated.measure if annotated and wanted.max_ap_drop is not None else None,
    )


if __name__ == "__main__":
    sys.exit(main())
