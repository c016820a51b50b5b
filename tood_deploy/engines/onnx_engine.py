"""ONNX Runtime: runs an exported .onnx artefact on CPU or CUDA. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.manifest import METADATA_KEY, Manifest, read_manifest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INPUTS = ["images", "valid_hw", "score_threshold", "iou_threshold"]
OUTPUTS = ["num_dets", "boxes", "scores", "labels"]


class OnnxEngine(Engine):
    """An .onnx artefact in an ONNX Runtime session."""

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Opens the artefact.

        Args:
            path: the .onnx file.
            device: "cpu" or "cuda" (needs onnxruntime-gpu; never falls back to the CPU).
            threads: of one inference on the CPU; the number of cores where not given.

        Raises:
            ArtefactError: not a file of tood-export, cut, or of another version.
            DeviceError: the device is not there.
        """
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise DeviceError(f"device {device} needs {provider}, this onnxruntime has {ort.get_available_providers()}: {_remedy(device)}")
        self.session = _open_session(path, provider, threads)
        if self.session.get_providers()[0] != provider:
            raise DeviceError(f"ONNX Runtime could not start {provider} and offers {self.session.get_providers()}: {_remedy(device)}")
        self.manifest = _session_manifest(self.session, path)
        self.device = device
        self.name = f"ONNX Runtime {ort.__version__}"

    def _run(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> BatchDetections:
        thresholds = np.float32(score_threshold), np.float32(iou_threshold)
        values = (images, valid_hw, *(np.asarray(threshold) for threshold in thresholds))
        found: Any = self.session.run(OUTPUTS, dict(zip(INPUTS, values, strict=True)))
        return BatchDetections(*found)

    def close(self) -> None:
        """Frees the session; may be called again."""
        super().close()
        vars(self).pop("session", None)


def _remedy(device: str) -> str:
    return (
        "install onnxruntime-gpu in its place (README, On a GPU), with matching CUDA and cuDNN"
        if device == "cuda"
        else "reinstall onnxruntime"
    )


def _open_session(path: Path, provider: str, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and said once
    if threads is not None:
        if threads < 1:
            raise ToodError(f"threads is {threads}; expected a positive number")
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime raises types of its own that share no public base
        reason = str(error).strip().splitlines()[0]
        raise ArtefactError(f"{path}: ONNX Runtime cannot open it, cut or not an ONNX file ({reason}); export it again") from error


def _session_manifest(session: ort.InferenceSession, path: Path) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    names = [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
    if text is None or names != (INPUTS, OUTPUTS):
        raise ArtefactError(
            f"{path}: an ONNX file, but not one of tood_deploy (inputs {names[0]}, outputs {names[1]}, expected {INPUTS} and {OUTPUTS}); "
            "make it from the checkpoint with tood-export"
        )
    inside = Manifest.from_json(text, str(path))
    return read_manifest(path) or inside
