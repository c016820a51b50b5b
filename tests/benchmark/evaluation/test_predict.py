import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.small_coco import annotation, coco, write_json
from inference.fakes import RedEngine, red_image, write_image
from numpy.typing import NDArray

from tood_deploy.benchmark.evaluation.predict import Key, PredictionFile, predict, prediction_key
from tood_deploy.data.coco import Annotations, read_annotations
from tood_deploy.data.image_set import list_image_files
from tood_deploy.detections import Detections
from tood_deploy.engines import BatchDetections
from tood_deploy.errors import ArtefactError, InputError, OutputError
from tood_deploy.inference.detector import Detector
from tood_deploy.reporter import Reporter

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
def truth(tmp_path: Path) -> Annotations:
    return read_annotations(
        write_json(tmp_path / "truth.json", coco([annotation(1, 1, (4, 8, 16, 16))], images=6))
    )


@pytest.fixture
def kept_by(tmp_path: Path, truth: Annotations, folder: Path) -> Open:
    """The prediction file that a detector writes to."""

    def open_file(detector: Detector) -> PredictionFile:
        key = prediction_key(detector, "red", truth, list_image_files(truth, folder))
        return PredictionFile(key.file_in(tmp_path / "out"), key)

    return open_file


def detector_of(engine: RedEngine, **options: float) -> Detector:
    return Detector(engine, imgsz=(48, 64), **{"conf": 0.05, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_every_image_is_detected_in(
    truth: Annotations, folder: Path, kept_by: Open, batch: int
) -> None:
    detector = detector_of(RedEngine())
    kept = kept_by(detector)
    predict(detector, truth, list_image_files(truth, folder), kept, batch, Reporter.silent())
    results = kept.results([1, 2])
    assert results.image_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert results.boxes_xywh.tolist() == [[4 * i, 8, 16, 16] for i in range(1, 7)]


def test_an_interrupted_run_goes_on(truth: Annotations, folder: Path, kept_by: Open) -> None:
    files = list_image_files(truth, folder)
    interrupted = detector_of(RedEngine(fail_at_call=3))
    with pytest.raises(RuntimeError, match="the engine broke"):
        predict(interrupted, truth, files, kept_by(interrupted), 1, Reporter.silent())
    engine = RedEngine()
    kept = kept_by(detector_of(engine))
    assert len(kept) == 3
    predict(detector_of(engine), truth, files, kept, 1, Reporter.silent())
    assert len(engine.batches) == 3
    assert kept.results([1, 2]).image_ids.tolist() == [1, 2, 3, 4, 5, 6]
    predict(detector_of(engine), truth, files, kept_by(detector_of(engine)), 1, Reporter.silent())
    assert len(engine.batches) == 3


def test_another_threshold_annotation_or_image_is_another_run(
    truth: Annotations, folder: Path
) -> None:
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
    truth = read_annotations(write_json(tmp_path / "large.json", content))
    files = list_image_files(truth, tmp_path / "large")
    detector = detector_of(RedEngine(), fast_decode=True)
    key = prediction_key(detector, "red", truth, files)
    kept = PredictionFile(key.file_in(tmp_path), key)
    predict(detector, truth, files, kept, 1, Reporter.silent())
    assert kept.sizes_hw == {1: (192, 256), 2: (192, 256)}
    np.testing.assert_allclose(kept.results([1, 2]).boxes_xywh, [[64, 8, 96, 96]] * 2, atol=8)


def test_values_that_are_no_numbers_name_the_image(
    truth: Annotations, folder: Path, kept_by: Open
) -> None:
    detector = detector_of(BrokenEngine(2))
    kept = kept_by(detector)
    with pytest.raises(ArtefactError, match=r"NaN or infinite.*image .*3\.png\)"):
        predict(detector, truth, list_image_files(truth, folder), kept, 1, Reporter.silent())
    assert list(kept.sizes_hw) == [1, 2]


def test_a_damaged_image_ends_the_run_after_the_others(
    truth: Annotations, folder: Path, kept_by: Open
) -> None:
    (folder / "2.png").write_bytes(b"nothing")
    detector = detector_of(RedEngine())
    kept = kept_by(detector)
    with pytest.raises(InputError, match=r"1 of 6 images cannot be read, the first: .*2\.png"):
        predict(detector, truth, list_image_files(truth, folder), kept, 2, Reporter.silent())
    assert sorted(kept.sizes_hw) == [1, 3, 4, 5, 6]


def test_missing_images_are_counted(truth: Annotations, folder: Path) -> None:
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
    truth = read_annotations(write_json(tmp_path / "mixed.json", content))
    files = list_image_files(truth, tmp_path / "mixed")
    detector = Detector(RedEngine(), imgsz=(48, 96), conf=0.05)
    key = prediction_key(detector, "red", truth, files)
    predict(
        detector, truth, files, PredictionFile(key.file_in(tmp_path), key), 3, Reporter.silent()
    )
    assert isinstance(detector.engine, RedEngine)
    assert detector.engine.batches == [3, 3]


KEY = Key({"model": "a", "conf": 0.05})


def some(count: int = 2) -> Detections:
    boxes = np.array([[1, 2, 4, 6], [0.1, 0.2, 30.3, 40.4]], np.float32)[:count]
    return Detections(
        boxes, np.array([0.9, 1 / 3], np.float32)[:count], np.array([1, 0], np.int32)[:count]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = KEY.file_in(tmp_path)
    with PredictionFile(path, KEY) as kept:
        kept.add(7, (48, 64), some())
        kept.add(3, (48, 64), some(1))
        kept.add(5, (10, 20), some(0))
    return path


def test_detections_come_back_bit_by_bit_in_order_of_the_images(path: Path) -> None:
    kept = PredictionFile(path, KEY)
    results = kept.results([10, 20])
    assert kept.sizes_hw == {7: (48, 64), 3: (48, 64), 5: (10, 20)}
    assert results.image_ids.tolist() == [3, 7, 7]
    assert results.category_ids.tolist() == [20, 20, 10]
    assert results.scores.tolist() == [
        float(score) for score in np.array([0.9, 0.9, 1 / 3], np.float32)
    ]
    rows = some().to_coco(7, [10, 20])
    assert [row["bbox"] for row in rows] == results.boxes_xywh[1:].tolist()


def test_classes_without_a_category_are_left_out(path: Path) -> None:
    assert PredictionFile(path, KEY).results([None, 20]).category_ids.tolist() == [20, 20]
    assert len(PredictionFile(path, KEY).results([None, None])) == 0


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_in_the_middle_is_done_again(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = PredictionFile(path, KEY)
    assert list(kept.sizes_hw) == [7, 3]
    with kept:
        kept.add(5, (10, 20), some(0))
    assert path.read_bytes() == whole


def test_a_file_cut_in_its_first_line_starts_anew(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    with PredictionFile(path, KEY) as kept:
        assert len(kept) == 0
        for image, size, count in ((7, (48, 64), 2), (3, (48, 64), 1), (5, (10, 20), 0)):
            kept.add(image, size, some(count))
    assert path.read_bytes() == whole


def test_every_value_makes_another_file(tmp_path: Path) -> None:
    keys = (
        KEY,
        Key({"model": "b", "conf": 0.05}),
        Key({"model": "a", "conf": 0.051}),
        Key({"model": "a"}),
    )
    assert len({key.file_in(tmp_path) for key in keys}) == 4


def test_a_file_of_another_key_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="delete it"):
        PredictionFile(path, Key({"model": "b"}))


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"x",
        b'{"image_id": 1, "boxes": [[1]], "scores": [], "class_ids": [], "size_hw": [1, 2]}',
        b'{"image_id": [1], "boxes": [], "scores": [], "class_ids": [], "size_hw": [1, 2]}',
        b'{"image_id": 1, "boxes": [], "scores": [0.5], "class_ids": [], "size_hw": [1, 2]}',
        b'{"image_id": 1, "boxes": [], "scores": [], "class_ids": [], "size_hw": [1]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused(path: Path, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(InputError, match=r"damaged .*delete it"):
        PredictionFile(path, KEY)


def test_a_class_that_the_model_does_not_have_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"of 1 classes.*delete it"):
        PredictionFile(path, KEY).results([1])


def test_two_runs_do_not_write_into_one_file(path: Path) -> None:
    whole = path.read_bytes()
    with PredictionFile(path, KEY) as first:
        with pytest.raises(OutputError, match="another tood-eval"), PredictionFile(path, KEY):
            pass
        first.add(9, (10, 20), some(0))
    assert path.read_bytes().startswith(whole)
    with PredictionFile(path, KEY) as kept:
        assert len(kept) == 4
