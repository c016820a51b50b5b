"""Which runtime opens which model.

Comes in: the path of an artefact or checkpoint, or a preset's name. Goes out: an `Engine`. A
runtime is imported only when it is asked for; this module itself is light, as the commands'
`--help` reads the table of runtimes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tood_deploy.errors import ArtefactError, ArtefactWarning, InputError, ToodError, naming_extras
from tood_deploy.files import absent_or
from tood_deploy.graph_io import (
    ARTEFACT_SUFFIXES,
    ENGINE_SUFFIXES,
    ONNX_SUFFIX,
    OPENVINO_SUFFIX,
    TORCH_SUFFIX,
)
from tood_deploy.presets import PRESETS, like_presets

if TYPE_CHECKING:
    from tood_deploy.engines.base import Engine

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
LOAD_OPTIONS = ("preset", "class_names", "convention", "weights_key")  # of checkpoints
CHECKPOINT_OPTIONS = ("threads", *LOAD_OPTIONS)
FAST_OPTIONS = ("precision", "compile", "cuda_graph")  # of PyTorch's fast form
DEVICES = ("cpu", "cuda")
Hint = Literal["latency", "throughput"]  # work on one batch at a time, or on several
HINTS: tuple[Hint, ...] = ("latency", "throughput")
Verify = Literal["warn", "strict", "off"]
VERIFY: tuple[Verify, ...] = ("warn", "strict", "off")


@dataclass(frozen=True)
class Runtime:
    """A runtime for artefacts.

    Attributes:
        module: that its engine is in, within this package.
        engine: the class's name.
        suffixes: endings of the files that it opens.
        side_by_side_on: devices on which it works on several batches at a time, with
            `hint="throughput"`.
    """

    module: str
    engine: str
    suffixes: tuple[str, ...]
    side_by_side_on: tuple[str, ...] = ()


RUNTIMES = {  # the first that opens a suffix is its default
    "onnxruntime": Runtime("onnx_engine", "OnnxEngine", (ONNX_SUFFIX,), ("cpu",)),
    "openvino": Runtime(
        "openvino_engine", "OpenVinoEngine", (OPENVINO_SUFFIX, ONNX_SUFFIX), DEVICES
    ),
    "tensorrt": Runtime("tensorrt.engine", "TensorRTEngine", ENGINE_SUFFIXES),
    "torch": Runtime("torch_fast", "FastTorchEngine", (TORCH_SUFFIX,)),
}


def runtimes_for(path: Path) -> list[str]:
    """Return the names of the runtimes that open a file with this ending, the default first."""
    suffix = path.suffix.lower()
    return [name for name, runtime in RUNTIMES.items() if suffix in runtime.suffixes]


def open_engine(
    model: str | PathLike[str],
    *,
    device: str = "cpu",
    runtime: str | None = None,
    self_test: bool = True,
    verify: Verify = "warn",
    **options: Any,
) -> Engine:
    """Open a model in the runtime that it is made for.

    Args:
        model: an artefact: .onnx (ONNX Runtime, or OpenVINO where `runtime` says so), .xml
            (OpenVINO), .engine or .plan (TensorRT), .pt2 (PyTorch, fast); a checkpoint (.pth, .pt,
            .safetensors) or a preset's name (PyTorch as it is, the reference; fast where `runtime`
            is "torch", or one of its options is given).
        device: "cpu" or "cuda".
        runtime: "onnxruntime", "openvino", "tensorrt" or "torch"; by the file's ending where not
            given.
        self_test: whether an artefact proves, when it is first opened on this machine, that it
            gives the answer stored in its manifest.
        verify: what is done about an artefact whose SHA-256 is not the one in the manifest beside
            it: "warn" gives an `ArtefactWarning`, once for a file; "strict" refuses it, and one
            that has no SHA-256 to be compared with; "off" does not compare.
        **options: of that runtime: `threads`; of OpenVINO `precision` and more; of PyTorch
            `precision`, `compile` and `cuda_graph`; of checkpoints what `load_checkpoint` takes.

    Raises:
        ToodError: no such file, not a model, an option that its runtime lacks, or the device is not
            there.
    """
    _check_arguments(model, device, verify)
    path = Path(model)
    is_preset = str(model) in PRESETS and not path.exists()
    if not is_preset and not absent_or(path.is_file):
        raise ToodError(
            f"{model}: no such file; expected an exported artefact, a checkpoint, or a preset such "
            f"as {like_presets(str(model))}"
        )
    if is_preset or path.suffix.lower() in CHECKPOINT_SUFFIXES:
        return _open_checkpoint(model, device, runtime, verify, options)
    engine = _open_artefact(path, device, runtime, verify, options)
    try:
        _check_engine(engine, path, self_test)
    except BaseException:
        engine.close()
        raise
    return engine


def _check_arguments(model: object, device: object, verify: object) -> None:
    if verify not in VERIFY:
        raise ToodError(f"verify is {verify!r}; expected {', '.join(VERIFY[:-1])} or {VERIFY[-1]}")
    if device not in DEVICES:
        choice = "; CUDA_VISIBLE_DEVICES chooses the GPU" if str(device).startswith("cuda:") else ""
        raise ToodError(f"device is {device!r}; expected {' or '.join(DEVICES)}{choice}")
    if not isinstance(model, str | PathLike):
        given = "None" if model is None else f"of type {type(model).__name__}"
        raise InputError(
            f"the model is {given}; expected the path of an exported artefact or checkpoint, or a "
            "preset's name"
        )


def _verify_bytes(path: Path, verify: Verify) -> None:
    """Compare an artefact with its manifest, before a runtime reads it.

    Raises:
        ArtefactError: `verify` is "strict", and it is not the file of its manifest.
    """
    from tood_deploy.manifest import mismatch, read_manifest

    if verify == "off":
        return
    manifest = read_manifest(path)
    differs = mismatch(path, manifest)
    if verify == "warn":
        if differs:
            _warn_once(differs)
        return
    if manifest is None or not manifest.artefact_sha256:
        differs = (
            f"{path}: there is no SHA-256 to compare it with, as no manifest beside it states one; "
            "copy its .json too, or export it again with tood-export"
        )
    if differs:
        raise ArtefactError(differs)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, ArtefactWarning, stacklevel=5)  # where the model was opened


def _check_engine(engine: Engine, path: Path, self_test: bool) -> None:
    """Raise ArtefactError for an artefact that is not to be run here, or fails its self-test."""
    from tood_deploy.engines.self_test import check_self_test

    if engine.manifest.build.serving:
        raise ArtefactError(
            f"{path}: has the form that Triton serves, with thresholds for every image; open what "
            "it was made from"
        )
    if self_test:
        check_self_test(engine, path)


def _open_checkpoint(
    model: str | PathLike[str],
    device: str,
    runtime: str | None,
    verify: Verify,
    options: dict[str, Any],
) -> Engine:
    if verify == "strict":
        raise ToodError(
            f"{model}: a checkpoint has no manifest to be compared with; leave verify out, or "
            "export it first with tood-export"
        )
    if runtime not in (None, "torch"):
        raise ToodError(
            f"{model}: a checkpoint is run by PyTorch, not by {runtime}; export it first with "
            "tood-export"
        )
    _check_options(f"{model}: PyTorch", options, (*CHECKPOINT_OPTIONS, *FAST_OPTIONS))
    if runtime is None and not any(name in options for name in FAST_OPTIONS):
        with naming_extras():
            from tood_deploy.engines.torch_engine import TorchEngine

        return TorchEngine(model, device=device, **options)
    with naming_extras():
        from tood_deploy.engines.torch_fast import open_checkpoint
    loading = {name: options.pop(name) for name in LOAD_OPTIONS if name in options}
    return open_checkpoint(model, loading, device=device, **options)


def _open_artefact(
    path: Path, device: str, runtime: str | None, verify: Verify, options: dict[str, Any]
) -> Engine:
    suffix, fitting = path.suffix.lower(), runtimes_for(path)
    if not fitting:
        expected = ", ".join((*ARTEFACT_SUFFIXES, *CHECKPOINT_SUFFIXES))
        raise ToodError(
            f"{path}: a file ending in {suffix or 'nothing'} is not a model that can be opened; "
            f"expected one of {expected}"
        )
    if runtime is not None and runtime not in fitting:
        raise ToodError(
            f"{path}: {runtime} does not open a file ending in {suffix}; expected the runtime "
            f"{' or '.join(fitting)}"
        )
    name = runtime or fitting[0]
    with naming_extras():
        module = import_module(f"tood_deploy.engines.{RUNTIMES[name].module}")
    engine = getattr(module, RUNTIMES[name].engine)
    _check_options(f"{path}: {name}", options, [*inspect.signature(engine).parameters][1:])
    _verify_bytes(path, verify)
    return engine(path, device=device, **options)


def _check_options(who: str, options: dict[str, Any], known: Sequence[str]) -> None:
    """Raise ToodError for an option that the runtime does not take."""
    if unknown := [name for name in options if name not in known]:
        takes = ", ".join(name for name in known if name != "device")
        raise ToodError(f"{who} takes no {', '.join(unknown)}; it takes {takes}")
