"""What passes `tood-train --check-data` passes `tood-eval`, and the reverse."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inference.fakes import red_image, write_image

from tood_deploy.cli.eval import main as evaluate
from tood_deploy.cli.train import main as train

Change = Callable[[dict[str, Any]], object]
RESULT = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9}


def content() -> dict[str, Any]:
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50]}
    return {
        "images": [{"id": 7, "file_name": "sub/a.png", "width": 96, "height": 64}],
        "annotations": [box | {"area": 2500, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cell"}],
    }


def set_ids(values: dict[str, Any]) -> None:
    values["images"][0]["id"] = values["annotations"][0]["image_id"] = "7"
    values["categories"][0]["id"] = values["annotations"][0]["category_id"] = "1"


def add_box(values: dict[str, Any], **changes: Any) -> None:
    values["annotations"].append(values["annotations"][0] | {"id": 2} | changes)


PASSES: dict[str, Change] = {
    "plain": lambda values: None,
    "string ids": set_ids,
    "null area and iscrowd": lambda v: v["annotations"][0].update(area=None, iscrowd=None),
    "no area and iscrowd": lambda v: [v["annotations"][0].pop(key) for key in ("area", "iscrowd")],
    "no size": lambda v: [v["images"][0].pop(key) for key in ("width", "height")],
    "null size": lambda v: v["images"][0].update(width=None, height=None),
    "negative box": lambda v: add_box(v, bbox=[40, 40, -10, 10]),
    "box that is not a number": lambda v: add_box(v, bbox=[40, 40, float("nan"), 10]),
    "unknown image": lambda v: add_box(v, image_id=8),
    "unknown category": lambda v: add_box(v, category_id=8),
    "annotation id twice": lambda v: add_box(v, id=1),
    "image id twice": lambda v: v["images"].append(v["images"][0] | {"file_name": "b.png"}),
    "windows separators": lambda v: v["images"][0].update(file_name="sub\\a.png"),
}
FAILS: dict[str, Change] = {
    "nothing annotated": lambda v: v.update(annotations=[]),
    "only a negative box": lambda v: v["annotations"][0].update(bbox=[40, 40, -10, 10]),
    "image id is no number": lambda v: v["images"][0].update(id="seven"),
    "box of three": lambda v: v["annotations"][0].update(bbox=[1, 2, 3]),
    "no file name": lambda v: v["images"][0].pop("file_name"),
    "a file name twice": lambda v: v["images"].append(v["images"][0] | {"id": 8}),
    "a category twice": lambda v: v["categories"].append(v["categories"][0]),
    "image missing": lambda v: v["images"][0].update(file_name="b.png"),
    "wrong folder": lambda v: v["images"][0].update(file_name="top\\sub\\a.png"),
}
ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "byte-order mark": lambda data: b"\xef\xbb\xbf" + data,
    "gzip": gzip.compress,
}


def run_both(folder: Path, data: bytes, name: str = "truth.json") -> tuple[int, int]:
    """Return the exit codes of `tood-train --check-data` and `tood-eval`."""
    (folder / name).write_bytes(data)
    write_image(folder / "images" / "sub" / "a.png", red_image(64, 96))
    (folder / "results.json").write_text(json.dumps([RESULT]))
    truth, images = str(folder / name), str(folder / "images")
    check = ["tiny", "--check-data", "--train-json", truth, "--train-images", images]
    options = ["--annotations", truth, "--images", images, "--output", str(folder / "eval")]
    return train(check), evaluate([str(folder / "results.json"), *options])


@pytest.mark.parametrize("case", PASSES)
def test_both_take_it(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = content()
    PASSES[case](values)
    assert run_both(tmp_path, json.dumps(values).encode()) == (0, 0)
    out = capsys.readouterr()
    assert " AP 100.00" in out.out, "AP is that of the one good box"
    if len(values["annotations"]) > 1:  # what is left out is reported by both
        assert "left out (2)" in out.out or "the first counts (1)" in out.out
        assert "left out (2)" in out.err or "the first counts (1)" in out.err


@pytest.mark.parametrize("case", FAILS)
def test_both_refuse_it(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = content()
    FAILS[case](values)
    assert run_both(tmp_path, json.dumps(values).encode()) == (2, 2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    if case == "wrong folder":
        assert all("take top\\ out of" in line for line in errors)


@pytest.mark.parametrize("name", ["truth.json", "truth.json.gz"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_both_read_its_bytes(tmp_path: Path, encoding: str, name: str) -> None:
    data = ENCODINGS[encoding](json.dumps(content()).encode())
    assert run_both(tmp_path, data, name) == (0, 0)


def test_compressed_results_and_ids_of_digits(tmp_path: Path) -> None:
    assert run_both(tmp_path, json.dumps(content()).encode()) == (0, 0)
    rows = [RESULT | {"image_id": "7"}, RESULT | {"category_id": "1"}]
    results = tmp_path / "results.json.gz"
    results.write_bytes(gzip.compress(json.dumps(rows).encode()))
    options = ["--annotations", str(tmp_path / "truth.json"), "--output", str(tmp_path / "eval")]
    assert evaluate([str(results), *options]) == 0
