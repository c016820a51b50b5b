"""Check, before the long work, all that the end of an export needs.

Comes in: an `ExportConfig`. Goes out: nothing, or one error. Takes about two seconds, imports no
PyTorch and writes nothing. What only the loaded checkpoint can tell, `run_export` checks then.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tood_deploy.data.images import (
    ImagesToCheck,
    check_images,
    choose_images,
    image_paths,
    left_out_note,
)
from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.errors import ArtefactError, CheckpointError, DeviceError, OutputError, ToodError
from tood_deploy.export.config import ExportConfig, PrecisionOptions
from tood_deploy.export.options import flag_of
from tood_deploy.export.tensorrt.options import EngineOptions, SizeOptions, int8_notes
from tood_deploy.files import check_overwrites, check_writable, home_folder
from tood_deploy.graph_io import (
    ARTEFACT_SUFFIXES,
    OPENVINO_SUFFIX,
    OPENVINO_WEIGHTS_SUFFIX,
    TARGET_SUFFIXES,
    TORCH_SUFFIX,
)
from tood_deploy.manifest import Manifest, manifest_path, neighbour
from tood_deploy.manifest_sections import HalfBuild, Int8Build
from tood_deploy.onnx_file import OnnxArtefact, read_onnx
from tood_deploy.preprocess import check_imgsz
from tood_deploy.presets import MAX_CANDIDATES, PRESETS, get_preset, published_weights

if TYPE_CHECKING:
    from tood_deploy.export.export import AnnotatedImages

MAX_VERIFY_IMAGES = 16
ELSEWHERE = "choose another --output"
# Copies of the float32 weights that lie in the output's folder at a time.
COPIES = {"onnx": 1, "openvino": 1, "engine": 2, "triton": 2, "torch": 1}

MIB = 2**20
SPARE_BYTES = 64 * MIB  # beside the artefacts themselves
PUBLISHED_BYTES = 256 * MIB  # of the largest weights that a preset's name stands for


def check_artefact(output: Path, suffixes: Collection[str], alternative: str) -> None:
    """Refuse a name of another kind, and a place that holds something else.

    Args:
        output: the artefact's file.
        suffixes: that its name may end in.
        alternative: word to tell it from a neighbour by, for the message.

    Raises:
        ToodError: another ending, or a neighbour of the same manifest.
        OutputError: a folder, or files beside it that are not of tood-export.
    """
    if output.suffix.lower() not in suffixes:
        raise ToodError(f"output is {output}; expected a name ending in {' or '.join(suffixes)}")
    if output.is_dir():
        raise OutputError(
            f"{output}: is a folder; expected a file that may be written: give another --output"
        )
    manifest = manifest_path(output)
    if other := neighbour(output):
        raise ToodError(
            f"{output}: its manifest {manifest.name} would replace that of {other.name}; "
            f"give another --output, such as {output.with_stem(f'{output.stem}-{alternative}')}"
        )
    if manifest.exists() and not _is_manifest(manifest):
        raise OutputError(
            f"{manifest}: is no manifest of tood-export, and would be replaced by one; "
            "give another --output"
        )
    if (
        output.suffix.lower() == OPENVINO_SUFFIX
        and (weights := output.with_suffix(OPENVINO_WEIGHTS_SUFFIX)).exists()
        and not output.exists()
    ):
        raise OutputError(
            f"{weights}: belongs to no {OPENVINO_SUFFIX}, and would be replaced; "
            "give another --output"
        )


def _is_manifest(path: Path) -> bool:
    """Tell by its keys; one of another version may be replaced too."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "preset"} <= content.keys()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a disk that is too full.

    Args:
        folder: exists.
        needed_bytes: of all files of the export that are there at a time; an estimate.

    Raises:
        OutputError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + SPARE_BYTES:
        raise OutputError(
            f"{folder}: {free // MIB} MiB are free, and this export needs about "
            f"{(needed_bytes + SPARE_BYTES) // MIB}; make room, or give an --output on another disk"
        )


