"""The whole export: checkpoint in, verified artefact and its manifest out, or nothing at all."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from tood_deploy import __version__
from tood_deploy.errors import ToodError
from tood_deploy.export.graph import DeformForm
from tood_deploy.export.runners import OnnxRunner
from tood_deploy.export.self_test import self_test_from
from tood_deploy.export.to_onnx import OPSET, onnx_from_model, save_onnx
from tood_deploy.manifest import Manifest, atomic_path, manifest_path, write_text
from tood_deploy.model.tood import Tood
from tood_deploy.parity.reference import torch_reference
from tood_deploy.parity.verify import verify_float32
from tood_deploy.presets import MAX_CANDIDATES


def export_onnx(
    model: Tood,
    output: Path,
    *,
    deform: DeformForm = "op",
    max_det: int | None = None,
    verify_pictures: Sequence[NDArray[np.uint8]] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Writes `output` (.onnx) and the manifest beside it, after proving the former equal to the network.

    Args:
        model: the network, as `load_checkpoint` gives it.
        output: where to; an artefact that is there already is replaced in one step.
        deform: the form of deformable convolutions: ONNX's operator, or gathers for runtimes that lack it.
        max_det: rows D of the outputs; the preset's where not given.
        verify_pictures: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        say: told what goes on, a line each.

    Raises:
        ToodError: an argument out of range, or a place that cannot be written.
        CheckFailed: the artefact deviates from PyTorch; nothing is left behind.
    """
    if output.suffix.lower() != ".onnx":
        raise ToodError(f"output is {output}; expected a name ending in .onnx")
    max_det = model.preset.max_det if max_det is None else max_det
    if not 1 <= max_det <= MAX_CANDIDATES:
        raise ToodError(f"max_det is {max_det}; expected 1 to {MAX_CANDIDATES}")
    manifest = Manifest(
        model.preset,
        max_det=max_det,
        checkpoint_sha256=model.checkpoint_sha256,
        options={"format": "onnx", "opset": OPSET, "deform": deform if _is_deformable(model) else "none"},
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with atomic_path(output) as temporary:
        say("making the graph, which takes a minute or so")
        save_onnx(onnx_from_model(model, deform=deform, max_det=max_det), manifest, temporary)
        reference = torch_reference(model, max_det)
        parity = verify_float32(reference, OnnxRunner(temporary), pictures=verify_pictures, say=say)
        say("making its self-test")
        manifest = replace(manifest, parity=parity, self_test=self_test_from(reference.run)).with_artefact(temporary)
        write_text(manifest_path(output), manifest.to_json())
    return manifest


def _is_deformable(model: Tood) -> bool:
    return bool(model.preset.deform_stages or model.preset.deform_tower)


def _versions() -> dict[str, str]:
    return {
        "tood_deploy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
