"""`tood-export --autotune-precision`: from a float32 artefact to the fastest mixture of precisions whose quality stays.

Puts together what others do: one calibration, mixed graphs, their latency in the target's runtime, their quality, the search itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from tood_deploy.benchmark.precision_latency import LatencyBench, Opener
from tood_deploy.errors import ToodError
from tood_deploy.export.onnx_artefact import OnnxArtefact
from tood_deploy.export.precision.autotune import Hands, Mixture, Tuned, autotune
from tood_deploy.export.precision.calibration import Calibration, calibrate
from tood_deploy.export.precision.emulation import emulate_low_precision
from tood_deploy.export.precision.int8 import Int8Options, prepare_pictures
from tood_deploy.export.precision.lowering import Lowered, QualityOf
from tood_deploy.export.precision.mismatch import DetectionMismatch
from tood_deploy.export.precision.mixed_precision import DATA_TYPES, LowPrecision
from tood_deploy.export.precision.mixture import mix_precisions, network_parts
from tood_deploy.export.precision.quantizable import all_layers
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.export.precision.sensitivity import Prepared
from tood_deploy.export.progress import progress_bar
from tood_deploy.manifest import METADATA_KEY

Tell = Callable[[Any], None]


@dataclass(frozen=True)
class PrecisionSearch:
    """A search, to be had by calling it with the float32 artefact; see `export.lowering.Lower`.

    Attributes:
        opener: opens graphs in the runtime that they are made for.
        calib_data: a folder of pictures to calibrate on; the first is also what latency is measured on.
        int8: how 8-bit layers are made; its `max_drop` is the most that quality may drop.
        half: the half precision that takes part, of what is not 8-bit, too; None for none.
        quality: makes what tells how much worse a graph is; per cent of mismatched detections where not given.
        quiet: no progress bars.
    """

    opener: Opener
    calib_data: Path
    int8: Int8Options
    half: LowPrecision | None = None
    quality: QualityOf | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.int8.max_drop is None:
            raise ToodError("the most that quality may drop is not given; give --max-ap-drop with annotations, or --max-drop without")
        if self.half is not None and self.opener.target != "engine":
            raise ToodError(f"{self.half} takes part in the search for {self.opener.target}, which is measured on the CPU; leave it out")
        self.opener.check()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that a part of the network may have, the reference first."""
        return ("fp32", *([self.half] if self.half else []), "int8")

    def __call__(self, artefact: OnnxArtefact, tell: Tell) -> Lowered:
        """Searches; `tell` is given a line for every trial, and the table of all.

        Raises:
            ToodError: pictures cannot be read, classes and categories differ, or a graph cannot be built or run.
        """
        pictures = prepare_pictures(self.calib_data, artefact.manifest.preset.sizing)
        evaluate, unit = self._quality(artefact, pictures)
        calibration = self._calibrate(artefact, tell)
        mixer = Mixer(artefact, calibration, self.int8, self.half)
        assert self.int8.max_drop is not None
        with LatencyBench(artefact.model, self.opener, pictures[0]) as bench:
            hands = Hands(build=mixer, measure=bench, evaluate=evaluate, say=tell)
            tuned = autotune(tuple(mixer.parts), self.precisions, hands, max_drop=self.int8.max_drop)
            told = {"target": self.opener.target, "runtime": bench.runtime, "unit": unit, **self._describe(tuned, calibration)}
        tell(tuned.table())
        model = mixer(tuned.best.mixture)
        return Lowered(model, graph_precision(model), {"autotune": told})

    def _quality(self, artefact: OnnxArtefact, pictures: Sequence[Prepared]) -> tuple[Callable[[onnx.ModelProto], float], str]:
        """How much worse a graph is, and in which unit."""
        if self.quality is not None:
            return self.quality(artefact), "points of AP"
        mismatch = DetectionMismatch(artefact.model, pictures)
        return lambda model: mismatch(emulate_low_precision(model)), "per cent of detections"

    def _calibrate(self, artefact: OnnxArtefact, tell: Tell) -> Calibration:
        model, sizing = artefact.model, artefact.manifest.preset.sizing
        with progress_bar("calibrating", self.quiet) as progress:
            most = self.int8.most_pictures
            return calibrate(model, calibrated_values(model), self.calib_data, sizing, most=most, progress=progress, say=tell)

    def _describe(self, tuned: Tuned, calibration: Calibration) -> dict[str, Any]:
        """What the manifest says of a search beside its target."""
        how = {"max_drop": self.int8.max_drop, "scheme": self.int8.scheme, "method": self.int8.method, "precisions": self.precisions}
        return how | {"pictures": calibration.pictures, "calibration": calibration.key} | tuned.to_dict()


class Mixer:
    """Makes the graph of a mixture, metadata inside; the float32 graph itself where that is the mixture.

    Attributes:
        parts: names of the layers by part of the network; only parts that have a choice.
    """

    def __init__(self, artefact: OnnxArtefact, calibration: Calibration, int8: Int8Options, half: LowPrecision | None) -> None:
        self.artefact, self.int8 = artefact, int8
        self.half: LowPrecision | None = half
        self.ranges = calibration.ranges(int8.method)
        possible = {layer.name for layer in all_layers(ir.from_proto(artefact.model).graph)}
        parts = network_parts(artefact.model)
        self.parts = {part: names for part, names in parts.items() if half is not None or possible.intersection(names)}

    def __call__(self, mixture: Mixture) -> onnx.ModelProto:
        """The graph of a precision for every part."""
        model = mix_precisions(self.artefact.model, mixture, self.parts, quantize=self._quantize, beside_int8=self.half)
        if model is not self.artefact.model:
            _stamp(model, self.artefact)
        return model

    def _quantize(self, model: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
        return quantize(model, self.ranges, scheme=self.int8.scheme, keep=keep)


def _stamp(model: onnx.ModelProto, artefact: OnnxArtefact) -> None:
    """Writes into a graph's metadata what it is, as runtimes read it there."""
    manifest = replace(artefact.manifest, precision=graph_precision(model), artefact_sha256="", parity={}, self_test={})
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})


def graph_precision(model: onnx.ModelProto) -> str:
    """The lowest precision that a graph holds: "int8", "fp16", "bf16" or "fp32"."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    found = {tensor.data_type for tensor in model.graph.initializer}
    return next((name for name, kind in DATA_TYPES.items() if int(kind) in found), "fp32")
