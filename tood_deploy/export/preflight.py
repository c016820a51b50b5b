"""Asks for everything that the end of an export needs before its beginning: within two seconds, without PyTorch, writing nothing.

What a checkpoint alone can tell is not known here yet; `carry_out` asks for that once it is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from tood_deploy.data.images import ImagesToCheck, check_images, choose_images, image_paths
from tood_deploy.engines import openvino_runtime as openvino_model
from tood_deploy.engines.precision_support import (
    half_precision_of,
    saturates_in_onnxruntime,
    saturates_in_openvino,
)
from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.errors import ArtefactError, CheckpointError, DeviceError, OutputError, ToodError
from tood_deploy.export.config import SUFFIXES, Order
from tood_deploy.export.tensorrt.build import known_capabilities
from tood_deploy.export.tensorrt.shapes import PLOT_SUFFIXES
from tood_deploy.export.triton.fit import (
    SERVED_FLAVOUR,
    check_batches,
    check_precision,
    choose_backend,
    plan_serving,
    read_engine_manifest,
)
from tood_deploy.export.triton.folder import read_present
from tood_deploy.files import home_folder
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.manifest import Manifest, manifest_path, neighbour
from tood_deploy.manifest_sections import HalfBuild, Int8Build
from tood_deploy.onnx_file import read_onnx
from tood_deploy.preprocess import check_imgsz
from tood_deploy.presets import MAX_CANDIDATES, PRESETS, SIZE_DIVISOR, get_preset

MIB = 2**20
SPARE_BYTES = 64 * MIB  # beside the artefacts themselves


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
            f"{manifest}: is no manifest of tood-export, and would be replaced by one; give another --output"
        )
    if (
        output.suffix.lower() == ".xml"
        and output.with_suffix(".bin").exists()
        and not output.exists()
    ):
        raise OutputError(
            f"{output.with_suffix('.bin')}: belongs to no .xml, and would be replaced; give another --output"
        )


def _is_manifest(path: Path) -> bool:
    """Tell by its keys; one of another version may be replaced too."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "preset"} <= content.keys()


def check_inputs_stay(written: Collection[Path], inputs: Collection[Path]) -> None:
    """Refuse to write over what is read, and two results into one file.

    Raises:
        OutputError: a file stands on both sides, or twice among those that are written.
    """
    read = {path.resolve() for path in inputs}
    places: set[Path] = set()
    for path in written:
        place = path.resolve()
        if place in read:
            raise OutputError(
                f"{path}: is an input of this export, and would be replaced by its result; give another name"
            )
        if place in places:
            raise OutputError(
                f"{path}: two results of this export would be written there; give each a name of its own"
            )
        places.add(place)


def check_writable(folder: Path, remedy: str) -> Path:
    """Refuse a folder that cannot be written, or made where it is not there yet.

    Args:
        folder: that files will come into.
        remedy: what to do about it, for the message.

    Returns:
        The folder itself, or the one that it will be made in.

    Raises:
        OutputError: it cannot.
    """
    present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not present.is_dir():
        raise OutputError(f"{folder}: cannot be written, as {present} is a file; {remedy}")
    try:
        with tempfile.TemporaryFile(dir=present):
            return present
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from error


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
            f"{folder}: {free // MIB} MiB are free, and this export needs about {(needed_bytes + SPARE_BYTES) // MIB}; "
            "make room, or give an --output on another disk"
        )


MOST_VERIFY_IMAGES = 16
ELSEWHERE = "choose another --output"
# How often the float32 weights lie in the output's folder at a time: the float32 .onnx first, then what is made from it.
COPIES = {"onnx": 1, "openvino": 2, "engine": 3, "triton": 2}
ANY_IMGSZ = (SIZE_DIVISOR, SIZE_DIVISOR)  # in place of a checkpoint's own
PUBLISHED_BYTES = 256 * MIB  # of the largest weights that a preset's name stands for


def check_order(order: Order) -> None:
    """Refuse an order that would fail later.

    Args:
        order: whose options go together, as `check_options` tells.

    Raises:
        ToodError: what is missing or wrong, in one line.
    """
    _check_numbers(order)
    source = _check_source(order)
    _check_precision(order, source)
    _check_output(order, source)
    _check_device(order, source)
    _check_folders(order)
    check_images(list(_image_sets(order)))


