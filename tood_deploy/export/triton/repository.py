"""From an artefact to a model in a Triton model repository, ready to be served: docs/serving.md says how."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from tood_deploy.errors import OutputError
from tood_deploy.export.config import Backend, EngineOptions, Profiles, TritonOptions
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.triton.config import (
    LABELS_FILE,
    MODEL_FILES,
    OURS,
    WARM_UP_FOLDER,
    config_text,
    read_config,
    triton_config,
    write_warm_up,
)
from tood_deploy.export.triton.fit import (
    SERVED_FLAVOUR,
    choose_backend,
    is_engine,
    plan_serving,
    read_engine_manifest,
)
from tood_deploy.export.triton.serving_graph import check_serving_form, serving_form
from tood_deploy.files import write_text
from tood_deploy.manifest import Manifest, manifest_path
from tood_deploy.onnx_file import read_onnx, save_onnx

CONFIG_FILE = "config.pbtxt"
FIRST_VERSION = "1"


def next_version(repository: Path, config: Any) -> int:
    """The version that a model of this configuration gets in a repository.

    Raises:
        OutputError: the folder holds something else than a model repository, the model is not of tood-export, or its clients would break.
    """
    folder, present = repository / config.name, read_present(repository, config.name)
    if present is None:
        return int(FIRST_VERSION)
    if differing := [
        part
        for part in ("backend", "input", "output")
        if getattr(present, part) != getattr(config, part)
    ]:
        raise OutputError(
            f"{folder}: the model there has another {differing[0]}; give another --name, or delete the folder"
        )
    if present.parameters["class_names"] != config.parameters["class_names"]:
        raise OutputError(
            f"{folder}: the model there has other classes, which its clients count on; give another --name, or delete the folder"
        )
    return 1 + max(
        (int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0
    )


def read_present(repository: Path, name: str) -> Any:
    """Return the configuration of the model of that name in a repository; None where there is none yet.

    Raises:
        OutputError: the folder holds something else than a model repository, or the model is not of tood-export.
    """
    if repository.exists() and not repository.is_dir():
        raise OutputError(f"{repository}: is a file; expected a folder, the model repository")
    if (
        repository.is_dir()
        and any(repository.iterdir())
        and not any(repository.glob(f"*/{CONFIG_FILE}"))
    ):
        raise OutputError(
            f"{repository}: holds files, but no model with a {CONFIG_FILE}; give a new folder or a Triton model repository"
        )
    folder = repository / name
    return _read_ours(folder) if folder.exists() else None


def _read_ours(folder: Path) -> Any:
    try:
        config = read_config((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        reason = str(error).splitlines()[0]
        raise OutputError(
            f"{folder}: holds no {CONFIG_FILE} that can be read ({reason}); give another --name, or delete the folder"
        ) from error
    if OURS not in config.parameters:
        raise OutputError(
            f"{folder}: the model there was not written by tood-export; give another --name, or delete the folder"
        )
    return config


@contextmanager
def new_model_folder(folder: Path, version: int) -> Iterator[Path]:
    """A model's folder to fill, its version's files in `FIRST_VERSION`: becomes `folder`, or part of it, if the block succeeds.

    Raises:
        OutputError: the place cannot be written, or the disk is full; nothing is left behind.
    """
    parent = folder if folder.exists() else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent)
        )  # no number, so no version to Triton
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    try:
        made = (
            staging / folder.name
        )  # unlike its parent readable for all: the server may be another user
        (made / FIRST_VERSION).mkdir(parents=True)
        yield made
        if folder.exists():
            _add_version(made, folder, version)
        else:
            made.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: writing failed ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _add_version(made: Path, folder: Path, version: int) -> None:
    """Moves files in, the configuration last: it names the others."""
    (made / FIRST_VERSION).rename(folder / str(version))
    files = [path for path in made.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == CONFIG_FILE):
        place = folder / path.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


@dataclass(frozen=True)
class ServedModel:
    """A model in a repository.

    Attributes:
        folder: of the model; its name is the model's.
        version: that was added.
        backend: what runs it.
        manifest: beside the model's file.
        profiles: the sizes that are warmed up, and the largest batch.
    """

    folder: Path
    version: int
    backend: Backend
    manifest: Manifest
    profiles: Profiles

    @property
    def path(self) -> Path:
        """The model's file."""
        return self.folder / str(self.version) / MODEL_FILES[self.backend]


