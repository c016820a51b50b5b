"""Decide whether and how Triton can serve a model, before anything is made.

Comes in: manifests and options. Goes out: a plan, or one error. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tood_deploy.engines.precision_support import ON_CPUS, half_precision_of, mixes_int8_and_half
from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.export.tensorrt.options import Profiles, default_shapes
from tood_deploy.export.triton.config import triton_config
from tood_deploy.export.triton.folder import next_version
from tood_deploy.export.triton.options import Backend, TritonOptions
from tood_deploy.graph_io import ENGINE_SUFFIXES
from tood_deploy.manifest import Manifest, artefact_sha256, manifest_path, read_manifest

SERVED_FLAVOUR = "tensorrt"  # Triton has no backend for plans of TensorRT-RTX


@dataclass(frozen=True)
class ServingPlan:
    """How a model will be served.

    Attributes:
        backend: what runs it.
        profiles: the sizes that are warmed up, and the largest batch.
        version: that the model gets in its repository.
    """

    backend: Backend
    profiles: Profiles
    version: int


def is_engine(model: Path) -> bool:
    """Tell an engine from everything else by its name."""
    return model.suffix.lower() in ENGINE_SUFFIXES


def plan_serving(
    model: Path,
    source: Manifest,
    repository: Path,
    options: TritonOptions,
    profiles: Profiles | None,
) -> ServingPlan:
    """Decide how a model is served.

    Args:
        model: an engine; or an .onnx, or what will become one.
        source: its manifest; of what is yet to be made preset, precision and `max_det` count.
        repository: the folder that holds the models of a server.
        options: with the model's name.
        profiles: as asked for.

    Raises:
        ToodError: options that do not fit, a precision that the back end does not compute, or a
            place that is taken.
    """
    backend = choose_backend(model, options)
    if not is_engine(model):
        check_precision(model.name, source, backend, options)
    chosen = choose_profiles(model, source, profiles, options)
    return ServingPlan(
        backend, chosen, next_version(repository, triton_config(source, backend, options, chosen))
    )


def choose_backend(model: Path, options: TritonOptions) -> Backend:
    """Return the back end that was asked for, or else the one that runs the file.

    Raises:
        ToodError: it does not run the file, or not on that device.
    """
    backend: Backend = options.backend or ("tensorrt" if is_engine(model) else "onnxruntime")
    if is_engine(model) and backend != "tensorrt":
        raise ToodError(
            f"{model}: {backend} does not run an engine; give the .onnx artefact, or leave the "
            "backend out"
        )
    if backend == "tensorrt" and options.device == "cpu":
        raise ToodError(
            f"{model}: device is cpu, and TensorRT runs on GPUs; give device cuda, or an .onnx "
            "artefact and backend onnxruntime"
        )
    return backend


def check_precision(name: str, source: Manifest, backend: Backend, options: TritonOptions) -> None:
    """Refuse a graph that the back end cannot load, gets wrong, or runs no faster than float32.

    Raises:
        ToodError: it is such a graph; the message names the precision and the cure.
    """
    half = half_precision_of(source)
    if backend == "tensorrt":
        if source.precision == "int8" and source.build.int8_scheme.startswith("u8"):
            raise ToodError(
                f"{name}: its 8-bit numbers have zero points, which TensorRT lacks; quantise the "
                "float32 .onnx with --backend tensorrt"
            )
        return
    if mixes_int8_and_half(source):
        raise ToodError(
            f"{name} in int8 beside {half}: Triton's back end onnxruntime computes it wrongly; "
            "serve int8 beside fp32, "
            "or give --backend tensorrt"
        )
    if half == "bf16":
        raise ToodError(
            f"{name} in bf16: Triton's back end onnxruntime does not compute it; serve fp32, "
            "int8, or fp16 on GPUs, "
            "or give --backend tensorrt"
        )
    if half == "fp16" and options.device == "cpu":
        raise ToodError(
            f"{name} in fp16 and device cpu: {ON_CPUS['fp16']}; serve fp32 or int8, or give "
            "--device cuda"
        )


def choose_profiles(
    model: Path, source: Manifest, profiles: Profiles | None, options: TritonOptions
) -> Profiles:
    """Return the profiles asked for, the engine's own, or those of the model's own sizes.

    Raises:
        ToodError: they do not fit the model or the options.
    """
    if is_engine(model):
        if profiles is not None:
            raise ToodError(
                f"{model}: an engine has its own sizes and batches; leave --shapes and --batch out"
            )
        profiles = engine_profiles(source)
    profiles = profiles or Profiles(default_shapes(source.preset.imgsz))
    check_batches(profiles.batch, options)
    return profiles


def check_batches(batch: tuple[int, int, int], options: TritonOptions) -> None:
    """Refuse batches that a server cannot work with.

    Raises:
        ToodError: single images would not be taken, or a warm-up is larger than the largest batch.
    """
    smallest, _, largest = batch
    if smallest > 1:
        raise ToodError(
            f"batch is at least {smallest}; a server also gets images one by one: give a --batch "
            "from 1"
        )
    if options.warm_up_batches and max(options.warm_up_batches) > largest:
        raise ToodError(
            f"warm-up batch is {max(options.warm_up_batches)}; expected at most {largest}, the "
            "largest batch"
        )


def engine_profiles(manifest: Manifest) -> Profiles:
    """Return the profiles that an engine was built with."""
    assert manifest.target is not None
    profiles = manifest.target.profiles
    first = profiles[0]
    return Profiles(
        tuple(profile.size_hw for profile in profiles),
        (first.min_batch, first.opt_batch, first.max_batch),
    )


def read_engine_manifest(engine: Path) -> Manifest:
    """Return the manifest of an engine that Triton can serve.

    Raises:
        ToodError: there is no such file.
        ArtefactError: its manifest is missing or another's, or Triton cannot serve it.
    """
    if not engine.is_file():
        raise ToodError(
            f"{engine}: no such file; expected an .onnx artefact or an engine of tood-export"
        )
    manifest = read_manifest(engine)
    if manifest is None or manifest.artefact_sha256 != artefact_sha256(engine):
        raise ArtefactError(
            f"{engine}: its manifest {manifest_path(engine).name} is missing or describes another "
            "file; export it again"
        )
    if manifest.build.serving is None:
        raise ArtefactError(
            f"{engine}: has one threshold for all images, and Triton batches only what has one "
            "for each; give the .onnx artefact"
        )
    flavour = manifest.target.flavour if manifest.target else "nothing"
    if flavour != SERVED_FLAVOUR:
        raise ArtefactError(
            f"{engine}: is a plan of {flavour}, Triton runs those of {SERVED_FLAVOUR}; build it "
            "with that"
        )
    return manifest
