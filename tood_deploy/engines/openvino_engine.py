"""OpenVINO: runs an exported .onnx artefact or an OpenVINO IR (.xml with its .bin) on the CPU.

No torch.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine, check_hint
from tood_deploy.engines.open import Hint
from tood_deploy.engines.openvino_runtime import (
    CPU,
    TYPES,
    check_files,
    check_precision,
    foreign,
    is_ours,
    load_openvino,
    make_cache_folder,
    manifest_inside,
    read_model,
    reason_of,
    refusal,
    shared_core,
)
from tood_deploy.engines.precision_support import saturates_in_openvino
from tood_deploy.engines.self_test import tolerance_of
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.files import home_folder
from tood_deploy.graph_io import OUTPUTS, graph_feeds
from tood_deploy.manifest import Manifest, artefact_files, read_manifest
from tood_deploy.matching import split_batch
from tood_deploy.parity.detection_verdict import answer_deviation
from tood_deploy.parity.tolerances import AnswerTolerance

MAX_STATIC_SHAPES = 4  # that the model is compiled for at a time
# For scores and overlaps: with none for scores there is always something to compare.
PROOF_THRESHOLDS = (0.0, 0.6)
Shape = tuple[int, ...]
Feeds = dict[str, NDArray[Any]]
Ticket = tuple[Any, Feeds]  # a request that runs, and what it reads


class CompiledShape:
    """A model compiled for one shape of batches, or for every shape, and its idle requests."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: deque[Any] = deque()

    def submit(self, feeds: Feeds) -> Ticket:
        """Start an inference on `graph_feeds`, which OpenVINO reads where they lie.

        `collect` takes what comes back.
        """
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        request.start_async(feeds, share_inputs=True)
        return request, feeds  # the arrays must live as long as the request runs

    def collect(self, ticket: Ticket) -> list[NDArray[Any]]:
        """Wait, and return what `OUTPUTS` names, in arrays of the caller's own.

        Raises:
            DeviceError: the inference failed.
        """
        request, _ = ticket
        try:
            request.wait()
        except RuntimeError as error:
            raise DeviceError(
                f"OpenVINO: an inference failed ({reason_of(error)}); give smaller images or a "
                "smaller --batch"
            ) from error
        # Copied, as the next inference writes over the tensors.
        outputs = [np.array(request.get_tensor(name).data) for name in OUTPUTS]
        self._idle.append(request)
        return outputs


