"""Which runtime opens which model. Imports a runtime only when it is asked for."""

import inspect
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from tood_deploy.engines.base import Engine
from tood_deploy.engines.self_test import check_self_test
from tood_deploy.errors import ArtefactError, InputError, ToodError, naming_extras
from tood_deploy.graph_io import ARTEFACT_SUFFIXES, ENGINE_SUFFIXES, ONNX_SUFFIX, OPENVINO_SUFFIX
from tood_deploy.presets import PRESETS

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
CHECKPOINT_OPTIONS = ("threads", "preset", "class_names", "convention", "weights_key")


@dataclass(frozen=True)
class Runtime:
    """A runtime for artefacts: the module and class of its engine, and the files it opens, ending in `suffixes`."""

    module: str
    engine: str
    suffixes: tuple[str, ...]


RUNTIMES = {  # the first that opens a suffix is its default
    "onnxruntime": Runtime("onnx_engine", "OnnxEngine", (ONNX_SUFFIX,)),
    "openvino": Runtime("openvino_engine", "OpenVinoEngine", (OPENVINO_SUFFIX, ONNX_SUFFIX)),
    "tensorrt": Runtime("tensorrt.engine", "TensorRTEngine", ENGINE_SUFFIXES),
}


def open_engine(
    model: str | PathLike[str],
    *,
    device: str = "cpu",
    runtime: str | None = None,
    self_test: bool = True,
    **options: Any,
) -> Engine:
    """Opens a model in the runtime it is made for.

    Args:
        model: an artefact: .onnx (ONNX Runtime, or OpenVINO where `runtime` says so), .xml (OpenVINO), .engine (TensorRT); a checkpoint
            (.pth, .pt, .safetensors) or a preset's name (PyTorch).
        device: "cpu" or "cuda".
        runtime: of an artefact: "onnxruntime", "openvino" or "tensorrt"; by the file's ending where not given.
        self_test: whether an artefact proves, when it is first opened on this machine, that it gives the answer stored in its manifest.
        **options: of that runtime: `threads`; of OpenVINO `precision` and more; of checkpoints what `load_checkpoint` takes.

    Raises:
        ToodError: no such file, not a model, an option that its runtime lacks, or the device is not there.
    """
    if device not in ("cpu", "cuda"):
        raise ToodError(f"device is {device!r}; expected cpu or cuda")
    if not isinstance(model, str | PathLike):
        given = "None" if model is None else f"of type {type(model).__name__}"
        raise InputError(
            f"the model is {given}; expected the path of an exported artefact or checkpoint, or a preset's name"
        )
    path = Path(model)
    named = str(model) in PRESETS and not path.exists()
    if not named and not path.is_file():
        raise ToodError(
            f"{model}: no such file; expected an exported artefact, a checkpoint, or one of the presets {', '.join(PRESETS)}"
        )
    if named or path.suffix.lower() in CHECKPOINT_SUFFIXES:
        return _open_checkpoint(model, device, runtime, options)
    engine = _open_artefact(path, device, runtime, options)
    try:
        if "serving" in engine.manifest.options:
            raise ArtefactError(
                f"{path}: has the form that Triton serves, with thresholds for every image; open what it was made from"
            )
        if self_test:
            check_self_test(engine, path)
    except BaseException:
        engine.close()
        raise
    return engine


def _open_checkpoint(
    model: str | PathLike[str], device: str, runtime: str | None, options: dict[str, Any]
) -> Engine:
    if runtime is not None:
        raise ToodError(
            f"{model}: a checkpoint is run by PyTorch, not by {runtime}; export it first with tood-export"
        )
    _check_options(f"{model}: PyTorch", options, CHECKPOINT_OPTIONS)
    with naming_extras():
        from tood_deploy.engines.torch_engine import TorchEngine

    return TorchEngine(model, device=device, **options)


def _open_artefact(path: Path, device: str, runtime: str | None, options: dict[str, Any]) -> Engine:
    suffix = path.suffix.lower()
    fitting = [name for name, each in RUNTIMES.items() if suffix in each.suffixes]
    if not fitting:
        expected = ", ".join((*ARTEFACT_SUFFIXES, *CHECKPOINT_SUFFIXES))
        raise ToodError(
            f"{path}: a file ending in {suffix or 'nothing'} is not a model that can be opened; expected one of {expected}"
        )
    if runtime is not None and runtime not in fitting:
        raise ToodError(
            f"{path}: {runtime} does not open a file ending in {suffix}; expected the runtime {' or '.join(fitting)}"
        )
    chosen = RUNTIMES[runtime or fitting[0]]
    with naming_extras():
        engine = getattr(import_module(f"tood_deploy.engines.{chosen.module}"), chosen.engine)
    _check_options(
        f"{path}: {runtime or fitting[0]}", options, [*inspect.signature(engine).parameters][1:]
    )
    return engine(path, device=device, **options)


def _check_options(who: str, options: dict[str, Any], taken: Any) -> None:
    """Raises ToodError for an option that the runtime does not take."""
    if unknown := [name for name in options if name not in taken]:
        raise ToodError(
            f"{who} takes no {', '.join(unknown)}; it takes {', '.join(name for name in taken if name != 'device')}"
        )
