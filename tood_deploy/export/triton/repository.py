"""Add a model to a Triton model repository, ready to be served (docs/serving.md).

Comes in: an artefact or an engine, and how it is served. Goes out: the model's folder, whole or not
at all. The graph that is served has thresholds for every image, and is compared to the bit with the
one that it is made from. Knows nothing of checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import CheckFailed
from tood_deploy.export.precision.half import emulate_low_precision
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.export.triton.config import (
    LABELS_FILE,
    MODEL_FILES,
    WARM_UP_FOLDER,
    config_text,
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
from tood_deploy.export.triton.folder import CONFIG_FILE, FIRST_VERSION, new_model_folder
from tood_deploy.export.triton.options import Backend, TritonOptions
from tood_deploy.files import no_empty_folder, write_text
from tood_deploy.graph_io import INPUTS, ONNX_SUFFIX, OUTPUTS
from tood_deploy.manifest import Manifest, manifest_path
from tood_deploy.manifest_sections import Serving
from tood_deploy.onnx_file import (
    OnnxArtefact,
    artefact_in_memory,
    open_session,
    read_onnx,
    write_onnx,
)
from tood_deploy.reporter import Reporter

SCORE, IOU = INPUTS[2:]
CHECK_HW, CHECK_VALID_HW = (96, 160), (90, 150)


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
        """Return the model's file."""
        return self.folder / str(self.version) / MODEL_FILES[self.backend]


def triton_repository(
    model: Path | OnnxArtefact,
    repository: Path,
    options: TritonOptions | None = None,
    *,
    profiles: Profiles | None = None,
    engine_options: EngineOptions | None = None,
    reporter: Reporter | None = None,
) -> ServedModel:
    """Add a model to a repository: its first version, or the next where the model is there already.

    Args:
        model: an .onnx artefact or its file; or the file of an engine that was built from the
            model.onnx of such a repository.
        repository: the folder that holds the models of a server; made where it does not exist.
        options: how it is served.
        profiles: the largest batch, and the padded sizes to warm up, which a plan is built for;
            landscape and portrait of the model's own size, batches of up to 8 where not given. An
            engine has its own.
        engine_options: of the builder, where a plan is built.
        reporter: of a build's progress.

    Raises:
        ToodError: an option that does not fit, not such a model, a place that is something else, no
            TensorRT where it is asked for.
        CheckFailed: the form of the graph that is served deviates from the artefact; nothing is
            left behind.
    """
    path = model if isinstance(model, Path) else model.path
    options = options or TritonOptions()
    options = replace(options, name=options.name or path.stem)
    choose_backend(path, options)  # first, as only a file that it runs can be read
    if isinstance(model, Path) and not is_engine(model):
        model = read_onnx(model)
    source = read_engine_manifest(model) if isinstance(model, Path) else model.manifest
    plan = plan_serving(path, source, repository, options, profiles)
    backend, profiles = plan.backend, plan.profiles
    folder = repository / options.name
    with no_empty_folder(repository), new_model_folder(folder, plan.version) as new_folder:
        file = new_folder / FIRST_VERSION / MODEL_FILES[backend]
        manifest = _write_model(model, file, profiles, engine_options, reporter)
        (new_folder / LABELS_FILE).write_text(
            "\n".join([*manifest.preset.class_names, ""]), encoding="utf-8"
        )
        if options.warm_up_batches:
            write_warm_up(new_folder / WARM_UP_FOLDER, profiles.shapes_hw)
        (new_folder / CONFIG_FILE).write_text(
            config_text(triton_config(manifest, backend, options, profiles)), encoding="utf-8"
        )
    return ServedModel(folder, plan.version, backend, manifest, profiles)


def _write_model(
    model: Path | OnnxArtefact,
    output: Path,
    profiles: Profiles,
    engine_options: EngineOptions | None,
    reporter: Reporter | None,
) -> Manifest:
    """Write the model's file and its manifest; an .onnx artefact for TensorRT is built.

    Args:
        model: an artefact, or the file of an engine.
        output: the model's file in the repository; its ending says what runs it.
        profiles: that an engine is built for.
        engine_options: of the builder.
        reporter: of a build's progress.
    """
    if isinstance(model, Path):
        shutil.copyfile(model, output)
        manifest = read_engine_manifest(model)
        write_text(manifest_path(output), manifest.to_json())
        return manifest
    serving = _serving_artefact(model)
    if output.suffix == ONNX_SUFFIX:
        return write_onnx(serving, output)
    return engine_from_onnx(
        serving,
        output,
        profiles=profiles,
        options=engine_options,
        flavour=SERVED_FLAVOUR,
        reporter=reporter,
    ).manifest


