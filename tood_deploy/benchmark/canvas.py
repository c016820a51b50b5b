"""What padding every picture to one canvas changes, as an engine of fixed shape does: the head pools over the whole padded input."""

from __future__ import annotations

from tood_deploy.benchmark.matching import RowDeviation
from tood_deploy.benchmark.picture_set import Picture
from tood_deploy.benchmark.scoring import CocoRows, Scoring
from tood_deploy.benchmark.stage_deviations import rows_of
from tood_deploy.benchmark.stages import STAGES, StageRunner
from tood_deploy.benchmark.subject import network_inputs
from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError
from tood_deploy.preprocess import fit_imgsz, resize_and_pad
from tood_deploy.presets import SIZE_DIVISOR
from tood_deploy.rows import Rows


class Canvas:
    """Runs a detector on pictures that are padded to one canvas.

    Attributes:
        net_hw: rows and columns of the canvas.
        rows: COCO rows.
        change: against the same detector with each picture padded no further than needed, in the picture's pixels.
        shrunk: pictures that were too tall or too wide for the canvas and were scaled down further to fit.
    """

    def __init__(
        self, runner: StageRunner, net_hw: tuple[int, int], imgsz: tuple[int, int], conf: float, iou: float, scoring: Scoring | None
    ) -> None:
        if min(net_hw) < SIZE_DIVISOR or net_hw[0] % SIZE_DIVISOR or net_hw[1] % SIZE_DIVISOR:
            raise ToodError(f"--net-size is {net_hw[0]} {net_hw[1]}; expected two multiples of {SIZE_DIVISOR}")
        self.runner, self.net_hw, self.imgsz, self.scoring = runner, net_hw, imgsz, scoring
        self.conf, self.iou = conf, iou
        self.rows: CocoRows = []
        self.change = RowDeviation()
        self.shrunk = 0

    def add(self, picture: Picture, dynamic: Detections) -> None:
        """Adds one picture; `dynamic` is what the detector finds in it when it is padded no further than needed."""
        image_bgr = picture.read()
        fitting = fit_imgsz(image_bgr.shape[:2], self.imgsz, self.net_hw)
        self.shrunk += fitting != self.imgsz
        image, transform = resize_and_pad(image_bgr, fitting, self.net_hw)
        rows = rows_of(STAGES[-1], self.runner.run_all(network_inputs(image, transform, self.conf, self.iou)))
        found = Detections(transform.boxes_to_image(rows.boxes), rows.scores, rows.labels, dynamic.class_names)
        self.change.add(Rows(dynamic.boxes, dynamic.scores, dynamic.class_ids), Rows(found.boxes, found.scores, found.class_ids))
        if self.scoring is not None:
            self.rows += self.scoring.rows(found, picture.image_id)
