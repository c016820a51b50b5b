from pathlib import Path
from typing import Any

import pytest
from benchmark.truths import annotation, coco, truth_of, write_json

from tood_deploy.data.coco import read_truth
from tood_deploy.errors import InputError

BOX = annotation(1, 1, (1, 2, 3, 4))


def test_boxes_come_in_order_of_the_images(tmp_path: Path) -> None:
    truth = truth_of(
        tmp_path,
        [
            annotation(3, 2, (1, 1, 4, 4)),
            annotation(1, 1, (2, 2, 4, 4), area=9.5, iscrowd=1),
            annotation(3, 1, (3, 3, 4, 4)),
        ],
    )
    assert truth.boxes.image_ids.tolist() == [1, 3, 3]
    assert truth.boxes.boxes_xywh[:, 0].tolist() == [2, 1, 3]
    assert truth.boxes.areas.tolist() == [9.5, 16, 16]
    assert truth.boxes.crowd.tolist() == [True, False, False]
    assert truth.boxes.span(2, 3) == slice(1, 3)
    assert truth.images[2].size_hw == (48, 64)


def test_only_some_categories(tmp_path: Path) -> None:
    truth = truth_of(
        tmp_path, [annotation(1, 1, (1, 1, 4, 4)), annotation(2, 2, (2, 2, 4, 4))]
    ).only({2})
    assert truth.categories == {2: "dog"}
    assert truth.boxes.image_ids.tolist() == [2]
    assert len(truth.images) == 3


def changed(**values: Any) -> dict[str, Any]:
    return coco([BOX]) | values


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "found a list"),
        ({"preset": 1}, "an object with preset"),
        (changed(images=[]), "images is empty"),
        (changed(annotations=[]), "annotations is empty"),
        (changed(categories=[]), "categories is empty"),
        (changed(images=[{"file_name": "a"}]), "image number 0 has no whole-numbered id"),
        (changed(images=[{"id": 1}]), "no file_name"),
        (changed(categories=[{"id": 1}]), "no name"),
        (
            changed(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]),
            "image id 1 stands twice",
        ),
        (
            changed(images=[{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]),
            "2 images are called a",
        ),
        (
            changed(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]),
            "2 categories are called a",
        ),
        (coco([annotation(9, 1, (1, 2, 3, 4))]), "image id 9, which the file does not list"),
        (coco([annotation(1, 9, (1, 2, 3, 4))]), "category id 9, which the file does not list"),
        (coco([annotation(1, 1, (1, 2, 3))]), "expected"),
        (coco([annotation(1, 1, (1, 2, 3, float("nan")))]), "nan"),
        (coco([{"image_id": 1, "category_id": 1}]), "cannot be read"),
        (changed(annotations=["x"]), "cannot be read"),
    ],
)
def test_what_is_no_annotation_file_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_truth(write_json(tmp_path / "truth.json", content))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "truth.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_truth(path)