def check_export(config: ExportConfig, annotated: AnnotatedImages | None = None) -> list[str]:
    """Refuse what would fail later.

    Args:
        config: whose options go together, as `check_rules` finds.
        annotated: the images of its annotations.

    Returns:
        What is not wrong, but should be known, a sentence each.

    Raises:
        ToodError: something is missing or wrong; one line names it and the cure.
    """
    _check_numbers(config, annotated)
    source = _check_source(config, annotated)
    _check_precision(config, source)
    _check_output(config, source)
    _check_device(config)
    if config.precision.autotune or config.precision.precision in ("int8", "auto"):
        # Where a calibration will keep what it has measured.
        check_writable(home_folder("calibration"), "name another folder in TOOD_HOME")
    folders = filter(None, (config.precision.calib_data, config.verify_images))
    notes = [note for folder in folders if (note := left_out_note(folder))]
    check_images(list(_image_sets(config, annotated)))
    precision = source.precision if source else config.precision.precision
    if config.to == "engine" and "int8" in str(precision):
        notes += int8_notes(load_flavour(config.flavour))
    return notes


def _check_numbers(config: ExportConfig, annotated: AnnotatedImages | None) -> None:
    """Refuse values that no export can have."""
    options = config.checkpoint
    if options.imgsz is not None:
        check_imgsz(options.imgsz)
    if options.max_det is not None and not 1 <= options.max_det <= MAX_CANDIDATES:
        raise ToodError(f"max_det is {options.max_det}; expected 1 to {MAX_CANDIDATES}")
    if isinstance(preset := options.load.get("preset"), str):
        get_preset(preset)
    if annotated is not None and (names := options.load.get("class_names")):
        annotated.check_classes(names)


def needs_gather(config: ExportConfig) -> bool:
    """Tell whether the target lacks ONNX's operator for deformable convolutions."""
    return bool(_lacks_deform_op(config))


def _lacks_deform_op(config: ExportConfig) -> str:
    """Return the target's name if it has no operator for deformable convolutions, else ""."""
    if config.to == "openvino":
        return "OpenVINO"
    if config.to == "engine" and load_flavour(config.flavour).name == "tensorrt_rtx":
        return "TensorRT-RTX"
    return ""


def check_deform(name: str, deform: str, config: ExportConfig) -> None:
    """Refuse deformable convolutions in a form that the target lacks.

    Args:
        name: of the source.
        deform: "op", "gather", or "none" for a network without any.
        config: with the target.

    Raises:
        ToodError: the target has no such operator.
    """
    if deform == "op" and (lacking := _lacks_deform_op(config)):
        cure = (
            "export the checkpoint again with --deform gather"
            if config.from_onnx
            else "leave --deform out"
        )
        raise ToodError(
            f"{name}: holds deformable convolutions as an operator, which {lacking} lacks; {cure}"
        )


def _check_source(config: ExportConfig, annotated: AnnotatedImages | None) -> Manifest | None:
    """Look at the source; return what it says of itself, None where it is a checkpoint."""
    path = Path(config.source)
    if config.from_engine:
        from tood_deploy.export.triton.fit import choose_backend, read_engine_manifest

        if config.to != "triton":
            raise ToodError(
                f"{path} is an engine, which can be served and not exported; "
                "give --to triton, or the .onnx it was built from"
            )
        choose_backend(path, config.triton)
        return read_engine_manifest(path)
    if config.from_onnx:
        artefact = read_onnx(path)
        _check_given_onnx(config, artefact.manifest)
        if annotated is not None:
            annotated.check_classes(artefact.manifest.preset.class_names)
        _check_kept(config, artefact)
        return artefact.manifest
    _check_checkpoint(config.source)
    return None


def _check_checkpoint(source: str) -> None:
    """Refuse what is no checkpoint that can be read, and a preset without published weights."""
    path = Path(source)
    if not path.exists() and source in PRESETS:
        published_weights(PRESETS[source])
        return
    if path.suffix.lower() in ARTEFACT_SUFFIXES:
        kind = "PyTorch" if path.suffix.lower() == TORCH_SUFFIX else "OpenVINO"
        raise ToodError(
            f"{path}: an artefact for {kind} cannot be exported further; "
            "give the .onnx or the checkpoint it was made from"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; expected a checkpoint (.pth, .pt or .safetensors), an .onnx, "
            "or a preset's name"
        )
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); expected a checkpoint that you may read"
        ) from error
    if empty:
        raise CheckpointError(
            f"{path}: is an empty file; expected a checkpoint: copy or download it again"
        )


