"""ONNX Runtime: runs an exported .onnx artefact on CPU or CUDA. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine, check_hint
from tood_deploy.engines.open import Hint
from tood_deploy.engines.precision_support import saturates_in_onnxruntime, why_not_on_cpus
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.graph_io import INPUTS, OUTPUTS, graph_feeds
from tood_deploy.manifest import METADATA_KEY, Manifest, manifest_path, read_manifest
from tood_deploy.onnx_file import CPU, first_line, naming_failures, open_session, run_session

NHWC_OPTIONS = {"prefer_nhwc": "1"}  # of the CUDA provider
# Batches side by side with the hint throughput: every one holds its own memory, and what one thread
# of four waits for is little.
CORES_A_STREAM, FEWEST_STREAMS, MOST_STREAMS = 4, 2, 8
PROVIDERS = {"cpu": CPU, "cuda": "CUDAExecutionProvider"}


class OnnxEngine(Engine):
    """An .onnx artefact in an ONNX Runtime session."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        hint: Hint = "latency",
        float_arithmetic: bool = False,
        nhwc: bool = False,
    ) -> None:
        """Open the artefact.

        Args:
            path: the .onnx file.
            device: "cpu" or "cuda" (needs onnxruntime-gpu; never falls back to the CPU).
            threads: on the CPU, of all inferences together; the number of cores where not given.
            hint: "latency": all threads work on one batch; "throughput", on the CPU: two to eight
                batches, one for four cores, run beside one another (`in_flight`), whose threads
                need not wait for each other after every layer.
            float_arithmetic: compute quantised layers as their Q/DQ nodes define them, in float32;
                what is quantised for TensorRT is compared so (`needs_float_arithmetic`).
            nhwc: on a GPU, convolutions with the channels last, which tensor cores like.

        Raises:
            ArtefactError: not a file of tood-export, cut, or of another version.
            DeviceError: the device is not there, or does not compute the artefact's precision.
            ToodError: a value out of range.
        """
        provider = _provider_for(device, hint, nhwc=nhwc)
        if device == "cpu":
            _check_precision(path)
        else:
            ort.preload_dlls()  # CUDA and cuDNN from their wheels, or from beside torch
        cores = _cores() if threads is None else threads
        side_by_side = hint == "throughput" and cores >= FEWEST_STREAMS
        streams = streams_of(cores)
        # Who calls a session works for it; its own threads are one less than its number of threads.
        self.session = _open_session(
            path,
            provider,
            cores - streams + 1 if side_by_side else threads,
            float_arithmetic=float_arithmetic,
            provider_options=NHWC_OPTIONS if nhwc else None,
        )
        if self.session.get_providers()[0] != provider:
            raise DeviceError(
                f"ONNX Runtime could not start {provider} and offers "
                f"{self.session.get_providers()}: {_remedy(device)}"
            )
        self.manifest = _session_manifest(self.session, path)
        self.device = device
        self.name = f"ONNX Runtime {ort.__version__}"
        self._callers = ThreadPoolExecutor(streams, "onnxruntime") if side_by_side else None
        self.in_flight = streams if side_by_side else 1
        self._bound = BoundInputs(self.session) if device == "cuda" else None
        # Who calls a session does the work of the threads that a fork has left behind.
        self.survives_fork = device == "cpu" and not side_by_side

    def saturates(self) -> bool:
        """Return as `Engine.saturates` does; never on a GPU."""
        return self.device == "cpu" and saturates_in_onnxruntime()

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        feeds = graph_feeds(images, valid_hw, score_threshold, iou_threshold)
        if self._bound is not None:
            return BatchDetections(*self._bound.run(feeds))
        return BatchDetections(*run_session(self.session, OUTPUTS, feeds))

    def _submit(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Any:
        call = images, valid_hw, score_threshold, iou_threshold
        return self._run(*call) if self._callers is None else self._callers.submit(self._run, *call)

    def _collect(self, ticket: BatchDetections | Future[BatchDetections]) -> BatchDetections:
        return ticket.result() if isinstance(ticket, Future) else ticket

    def close(self) -> None:
        """Free the session; may be called again."""
        super().close()
        if (callers := vars(self).pop("_callers", None)) is not None:
            callers.shutdown()
        self._bound = None
        vars(self).pop("session", None)


class BoundInputs:
    """Inputs of a session that stay where they are on the GPU, for calls of the same shapes.

    A CUDA graph on top is not to be had: ONNX Runtime records none of a graph with loops, and ours
    has the exact one of suppression.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        """Bind nothing yet."""
        self._session, self._binding = session, session.io_binding()
        self._values: dict[str, Any] = {}
        self._running = Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Copy the inputs to the GPU, run, and return what `OUTPUTS` names, in host memory.

        Raises:
            ArtefactError: the graph fails while it runs, or there is not enough memory for it.
        """
        with self._running, naming_failures():
            for name, array in feeds.items():
                value, contiguous = self._values.get(name), np.asarray(array, order="C")
                if value is not None and tuple(value.shape()) == array.shape:
                    value.update_inplace(contiguous)
                    continue
                self._values[name] = ort.OrtValue.ortvalue_from_numpy(contiguous, "cuda", 0)
                self._binding.bind_ortvalue_input(name, self._values[name])
            for name in OUTPUTS:
                self._binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(self._binding)
            return self._binding.copy_outputs_to_cpu()


def streams_of(cores: int) -> int:
    """Return how many batches run side by side on so many cores, with the hint throughput."""
    return min(max(cores // CORES_A_STREAM, FEWEST_STREAMS), MOST_STREAMS)


def _provider_for(device: str, hint: Hint, *, nhwc: bool) -> str:
    """Return the name of ONNX Runtime's provider; refuse what it is not there for."""
    check_hint(hint)
    if hint == "throughput" and device != "cpu":
        raise ToodError(
            f"hint is throughput, which ONNX Runtime has on the CPU, and device is {device}; "
            "leave the hint out, give a batch"
        )
    if nhwc and device != "cuda":
        raise ToodError(f"nhwc is for GPUs, and device is {device}; leave it out")
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise DeviceError(
            f"device {device} needs {provider}, this onnxruntime has "
            f"{ort.get_available_providers()}: {_remedy(device)}"
        )
    return provider


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remedy(device: str) -> str:
    return (
        "install onnxruntime-gpu in its place (README, On a GPU), with matching CUDA and cuDNN"
        if device == "cuda"
        else "reinstall onnxruntime"
    )


def _check_precision(path: Path) -> None:
    """Refuse, by its manifest, what ONNX Runtime does not compute on CPUs.

    Raises:
        DeviceError: the artefact is in bf16, or in int8 beside half precision.
    """
    manifest = read_manifest(path)
    if manifest is not None and (reason := why_not_on_cpus(str(path), manifest)):
        raise DeviceError(reason)


def _open_session(
    path: Path,
    provider: str,
    threads: int | None,
    *,
    float_arithmetic: bool,
    provider_options: Mapping[str, str] | None,
) -> ort.InferenceSession:
    if threads is not None and threads < 1:
        raise ToodError(f"threads is {threads}; expected a positive number")
    try:
        return open_session(
            path,
            provider=provider,
            threads=threads,
            float_arithmetic=float_arithmetic,
            provider_options=provider_options,
        )
    except Exception as error:  # onnxruntime raises types of its own that share no public base
        reason = first_line(error)
        if "NOT_IMPLEMENTED" in reason:  # by its text: the type has no public name
            raise ArtefactError(
                f"{path}: ONNX Runtime {ort.__version__} lacks an operator of it in its precision "
                f"({reason}); bf16 needs OpenVINO "
                "(--runtime openvino) or an engine (tood-export --to engine), all else a newer "
                "onnxruntime"
            ) from error
        raise ArtefactError(
            f"{path}: ONNX Runtime cannot open it, cut or not an ONNX file ({reason}); export it "
            "again"
        ) from error


def _session_manifest(session: ort.InferenceSession, path: Path) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    names = (
        [value.name for value in session.get_inputs()],
        [value.name for value in session.get_outputs()],
    )
    if text is None or names != ([*INPUTS], [*OUTPUTS]):
        raise ArtefactError(
            f"{path}: an ONNX file, but not one of tood_deploy (inputs {names[0]}, outputs "
            f"{names[1]}, expected {INPUTS} and {OUTPUTS}); "
            "make it from the checkpoint with tood-export"
        )
    inside, beside = Manifest.from_json(text, str(path)), read_manifest(path)
    if beside is not None:
        beside.check_outputs(inside, str(manifest_path(path)))
    return beside or inside
