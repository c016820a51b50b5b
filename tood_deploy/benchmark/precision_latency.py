"""Latency of graphs in the runtime that they are made for, each in turns with one reference, so that drift of the machine cancels."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from tood_deploy.benchmark.precision_quality import IOU_THRESHOLD, SCORE_THRESHOLD
from tood_deploy.benchmark.warmup import warm_up
from tood_deploy.engines import Engine, open_engine
from tood_deploy.export.precision.sensitivity import Prepared
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.profiles import Profiles
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx

Target = Literal["onnx", "openvino", "engine"]
Open = Callable[[Path, tuple[int, int]], Engine]

ROUNDS = 9
TURN_S = 0.15
WARM_UP_S = 3.0


@dataclass(frozen=True)
class Opener:
    """Opens an .onnx file in the runtime of a target.

    Attributes:
        target: ONNX Runtime or OpenVINO on the CPU, or TensorRT on the GPU, which builds an engine first.
        options, flavour: of that engine.
    """

    target: Target
    options: EngineOptions = field(default_factory=EngineOptions)
    flavour: str | None = None

    def check(self) -> None:
        """Raises DeviceError where the runtime or its device is not there."""
        if self.target == "engine":
            from tood_deploy.cuda_device import check_driver

            check_driver()
        elif self.target == "openvino":
            from tood_deploy.openvino_model import load_openvino

            load_openvino()

    def __call__(self, path: Path, net_hw: tuple[int, int]) -> Engine:
        """The runtime, for pictures of one padded size.

        Raises:
            ToodError: it cannot be built or opened.
        """
        if self.target == "onnx":
            return open_engine(path, runtime="onnxruntime", self_test=False)
        if self.target == "openvino":
            return open_engine(path, runtime="openvino", self_test=False, cache=False, calls_before_static=0)
        plan = path.with_name("plan.engine")
        engine_from_onnx(path, plan, profiles=Profiles((net_hw,), (1, 1, 1)), options=self.options, flavour=self.flavour, quiet=True)
        return open_engine(plan, device="cuda", self_test=False)


class LatencyBench:
    """Measures graphs on one picture; a context manager that holds the reference open meanwhile."""

    def __init__(
        self, reference: onnx.ModelProto, open_file: Open, picture: Prepared, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Opens the reference and warms it up.

        Args:
            reference: what all others take turns with; artefacts' metadata inside, as in those.
            open_file: opens an .onnx file for pictures of one padded size.
            picture: to measure on.
            clock: in seconds.

        Raises:
            ToodError: the reference cannot be opened.
        """
        self.reference, self._open_file, self._clock = reference, open_file, clock
        image, valid_hw = picture
        self._net_hw = (image.shape[0], image.shape[1])
        self._inputs = image[None], np.array([valid_hw], np.int32)
        with ExitStack() as resources:
            self._call_reference, self.runtime = self._open(reference, resources)
            self.reference_ms = statistics.median(self._turn(self._call_reference) for _ in range(ROUNDS))
            self._resources = resources.pop_all()

    def __call__(self, model: onnx.ModelProto) -> float:
        """Median milliseconds of a graph: as many times those of the reference, measured first, as it took in turns beside it.

        Raises:
            ToodError: it cannot be opened or run.
        """
        if model is self.reference:
            return self.reference_ms
        with ExitStack() as resources:
            call, _ = self._open(model, resources)
            return self.reference_ms * statistics.median(self._ratio(call, number) for number in range(ROUNDS))

    def _ratio(self, call: Callable[[], object], number: int) -> float:
        """The time of a call as a multiple of the reference's, in one round; who comes first changes from round to round."""
        order: Sequence[Callable[[], object]] = (call, self._call_reference)[:: -1 if number % 2 else 1]
        times_ms = {each: self._turn(each) for each in order}
        return times_ms[call] / times_ms[self._call_reference]

    def _open(self, model: onnx.ModelProto, resources: ExitStack) -> tuple[Callable[[], object], str]:
        """A function that runs a graph once, warmed up, and the name of the runtime."""
        path = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="tood-"))) / "graph.onnx"
        onnx.save(model, path)
        engine = resources.enter_context(self._open_file(path, self._net_hw))

        def call() -> object:
            return engine.infer(*self._inputs, SCORE_THRESHOLD, IOU_THRESHOLD)

        warm_up(call, WARM_UP_S, self._clock)
        return call, f"{engine.name}, {engine.device}"

    def _turn(self, call: Callable[[], object]) -> float:
        """Median milliseconds of the calls of one turn."""
        times_ms: list[float] = []
        started = now = self._clock()
        while not times_ms or now - started < TURN_S:
            call()
            before, now = now, self._clock()
            times_ms.append(1000 * (now - before))
        return statistics.median(times_ms)

    def __enter__(self) -> LatencyBench:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()