def check_deform(name: str, deform: str, order: Order) -> None:
    """Refuse deformable convolutions in a form that the target lacks.

    Args:
        name: of the source.
        deform: "op", "gather", or "none" for a network without any.
        order: with the target.

    Raises:
        ToodError: the target has no such operator.
    """
    if deform != "op":
        return
    lacking = "OpenVINO" if order.to == "openvino" else None
    if order.to == "engine" and load_flavour(order.flavour).name == "tensorrt_rtx":
        lacking = "TensorRT-RTX"
    if lacking:
        cure = (
            "export the checkpoint again with --deform gather"
            if order.from_onnx
            else "leave --deform out"
        )
        raise ToodError(
            f"{name}: holds deformable convolutions as an operator, which {lacking} lacks; {cure}"
        )


def _check_numbers(order: Order) -> None:
    """Refuse values that no export can have."""
    order.sizes.without_proposal(ANY_IMGSZ)
    options, precision = order.checkpoint, order.precision
    if options.imgsz is not None:
        check_imgsz(options.imgsz)
    if options.max_det is not None and not 1 <= options.max_det <= MAX_CANDIDATES:
        raise ToodError(f"max_det is {options.max_det}; expected 1 to {MAX_CANDIDATES}")
    if isinstance(preset := options.load.get("preset"), str):
        get_preset(preset)
    if order.check_classes is not None and (names := options.load.get("class_names")):
        order.check_classes(names)
    if precision.max_drop is not None and not precision.max_drop >= 0:
        raise ToodError(f"the largest drop is {precision.max_drop}; expected 0 or more")


