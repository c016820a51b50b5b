"""Make a .pt2 artefact: the network with pre- and post-processing as a `torch.export` program.

Comes in: a network. Goes out: the file and its manifest, compared with the network, both or none.
PyTorch's tracer takes a minute and looks at no weight, so what it makes of a configuration is kept
beside the ONNX graphs (`graph_cache`), and weights are filled in here.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tood_deploy.engines.self_test import self_test_from
from tood_deploy.engines.torch_program import (
    MANIFEST,
    MODEL,
    SCALAR_TYPES,
    TENSORS,
    Program,
    read_program,
)
from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export.config import ExportConfig
from tood_deploy.export.graph import inner_values
from tood_deploy.export.graph_cache import Say, describe
from tood_deploy.export.precision.convert import images_to_verify
from tood_deploy.export.result import ExportResult, timed
from tood_deploy.export.to_onnx import example_inputs, quiet_exporter
from tood_deploy.files import atomic_path, atomic_paths, home_folder
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS, TORCH_SUFFIX, program_outputs
from tood_deploy.manifest import METADATA_KEY, Manifest, manifest_path
from tood_deploy.manifest_sections import Build
from tood_deploy.model.detector import DenseDetector
from tood_deploy.model.postprocess import Candidates
from tood_deploy.model.static_detector import StaticDetector, finish_exactly
from tood_deploy.parity.reference import Outputs
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.parity.torch_reference import torch_reference
from tood_deploy.parity.verify import verify_detections, verify_float32
from tood_deploy.presets import MAX_CANDIDATES
from tood_deploy.reporter import Reporter

FOLDER = "model"  # that all parts of the archive lie in
# What PyTorch notes on every node: paths of this machine.
NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
NUMBERS = {dtype: number for number, dtype in SCALAR_TYPES.items()}

Parts = dict[str, bytes]


class ProgramModule(nn.Module):
    """What is traced: a `StaticDetector` whose results stand in a row, as `program_outputs`."""

    def __init__(self, model: DenseDetector, precision: str, max_det: int) -> None:
        super().__init__()
        self.detector = StaticDetector(model, precision, max_det)

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what `program_outputs` names; arguments as of `StaticDetector.forward`."""
        result = self.detector(images, valid_hw, score_threshold, iou_threshold)
        return (*result.detections, result.exact, *inner_values(result.stages))

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and buffers by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class ProgramRunner:
    """A .pt2 program in PyTorch on the CPU, with its maps; a `Runner`."""

    def __init__(self, program: Program) -> None:
        """Take a program whose weights are on the CPU."""
        self._program, manifest = program, program.manifest
        self._names = program_outputs(manifest.preset)
        self.name = f"PyTorch {torch.__version__}, .pt2, {manifest.precision}, CPU"

    @torch.no_grad()
    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """Run a batch; see `Runner`."""
        arrays = (torch.from_numpy(array) for array in (images, valid_hw))
        values = self._program.run_stages(
            *arrays, torch.tensor(score_threshold), torch.tensor(iou_threshold)
        )
        named = dict(zip(self._names, values, strict=True))
        detections = [named[name] for name in OUTPUTS]
        if not named["exact"].all():
            manifest = self._program.manifest
            candidates = Candidates(*values[len(OUTPUTS) + 1 + len(MAP_NAMES) :][:3])
            detections = finish_exactly(
                candidates, iou_threshold, manifest.max_det, voting=manifest.preset.score_voting
            )
        maps = [named[name].float() for name in MAP_NAMES]
        return [tensor.numpy() for tensor in (*detections, *maps)]


