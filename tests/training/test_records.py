"""Annotated images as training takes them: what is left out is counted, and the report names it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tood_deploy.errors import InputError
from tood_deploy.reporter import Reporter
from tood_deploy.training import records as records_module
from tood_deploy.training.records import (
    LabelledImages,
    read_image,
    read_labelled_images,
    slice_images,
)
from tood_deploy.training.report import check_images, data_report
from tood_deploy.windows import boxes_in_window, slice_windows


@pytest.fixture
def coco(scenes: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A right file's content, and where to write a changed one."""
    return json.loads((scenes / "annotations.json").read_text()), tmp_path / "changed.json"


def read_changed(scenes: Path, content: Any, path: Path) -> LabelledImages:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_labelled_images(path, scenes / "images")


def test_a_right_file(scenes: Path) -> None:
    labelled = read_labelled_images(scenes / "annotations.json", scenes / "images")
    content = json.loads((scenes / "annotations.json").read_text())
    assert len(labelled.records) == 10
    assert sum(len(record.boxes) for record in labelled.records) == len(content["annotations"])
    assert labelled.category_ids == (1, 2, 3, 4, 5)
    assert not labelled.problems.counts
    first = content["annotations"][0]
    x, y, width, height = first["bbox"]
    np.testing.assert_array_equal(labelled.records[0].boxes[0], [x, y, x + width, y + height])
    assert labelled.records[0].labels[0] == first["category_id"] - 1


def test_classes_and_images_stand_in_the_order_of_the_file(
    scenes: Path, coco: tuple[dict[str, Any], Path]
) -> None:
    content, path = coco
    content["images"].reverse()
    content["categories"].reverse()
    labelled = read_changed(scenes, content, path)
    assert [record.image_id for record in labelled.records] == list(range(10))[::-1]
    assert (labelled.class_names[0], labelled.category_ids[0]) == ("ring", 5)
    first = next(entry for entry in content["annotations"] if entry["image_id"] == 9)
    assert labelled.records[0].labels[0] == 5 - first["category_id"]