def _serving_artefact(artefact: OnnxArtefact) -> OnnxArtefact:
    """Return the serving form of an artefact; one that has that form already as it is."""
    source = artefact.manifest
    if source.build.serving:
        return artefact
    serving = serving_form(artefact.model)
    compared = check_serving_form(artefact.model, serving, source.precision)
    made_from = "the ONNX artefact that this was made from"
    manifest = replace(
        source,
        build=replace(source.build, serving=Serving(artefact.sha256, compared)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity=replace(source.parity, compared=made_from) if source.parity else None,
        self_test=None,  # its stored answer is to one threshold for all
    )
    return artefact_in_memory(artefact.path, serving, manifest)


# (B, 1, 1), to be compared with the overlap of each two boxes of an image.
PAIRS = f"{IOU}_of_pairs"
CHECK_THRESHOLDS = ((0.05, 0.6), (0.2, 0.3), (0.0, 0.9))  # of one image each


def serving_form(shipped: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a shipped graph whose `score_threshold` and `iou_threshold` are (B, 1)."""
    model = onnx.ModelProto()
    model.CopyFrom(shipped)
    inputs = {value.name: value for value in model.graph.input}
    batch = inputs["images"].type.tensor_type.shape.dim[0]
    for name in (SCORE, IOU):
        shape = inputs[name].type.tensor_type.shape
        shape.dim.add().CopyFrom(batch)
        shape.dim.add().dim_value = 1
    for node in _nodes(model.graph):
        for i, name in enumerate(node.input):
            if name == IOU:
                node.input[i] = PAIRS
    axis = onnx.numpy_helper.from_array(np.array([2], np.int64), f"{PAIRS}_axis")
    model.graph.initializer.append(axis)
    model.graph.node.insert(
        0, onnx.helper.make_node("Unsqueeze", [IOU, axis.name], [PAIRS], name=f"node_{PAIRS}")
    )
    return model


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, those in the bodies of loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def check_serving_form(shipped: onnx.ModelProto, serving: onnx.ModelProto, precision: str) -> int:
    """Run both in ONNX Runtime on a batch whose images have different thresholds.

    Args:
        shipped: the graph with one threshold for all.
        serving: its serving form.
        precision: of both. ONNX Runtime lacks bf16 on the CPU, so such graphs are emulated.

    Returns:
        How many detections were compared.

    Raises:
        CheckFailed: the detections of an image are not, to the bit, those that the shipped graph
            gives with its thresholds.
    """
    height, width = CHECK_VALID_HW
    images = np.zeros((len(CHECK_THRESHOLDS), *CHECK_HW, 3), np.uint8)
    images[:, :height, :width] = [
        synthetic_image(height, width, seed) for seed in range(len(images))
    ]
    feeds = {"images": images, "valid_hw": np.array([CHECK_VALID_HW] * len(images), np.int32)}
    scores, ious = np.array(CHECK_THRESHOLDS, np.float32).T[:, :, None]
    served = _run(serving, precision, [feeds | {SCORE: scores, IOU: ious}])[0]
    one_each = [
        feeds | {SCORE: np.array(score, np.float32), IOU: np.array(iou, np.float32)}
        for score, iou in CHECK_THRESHOLDS
    ]
    for i, expected in enumerate(_run(shipped, precision, one_each)):
        if not all(
            np.array_equal(one[i], other[i]) for one, other in zip(expected, served, strict=True)
        ):
            raise CheckFailed(
                "the serving form does not give what the graph gives with the thresholds "
                f"{CHECK_THRESHOLDS[i]}"
            )
    return int(served[0].sum())


def _run(
    model: onnx.ModelProto, precision: str, feeds: list[dict[str, NDArray]]
) -> list[list[NDArray]]:
    runnable = emulate_low_precision(model) if precision == "bf16" else model
    session = open_session(runnable.SerializeToString())
    outputs: Any = [session.run(list(OUTPUTS), feed) for feed in feeds]
    return outputs
