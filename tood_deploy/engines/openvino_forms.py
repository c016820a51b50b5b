"""The compiled forms of a model in OpenVINO: one for every shape, and one each for shapes that keep coming. Knows no pictures."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.self_test import deviation
from tood_deploy.errors import ArtefactError, DeviceError
from tood_deploy.manifest import INPUTS, OUTPUTS
from tood_deploy.openvino_model import CPU, check_files, foreign, is_ours, read_model, reason_of, refusal
from tood_deploy.parity.tolerances import AnswerTolerance
from tood_deploy.rows import batch_rows

MOST_STATIC = 4  # shapes with a form of their own at a time
PROOF = 0.0, 0.6  # thresholds of a form's proof: with none for scores there is always something to compare
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
            raise DeviceError(f"OpenVINO: an inference failed ({reason_of(error)}); give smaller pictures or a smaller --batch") from error
        found = [np.array(request.get_tensor(name).data) for name in OUTPUTS]  # the next inference writes over the tensors
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
        self._core, self._path, self._config, self._static_after, self._tolerance = core, path, config, static_after, tolerance
        self._calls: Counter[Shape] = Counter()
        self._static: OrderedDict[Shape, Future[Form]] = OrderedDict()
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "openvino-form")
        check_files(path)
        self._dynamic = self._compile(path if model is None else model, config if cache is None else config | {"CACHE_DIR": cache})
        self.in_flight = int(self._dynamic.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
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
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)  # no two places alike, so that no order is left to chance
        values = (noise, np.array([shape[1:3]] * shape[0], np.int32), *(np.array(threshold, np.float32) for threshold in PROOF))
        answers = (batch_rows(each.collect(each.submit(values))) for each in (self._dynamic, form))
        for expected, found in zip(*answers, strict=True):
            if wrong := deviation(expected, found, self._tolerance):
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
            raise DeviceError(f"OpenVINO would run in {found} in place of {config['INFERENCE_PRECISION_HINT']} on this CPU")
        return Form(compiled)
