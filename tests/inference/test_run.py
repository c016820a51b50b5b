"""What a run prints on stderr."""

from pathlib import Path
from typing import Any

import pytest
from inference.fakes import RedEngine, red_image, write_image

from tood_deploy.inference.detector import Detector
from tood_deploy.inference.run import Outputs, run_inference
from tood_deploy.inference.source import open_source
from tood_deploy.reporter import Reporter


class RemarkingEngine(RedEngine):
    """Has one remark from the start, and another at its second image."""

    def __init__(self) -> None:
        super().__init__()
        self.remarks = ["it was tuned elsewhere"]
        self.notes = self.remarks

    def _run(self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float) -> Any:
        if len(self.batches) == 1:
            self.remarks.append("it runs without graphs")
        return super()._run(images, valid_hw, score_threshold, iou_threshold)


@pytest.mark.parametrize("quiet", [False, True])
def test_remarks_of_the_engine_are_told_once(
    quiet: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        write_image(tmp_path / f"{number}.png", red_image())
    run_inference(
        Detector(RemarkingEngine()), open_source(str(tmp_path)), Outputs(), Reporter(quiet)
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert told == (
        [] if quiet else ["note: it was tuned elsewhere", "note: it runs without graphs"]
    )
