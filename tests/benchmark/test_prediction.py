import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmark.truths import annotation, coco, write_json
from inference.fakes import RedEngine, red_image, write_image
from numpy.typing import NDArray

from tood_deploy.benchmark.evaluation.predict import PredictionFile, predict, prediction_key
from tood_deploy.data.coco import Truth, read_truth
from tood_deploy.data.image_set import list_image_files
from tood_deploy.engines import BatchDetections
from tood_deploy.errors import ArtefactError, InputError
from tood_deploy.inference.detector import Detector

Pixels, Sizes = NDArray[np.uint8], NDArray[np.int32]
Open = Callable[..., PredictionFile]


class BrokenEngine(RedEngine):
    """Gives NaN for one image."""

    def __init__(self, broken_call: int) -> None:
        super().__init__()
        self.broken_call = broken_call

    def _run(
        self, images: Pixels, valid_hw: Sizes, score_threshold: float, iou_threshold: float
    ) -> BatchDetections:
        found = super()._run(images, valid_hw, score_threshold, iou_threshold)
        if len(self.batches) > self.broken_call:
            found.scores[0, 0] = np.nan
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(1, 7):
        write_image(tmp_path / "images" / f"{i}.png", red_image(left=4 * i))
    return tmp_path / "images"


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    return read_truth(
        write_json(tmp_path / "truth.json", coco([annotation(1, 1, (4, 8, 16, 16))], images=6))
    )


@pytest.fixture
def kept_by(tmp_path: Path, truth: Truth, folder: Path) -> Open:
    """The prediction file that a detector writes to."""

    def open_file(detector: Detector) -> PredictionFile:
        key = prediction_key(detector, "red", truth, list_image_files(truth, folder))
        return PredictionFile(key.file_in(tmp_path / "out"), key)

    return open_file


def detector_of(engine: RedEngine, **options: float) -> Detector:
    return Detector(engine, imgsz=(48, 64), **{"conf": 0.05, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_every_image_is_detected_in(truth: Truth, folder: Path, kept_by: Open, batch: int) -> None:
    detector = detector_of(RedEngine())
    kept = kept_by(detector)
    predict(detector, truth, list_image_files(truth, folder), kept, batch, quiet=True)
    results = kept.results([1, 2])
    assert results.image_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert results.boxes_xywh.tolist() == [[4 * i, 8, 16, 16] for i in range(1, 7)]


def test_an_interrupted_run_goes_on(truth: Truth, folder: Path, kept_by: Open) -> None:
    files = list_image_files(truth, folder)
    interrupted = detector_of(RedEngine(fail_at_call=3))
    with pytest.raises(RuntimeError, match="the engine broke"):
        predict(interrupted, truth, files, kept_by(interrupted), 1, quiet=True)
    engine = RedEngine()
    kept = kept_by(detector_of(engine))
    assert len(kept) == 3
    predict(detector_of(engine), truth, files, kept, 1, quiet=True)
    assert len(engine.batches) == 3
    assert kept.results([1, 2]).image_ids.tolist() == [1, 2, 3, 4, 5, 6]
    predict(detector_of(engine), truth, files, kept_by(detector_of(engine)), 1, quiet=True)
    assert len(engine.batches) == 3


def test_another_threshold_annotation_or_image_is_another_run(truth: Truth, folder: Path) -> None:
    files = list_image_files(truth, folder)
    keys = [
        prediction_key(detector_of(RedEngine(), **options), "red", truth, files)
        for options in ({}, {"conf": 0.06}, {"iou": 0.5}, {"max_det": 3}, {"fast_decode": True})
    ]
    keys.append(prediction_key(detector_of(RedEngine()), "blue", truth, files))
    write_image(folder / "3.png", red_image(left=33))
    keys.append(prediction_key(detector_of(RedEngine()), "red", truth, files))
    os.utime(folder / "3.png", (1, 1))
    keys.append(prediction_key(detector_of(RedEngine()), "red", truth, files))
    truth.path.write_text(truth.path.read_text() + " ")
    keys.append(prediction_key(detector_of(RedEngine()), "red", truth, files))
    assert len({key.header() for key in keys}) == len(keys)
    again = prediction_key(detector_of(RedEngine()), "red", truth, files)
    assert again.header() == keys[-1].header()


def test_images_decoded_smaller_keep_their_size(tmp_path: Path) -> None:
    for i in range(1, 3):
        write_image(tmp_path / "large" / f"{i}.jpg", red_image(192, 256, left=64, side=96))
    content = coco([annotation(1, 1, (64, 8, 96, 96))], images=2)
    for image in content["images"]:
        image |= {"file_name": f"{image['id']}.jpg", "height": 192, "width": 256}
    truth = read_truth(write_json(tmp_path / "large.json", content))
    files = list_image_files(truth, tmp_path / "large")
    detector = detector_of(RedEngine(), fast_decode=True)
    key = prediction_key(detector, "red", truth, files)
    kept = PredictionFile(key.file_in(tmp_path), key)
    predict(detector, truth, files, kept, 1, quiet=True)
    assert kept.sizes_hw == {1: (192, 256), 2: (192, 256)}
    np.testing.assert_allclose(kept.results([1, 2]).boxes_xywh, [[64, 8, 96, 96]] * 2, atol=8)


def test_values_that_are_no_numbers_name_the_image(
    truth: Truth, folder: Path, kept_by: Open
) -> None:
    detector = detector_of(BrokenEngine(2))
    kept = kept_by(detector)
    with pytest.raises(ArtefactError, match=r"NaN or infinite.*image .*3\.png\)"):
        predict(detector, truth, list_image_files(truth, folder), kept, 1, quiet=True)
    assert list(kept.sizes_hw) == [1, 2]


def test_a_damaged_image_ends_the_run_after_the_others(
    truth: Truth, folder: Path, kept_by: Open
) -> None:
    (folder / "2.png").write_bytes(b"nothing")
    detector = detector_of(RedEngine())
    kept = kept_by(detector)
    with pytest.raises(InputError, match=r"1 of 6 images cannot be read, the first: .*2\.png"):
        predict(detector, truth, list_image_files(truth, folder), kept, 2, quiet=True)
    assert sorted(kept.sizes_hw) == [1, 3, 4, 5, 6]


def test_missing_images_are_counted(truth: Truth, folder: Path) -> None:
    (folder / "2.png").unlink()
    (folder / "4.png").unlink()
    with pytest.raises(
        InputError, match=r"2 of the 6 images .* are missing, the first is .*2\.png"
    ):
        list_image_files(truth, folder)
    with pytest.raises(InputError, match="no such folder"):
        list_image_files(truth, folder / "deeper")


def test_images_of_one_size_are_put_together(tmp_path: Path) -> None:
    content = coco([annotation(1, 1, (4, 8, 16, 16))], images=6)
    for image in content["images"]:
        image["width"] = 64 if image["id"] % 2 else 96
        write_image(tmp_path / "mixed" / image["file_name"], red_image(width=image["width"]))
    truth = read_truth(write_json(tmp_path / "mixed.json", content))
    files = list_image_files(truth, tmp_path / "mixed")
    detector = Detector(RedEngine(), imgsz=(48, 96), conf=0.05)
    key = prediction_key(detector, "red", truth, files)
    predict(detector, truth, files, PredictionFile(key.file_in(tmp_path), key), 3, quiet=True)
    assert isinstance(detector.engine, RedEngine)
    assert detector.engine.batches == [3, 3]