def _check_given_onnx(config: ExportConfig, manifest: Manifest) -> None:
    """Refuse an .onnx that cannot become what is asked for."""
    path, changes = Path(config.source), config.precision.changes_graph
    if config.to == "torch":
        raise ToodError(
            f"{path} is an .onnx, and --to torch starts from the network; give the checkpoint that "
            "it was made from"
        )
    if manifest.precision != "fp32" and changes:
        raise ToodError(
            f"{path} is in {manifest.precision} already; leave --precision out, or start from the "
            "float32 .onnx"
        )
    if config.to == "onnx" and not changes:
        raise ToodError(
            f"{path} is an .onnx already; give --precision or --to openvino, engine or triton"
        )
    if manifest.build.serving and (changes or config.to == "openvino"):
        raise ArtefactError(
            f"{path}: has the form that Triton serves, with thresholds for every image; "
            "start from what it was made from"
        )
    has_zero_points = manifest.precision == "int8" and manifest.build.int8_scheme.startswith("u8")
    if config.builds_engine and has_zero_points:
        raise ToodError(
            f"{path}: its 8-bit numbers have zero points, as CPUs want them and TensorRT does not; "
            "quantise the float32 .onnx with --to engine"
        )
    check_deform(str(path), manifest.build.deform or "none", config)


def _check_kept(config: ExportConfig, artefact: OnnxArtefact) -> None:
    """Refuse patterns of what stays float32 that fit nothing in a given graph."""
    precision = config.precision
    if not precision.keep_fp32 or not precision.changes_graph:
        return
    import onnx_ir as ir

    from tood_deploy.export.precision.half import check_patterns
    from tood_deploy.export.precision.quantize import choose_layers

    graph = ir.from_proto(artefact.model).graph
    if precision.precision == "int8":
        choose_layers(graph, precision.keep_fp32)
    else:
        check_patterns(graph, precision.keep_fp32)


def _check_precision(config: ExportConfig, source: Manifest | None) -> None:
    """Refuse a precision that the target does not compute in."""
    precision = config.precision
    if config.to == "openvino":
        _check_openvino_precision(config, source)
    if precision.target_cpu != "native":
        return
    from tood_deploy.engines.precision_support import (
        saturates_in_onnxruntime,
        saturates_in_openvino,
    )

    if saturates_in_openvino() if config.to == "openvino" else saturates_in_onnxruntime():
        flag = flag_of(PrecisionOptions, "target_cpu")
        raise DeviceError(
            f"{flag} native: this CPU has no VNNI instructions, and sums of 8-bit products "
            "saturate on it, so the artefact could not be verified here; "
            f"leave {flag} out, or export on a CPU like the one that it is for"
        )


def _check_openvino_precision(config: ExportConfig, source: Manifest | None) -> None:
    """Refuse fp16, and bf16 where this CPU lacks it."""
    from tood_deploy.engines import openvino_runtime
    from tood_deploy.engines.precision_support import half_precision_of

    asked = {config.precision.precision, config.precision.fallback}
    if source is not None and config.from_onnx:
        asked.add(half_precision_of(source))
    if "fp16" in asked:
        raise ToodError(
            "OpenVINO on CPUs computes in fp32, bf16 and int8; "
            "give --precision bf16, or another --to"
        )
    if "bf16" in asked:
        openvino_runtime.check_precision(openvino_runtime.shared_core(), "bf16")


def _check_output(config: ExportConfig, source: Manifest | None) -> None:
    """Refuse a place that cannot be written, is too small, or is taken."""
    place = config.place
    if config.to == "triton":
        _check_repository(config, source)
        folder = place
    else:
        check_artefact(place, TARGET_SUFFIXES[config.to], config.to)
        folder = place.parent
    if (plot := config.sizes.shapes_plot) is not None:
        _check_plot(plot)
    read = [Path(config.source), Path(f"{config.source}.data")]
    read += [] if config.precision.annotations is None else [config.precision.annotations]
    for images in (config.precision.calib_data, config.verify_images, config.images):
        read += [] if images is None else image_paths(images)
    check_overwrites({"an input of this export": read}, written_files(config))
    check_space(check_writable(folder, ELSEWHERE), COPIES[config.to] * _weights_bytes(config))


def written_files(config: ExportConfig) -> dict[str, list[Path]]:
    """Return the files that an export writes, by option; not those in a Triton repository."""
    place = config.place
    written = [] if config.to == "triton" else [place, manifest_path(place)]
    if place.suffix.lower() == OPENVINO_SUFFIX:
        written.append(place.with_suffix(OPENVINO_WEIGHTS_SUFFIX))
    plot, cache = config.sizes.shapes_plot, config.engine.timing_cache
    return {
        "--output": written,
        flag_of(SizeOptions, "shapes_plot"): [plot] if plot else [],
        flag_of(EngineOptions, "timing_cache"): [cache] if cache else [],
    }


