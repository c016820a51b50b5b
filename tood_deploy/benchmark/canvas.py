"""What padding every picture to a canvas changes, as an engine of fixed shape does: the head pools over the whole padded input."""

from __future__ import annotations

from collections.abc import Sequence

from tood_deploy.benchmark.matching import RowDeviation
from tood_deploy.benchmark.picture_set import Picture
from tood_deploy.benchmark.scoring import CocoRows, Scoring
from tood_deploy.benchmark.stage_deviations import rows_of
from tood_deploy.benchmark.stages import STAGES, StageRunner
from tood_deploy.benchmark.subject import network_inputs
from tood_deploy.detections import Detections
from tood_deploy.preprocess import choose_canvas, fit_imgsz, resize_and_pad
from tood_deploy.rows import Rows


class Canvas:
    """Runs a detector once more, with the other padding than it is compared with: canvases, or as little as needed.

    Attributes:
        canvases_hw: rows and columns of every canvas; a picture goes to the one that shrinks it least.
        fixed: whether it is compared on the canvases, since an artefact takes nothing else. Then the detector here is the reference.
        rows: COCO rows with the other padding.
        change: from as little padding as needed to the canvases, in the picture's pixels.
        shrunk: pictures that were too tall or too wide for every canvas and were scaled down further to fit.
    """

    def __init__(
        self,
        runner: StageRunner,
        canvases_hw: Sequence[tuple[int, int]],
        fixed: bool,
        imgsz: tuple[int, int],
        conf: float,
        iou: float,
        scoring: Scoring | None,
    ) -> None:
        self.runner, self.canvases_hw, self.fixed = runner, tuple(canvases_hw), fixed
        self.imgsz, self.conf, self.iou, self.scoring = imgsz, conf, iou, scoring
        self.rows: CocoRows = []
        self.change = RowDeviation()
        self.shrunk = 0

    @property
    def title(self) -> str:
        """The canvases as text, such as "800x1344, 1344x800"."""
        return ", ".join(f"{height}x{width}" for height, width in self.canvases_hw)

    def add(self, picture: Picture, usual: Detections) -> None:
        """Adds one picture; `usual` is what the detector finds in it with the padding that it is compared with."""
        image_bgr = picture.read()
        net_hw = choose_canvas(image_bgr.shape, self.imgsz, self.canvases_hw)
        fitting = fit_imgsz(image_bgr.shape, self.imgsz, net_hw)
        self.shrunk += fitting != self.imgsz
        image, transform = resize_and_pad(image_bgr, self.imgsz) if self.fixed else resize_and_pad(image_bgr, fitting, net_hw)
        rows = rows_of(STAGES[-1], self.runner.run_all(network_inputs(image, transform, self.conf, self.iou)))
        other = Detections(transform.boxes_to_image(rows.boxes), rows.scores, rows.labels, usual.class_names)
        least, padded = (other, usual) if self.fixed else (usual, other)
        self.change.add(Rows(least.boxes, least.scores, least.class_ids), Rows(padded.boxes, padded.scores, padded.class_ids))
        if self.scoring is not None:
            self.rows += self.scoring.rows(other, picture.image_id)
