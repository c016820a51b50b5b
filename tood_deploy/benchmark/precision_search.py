"""`tood-export --autotune-precision`: the fastest mixture of precisions whose quality stays.

A float32 artefact comes in, the graph of the best mixture goes out. Puts together what others do:
one calibration, mixed graphs, their latency in the target's runtime, their quality, the search.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from tood_deploy.benchmark.evaluation.evaluate import DataSet
from tood_deploy.benchmark.evaluation.predict import Key, PredictionFile, predict
from tood_deploy.benchmark.latency.worker import warm_up
from tood_deploy.data.categories import map_categories
from tood_deploy.data.coco_metrics import evaluate
from tood_deploy.engines import Engine, open_engine
from tood_deploy.errors import ArtefactError, InputError, ToodError
from tood_deploy.export.precision.calibrate import Calibration, calibrate
from tood_deploy.export.precision.convert import (
    ConvertedGraph,
    Int8Options,
    QualityOf,
    prepare_images,
)
from tood_deploy.export.precision.half import DATA_TYPES, LowPrecision, emulate_low_precision
from tood_deploy.export.precision.quantize import all_layers, calibrated_values, quantize
from tood_deploy.export.precision.search import Mixture, SearchResult, TrialSteps, autotune
from tood_deploy.export.precision.sensitivity import (
    DetectionMismatch,
    Prepared,
    mix_precisions,
    network_parts,
)
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles
from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import METADATA_KEY
from tood_deploy.manifest_sections import Int8Build
from tood_deploy.onnx_file import OnnxArtefact, needs_float_arithmetic
from tood_deploy.reporter import Reporter

SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6


class ApDrop:
    """Points of AP that graphs lose against a float32 one.

    ONNX Runtime on the CPU runs both: half precision is emulated, and what is quantised for
    TensorRT is computed in float32 (`needs_float_arithmetic`).
    """

    def __init__(self, data: DataSet, reference: OnnxArtefact, *, quiet: bool = True) -> None:
        """Pair classes and categories; run nothing yet.

        Args:
            data: annotations with their images.
            reference: the float32 artefact.
            quiet: say nothing of how far a measurement is.

        Raises:
            ToodError: the classes are not the categories of the annotations.
        """
        self.category_ids = map_categories(reference.manifest.preset.class_names, data.truth)
        self.data, self.reference, self.quiet = data, reference, quiet

    @property
    def reference_ap(self) -> float:
        """Return AP of the float32 graph in points, 0 to 100; measured once.

        Raises:
            InputError: it is 0, so that nothing could be lost; or images cannot be read.
        """
        if (ap := self._measured_ap) <= 0:
            raise InputError(
                f"{self.data.truth.path}: the float32 network has no AP on its "
                f"{len(self.data.files)} images, so none can be lost; "
                "give annotated images of what is to be found"
            )
        return ap

    @cached_property
    def _measured_ap(self) -> float:
        return self._ap(self.reference.model)

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return the points of AP, 0 to 100, that a graph made from the reference loses.

        Below 0 where it gains; all of them where NaN is among its outputs.
        """
        expected = self.reference_ap
        try:
            return expected - self._ap(model)
        except _NotNumbersError:
            return expected

    def file_ap(self, path: Path, **engine_options: Any) -> float:
        """Measure AP of an artefact, 0 to 100 points, in the runtime that its file belongs to."""
        with tempfile.TemporaryDirectory(prefix="tood-") as folder:
            kept = PredictionFile(Path(folder) / "predictions.jsonl", Key({}))
            with Detector(
                path, conf=SCORE_THRESHOLD, iou=IOU_THRESHOLD, self_test=False, **engine_options
            ) as detector:
                self._predict(detector, kept)
            return 100 * evaluate(self.data.truth, kept.results(self.category_ids)).numbers["AP"]

    def _ap(self, model: onnx.ModelProto) -> float:
        with tempfile.TemporaryDirectory(prefix="tood-") as folder:
            path = Path(folder) / "graph.onnx"
            onnx.save(emulate_low_precision(model), path)
            return self.file_ap(path, float_arithmetic=needs_float_arithmetic(model))

    def _predict(self, detector: Detector, kept: PredictionFile) -> None:
        try:
            predict(
                detector,
                self.data.truth,
                self.data.files,
                kept,
                1,
                Reporter(self.quiet),
                "measuring AP",
            )
        except ArtefactError as error:  # which this raises for nothing else
            raise _NotNumbersError(str(error)) from error


class _NotNumbersError(ArtefactError):
    """The graph gave values that are not numbers."""


Target = Literal["onnx", "openvino", "engine"]
Open = Callable[[Path, tuple[int, int]], Engine]

ROUNDS = 9
TURN_S = 0.15
WARM_UP_S = 3.0