class CompiledShapes:
    """A model compiled for every shape, and once more for each shape that keeps coming.

    Attributes:
        in_flight: how many batches it can work on at a time.
        cached: whether what was compiled for every shape came from the cache.
    """

    def __init__(
        self,
        core: Any,
        path: Path,
        config: dict[str, Any],
        *,
        model: Any,
        cache: str | None,
        static_after: int | None,
        tolerance: AnswerTolerance,
    ) -> None:
        """Compile the model for every shape.

        Args:
            core: OpenVINO's.
            path: the .onnx or .xml file.
            config: of the CPU plugin.
            model: what is in the file, if it was read already; otherwise a cached model is opened
                without reading it.
            cache: folder for what is compiled for every shape, used with this precision alone:
                OpenVINO would open what it compiled in float32 in bf16 too, and does not always get
                it right (2026.4). What is compiled for one shape is not kept.
            static_after: how many batches of one shape come before the model is compiled for it,
                while work goes on; 0: at once, and the first batch waits for it; None: never.
            tolerance: between the answers of one shape and of every shape.

        Raises:
            ArtefactError: the file cannot be read, or is not one of ours.
            DeviceError: OpenVINO would run in another precision.
        """
        self._core, self._path, self._config = core, path, config
        self._static_after, self._tolerance = static_after, tolerance
        self._calls: Counter[Shape] = Counter()
        self._static: OrderedDict[Shape, Future[CompiledShape]] = OrderedDict()
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "openvino-compiler")
        check_files(path)
        self._dynamic = self._compile(
            path if model is None else model,
            config if cache is None else config | {"CACHE_DIR": cache},
        )
        self.in_flight = int(
            self._dynamic.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        )
        self.cached = bool(self._dynamic.compiled.get_property("LOADED_FROM_CACHE"))

    def of_shape(self, shape: Shape) -> CompiledShape:
        """Return what runs a batch of this shape, (B, H, W, 3).

        Raises:
            ArtefactError: compiled for this shape, the model gives other answers than for every
                shape.
        """
        if self._static_after is None:
            return self._dynamic
        with self._lock:
            self._calls[shape] += 1
            if shape not in self._static and self._calls[shape] <= self._static_after:
                return self._dynamic
            own = self._of_one_shape(shape)
        return own.result() if own.done() or self._static_after == 0 else self._dynamic

    def settle(self, shape: Shape) -> None:
        """Wait until the model is compiled for this shape, if ever it will be.

        Raises:
            ArtefactError: as `of_shape`.
        """
        if self._static_after is None:
            return
        with self._lock:
            own = self._of_one_shape(shape)
        own.result()

    def close(self) -> None:
        """End what is still being compiled."""
        self._compiler.shutdown(cancel_futures=True)

    def _of_one_shape(self, shape: Shape) -> Future[CompiledShape]:
        """Return the model compiled for one shape, which may still be under way.

        The shape that was not used for longest is forgotten.
        """
        if shape not in self._static:
            self._static[shape] = self._compiler.submit(self._compile_for, shape)
        self._static.move_to_end(shape)
        while len(self._static) > MAX_STATIC_SHAPES:
            forgotten, _ = self._static.popitem(last=False)
            self._calls.pop(forgotten, None)
        return self._static[shape]

    def _compile_for(self, shape: Shape) -> CompiledShape:
        """Compile the model for one shape, and prove it.

        Compiled apart, it is not what the self-test has seen.
        """
        model = read_model(self._core, self._path)
        model.reshape({"images": list(shape), "valid_hw": [shape[0], 2]})
        compiled = self._compile(model, self._config)
        # Noise: no two places are alike, so that no order is left to chance.
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        valid_hw = np.array([shape[1:3]] * shape[0], np.int32)
        feeds = graph_feeds(noise, valid_hw, *PROOF_THRESHOLDS)
        answers = (split_batch(way.collect(way.submit(feeds))) for way in (self._dynamic, compiled))
        for expected, actual in zip(*answers, strict=True):
            if wrong := answer_deviation(expected, actual, self._tolerance):
                raise ArtefactError(
                    f"{self._path}: compiled for the shape {shape} OpenVINO gives another answer "
                    f"than for every shape: {wrong}; "
                    "update openvino, or export in higher precision"
                )
        return compiled

    def _compile(self, model: Any, config: dict[str, Any]) -> CompiledShape:
        """Compile a model, or the file itself."""
        try:
            compiled = self._core.compile_model(model, CPU, config)
        except RuntimeError as error:
            raise refusal(self._path, error) from error
        if not is_ours(compiled):
            raise foreign(self._path, compiled)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if precision != config["INFERENCE_PRECISION_HINT"]:
            raise DeviceError(
                f"OpenVINO would run in {precision} in place of "
                f"{config['INFERENCE_PRECISION_HINT']} on this CPU"
            )
        return CompiledShape(compiled)


Precision = Literal["fp32", "bf16"]

# A call with dynamic shapes takes longer than one of a model compiled for its shape: `tiny` by a
# third, a ResNet-50 at 640 x 640 by 17% in int8, 6% in bf16, 3% in float32. Compiling takes some
# seconds, so it pays after some hundred calls, and what is compiled holds the weights again.
CALLS_BEFORE_STATIC = 100
MAX_STATIC_BYTES = 64 * 2**20