def _check_source(order: Order) -> Manifest | None:
    """Look at the source; return what it says of itself, None where it is a checkpoint."""
    path = Path(order.source)
    if order.from_engine:
        if order.to != "triton":
            raise ToodError(
                f"{path} is an engine, which can be served and not exported; give --to triton, or the .onnx it was built from"
            )
        choose_backend(path, order.triton)
        return read_engine_manifest(path)
    if order.from_onnx:
        manifest = read_onnx(path).manifest
        _check_given_onnx(order, manifest)
        return manifest
    if not path.exists() and order.source in PRESETS:
        return None
    if path.suffix.lower() in ARTEFACT_SUFFIXES:
        raise ToodError(
            f"{path}: an artefact for OpenVINO cannot be exported further; give the .onnx or the checkpoint it was made from"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; expected a checkpoint (.pth, .pt or .safetensors), an .onnx, or a preset's name"
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
    return None


def _check_given_onnx(order: Order, manifest: Manifest) -> None:
    """Refuse an .onnx from which the order does not lead on."""
    path, changes = Path(order.source), order.precision.changes_graph
    if manifest.precision != "fp32" and changes:
        raise ToodError(
            f"{path} is in {manifest.precision} already; leave --precision out, or start from the float32 .onnx"
        )
    if order.to == "onnx" and not changes:
        raise ToodError(
            f"{path} is an .onnx already; give --precision or --to openvino, engine or triton"
        )
    if manifest.build.serving and (changes or order.to == "openvino"):
        raise ArtefactError(
            f"{path}: has the form that Triton serves, with thresholds for every image; start from what it was made from"
        )
    if (
        order.builds_engine
        and manifest.precision == "int8"
        and manifest.build.int8_scheme.startswith("u8")
    ):
        raise ToodError(
            f"{path}: its 8-bit numbers have zero points, as CPUs want them and TensorRT does not; "
            "quantise the float32 .onnx with --to engine"
        )
    if order.check_classes is not None:
        order.check_classes(manifest.preset.class_names)
    check_deform(str(path), manifest.build.deform or "none", order)


def _check_precision(order: Order, source: Manifest | None) -> None:
    """Refuse a precision that the target does not compute in."""
    wanted = order.precision
    halves = {
        wanted.precision,
        wanted.rest,
        half_precision_of(source) if source and order.from_onnx else "",
    }
    if order.to == "openvino" and "fp16" in halves:
        raise ToodError(
            "OpenVINO on CPUs computes in fp32, bf16 and int8; give --precision bf16, or another --to"
        )
    if order.to == "openvino" and "bf16" in halves:
        openvino_model.check_precision(openvino_model.shared_core(), "bf16")
    if wanted.target_cpu == "native" and (
        saturates_in_openvino() if order.to == "openvino" else saturates_in_onnxruntime()
    ):
        raise DeviceError(
            "--target-cpu native: this CPU has no VNNI instructions, and sums of 8-bit products saturate on it, so the artefact could "
            "not be verified here; leave --target-cpu out, or export on a CPU like the one that it is for"
        )


def _check_output(order: Order, source: Manifest | None) -> None:
    """Refuse a place that cannot be written, is too small, or is taken."""
    if order.to == "triton":
        _check_repository(order, source)
        folder, written = order.output, []
    else:
        check_artefact(order.output, SUFFIXES[order.to], order.to)
        folder, written = order.output.parent, [order.output, manifest_path(order.output)]
    plot, cache = order.sizes.plot, order.engine.timing_cache
    if plot is not None:
        _check_plot(plot)
        written.append(plot)
    read = (Path(order.source), order.precision.annotations)
    check_inputs_stay(
        [*written, *([cache] if cache else [])], [path for path in read if path is not None]
    )
    present = check_writable(folder, ELSEWHERE)
    check_space(present, (COPIES[order.to] + order.precision.changes_graph) * _weights_bytes(order))


def _weights_bytes(order: Order) -> int:
    """Return the size of the source, which holds the weights in float32 or more beside them."""
    path = Path(order.source)
    return path.stat().st_size if path.is_file() else PUBLISHED_BYTES


def _check_repository(order: Order, source: Manifest | None) -> None:
    """Refuse a model that cannot be served as asked, and a repository or a name that is something else's."""
    path, options = Path(order.source), order.served_as
    backend = choose_backend(path, options)
    if source is not None:
        lowered = _as_ordered(order, source)
        profiles = None if order.from_engine else order.sizes.without_proposal(source.preset.imgsz)
        plan_serving(path, lowered, order.output, options, profiles)
        return
    yet_to_come = Manifest(
        PRESETS["tiny"]
    )  # which network it is does not count: what is served is in the precision asked for
    check_precision(path.name, _as_ordered(order, yet_to_come), backend, options)
    check_batches(order.sizes.batches, options)
    read_present(order.output, options.name)


def _as_ordered(order: Order, source: Manifest) -> Manifest:
    """Return a manifest that says of the precision what the finished artefact will say."""
    wanted = order.precision
    if not wanted.changes_graph:
        return source
    build = replace(
        source.build,
        int8=Int8Build("s8s8" if order.builds_engine else "u8s7"),
        half=source.build.half if wanted.rest == "fp32" else HalfBuild(wanted.rest),
    )
    return replace(source, precision=wanted.precision, build=build)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ToodError(f"plot is {path}; expected a name ending in {', '.join(PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise DeviceError("a plot needs matplotlib; pip install matplotlib")
    if path.is_dir():
        raise ToodError(f"plot is {path}, a folder; expected the name of a file")
    check_writable(path.parent, "give another --shapes-plot")


def _check_device(order: Order, source: Manifest | None) -> None:
    """Refuse what this machine cannot build: no library, no GPU, no such option."""
    if order.to == "openvino":
        openvino_model.load_openvino()
    if not order.builds_engine:
        return
    library = load_flavour(order.flavour if order.to == "engine" else SERVED_FLAVOUR)
    order.engine.check(library)
    capabilities = order.engine.compute_capabilities
    if capabilities and (
        unknown := [name for name in capabilities if name not in known_capabilities(library)]
    ):
        known = ", ".join(known_capabilities(library))
        raise ToodError(
            f"compute capability {', '.join(unknown)}: {library.title} builds for {known}"
        )
    if (
        library.name == "tensorrt" or order.precision.tuned
    ):  # it builds on the GPU that it builds for; a search measures there
        from tood_deploy.engines.tensorrt.cuda import check_driver

        check_driver()
    if (cache := order.engine.timing_cache) is not None:
        if cache.exists() and not cache.is_file():
            raise ToodError(f"{cache}: is no file; give another --timing-cache")
        check_writable(cache.parent, "give another --timing-cache")


def _check_folders(order: Order) -> None:
    """Refuse a cache that cannot be written where a calibration will want to keep what it has measured."""
    if order.precision.tuned or order.precision.precision == "int8":
        check_writable(home_folder("calibration"), "name another folder in TOOD_HOME")


def _image_sets(order: Order) -> Iterator[ImagesToCheck]:
    """Yield the images that the export will read, by the option that names them.

    Raises:
        InputError: a folder does not exist or holds none.
    """
    wanted = order.precision
    if wanted.calib_data is not None:
        yield ImagesToCheck("--calib-data", choose_images(wanted.calib_data, wanted.most_images))
    if order.verify_images is not None:
        yield ImagesToCheck("--verify-images", image_paths(order.verify_images, MOST_VERIFY_IMAGES))
    if wanted.annotated is not None:
        yield wanted.annotated
    if order.sizes.shapes == "auto":
        assert order.sizes.images is not None
        yield ImagesToCheck("--images", image_paths(order.sizes.images), decode=None)
