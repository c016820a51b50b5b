"""The golden self-test of an artefact: a stored picture, and the stored answer to it. NumPy and OpenCV alone.

TOOD's head pools over the whole padded input, so one picture has another answer on every canvas. An artefact of fixed canvases holds an
answer for each of them, one that takes any size a single answer, on a small canvas.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import ArtefactError
from tood_deploy.rows import Rows


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """The answer on one canvas.

    Attributes:
        net_hw: rows and columns of the canvas.
        score_threshold: lies in a gap between the scores, so that none of them is on its edge.
        expected: what is found above it.
    """

    net_hw: tuple[int, int]
    score_threshold: float
    expected: Rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a float32 survives as it is."""
        rows = {"boxes": self.expected.boxes.tolist(), "scores": self.expected.scores.tolist(), "labels": self.expected.labels.tolist()}
        return {"net_hw": list(self.net_hw), "score_threshold": self.score_threshold, **rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The case that `to_dict` wrote."""
        boxes = np.array(values["boxes"], np.float32).reshape(-1, 4)
        expected = Rows(boxes, np.array(values["scores"], np.float32), np.array(values["labels"], np.int32))
        height, width = values["net_hw"]
        return cls((height, width), float(values["score_threshold"]), expected)


@dataclass(frozen=True, eq=False)
class Golden:
    """A picture and its answers.

    Attributes:
        picture: (rows, columns, 3) uint8 RGB, lies at the top left of every canvas.
        iou_threshold: of the suppression.
        reference: what gave the answers, for reports.
        cases: an answer for each canvas.
    """

    picture: NDArray[np.uint8]
    iou_threshold: float
    reference: str
    cases: tuple[GoldenCase, ...]

    def inputs(self, net_hw: tuple[int, int], batch: int = 1) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """The picture in every slot of a batch on a canvas: `images` and `valid_hw` as an engine takes them."""
        rows, columns, _ = self.picture.shape
        images = np.zeros((batch, *net_hw, 3), np.uint8)
        images[:, :rows, :columns] = self.picture
        return images, np.array([[rows, columns]] * batch, np.int32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; the picture as PNG, whose pixels every decoder gives alike."""
        _, png = cv2.imencode(".png", self.picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        return {
            "picture_png": base64.b64encode(png.tobytes()).decode("ascii"),
            "iou_threshold": self.iou_threshold,
            "reference": self.reference,
            "cases": [case.to_dict() for case in self.cases],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> Self:
        """What `to_dict` wrote; `origin` names the file in errors.

        Raises:
            ArtefactError: it is damaged.
        """
        try:
            png = np.frombuffer(base64.b64decode(values["picture_png"], validate=True), np.uint8)
            picture = np.ascontiguousarray(np.asarray(cv2.imdecode(png, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])
            cases = tuple(GoldenCase.from_dict(case) for case in values["cases"])
            return cls(picture, float(values["iou_threshold"]), str(values["reference"]), cases)
        except (KeyError, TypeError, ValueError, IndexError, cv2.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ArtefactError(f"{origin}: the self-test in its manifest is damaged ({reason}); export the model again") from error