def triton_repository(
    model: Path,
    repository: Path,
    options: TritonOptions | None = None,
    *,
    profiles: Profiles | None = None,
    engine_options: EngineOptions | None = None,
    quiet: bool = False,
) -> ServedModel:
    """Adds a model to a repository: its first version, or the next where this model is there already.

    Args:
        model: an .onnx artefact, or an engine that was built from the model.onnx of such a repository.
        repository: the folder that holds the models of a server; is made where it does not exist.
        options: how it is served.
        profiles: the largest batch, and the padded sizes to warm up, which a plan is built for; landscape and portrait of the model's own
            size, batches of up to 8 where not given. An engine has its own.
        engine_options: of the builder, where a plan is built.
        quiet: no progress bar.

    Raises:
        ToodError: an option that does not fit, not such a model, a place that is something else, no TensorRT where it is asked for.
        CheckFailed: the form of the graph that is served deviates from the artefact; nothing is left behind.
    """
    options = options or TritonOptions()
    options = replace(options, name=options.name or model.stem)
    choose_backend(model, options)  # first, as only a file that it runs can be read
    source = read_engine_manifest(model) if is_engine(model) else read_onnx(model).manifest
    plan = plan_serving(model, source, repository, options, profiles)
    backend, profiles = plan.backend, plan.profiles
    folder = repository / options.name
    with new_model_folder(folder, plan.version) as made:
        manifest = _write_model(
            model, made / FIRST_VERSION / MODEL_FILES[backend], profiles, engine_options, quiet
        )
        (made / LABELS_FILE).write_text(
            "\n".join([*manifest.preset.class_names, ""]), encoding="utf-8"
        )
        if options.warm_up_batches:
            write_warm_up(made / WARM_UP_FOLDER, profiles.shapes_hw)
        (made / CONFIG_FILE).write_text(
            config_text(triton_config(manifest, backend, options, profiles)), encoding="utf-8"
        )
    return ServedModel(folder, plan.version, backend, manifest, profiles)


def _write_model(
    model: Path, output: Path, profiles: Profiles, engine_options: EngineOptions | None, quiet: bool
) -> Manifest:
    """Writes the model's file and its manifest; an .onnx artefact for TensorRT is built."""
    if is_engine(model):
        shutil.copyfile(model, output)
        manifest = read_engine_manifest(model)
    elif output.suffix == ".onnx":
        manifest = _write_serving_onnx(model, output)
    else:
        onnx_path = output.parent.parent / "serving.onnx"
        _write_serving_onnx(model, onnx_path)
        built = engine_from_onnx(
            onnx_path,
            output,
            profiles=profiles,
            options=engine_options,
            flavour=SERVED_FLAVOUR,
            quiet=quiet,
        )
        manifest = built.manifest
        onnx_path.unlink()
    write_text(manifest_path(output), manifest.to_json())
    return manifest


def _write_serving_onnx(model: Path, output: Path) -> Manifest:
    """The serving form of an artefact, its manifest in its metadata; a file that has that form already stays as it is."""
    artefact = read_onnx(model)
    source = artefact.manifest
    if "serving" in source.options:
        shutil.copyfile(model, output)
        return source.with_artefact(output)
    serving = serving_form(artefact.model)
    compared = check_serving_form(artefact.model, serving, source.precision)
    note = {
        "thresholds": "one of each for every image",
        "onnx_sha256": artefact.sha256,
        "equal_detections": compared,
    }
    manifest = replace(
        source,
        options=source.options | {"serving": note},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity={**source.parity, "compared": "the ONNX artefact that this was made from"}
        if source.parity
        else {},
        self_test={},  # its stored answer is to one threshold for all
    )
    save_onnx(serving, manifest, output)
    return manifest.with_artefact(output)
