import json
from pathlib import Path

import pytest
from inference.fakes import CLASSES

from tood_deploy.data.coco import read_coco_ids
from tood_deploy.errors import InputError

ANNOTATIONS = {
    "images": [{"id": 42, "file_name": "a.png"}, {"id": 43, "file_name": "two/a.png"}],
    "categories": [{"id": 9, "name": "other/thing"}, {"id": 4, "name": "red thing"}],
}


def write_annotations(folder: Path, content: object) -> Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_names_and_classes_are_matched(tmp_path: Path) -> None:
    path = write_annotations(tmp_path, ANNOTATIONS)
    assert read_coco_ids(path, ["/x/one/a.png", "/x/two/a.png"], CLASSES) == (
        {"/x/one/a.png": 42, "/x/two/a.png": 43},
        [4, 9],
    )


def test_what_is_not_listed_is_an_error(tmp_path: Path) -> None:
    path = write_annotations(tmp_path, ANNOTATIONS)
    with pytest.raises(InputError, match=r"does not list the image b\.png"):
        read_coco_ids(path, ["b.png"], CLASSES)
    with pytest.raises(InputError, match="no category 'cat'"):
        read_coco_ids(path, ["a.png"], ["red thing", "cat"])


@pytest.mark.parametrize(
    "content", ["", "no json", [], {"images": []}, {"images": [{"id": 1}], "categories": []}]
)
def test_what_are_no_annotations_is_an_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(InputError, match="cannot be read as COCO annotations"):
        read_coco_ids(write_annotations(tmp_path, content), ["a.png"], CLASSES)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_coco_ids(tmp_path / "none.json", [], CLASSES)