def export_torch(
    model: DenseDetector,
    output: Path,
    *,
    precision: str = "fp32",
    max_det: int | None = None,
    calib_data: Path | None = None,
    verify_images: Sequence[NDArray[np.uint8]] = (),
    reporter: Reporter | None = None,
) -> Manifest:
    """Write a network as a .pt2 artefact and its manifest, after comparing it with the network.

    Args:
        model: as `load_checkpoint` gives it.
        output: a .pt2 file; what is there already is replaced.
        precision: of convolutions and group norms: "fp32", "bf16" or "fp16".
        max_det: rows D of the outputs; the preset's where not given.
        calib_data: a folder of images like those to come, to verify half precision on.
        verify_images: (H, W, 3) uint8 BGR, to verify on as well.
        reporter: of every step.

    Raises:
        ToodError: an argument out of range, or a place that cannot be written.
        CheckFailed: the artefact deviates from PyTorch; nothing is left behind.
    """
    reporter = reporter or Reporter.silent()
    max_det = model.preset.max_det if max_det is None else max_det
    if output.suffix.lower() != TORCH_SUFFIX:
        raise ToodError(f"output is {output}; expected a name ending in {TORCH_SUFFIX}")
    if not 1 <= max_det <= MAX_CANDIDATES:
        raise ToodError(f"max_det is {max_det}; expected 1 to {MAX_CANDIDATES}")
    manifest = Manifest(
        model.preset,
        precision=precision,
        max_det=max_det,
        checkpoint_sha256=model.checkpoint_sha256,
        build=Build(format="torch", deform="gather" if model.preset.is_deformable else "none"),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    module = ProgramModule(model, precision, max_det).eval()
    with timed("graph"):
        parts = _kept_or_new(module, manifest, reporter.info)
    with atomic_paths(output, manifest_path(output)) as (written, described):
        write_parts(_filled(parts, module, manifest), written)
        with timed("verify"):
            run = ProgramRunner(read_program(written, torch.device("cpu")))
            manifest = _proven(manifest, model, run, calib_data, verify_images, reporter)
        manifest = manifest.with_artefact(written)
        described.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def write_torch(
    config: ExportConfig,
    model: DenseDetector,
    images: Sequence[NDArray[np.uint8]],
    reporter: Reporter,
) -> ExportResult:
    """Carry out an export to PyTorch.

    Args:
        config: what is asked for.
        model: the network of its checkpoint.
        images: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        reporter: of every step.
    """
    manifest = export_torch(
        model,
        config.place,
        precision=config.precision.precision,
        max_det=config.checkpoint.max_det,
        calib_data=config.precision.calib_data,
        verify_images=images,
        reporter=reporter,
    )
    return ExportResult(config.place, manifest)


def _versions() -> dict[str, str]:
    from tood_deploy import __version__

    return {"tood_deploy": __version__, "torch": torch.__version__}


def _proven(
    manifest: Manifest,
    model: DenseDetector,
    run: ProgramRunner,
    calib_data: Path | None,
    images: Sequence[NDArray[np.uint8]],
    reporter: Reporter,
) -> Manifest:
    """Return the manifest with the verdict on the written program, and its self-test.

    Args:
        manifest: as yet without both.
        model: the network that it is compared with.
        run: the program as it was read back.
        calib_data, images: as `export_torch` takes them.
        reporter: of what is being compared.
    """
    reference = torch_reference(model, manifest.max_det)
    if manifest.precision == "fp32":
        parity = verify_float32(reference, run, images=images, reporter=reporter)
    else:
        parity = verify_detections(
            reference,
            run,
            images_to_verify(calib_data, images),
            DETECTION_LIMITS[manifest.precision],
            reporter=reporter,
        )
    reporter.info("making its self-test")
    self_test = self_test_from(reference.run)
    return replace(manifest, parity=parity, self_test=self_test)


def _kept_or_new(module: ProgramModule, manifest: Manifest, say: Say) -> Parts:
    """Return the parts of a program's archive, the weights empty, from an earlier export or new."""
    decides = describe(manifest.preset, "gather", manifest.max_det)
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    description = json.dumps(["torch", manifest.precision, own, decides])
    key = hashlib.sha256(description.encode()).hexdigest()[:32]
    path = home_folder("graphs") / f"{key}.torch.graph"
    with suppress(OSError, ValueError, zlib.error, zipfile.BadZipFile):
        checksum, packed = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(packed).hexdigest().encode() == checksum:
            say("filling the program that an earlier export made of this configuration")
            return _parts_of(zlib.decompress(packed))
    say("tracing the network; the first time of this configuration takes a minute or two")
    parts = trace(module)
    packed = zlib.compress(_zip(parts))
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(hashlib.sha256(packed).hexdigest().encode() + b"\n" + packed)
    except OutputError as error:
        say(f"the program is not kept ({error})")
    return parts


def trace(module: ProgramModule) -> Parts:
    """Return the parts of a program's archive; those of weights and buffers are left out.

    Batch, rows and columns are dynamic, as in the ONNX graph.
    """
    torch.compiler.reset()
    example, dynamic = example_inputs()
    with quiet_exporter(), torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
        for node in program.graph.nodes:
            for note in NOTES:
                node.meta.pop(note, None)
        program._example_inputs = None
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={METADATA_KEY: ""})
    parts = _parts_of(file.getvalue())
    known = module.tensors()
    for folder in TENSORS:
        for name, entry in _stated(parts, folder).items():
            if name in known:
                parts.pop(f"data/{folder}/{entry['path_name']}", None)
    return parts


def _stated(parts: Parts, folder: str) -> dict[str, Any]:
    """Return what an archive says of its weights or constants, by name."""
    return json.loads(parts[f"data/{folder}/model_{folder}_config.json"])["config"]


def _filled(parts: Parts, module: ProgramModule, manifest: Manifest) -> Parts:
    """Return an archive's parts with weights and manifest.

    Args:
        parts: as `trace` gave them.
        module: has the weights.
        manifest: as the file itself holds it.
    """
    filled, tensors = dict(parts), module.tensors()
    for folder in TENSORS:
        for name, entry in _stated(parts, folder).items():
            if name in tensors:
                _check_stated(name, tensors[name], entry["tensor_meta"])
                filled[f"data/{folder}/{entry['path_name']}"] = _stored_bytes(tensors[name])
    return filled | {MANIFEST: manifest.to_json().encode()}


def _check_stated(name: str, tensor: Tensor, meta: Mapping[str, Any]) -> None:
    sizes, strides = ([one["as_int"] for one in meta[key]] for key in ("sizes", "strides"))
    stated = [*sizes], [*strides], meta["dtype"]
    own = [*tensor.shape], [*tensor.stride()], NUMBERS[tensor.dtype]
    if stated != own:
        raise AssertionError(f"{name} is {own}; expected {stated}")


def _stored_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor in the order that they lie in memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _parts_of(archive: bytes) -> Parts:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {info.filename.partition("/")[2]: opened.read(info) for info in opened.infolist()}


def _zip(parts: Parts) -> bytes:
    file = io.BytesIO()
    _write(parts, file)
    return file.getvalue()


def write_parts(parts: Parts, path: Path) -> None:
    """Write an archive that PyTorch, too, can read.

    Raises:
        OutputError: the place cannot be written.
    """
    assert MODEL in parts
    try:
        with path.open("wb") as file:
            _write(parts, file)
    except OSError as error:
        raise OutputError(
            f"{path.name}: cannot be written ({error.strerror}); make room, or choose another "
            "--output"
        ) from error


def _write(parts: Parts, file: Any) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            # Without the time of day, so that the same network gives the same file.
            archive.writestr(zipfile.ZipInfo(f"{FOLDER}/{name}"), content)
