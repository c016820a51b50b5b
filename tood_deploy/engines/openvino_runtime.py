"""OpenVINO, and a model's files as it reads them.

Whether they are ours, and what it says if it cannot. Compiles nothing.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tood_deploy.errors import ArtefactError, DeviceError, OutputError, naming_extras
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import METADATA_KEY, Manifest, artefact_files

CPU = "CPU"
TELEMETRY = "openvino_telemetry"
TYPES = {"fp32": "f32", "bf16": "bf16"}  # what it can compute in, beside int8
PLACE = [
    "framework",
    METADATA_KEY,
]  # where an ONNX file's metadata is found once OpenVINO has read it, and where an IR keeps it
BEGINNINGS = {
    ".xml": (b"<?xml",),
    ".onnx": (b"\x08",),
}  # of a file that at least may be one; others are tried by every frontend, aloud


def load_openvino() -> ModuleType:
    """Return the package, without the telemetry that importing it would send.

    It goes to a statistics service unless the machine's user has opted out.

    Raises:
        DeviceError: it is not installed, or does not load.
    """
    muted = TELEMETRY not in sys.modules
    if muted:
        # As if it were not installed: OpenVINO has a stub for that.
        sys.modules[TELEMETRY] = None  # pyright: ignore[reportArgumentType]
    try:
        with naming_extras():
            import openvino
    except ImportError as error:
        raise DeviceError(
            f"OpenVINO is installed but does not load ({error}); reinstall the package openvino"
        ) from error
    finally:
        if muted:
            del sys.modules[TELEMETRY]
    return openvino


@cache
def shared_core() -> Any:
    """Return the one Core of this process.

    With a Core OpenVINO's CPU plugin gives its thread another stack for signals, and takes it back
    in the end. Of several Cores that end in another order than they began, one leaves a stack
    behind that is freed, and the next Ctrl-C ends the process (2026.4).

    Raises:
        DeviceError: OpenVINO is not installed.
    """
    return load_openvino().Core()


def has_bf16() -> bool:
    """Return whether OpenVINO computes in bf16 on this CPU."""
    return "BF16" in shared_core().get_property(CPU, "OPTIMIZATION_CAPABILITIES")


def check_precision(core: Any, precision: str) -> None:
    """Raise DeviceError where the CPU lacks the instructions.

    OpenVINO would take another precision in silence.
    """
    if precision == "bf16" and not has_bf16():
        name = core.get_property(CPU, "FULL_DEVICE_NAME")
        raise DeviceError(
            f"precision bf16 is not there: this CPU ({name}) has no bf16 instructions; use fp32, "
            "or another machine"
        )


def check_files(path: Path) -> None:
    """Refuse a file that every frontend of OpenVINO would try to read, and print errors about.

    Raises:
        ArtefactError: a file is missing, or cannot be what its name says.
    """
    for file in artefact_files(path):
        if not file.is_file():
            raise ArtefactError(
                f"{file}: is missing; an OpenVINO model is an .xml and a .bin of the same name: "
                "copy both"
            )
    with path.open("rb") as opened:
        if not opened.read(5).startswith(BEGINNINGS[path.suffix.lower()]):
            raise ArtefactError(
                f"{path}: not an {path.suffix} file inside; export it again with tood-export"
            )


def read_model(core: Any, path: Path) -> Any:
    """Return the model of an .onnx or .xml file.

    Raises:
        ArtefactError: it cannot be read, or has operators that OpenVINO lacks.
    """
    check_files(path)
    try:
        return core.read_model(path)
    except RuntimeError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: RuntimeError) -> ArtefactError:
    """Return the error for a file that OpenVINO cannot open: its several lines as one."""
    reason = reason_of(error)
    if "DeformConv" in reason:
        return ArtefactError(
            f"{path}: holds deformable convolutions as an operator, which OpenVINO lacks; export "
            "the checkpoint again with --deform gather"
        )
    return ArtefactError(
        f"{path}: OpenVINO cannot open it, cut or not a model that it knows ({reason}); export it "
        "again with tood-export"
    )


def reason_of(error: RuntimeError) -> str:
    """Return the last line of what OpenVINO says, which holds the reason.

    Those before it are places in its sources.
    """
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def manifest_inside(model: Any, path: Path) -> Manifest:
    """Return the manifest that a model carries itself.

    Raises:
        ArtefactError: there is none.
    """
    if not model.has_rt_info(PLACE):
        raise foreign(path, model)
    return Manifest.from_json(model.get_rt_info(PLACE).astype(str), str(path))


def is_ours(model: Any) -> bool:
    """Return whether a model, read or compiled, has the inputs and outputs of DESIGN section 4."""
    pairs = ((model.inputs, INPUTS), (model.outputs, OUTPUTS))
    return all(
        len(ports) == len(names)
        and all(name in port.names for port, name in zip(ports, names, strict=True))
        for ports, names in pairs
    )


def foreign(path: Path, model: Any) -> ArtefactError:
    """Return the error for a model, read or compiled, that is not one of ours."""
    names = [[value.any_name for value in values] for values in (model.inputs, model.outputs)]
    return ArtefactError(
        f"{path}: a model, but not one of tood_deploy (inputs {names[0]}, outputs {names[1]}, "
        f"expected {INPUTS} and {OUTPUTS} and a "
        "manifest); make it from the checkpoint with tood-export"
    )


def make_cache_folder(folder: Path) -> str:
    """Return the folder for compiled models, made if need be.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot keep compiled models ({error.strerror}); name another folder in "
            "TOOD_HOME"
        ) from error
    return str(folder)
