"""OpenVINO: runs an exported .onnx artefact or an OpenVINO IR (.xml with its .bin) on the CPU. No torch."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine, Hint, check_hint
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
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import Manifest, artefact_files, read_manifest
from tood_deploy.matching import split_batch
from tood_deploy.parity.detection_verdict import answer_deviation
from tood_deploy.parity.tolerances import AnswerTolerance

MOST_STATIC = 4  # shapes with a form of their own at a time
PROOF = (
    0.0,
    0.6,
)  # thresholds of a form's proof: with none for scores there is always something to compare
Shape = tuple[int, ...]
Arrays = Sequence[NDArray[Any]]


class Form:
    """One compiled form of a model, and the requests that are idle."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: deque[Any] = deque()

    def submit(self, values: Arrays) -> Any:
        """Starts an inference on what `INPUTS` names, which OpenVINO reads where it lies; `collect` takes what comes back."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        request.start_async(dict(zip(INPUTS, values, strict=True)), share_inputs=True)
        return request, values  # the arrays must live as long as the request runs

    def collect(self, ticket: tuple[Any, Arrays]) -> list[NDArray[Any]]:
        """Waits, and gives what `OUTPUTS` names, in arrays of the caller's own.

        Raises:
            DeviceError: the inference failed.
        """
        request, _ = ticket
        try:
            request.wait()
        except RuntimeError as error:
            raise DeviceError(
                f"OpenVINO: an inference failed ({reason_of(error)}); give smaller images or a smaller --batch"
            ) from error
        found = [
            np.array(request.get_tensor(name).data) for name in OUTPUTS
        ]  # the next inference writes over the tensors
        self._idle.append(request)
        return found


class Forms:
    """The compiled forms of one model: one for every shape, and one each for shapes that keep coming.

    Attributes:
        in_flight: how many batches it can work on at a time.
        cached: whether the form for every shape came from the cache.
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
        """Compiles the form for every shape.

        Args:
            core: OpenVINO's.
            path: the .onnx or .xml file.
            config: of the CPU plugin.
            model: what is in the file, if it was read already; otherwise a cached form is opened without reading it.
            cache: folder for the form for every shape, used with this precision alone: OpenVINO would open what it compiled in float32
                in bf16 too, and does not always get it right (2026.4). Other forms are not kept.
            static_after: how many batches of one shape come before it gets its own form, which is compiled beside the work that goes on;
                0: at once, and the first batch waits for it; None: never.
            tolerance: between the forms.

        Raises:
            ArtefactError: the file cannot be read, or is not one of ours.
            DeviceError: OpenVINO would run in another precision.
        """
        self._core, self._path, self._config, self._static_after, self._tolerance = (
            core,
            path,
            config,
            static_after,
            tolerance,
        )
        self._calls: Counter[Shape] = Counter()
        self._static: OrderedDict[Shape, Future[Form]] = OrderedDict()
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "openvino-form")
        check_files(path)
        self._dynamic = self._compile(
            path if model is None else model,
            config if cache is None else config | {"CACHE_DIR": cache},
        )
        self.in_flight = int(
            self._dynamic.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        )
        self.cached = bool(self._dynamic.compiled.get_property("LOADED_FROM_CACHE"))

    def of_shape(self, shape: Shape) -> Form:
        """The form to run a batch of this shape, (B, H, W, 3), with.

        Raises:
            ArtefactError: a form that was compiled for this shape gives other answers than the one for every shape.
        """
        if self._static_after is None:
            return self._dynamic
        with self._lock:
            self._calls[shape] += 1
            if shape not in self._static and self._calls[shape] <= self._static_after:
                return self._dynamic
            own = self._own_form(shape)
        return own.result() if own.done() or self._static_after == 0 else self._dynamic

    def settle(self, shape: Shape) -> None:
        """Waits until batches of this shape have a form of their own, if ever they get one.

        Raises:
            ArtefactError: as `of_shape`.
        """
        if self._static_after is None:
            return
        with self._lock:
            own = self._own_form(shape)
        own.result()

    def close(self) -> None:
        """Ends what is still being compiled."""
        self._compiler.shutdown(cancel_futures=True)

    def _own_form(self, shape: Shape) -> Future[Form]:
        """The form of one shape, which may still be in the making; the one that was not used for longest goes."""
        if shape not in self._static:
            self._static[shape] = self._compiler.submit(self._compile_for, shape)
        self._static.move_to_end(shape)
        while len(self._static) > MOST_STATIC:
            forgotten, _ = self._static.popitem(last=False)
            self._calls.pop(forgotten, None)
        return self._static[shape]

    def _compile_for(self, shape: Shape) -> Form:
        """A form for one shape, proven: compiled apart, it is not what the self-test has seen."""
        model = read_model(self._core, self._path)
        model.reshape({"images": list(shape), "valid_hw": [shape[0], 2]})
        form = self._compile(model, self._config)
        noise = np.random.default_rng(0).integers(
            0, 256, shape, np.uint8
        )  # no two places alike, so that no order is left to chance
        values = (
            noise,
            np.array([shape[1:3]] * shape[0], np.int32),
            *(np.array(threshold, np.float32) for threshold in PROOF),
        )
        answers = (split_batch(each.collect(each.submit(values))) for each in (self._dynamic, form))
        for expected, found in zip(*answers, strict=True):
            if wrong := answer_deviation(expected, found, self._tolerance):
                raise ArtefactError(
                    f"{self._path}: compiled for the shape {shape} OpenVINO gives another answer than for every shape: {wrong}; "
                    "update openvino, or export in higher precision"
                )
        return form

    def _compile(self, model: Any, config: dict[str, Any]) -> Form:
        """A form of a model, or of the file itself."""
        try:
            compiled = self._core.compile_model(model, CPU, config)
        except RuntimeError as error:
            raise refusal(self._path, error) from error
        if not is_ours(compiled):
            raise foreign(self._path, compiled)
        found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != config["INFERENCE_PRECISION_HINT"]:
            raise DeviceError(
                f"OpenVINO would run in {found} in place of {config['INFERENCE_PRECISION_HINT']} on this CPU"
            )
        return Form(compiled)