@dataclass(frozen=True)
class Opener:
    """Opens an .onnx file in the runtime of a target.

    Attributes:
        target: ONNX Runtime or OpenVINO on the CPU, or TensorRT on the GPU, which builds an engine
            first.
        options: of that engine.
        flavour: of that engine's TensorRT; the one that is installed where None.
    """

    target: Target
    options: EngineOptions = field(default_factory=EngineOptions)
    flavour: str | None = None

    def check(self) -> None:
        """Raise DeviceError where the runtime or its device is not there."""
        if self.target == "engine":
            from tood_deploy.engines.tensorrt.cuda import check_driver

            check_driver()
        elif self.target == "openvino":
            from tood_deploy.engines.openvino_runtime import load_openvino

            load_openvino()

    def __call__(self, path: Path, net_hw: tuple[int, int]) -> Engine:
        """Open the runtime for images of one padded size.

        Raises:
            ToodError: it cannot be built or opened.
        """
        if self.target == "onnx":
            return open_engine(path, runtime="onnxruntime", self_test=False)
        if self.target == "openvino":
            return open_engine(
                path, runtime="openvino", self_test=False, cache=False, calls_before_static=0
            )
        plan = path.with_name("plan.engine")
        engine_from_onnx(
            path,
            plan,
            profiles=Profiles((net_hw,), (1, 1, 1)),
            options=self.options,
            flavour=self.flavour,
        )
        return open_engine(plan, device="cuda", self_test=False)


class LatencyBench:
    """Measures graphs on one image; a context manager that holds the reference open meanwhile."""

    def __init__(
        self,
        reference: onnx.ModelProto,
        open_file: Open,
        source_image: Prepared,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open the reference and warm it up.

        Args:
            reference: what all others take turns with; artefacts' metadata inside, as in those.
            open_file: opens an .onnx file for images of one padded size.
            source_image: to measure on.
            clock: in seconds.

        Raises:
            ToodError: the reference cannot be opened.
        """
        self.reference, self._open_file, self._clock = reference, open_file, clock
        image, valid_hw = source_image
        self._net_hw = (image.shape[0], image.shape[1])
        self._inputs = image[None], np.array([valid_hw], np.int32)
        with ExitStack() as resources:
            self._call_reference, self.runtime = self._open(reference, resources)
            self.reference_ms = statistics.median(
                self._turn(self._call_reference) for _ in range(ROUNDS)
            )
            self._resources = resources.pop_all()

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return median milliseconds of a graph.

        They are the reference's, measured first, times what the graph took in turns beside it.

        Raises:
            ToodError: it cannot be opened or run.
        """
        if model is self.reference:
            return self.reference_ms
        with ExitStack() as resources:
            call, _ = self._open(model, resources)
            return self.reference_ms * statistics.median(
                self._ratio(call, number) for number in range(ROUNDS)
            )

    def _ratio(self, call: Callable[[], object], number: int) -> float:
        """Return the time of a call as a multiple of the reference's, in one round.

        Who comes first changes from round to round.
        """
        order: Sequence[Callable[[], object]] = (call, self._call_reference)[
            :: -1 if number % 2 else 1
        ]
        times_ms = {each: self._turn(each) for each in order}
        return times_ms[call] / times_ms[self._call_reference]

    def _open(
        self, model: onnx.ModelProto, resources: ExitStack
    ) -> tuple[Callable[[], object], str]:
        """Return a function that runs a graph once, warmed up, and the name of the runtime."""
        path = (
            Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="tood-")))
            / "graph.onnx"
        )
        onnx.save(model, path)
        engine = resources.enter_context(self._open_file(path, self._net_hw))

        def call() -> object:
            return engine.infer(*self._inputs, SCORE_THRESHOLD, IOU_THRESHOLD)

        warm_up(call, WARM_UP_S, self._clock)
        return call, f"{engine.name}, {engine.device}"

    def _turn(self, call: Callable[[], object]) -> float:
        """Return median milliseconds of the calls of one turn."""
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