class OpenVinoEngine(Engine):
    """An artefact in OpenVINO's CPU plugin.

    Calls of several threads run beside one another as far as streams allow.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precision: Precision | None = None,
        hint: Hint = "latency",
        cache: bool | str | PathLike[str] = True,
        calls_before_static: int | None = None,
    ) -> None:
        """Open the artefact.

        Args:
            path: an .onnx file, or an .xml with its .bin beside it.
            device: "cpu".
            threads: of all inferences together; the number of cores where not given.
            precision: of what is not quantised, "fp32" or "bf16"; the artefact's own where not
                given, which is float32 unless its manifest says bf16. Never left to OpenVINO, which
                takes bf16 in silence where the CPU has it.
            hint: "latency": all threads work on one batch; "throughput": on several (`in_flight`).
            cache: whether to keep what was compiled for the next start: in
                `home_folder("openvino")`, or in this folder.
            calls_before_static: how many batches of one shape it takes until the model is compiled
                for that shape, beside the work that goes on; 100 where not given, for large
                networks never, since it hardly pays; 0: at once. `settle` does not wait for so
                many.

        Raises:
            ArtefactError: not a file of tood-export, cut, of another version, or with operators
                that OpenVINO lacks.
            DeviceError: OpenVINO, the device or the precision is not there.
            ToodError: a value out of range.
        """
        ov = load_openvino()
        if device != "cpu":
            raise DeviceError(
                f"device is {device}, OpenVINO runs on the CPU here; use --device cpu, or "
                "--runtime onnxruntime"
            )
        _check_options(threads, precision, hint)
        core = shared_core()
        manifest = read_manifest(path)
        model = read_model(core, path) if manifest is None else None
        self.manifest = manifest or manifest_inside(model, path)
        self._fallback: str = precision or _own_precision(self.manifest)
        check_precision(core, self._fallback)
        self.device, self.name = device, f"OpenVINO {ov.__version__.split('-')[0]}"
        config = {
            "INFERENCE_PRECISION_HINT": TYPES[self._fallback],
            "PERFORMANCE_HINT": hint.upper(),
        }
        config |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._shapes = CompiledShapes(
            core,
            path,
            config,
            model=model,
            cache=None
            if cache is False
            else make_cache_folder(
                (home_folder("openvino") if cache is True else Path(cache)) / self._fallback
            ),
            static_after=_static_after(path, calls_before_static),
            tolerance=tolerance_of(self),
        )
        self.in_flight = self._shapes.in_flight
        self.loaded_from = "cache" if self._shapes.cached else "artefact"

    @property
    def precision(self) -> str:
        """As it runs here: "fp32", "bf16", or two of them, such as "int8, bf16"."""
        own = self.manifest.precision
        if own in ("fp32", self._fallback):
            return self._fallback
        return own if own != "bf16" and self._fallback == "fp32" else f"{own}, {self._fallback}"

    def saturates(self) -> bool:
        """Return as `Engine.saturates` does."""
        return saturates_in_openvino()

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        return self._collect(self._submit(images, valid_hw, score_threshold, iou_threshold))

    def _submit(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Any:
        compiled = self._shapes.of_shape(images.shape)
        images, valid_hw = np.ascontiguousarray(images), np.ascontiguousarray(valid_hw)
        return compiled, compiled.submit(
            graph_feeds(images, valid_hw, score_threshold, iou_threshold)
        )

    def _collect(self, ticket: tuple[CompiledShape, Any]) -> BatchDetections:
        compiled, started = ticket
        return BatchDetections(*compiled.collect(started))

    def settle(self, batch: int, net_hw: tuple[int, int]) -> None:
        """Compile the model for one shape now, unless that is done or never will be.

        Raises:
            ArtefactError: compiled for this shape the model gives other answers.
        """
        self._shapes.settle((batch, *net_hw, 3))

    def close(self) -> None:
        """Free the model; may be called again."""
        super().close()
        if (shapes := vars(self).pop("_shapes", None)) is not None:
            shapes.close()


def _check_options(threads: int | None, precision: str | None, hint: str) -> None:
    if threads is not None and threads < 1:
        raise ToodError(f"threads is {threads}; expected a positive number")
    if precision is not None and precision not in TYPES:
        raise ToodError(
            f"precision is {precision!r}; OpenVINO on the CPU runs in {' or '.join(TYPES)}: int8 "
            "is made by tood-export"
        )
    check_hint(hint)


def _own_precision(manifest: Manifest) -> str:
    """Return what the artefact was made to run in, its quantised part aside."""
    if manifest.precision == "int8":
        return "bf16" if manifest.build.fallback_precision == "bf16" else "fp32"
    return "bf16" if manifest.precision == "bf16" else "fp32"


def _static_after(path: Path, calls: int | None) -> int | None:
    if calls is not None:
        return calls
    large = sum(file.stat().st_size for file in artefact_files(path)) > MAX_STATIC_BYTES
    return None if large else CALLS_BEFORE_STATIC