Precision = Literal["fp32", "bf16"]

# A call with dynamic shapes takes longer than one of a form compiled for its shape: `tiny` by a third, a ResNet-50 at 640 x 640 by 17% in
# int8, 6% in bf16, 3% in float32. A form takes some seconds to make, so it pays after some hundred calls, and holds the weights again.
CALLS_BEFORE_STATIC = 100
MOST_STATIC_BYTES = 64 * 2**20


class OpenVinoEngine(Engine):
    """An artefact in OpenVINO's CPU plugin. Calls of several threads run beside one another as far as streams allow."""

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
        """Opens the artefact.

        Args:
            path: an .onnx file, or an .xml with its .bin beside it.
            device: "cpu".
            threads: of all inferences together; the number of cores where not given.
            precision: of what is not quantised, "fp32" or "bf16"; the artefact's own where not given, which is float32 unless its manifest
                says bf16. Never left to OpenVINO, which takes bf16 in silence where the CPU has it.
            hint: "latency": all threads work on one batch; "throughput": on several (`in_flight`).
            cache: whether to keep what was compiled for the next start: in `home_folder("openvino")`, or in this folder.
            calls_before_static: how many batches of one shape it takes until a form is compiled for that shape, beside the work that goes
                on; 100 where not given, for large networks never, since it hardly pays; 0: at once. `settle` does not wait for so many.

        Raises:
            ArtefactError: not a file of tood-export, cut, of another version, or with operators that OpenVINO lacks.
            DeviceError: OpenVINO, the device or the precision is not there.
            ToodError: a value out of range.
        """
        ov = load_openvino()
        if device != "cpu":
            raise DeviceError(
                f"device is {device}, OpenVINO runs on the CPU here; use --device cpu, or --runtime onnxruntime"
            )
        _check_options(threads, precision, hint)
        core = shared_core()
        manifest = read_manifest(path)
        model = read_model(core, path) if manifest is None else None
        self.manifest = manifest or manifest_inside(model, path)
        self._rest: str = precision or _own_precision(self.manifest)
        check_precision(core, self._rest)
        self.device, self.name = device, f"OpenVINO {ov.__version__.split('-')[0]}"
        config = {"INFERENCE_PRECISION_HINT": TYPES[self._rest], "PERFORMANCE_HINT": hint.upper()}
        config |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._forms = Forms(
            core,
            path,
            config,
            model=model,
            cache=None
            if cache is False
            else make_cache_folder(
                (home_folder("openvino") if cache is True else Path(cache)) / self._rest
            ),
            static_after=_static_after(path, calls_before_static),
            tolerance=tolerance_of(self),
        )
        self.in_flight = self._forms.in_flight
        self.loaded_from = "cache" if self._forms.cached else "artefact"

    @property
    def precision(self) -> str:
        """As it runs here: "fp32", "bf16", or the artefact's own and that of the rest, such as "int8, bf16"."""
        own = self.manifest.precision
        if own in ("fp32", self._rest):
            return self._rest
        return own if own != "bf16" and self._rest == "fp32" else f"{own}, {self._rest}"

    def saturates(self) -> bool:
        """See `Engine.saturates`."""
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
        thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
        form = self._forms.of_shape(images.shape)
        return form, form.submit(
            (np.ascontiguousarray(images), np.ascontiguousarray(valid_hw), *thresholds)
        )

    def _collect(self, ticket: tuple[Form, Any]) -> BatchDetections:
        form, started = ticket
        return BatchDetections(*form.collect(started))

    def settle(self, batch: int, net_hw: tuple[int, int]) -> None:
        """Compiles the form of one shape now, unless it is there or none is wanted.

        Raises:
            ArtefactError: compiled for this shape the model gives other answers.
        """
        self._forms.settle((batch, *net_hw, 3))

    def close(self) -> None:
        """Frees the model; may be called again."""
        super().close()
        if (forms := vars(self).pop("_forms", None)) is not None:
            forms.close()


def _check_options(threads: int | None, precision: str | None, hint: str) -> None:
    if threads is not None and threads < 1:
        raise ToodError(f"threads is {threads}; expected a positive number")
    if precision is not None and precision not in TYPES:
        raise ToodError(
            f"precision is {precision!r}; OpenVINO on the CPU runs in {' or '.join(TYPES)}: int8 is made by tood-export"
        )
    check_hint(hint)


def _own_precision(manifest: Manifest) -> str:
    """What the artefact was made to run in, beside its quantised part."""
    if manifest.precision == "int8":
        return "bf16" if manifest.build.fallback_precision == "bf16" else "fp32"
    return "bf16" if manifest.precision == "bf16" else "fp32"


def _static_after(path: Path, calls: int | None) -> int | None:
    if calls is not None:
        return calls
    large = sum(file.stat().st_size for file in artefact_files(path)) > MOST_STATIC_BYTES
    return None if large else CALLS_BEFORE_STATIC
