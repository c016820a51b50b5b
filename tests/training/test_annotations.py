"""COCO files, right and wrong: one clear line, or a counted skip."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tood_deploy.data.coco import Annotations, read_annotations
from tood_deploy.errors import InputError
from tood_deploy.training.report import check_images, report


@pytest.fixture
def coco(scenes: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A right file's content, and where to write a changed one."""
    return json.loads((scenes / "annotations.json").read_text()), tmp_path / "changed.json"


def read_changed(scenes: Path, content: Any, path: Path) -> Annotations:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_annotations(path, scenes / "images")


def test_a_right_file(scenes: Path) -> None:
    found = read_annotations(scenes / "annotations.json", scenes / "images")
    content = json.loads((scenes / "annotations.json").read_text())
    assert len(found.records) == 10
    assert sum(len(record.boxes) for record in found.records) == len(content["annotations"])
    assert found.category_ids == (1, 2, 3, 4, 5)
    assert not found.problems.counts
    first = content["annotations"][0]
    x, y, width, height = first["bbox"]
    np.testing.assert_array_equal(found.records[0].boxes[0], [x, y, x + width, y + height])
    assert found.records[0].labels[0] == first["category_id"] - 1


def test_class_order_can_be_chosen(scenes: Path) -> None:
    found = read_annotations(scenes / "annotations.json", scenes / "images", ["ring", "disc"])
    assert found.category_ids == (5, 1)
    assert found.problems.counts["category not listed, left out"] > 0
    with pytest.raises(InputError, match="has no category cat; it has disc, square"):
        read_annotations(scenes / "annotations.json", scenes / "images", ["cat"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_id": 999}, "annotation without a image, left out"),
        ({"category_id": 77}, "category not listed, left out"),
        ({"bbox": [10, 10, 0, 5]}, "box of zero size, left out"),
        ({"bbox": [float("nan"), 10, 5, 5]}, "box of zero size, left out"),
        ({"bbox": [400, 10, 20, 20]}, "box outside the image, left out"),
        ({"bbox": [-10, 10, 50, 50]}, "box reaching out of the image, clipped"),
        ({"iscrowd": 1}, "crowd box, left out"),
        ({"id": 2}, "annotation id given twice, the first counts"),
    ],
)
def test_bad_annotations_are_counted(
    scenes: Path, coco: tuple[dict[str, Any], Path], change: dict[str, Any], problem: str
) -> None:
    content, path = coco
    content["annotations"][0].update(change)
    found = read_changed(scenes, content, path)
    assert dict(found.problems.counts) == {problem: 1}
    kept = sum(len(record.boxes) for record in found.records)
    assert kept == len(content["annotations"]) - ("clipped" not in problem)
    for record in found.records:
        assert (record.boxes >= 0).all()
        assert (record.boxes[:, 2:] <= [record.size_hw[1], record.size_hw[0]]).all()


def test_bad_images_are_counted(scenes: Path, coco: tuple[dict[str, Any], Path]) -> None:
    content, path = coco
    content["images"][0]["file_name"] = "gone.jpg"
    content["images"][1]["width"] = 0
    content["images"][2]["id"] = content["images"][3]["id"]
    found = read_changed(scenes, content, path)
    assert len(found.records) == 7
    assert found.problems.counts["image missing, left out"] == 1
    assert found.problems.counts["image of no size, left out"] == 1
    assert found.problems.counts["image id given twice, the first counts"] == 1
    assert "1 x image missing, left out (gone.jpg)" in found.problems.lines()


def test_images_without_boxes_are_not_trained_on(
    scenes: Path, coco: tuple[dict[str, Any], Path]
) -> None:
    content, path = coco
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 4]
    content["images"][5]["height"] = 20
    found = read_changed(scenes, content, path)
    assert {record.image_id for record in found.for_training()} == set(range(10)) - {4, 5}
    content["annotations"] = []
    with pytest.raises(InputError, match="no image can be trained on; 10 x image without boxes"):
        read_changed(scenes, content, path).for_training()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "found a list; expected the lists images, annotations and categories"),
        ('{"images": [], "annotations": []}', "not a COCO file: found images, annotations"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no categories"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1}]}',
            "a category is without 'name'",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "have the id 1",
        ),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "an image is without 'file_name'",
        ),
        (
            '{"images": [], "annotations": [{"id": 1}], "categories": [{"id": 1, "name": "a"}]}',
            "annotation 0 cannot be read",
        ),
    ],
)
def test_what_is_not_coco_is_an_error(
    scenes: Path, tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_changed(scenes, content, tmp_path / "wrong.json")


def test_missing_file_and_folder(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_annotations(tmp_path / "none.json", scenes)
    with pytest.raises(InputError, match="no such folder"):
        read_annotations(scenes / "annotations.json", tmp_path / "none")


def test_report_names_problems_and_counts(
    scenes: Path, coco: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    content, path = coco
    images = tmp_path / "images"
    images.mkdir()
    for entry in content["images"]:
        (images / entry["file_name"]).write_bytes(
            (scenes / "images" / entry["file_name"]).read_bytes()
        )
    (images / "00003.jpg").write_text("no image")
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    annotations = read_annotations(path, images)
    check_images(annotations)
    console = Console(width=120, file=io.StringIO())
    console.print(report(annotations, "training"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 x crowd box, left out (1)" in text
    assert "1 x image unreadable or of another size than annotated (00003.jpg)" in text
    counts = np.bincount(
        np.concatenate([record.labels for record in annotations.records]), minlength=5
    )
    for name, count in zip(annotations.class_names, counts, strict=True):
        assert any(line.split()[:2] == [name, str(count)] for line in text.splitlines()), name
    assert "320 x 240" in text
