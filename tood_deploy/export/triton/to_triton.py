"""From an artefact to a model in a Triton model repository, ready to be served: docs/serving.md says how."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tood_deploy.export.onnx_artefact import read_onnx
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.profiles import Profiles
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.to_onnx import save_onnx
from tood_deploy.export.triton.config import LABELS_FILE, MODEL_FILES, WARM_UP_FOLDER, triton_config, write_warm_up
from tood_deploy.export.triton.fit import SERVED_FLAVOUR, choose_backend, is_engine, plan_serving, read_engine_manifest
from tood_deploy.export.triton.folder import CONFIG_FILE, FIRST_VERSION, new_model_folder
from tood_deploy.export.triton.options import Backend, TritonOptions
from tood_deploy.export.triton.schema import config_text
from tood_deploy.export.triton.serving_form import check_serving_form, serving_form
from tood_deploy.manifest import Manifest, manifest_path, write_text


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
        manifest = _write_model(model, made / FIRST_VERSION / MODEL_FILES[backend], profiles, engine_options, quiet)
        (made / LABELS_FILE).write_text("\n".join([*manifest.preset.class_names, ""]), encoding="utf-8")
        if options.warm_up_batches:
            write_warm_up(made / WARM_UP_FOLDER, profiles.shapes_hw)
        (made / CONFIG_FILE).write_text(config_text(triton_config(manifest, backend, options, profiles)), encoding="utf-8")
    return ServedModel(folder, plan.version, backend, manifest, profiles)


def _write_model(model: Path, output: Path, profiles: Profiles, engine_options: EngineOptions | None, quiet: bool) -> Manifest:
    """Writes the model's file and its manifest; an .onnx artefact for TensorRT is built."""
    if is_engine(model):
        shutil.copyfile(model, output)
        manifest = read_engine_manifest(model)
    elif output.suffix == ".onnx":
        manifest = _write_serving_onnx(model, output)
    else:
        onnx_path = output.parent.parent / "serving.onnx"
        _write_serving_onnx(model, onnx_path)
        built = engine_from_onnx(onnx_path, output, profiles=profiles, options=engine_options, flavour=SERVED_FLAVOUR, quiet=quiet)
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
    note = {"thresholds": "one of each for every picture", "onnx_sha256": artefact.sha256, "equal_detections": compared}
    manifest = replace(
        source,
        options=source.options | {"serving": note},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity={**source.parity, "compared": "the ONNX artefact that this was made from"} if source.parity else {},
        self_test={},  # its stored answer is to one threshold for all
    )
    save_onnx(serving, manifest, output)
    return manifest.with_artefact(output)
