"""How many detections of a float32 graph another graph loses or adds: quality where there are no annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from tood_deploy.errors import InputError
from tood_deploy.export.precision.sensitivity import Prepared
from tood_deploy.export.runners import graph_inputs
from tood_deploy.graph_io import OUTPUTS
from tood_deploy.onnx_session import open_session
from tood_deploy.parity.compare import match_overlapping
from tood_deploy.rows import Rows, batch_rows

SCORE_THRESHOLD, IOU_THRESHOLD = 0.3, 0.6
SCORE_TOLERANCE = 0.1


class DetectionMismatch:
    """Compares graphs with one reference, on the same pictures."""

    def __init__(self, reference: onnx.ModelProto, pictures: Sequence[Prepared], score_threshold: float = SCORE_THRESHOLD) -> None:
        """Runs the reference; detections have a score above the threshold.

        Raises:
            InputError: it finds nothing in the pictures.
        """
        self.pictures, self.score_threshold = pictures, score_threshold
        self.expected = self._detect(reference)
        if not any(map(len, self.expected)):
            raise InputError(
                f"nothing is found with a score above {score_threshold} in {len(pictures)} calibration pictures, so quality cannot be "
                "measured; give pictures of what is to be found"
            )

    def __call__(self, model: onnx.ModelProto) -> float:
        """Per cent of the detections of both that only one of the two has; a pair overlaps and differs little in score."""
        found = self._detect(model)
        total = sum(map(len, self.expected)) + sum(map(len, found))
        matched = sum(len(match_overlapping(*rows, SCORE_TOLERANCE)[0]) for rows in zip(self.expected, found, strict=True))
        return 100 * (1 - 2 * matched / total)

    def _detect(self, model: onnx.ModelProto) -> list[Rows]:
        session = open_session(model.SerializeToString())
        rows = []
        for image, valid_hw in self.pictures:
            inputs = graph_inputs(image[None], np.array([valid_hw], np.int32), self.score_threshold, IOU_THRESHOLD)
            found: Any = session.run(list(OUTPUTS), inputs)
            rows += batch_rows(found)
        return rows