def _weights_bytes(config: ExportConfig) -> int:
    """Return the size of the source, which holds the weights in float32 or more beside them."""
    path = Path(config.source)
    return path.stat().st_size if path.is_file() else PUBLISHED_BYTES


def _check_repository(config: ExportConfig, source: Manifest | None) -> None:
    """Refuse a model that cannot be served as asked, and a repository or name that is taken."""
    from tood_deploy.export.triton.fit import (
        check_batches,
        check_precision,
        choose_backend,
        plan_serving,
    )
    from tood_deploy.export.triton.folder import read_present

    path, options = Path(config.source), config.served_as
    backend = choose_backend(path, options)
    if source is not None:
        profiles = None if config.from_engine else config.sizes.profiles(source.preset.imgsz)
        plan_serving(path, _as_converted(config, source), config.place, options, profiles)
        return
    # Which network it is does not count: what is served is in the precision asked for.
    converted = _as_converted(config, Manifest(PRESETS["tiny"]))
    check_precision(path.name, converted, backend, options)
    check_batches(config.sizes.batches, options)
    read_present(config.place, options.name)


def _as_converted(config: ExportConfig, source: Manifest) -> Manifest:
    """Return a manifest that states the precision as that of the finished artefact will."""
    precision = config.precision
    if not precision.changes_graph:
        return source
    half = source.build.half
    if precision.fallback not in (None, "fp32"):
        half = HalfBuild(str(precision.fallback))
    build = replace(source.build, int8=Int8Build(config.int8_scheme), half=half)
    return replace(source, precision=precision.precision, build=build)


def _check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn or written."""
    from tood_deploy.export.tensorrt.shapes import PLOT_SUFFIXES

    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ToodError(f"plot is {path}; expected a name ending in {', '.join(PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise DeviceError("a plot needs matplotlib; pip install matplotlib")
    if path.is_dir():
        raise ToodError(f"plot is {path}, a folder; expected the name of a file")
    check_writable(path.parent, f"give another {flag_of(SizeOptions, 'shapes_plot')}")


def _check_device(config: ExportConfig) -> None:
    """Refuse what this machine cannot build: no library, no GPU, no such option."""
    if config.to == "openvino":
        from tood_deploy.engines.openvino_runtime import load_openvino

        load_openvino()
    if config.builds_engine:
        _check_builder(config)


def _check_builder(config: ExportConfig) -> None:
    """Refuse what TensorRT cannot build here."""
    from tood_deploy.export.tensorrt.build import check_capabilities
    from tood_deploy.export.tensorrt.to_tensorrt import check_gpu_here
    from tood_deploy.export.triton.fit import SERVED_FLAVOUR

    library = load_flavour(config.flavour if config.to == "engine" else SERVED_FLAVOUR)
    config.engine.check(library)
    check_capabilities(library, config.engine.compute_capabilities)
    if library.name == "tensorrt_rtx" and not config.engine.compute_capabilities:
        check_gpu_here(library)
    # TensorRT builds on the GPU that it builds for; a search measures there.
    if library.name == "tensorrt" or config.precision.autotune:
        from tood_deploy.engines.tensorrt.cuda import check_driver

        check_driver()
    if (cache := config.engine.timing_cache) is not None:
        flag = flag_of(EngineOptions, "timing_cache")
        if cache.exists() and not cache.is_file():
            raise ToodError(f"{cache}: is no file; give another {flag}")
        check_writable(cache.parent, f"give another {flag}")


def _image_sets(config: ExportConfig, annotated: AnnotatedImages | None) -> Iterator[ImagesToCheck]:
    """Yield the images that the export will read, by the option that names them.

    Raises:
        InputError: a folder does not exist or holds none.
    """
    precision = config.precision
    if precision.calib_data is not None:
        flag = flag_of(PrecisionOptions, "calib_data")
        yield ImagesToCheck(flag, choose_images(precision.calib_data, precision.calib_images))
    if config.verify_images is not None:
        flag = flag_of(ExportConfig, "verify_images")
        yield ImagesToCheck(flag, image_paths(config.verify_images, MAX_VERIFY_IMAGES))
    if annotated is not None:
        yield annotated.images
    if config.sizes.shapes == "auto":
        assert config.images is not None  # a rule of the options
        yield ImagesToCheck(
            flag_of(ExportConfig, "images"), image_paths(config.images), decode=None
        )
