"""What a lower precision costs in AP: graphs in memory, run on annotated pictures and compared with the float32 graph they come from."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from tood_deploy.benchmark.categories import map_categories
from tood_deploy.benchmark.coco_ap import evaluate
from tood_deploy.benchmark.evaluation_run import DataSet
from tood_deploy.benchmark.prediction import predict
from tood_deploy.benchmark.prediction_file import Key, PredictionFile
from tood_deploy.errors import ArtefactError, InputError
from tood_deploy.export.onnx_artefact import OnnxArtefact
from tood_deploy.export.precision.emulation import emulate_low_precision
from tood_deploy.export.progress import progress_bar
from tood_deploy.inference.detector import Detector

SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6


class ApDrop:
    """Points of AP that graphs lose against a float32 one; ONNX Runtime on the CPU runs both, half precision emulated."""

    def __init__(self, data: DataSet, reference: OnnxArtefact, *, quiet: bool = True) -> None:
        """Pairs classes and categories; runs nothing yet.

        Args:
            data: annotations with their pictures.
            reference: the float32 artefact.
            quiet: say nothing of how far a measurement is.

        Raises:
            ToodError: the classes are not the categories of the annotations.
        """
        self.category_ids = map_categories(reference.manifest.preset.class_names, data.truth)
        self.data, self.reference, self.quiet = data, reference, quiet

    @property
    def reference_ap(self) -> float:
        """AP of the float32 graph in points, 0 to 100; measured once.

        Raises:
            InputError: it is 0, so that nothing could be lost; or pictures cannot be read.
        """
        if (ap := self._measured_ap) <= 0:
            raise InputError(
                f"{self.data.truth.path}: the float32 network has no AP on its {len(self.data.files)} pictures, so none can be lost; "
                "give annotated pictures of what is to be found"
            )
        return ap

    @cached_property
    def _measured_ap(self) -> float:
        return self._ap(self.reference.model)

    def __call__(self, model: onnx.ModelProto) -> float:
        """Points of AP, 0 to 100, that a graph made from the reference loses; below 0 where it gains. NaN among its outputs loses all."""
        expected = self.reference_ap
        try:
            return expected - self._ap(model)
        except _NotNumbersError:
            return expected

    def file_ap(self, path: Path, **engine_options: Any) -> float:
        """Measure the AP of an artefact in points, 0 to 100, in the runtime that its file belongs to."""
        with tempfile.TemporaryDirectory(prefix="tood-") as folder:
            kept = PredictionFile(Path(folder) / "predictions.jsonl", Key({}))
            with Detector(path, conf=SCORE_THRESHOLD, iou=IOU_THRESHOLD, self_test=False, **engine_options) as detector:
                self._predict(detector, kept)
            return 100 * evaluate(self.data.truth, kept.results(self.category_ids)).numbers["AP"]

    def _ap(self, model: onnx.ModelProto) -> float:
        with tempfile.TemporaryDirectory(prefix="tood-") as folder:
            path = Path(folder) / "graph.onnx"
            onnx.save(emulate_low_precision(model), path)
            return self.file_ap(path)

    def _predict(self, detector: Detector, kept: PredictionFile) -> None:
        try:
            with progress_bar("measuring AP", self.quiet) as progress:
                predict(detector, self.data.truth, self.data.files, kept, 1, quiet=True, progress=progress)
        except ArtefactError as error:  # which this raises for nothing else
            raise _NotNumbersError(str(error)) from error


class _NotNumbersError(ArtefactError):
    """The graph gave values that are not numbers."""
