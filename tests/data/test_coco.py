"""Annotation files as tools write them: one reading for training, evaluation and results' ids."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_coco import annotation, coco, truth_of, write_json

from tood_deploy.data.coco import (
    AnnotatedImage,
    read_annotations,
    read_coco_ids,
    whole_number,
    write_annotations,
)
from tood_deploy.errors import InputError

BOX = annotation(1, 1, (1, 2, 3, 4))


def changed(**values: Any) -> dict[str, Any]:
    return coco([BOX]) | values


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
    assert not truth.problems.counts


def test_the_orders_of_the_file_are_kept_beside_those_of_the_ids(tmp_path: Path) -> None:
    content = coco([BOX])
    content["images"].reverse()
    content["categories"].reverse()
    truth = read_annotations(write_json(tmp_path / "truth.json", content))
    assert (list(truth.images), truth.file_order) == ([1, 2, 3], (3, 2, 1))
    assert (list(truth.categories), truth.class_names) == ([1, 2], ("dog", "cat"))


def test_some_categories_and_some_images(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (1, 1, 4, 4)), annotation(2, 2, (2, 2, 4, 4))])
    dogs = truth.only({2})
    assert (dogs.categories, dogs.class_names) == ({2: "dog"}, ("dog",))
    assert (dogs.boxes.image_ids.tolist(), len(dogs.images)) == ([2], 3)
    first = truth.first(1)
    assert (first.boxes.image_ids.tolist(), first.file_order) == ([1], (1,))


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"area": None}, "areas", 12),
        ({"iscrowd": None}, "crowd", False),
        ({"iscrowd": True}, "crowd", True),
        ({"iscrowd": "0"}, "crowd", False),
        ({"image_id": "1", "category_id": "1"}, "image_ids", 1),
        ({"image_id": 1.0, "bbox": ["1", "2", "3", "4"]}, "image_ids", 1),
        ({"bbox": [1, 2, 0, 4]}, "areas", 0),
    ],
)
def test_what_other_tools_write_is_read(
    tmp_path: Path, change: dict[str, Any], field: str, expected: object
) -> None:
    truth = truth_of(tmp_path, [BOX | change])
    assert getattr(truth.boxes, field).tolist() == [expected]
    assert not truth.problems.counts


@pytest.mark.parametrize("change", [{"area": 10**400}, {"bbox": [1, 2, 3, 10**400]}])
def test_numbers_that_are_too_large_are_one_error(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="annotation number 0 cannot be read"):
        truth_of(tmp_path, [BOX | change])


def test_ids_of_digits_and_absent_sizes(tmp_path: Path) -> None:
    content = changed(
        images=[{"id": "1", "file_name": "a"}, {"id": 2, "file_name": "b", "width": None}],
        categories=[{"id": "1", "name": "cat"}],
    )
    truth = read_annotations(write_json(tmp_path / "truth.json", content))
    assert truth.images == {1: AnnotatedImage("a", None), 2: AnnotatedImage("b", None)}
    assert truth.categories == {1: "cat"}


@pytest.mark.parametrize("value", [True, None, 7.5, "7.5", "x", [], float("nan"), 2**63])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"no whole number|invalid literal"):
        whole_number(value)


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("truth.json", lambda data: b"\xef\xbb\xbf" + data),
        ("truth.json", gzip.compress),
        ("truth.json.gz", gzip.compress),
        ("truth.json.gz", lambda data: gzip.compress(b"\xef\xbb\xbf" + data)),
        ("truth.json", lambda data: data.decode().encode("utf-16")),
    ],
    ids=["byte-order mark", "gzip content", "gzip", "gzip and mark", "utf-16"],
)
def test_byte_order_marks_and_compression(tmp_path: Path, name: str, encode: Any) -> None:
    (tmp_path / name).write_bytes(encode(json.dumps(coco([BOX])).encode()))
    assert len(read_annotations(tmp_path / name).boxes) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_id": 9}, "annotation without an image, left out"),
        ({"category_id": 9}, "category not listed, left out"),
        ({"bbox": [1, 2, -3, 4]}, "box of negative size, left out"),
        ({"bbox": [1, 2, 3, float("nan")]}, "box or area that is not a number, left out"),
        ({"id": 2}, "annotation id given twice, the first counts"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    truth = truth_of(tmp_path, [BOX | change, BOX | {"id": 2}])
    assert dict(truth.problems.counts) == {problem: 1}
    assert len(truth.boxes) == 1


def test_problems_name_a_few_examples(tmp_path: Path) -> None:
    boxes = [annotation(1, 1, (1, 2, -3, 4)) for _ in range(5)]
    truth = truth_of(tmp_path, [*boxes, BOX])
    assert truth.problems.lines() == ["5 x box of negative size, left out (1, 2, 3, ...)"]


def test_an_image_listed_twice_counts_once(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]
    truth = read_annotations(write_json(tmp_path / "truth.json", changed(images=images)))
    assert truth.images == {1: AnnotatedImage("a", None)}
    assert truth.problems.lines() == ["1 x image id given twice, the first counts (1)"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "found a list"),
        ({"preset": 1}, "an object with preset"),
        (changed(images=[]), "images is empty"),
        (changed(annotations=[]), "annotations is empty"),
        (changed(categories=[]), "categories is empty"),
        (changed(images=[{"file_name": "a"}]), "image number 0 .*no 'id'"),
        (changed(images=[{"id": 1.5, "file_name": "a"}]), "1.5 is no whole number"),
        (changed(images=[{"id": 1}]), "file_name"),
        (changed(categories=[{"id": 1}]), "name"),
        (changed(images=[{"id": i, "file_name": "a"} for i in (1, 2)]), "2 images .* a;"),
        (changed(categories=[{"id": i, "name": "a"} for i in (1, 2)]), "2 categories .* a;"),
        (changed(categories=[{"id": 1, "name": name} for name in "ab"]), "have the id 1"),
        (coco([annotation(1, 1, (1, 2, 3))]), "annotation number 0"),
        (coco([{"image_id": 1, "category_id": 1}]), "no 'bbox'"),
        (changed(annotations=["x"]), "cannot be read"),
        (coco([BOX | {"image_id": 9}]), "none of its 1 annotations can be used"),
    ],
)
def test_what_is_no_annotation_file_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_annotations(write_json(tmp_path / "truth.json", content))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (gzip.compress(b"{}", mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8bnone", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "truth.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_annotations(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    images = {3: AnnotatedImage("b.png", (48, 64)), 1: AnnotatedImage("a.png", None)}
    boxes = [(3, 1, (1.5, 2, 3, 4)), (1, 0, (5, 6, 7, 8))]
    write_annotations(tmp_path / "new" / "truth.json", images, boxes, ("cat", "dog"))
    truth = read_annotations(tmp_path / "new" / "truth.json")
    assert (truth.images, truth.file_order) == (images, (3, 1))
    assert truth.categories == {1: "cat", 2: "dog"}
    np.testing.assert_array_equal(truth.boxes.boxes_xywh, [[5, 6, 7, 8], [1.5, 2, 3, 4]])
    assert truth.boxes.category_ids.tolist() == [1, 2]


@pytest.mark.shared
def test_the_collected_cases_are_read_alike(shared: Path) -> None:
    folder = shared / "cases" / "annotations"
    plain = read_annotations(folder / "gt.json")
    for path in folder.glob("gt_*.json"):
        truth = read_annotations(path)
        assert truth.boxes.boxes_xywh.tolist() == plain.boxes.boxes_xywh.tolist(), path
        assert truth.boxes.areas.tolist() == plain.boxes.areas.tolist(), path
        assert list(truth.images) == [7], path
        assert not truth.problems.counts, path
    assert len(read_annotations(folder / "bom.json").boxes)


CLASSES = ("red thing", "other/thing")
LISTED = {  # a list of images to be detected in: nothing is annotated
    "images": [{"id": 42, "file_name": "a.png"}, {"id": "43", "file_name": "two\\a.png"}],
    "categories": [{"id": 9, "name": "other/thing"}, {"id": 4, "name": "red thing"}],
}


def test_ids_by_the_ends_of_paths_and_names_of_classes(tmp_path: Path) -> None:
    path = write_json(tmp_path / "listed.json", LISTED)
    assert read_coco_ids(path, ["/x/one/a.png", "/x/two/a.png"], CLASSES) == (
        {"/x/one/a.png": 42, "/x/two/a.png": 43},
        [4, 9],
    )


@pytest.mark.parametrize(
    ("names", "classes", "words"),
    [
        (["b.png"], CLASSES, r"does not list the image b\.png"),
        (["a.png"], ["red thing", "cat"], "no category 'cat'"),
    ],
)
def test_ids_that_are_not_listed(
    tmp_path: Path, names: list[str], classes: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_coco_ids(write_json(tmp_path / "listed.json", LISTED), names, classes)


@pytest.mark.parametrize("content", [[], {"images": []}, {"images": [], "categories": []}])
def test_no_ids_in_what_is_no_list_of_images(tmp_path: Path, content: object) -> None:
    with pytest.raises(InputError, match=r"listed\.json"):
        read_coco_ids(write_json(tmp_path / "listed.json", content), ["a.png"], CLASSES)


def test_what_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tood_deploy.data.coco.MIN_UNPACKED_BYTES", 1000)
    bomb = tmp_path / "a.json"
    bomb.write_bytes(gzip.compress(b" " * 1_000_000))
    with pytest.raises(InputError, match="unpacks to more than"):
        read_annotations(bomb)
