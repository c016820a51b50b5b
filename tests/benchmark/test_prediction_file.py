from pathlib import Path

import numpy as np
import pytest

from tood_deploy.benchmark.evaluation.predict import Key, PredictionFile
from tood_deploy.detections import Detections
from tood_deploy.errors import InputError

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
    ],
)
def test_a_damaged_file_is_refused(path: Path, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(InputError, match=r"damaged .*delete it"):
        PredictionFile(path, KEY)