@dataclass(frozen=True)
class PrecisionSearch:
    """A search, to be had by calling it with the float32 artefact; a `convert.Search`.

    Attributes:
        opener: opens graphs in the runtime that they are made for.
        calib_data: a folder of images to calibrate on; latency is measured on the first of them.
        int8: how 8-bit layers are made; its `max_drop` is the most that quality may drop.
        half: the half precision that takes part, of what is not 8-bit, too; None for none.
        quality: makes what tells how much worse a graph is; per cent of mismatched detections
            where not given.
    """

    opener: Opener
    calib_data: Path
    int8: Int8Options
    half: LowPrecision | None = None
    quality: QualityOf | None = None

    def __post_init__(self) -> None:
        if self.int8.max_drop is None:
            raise ToodError(
                "the most that quality may drop is not given; give --max-ap-drop with "
                "annotations, or --max-drop without"
            )
        if self.half is not None and self.opener.target != "engine":
            raise ToodError(
                f"{self.half} takes part in the search for {self.opener.target}, "
                "which is measured on the CPU; leave it out"
            )
        self.opener.check()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that a part of the network may have, the reference first."""
        return ("fp32", *([self.half] if self.half else []), "int8")

    def __call__(self, artefact: OnnxArtefact, reporter: Reporter) -> ConvertedGraph:
        """Search; report a line for every trial, and the table of all.

        Raises:
            ToodError: images cannot be read, classes and categories differ, or a graph cannot
                be built or run.
        """
        images = prepare_images(self.calib_data, artefact.manifest.preset.sizing)
        evaluate, unit = self._quality(artefact, images)
        calibration = self._calibrate(artefact, reporter)
        mixer = Mixer(artefact, calibration, self.int8, self.half)
        assert self.int8.max_drop is not None
        with LatencyBench(artefact.model, self.opener, images[0]) as bench:
            steps = TrialSteps(build=mixer, measure=bench, evaluate=evaluate, reporter=reporter)
            tuned = autotune(
                tuple(mixer.parts), self.precisions, steps, max_drop=self.int8.max_drop
            )
            described = {
                "target": self.opener.target,
                "runtime": bench.runtime,
                "unit": unit,
                **self._describe(tuned, calibration),
            }
        reporter.table(tuned.table())
        model = mixer(tuned.best.mixture)
        return ConvertedGraph(model, graph_precision(model), mixture=Int8Build.from_dict(described))

    def _quality(
        self, artefact: OnnxArtefact, images: Sequence[Prepared]
    ) -> tuple[Callable[[onnx.ModelProto], float], str]:
        """Return what measures how much worse a graph is, and in which unit."""
        if self.quality is not None:
            return self.quality(artefact), "points of AP"
        mismatch = DetectionMismatch(artefact.model, images)
        return lambda model: mismatch(emulate_low_precision(model)), "per cent of detections"

    def _calibrate(self, artefact: OnnxArtefact, reporter: Reporter) -> Calibration:
        return calibrate(
            artefact.model,
            calibrated_values(artefact.model),
            self.calib_data,
            artefact.manifest.preset.sizing,
            max_images=self.int8.max_images,
            reporter=reporter,
        )

    def _describe(self, tuned: SearchResult, calibration: Calibration) -> dict[str, Any]:
        """What the manifest says of a search beside its target."""
        how = {
            "max_drop": self.int8.max_drop,
            "scheme": self.int8.scheme,
            "method": self.int8.method,
            "precisions": self.precisions,
        }
        return (
            how | {"images": calibration.images, "calibration": calibration.key} | tuned.to_dict()
        )


class Mixer:
    """Makes the graph of a mixture, metadata inside; the float32 graph itself where all is float32.

    Attributes:
        parts: names of the layers by part of the network; only parts that have a choice.
    """

    def __init__(
        self,
        artefact: OnnxArtefact,
        calibration: Calibration,
        int8: Int8Options,
        half: LowPrecision | None,
    ) -> None:
        """Find the parts that have a choice.

        Args:
            artefact: in float32.
            calibration: of its activations.
            int8: how 8-bit layers are made.
            half: the half precision that takes part; None for none.
        """
        self.artefact, self.int8 = artefact, int8
        self.half: LowPrecision | None = half
        self.ranges = calibration.ranges(int8.method)
        possible = {layer.name for layer in all_layers(ir.from_proto(artefact.model).graph)}
        parts = network_parts(artefact.model)
        self.parts = {
            part: names
            for part, names in parts.items()
            if half is not None or possible.intersection(names)
        }

    def __call__(self, mixture: Mixture) -> onnx.ModelProto:
        """Return the graph of a precision for every part."""
        model = mix_precisions(
            self.artefact.model, mixture, self.parts, quantize=self._quantize, beside_int8=self.half
        )
        if model is not self.artefact.model:
            _stamp(model, self.artefact)
        return model

    def _quantize(self, model: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
        return quantize(model, self.ranges, scheme=self.int8.scheme, keep=keep)


def _stamp(model: onnx.ModelProto, artefact: OnnxArtefact) -> None:
    """Write into a graph's metadata what it is, as runtimes read it there."""
    manifest = replace(
        artefact.manifest,
        precision=graph_precision(model),
        artefact_sha256="",
        parity=None,
        self_test=None,
    )
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})


def graph_precision(model: onnx.ModelProto) -> str:
    """Return the lowest precision that a graph holds: "int8", "fp16", "bf16" or "fp32"."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    types = {tensor.data_type for tensor in model.graph.initializer}
    return next((name for name, kind in DATA_TYPES.items() if int(kind) in types), "fp32")