def test_class_order_can_be_chosen(scenes: Path) -> None:
    names = ["ring", "disc"]
    labelled = read_labelled_images(scenes / "annotations.json", scenes / "images", names)
    assert labelled.category_ids == (5, 1)
    assert labelled.problems.counts["category not listed, left out"] > 0
    with pytest.raises(InputError, match="has no category cat; it has disc, square"):
        read_labelled_images(scenes / "annotations.json", scenes / "images", ["cat"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_id": 999}, "annotation without an image, left out"),
        ({"category_id": 77}, "category not listed, left out"),
        ({"bbox": [10, 10, 0, 5]}, "box of zero size, left out"),
        ({"bbox": [10, 10, -9, 5]}, "box of negative size, left out"),
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
    labelled = read_changed(scenes, content, path)
    assert dict(labelled.problems.counts) == {problem: 1}
    kept = sum(len(record.boxes) for record in labelled.records)
    assert kept == len(content["annotations"]) - ("clipped" not in problem)
    for record in labelled.records:
        assert (record.boxes >= 0).all()
        assert (record.boxes[:, 2:] <= [record.size_hw[1], record.size_hw[0]]).all()


def test_bad_images_are_counted(scenes: Path, coco: tuple[dict[str, Any], Path]) -> None:
    content, path = coco
    content["images"][0]["file_name"] = "gone.jpg"
    content["images"][1]["width"] = 0
    content["images"][2]["id"] = content["images"][3]["id"]
    labelled = read_changed(scenes, content, path)
    assert len(labelled.records) == 7
    assert labelled.problems.counts["image missing, left out"] == 1
    assert labelled.problems.counts["image of no size, left out"] == 1
    assert labelled.problems.counts["image id given twice, the first counts"] == 1
    assert "1 x image missing, left out (gone.jpg)" in labelled.problems.lines()


def test_sizes_that_are_not_given_are_those_of_the_images(
    scenes: Path, coco: tuple[dict[str, Any], Path]
) -> None:
    content, path = coco
    del content["images"][0]["width"]
    content["images"][1]["height"] = None
    labelled = read_changed(scenes, content, path)
    assert [record.size_hw for record in labelled.records] == [(240, 320)] * 10
    assert not labelled.problems.counts


def test_where_no_image_is_there_the_cure_is_named(
    scenes: Path, coco: tuple[dict[str, Any], Path]
) -> None:
    content, path = coco
    for entry in content["images"]:
        entry["file_name"] = "images\\" + entry["file_name"]
    with pytest.raises(InputError, match=r"none of the 10 images .* take images\\ out"):
        read_changed(scenes, content, path)
    assert len(read_labelled_images(path, scenes).records) == 10


def test_images_without_boxes_are_not_trained_on(
    scenes: Path, coco: tuple[dict[str, Any], Path]
) -> None:
    content, path = coco
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 4]
    content["images"][5]["height"] = 20
    labelled = read_changed(scenes, content, path)
    assert {record.image_id for record in labelled.for_training()} == set(range(10)) - {4, 5}
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    with pytest.raises(InputError, match=r"no image can be trained on; .* image without boxes"):
        read_changed(scenes, content, path).for_training()


def test_a_missing_folder_is_an_error(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_labelled_images(scenes / "annotations.json", tmp_path / "none")


def test_report_names_problems_and_counts(
    scenes: Path,
    coco: tuple[dict[str, Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
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
    labelled = read_labelled_images(path, images)
    check_images(labelled, Reporter.silent())
    Reporter().table(data_report(labelled, "training"))
    text = capsys.readouterr().out
    assert "1 x crowd box, left out (1)" in text
    assert "1 x image unreadable or of another size than annotated (00003.jpg)" in text
    counts = np.bincount(
        np.concatenate([record.labels for record in labelled.records]), minlength=5
    )
    for name, count in zip(labelled.class_names, counts, strict=True):
        assert any(line.split()[:2] == [name, str(count)] for line in text.splitlines()), name
    assert "320 x 240" in text


def test_windows_are_images_of_their_own(scenes: Path) -> None:
    whole = read_labelled_images(scenes / "annotations.json", scenes / "images")
    sliced = slice_images(whole, (160, 200), 0.25, 0.5)
    size_hw = whole.records[0].size_hw
    windows = slice_windows(size_hw, (160, 200), 0.25).tolist()
    assert len(sliced.records) == len(windows) * len(whole.records)
    assert [record.image_id for record in sliced.records] == list(range(1, len(sliced.records) + 1))
    first = whole.records[0]
    image = read_image(first)
    assert image is not None
    for record, window in zip(sliced.records, windows, strict=False):
        left, top, right, bottom = window
        np.testing.assert_array_equal(read_image(record), image[top:bottom, left:right])
        boxes, kept = boxes_in_window(first.boxes, np.array(window), 0.5)
        np.testing.assert_array_equal(record.boxes, boxes)
        np.testing.assert_array_equal(record.labels, first.labels[kept])
    truth = sliced.annotations
    assert set(truth.images) == {record.image_id for record in sliced.records}
    assert len(truth.boxes) == sum(len(record.boxes) for record in sliced.records)
    assert truth.boxes.span(1, 1) == slice(0, len(sliced.records[0].boxes))
    assert (truth.boxes.areas <= np.prod(truth.boxes.boxes_xywh[:, 2:], axis=1) + 1e-6).all()


def test_windows_of_an_image_are_cut_from_one_decoding(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_labelled_images(scenes / "annotations.json", scenes / "images")
    reads: list[Path] = []
    real = records_module.read_image_of_size

    def count(path: Path, size_hw: tuple[int, int]) -> Any:
        reads.append(path)
        return real(path, size_hw)

    monkeypatch.setattr(records_module, "read_image_of_size", count)
    image_bytes = 3 * int(np.prod(whole.records[0].size_hw))
    cache = records_module._WholeImages(2 * image_bytes)
    monkeypatch.setattr(records_module, "_WHOLE", cache)
    sliced = slice_images(whole, (120, 160), 0.0, 0.1)
    for record in sliced.records:
        assert read_image(record) is not None
    assert len(reads) == len(whole.records)
    assert cache._bytes() <= 2 * image_bytes
