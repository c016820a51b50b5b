"""The folder of a run: whole files, one row an image, and whose they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from tood_deploy.batch import output as output_module
from tood_deploy.batch.output import BatchOutput, RunDescription
from tood_deploy.batch.worker import ROWS
from tood_deploy.errors import OutputError

RUN = RunDescription("abc", ("images",), {"conf": "0.3", "iou": "None"})


def rows(*names: str, error: str | None = None) -> pa.Table:
    row: dict[str, Any] = {"height": 3, "width": 4, "boxes": [[0, 0, 1, 2]], "scores": [0.5]}
    row |= {"class_ids": [1], "class_names": ["star"], "notes": []}
    values = [{"path": name, "error": error} | ({} if error else row) for name in names]
    return pa.Table.from_pylist(values, schema=ROWS)


def begun(folder: Path) -> BatchOutput:
    output = BatchOutput(str(folder), RUN, resume=False)
    output.begin()
    return output


def test_nothing_is_written_before_a_run_begins(tmp_path: Path) -> None:
    BatchOutput(str(tmp_path / "out"), RUN, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_written_and_resumed(tmp_path: Path) -> None:
    first = begun(tmp_path / "new" / "out")
    first.write(rows("a", "b"))
    first.flush()
    first.write(rows("c"))  # waits, and is lost
    again = BatchOutput(str(tmp_path / "new" / "out"), RUN, resume=True)
    assert again.done == {"a", "b"}
    again.write(rows("c", error="cut"))
    again.flush()
    again.check_complete(["a", "b", "c"])
    assert (again.failed, len(again.done)) == (1, 3)
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "part-000000.parquet",
        "part-000001.parquet",
        "run.json",
    ]
    assert BatchOutput(str(tmp_path / "new" / "out"), RUN, resume=True).failed == 1


def test_an_image_has_one_row_however_often_it_comes(tmp_path: Path) -> None:
    output = begun(tmp_path)
    output.write(rows("a", "b"))
    output.write(rows("b", "c"))
    output.flush()
    output.check_complete(["a", "b", "c"])
    assert [row["path"] for row in output.rows()] == ["a", "b", "c"]


def test_many_rows_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "ROWS_OF_FILE", 2)
    output = begun(tmp_path)
    for name in "abc":
        output.write(rows(name))
    assert [path.name for path in tmp_path.glob("part-*")] == ["part-000000.parquet"]
    monkeypatch.setattr(output_module, "SECONDS_OF_FILE", 0.0)
    output.write(rows("d"))
    assert len(list(tmp_path.glob("part-*"))) == 2


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / ".tmp-0123").write_bytes(b"PAR1")
    BatchOutput(str(tmp_path), RUN, resume=True).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_is_not_gone_on_with_unasked(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(OutputError, match="--resume"):
        BatchOutput(str(tmp_path), RUN, resume=False)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(RUN, model_sha256="def"), "model_sha256"),
        (replace(RUN, source=("images", "more")), "source"),
        (replace(RUN, options={"conf": "0.5", "iou": "None"}), r"conf 0\.3"),
        (replace(RUN, options={"conf": "0.3", "iou": "None", "imgsz": "9"}), "imgsz not given"),
    ],
)
def test_another_run_is_named(other: RunDescription, named: str, tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(OutputError, match=named):
        BatchOutput(str(tmp_path), other, resume=True)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        BatchOutput(str(tmp_path), RUN, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match="part-000000"):
        BatchOutput(str(tmp_path), RUN, resume=True)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="out"):
        BatchOutput(str(tmp_path / "out"), RUN, resume=False)


def test_missing_rows_and_files_of_others_are_noticed(tmp_path: Path) -> None:
    output = begun(tmp_path)
    output.write(rows("a"))
    output.flush()
    with pytest.raises(OutputError, match="b has no row"):
        output.check_complete(["a", "b"])
    pq.write_table(rows("a"), tmp_path / "part-000007.parquet")
    with pytest.raises(OutputError, match="another run"):
        output.check_complete(["a"])


def test_json_lines_and_coco(tmp_path: Path) -> None:
    output = begun(tmp_path)
    output.write(rows("b", "a"))
    output.write(rows("c", error="cut"))
    output.flush()
    output.export("jsonl", {}, None)
    lines = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
    assert lines[0] == {
        "source": "b",
        "index": 0,
        "timestamp_s": None,
        "height": 3,
        "width": 4,
        "detections": [
            {"box": [0.0, 0.0, 1.0, 2.0], "score": 0.5, "class_id": 1, "class_name": "star"}
        ],
    }
    assert lines[2] == {"source": "c", "error": "cut"}
    output.export("coco", {"a": 1, "b": 2, "c": 3}, [10, 20])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(one["image_id"], one["category_id"], one["bbox"]) for one in results] == [
        (2, 20, [0.0, 0.0, 1.0, 2.0]),
        (1, 20, [0.0, 0.0, 1.0, 2.0]),
    ]


def test_no_objects_are_an_empty_list(tmp_path: Path) -> None:
    output = begun(tmp_path)
    output.export("coco", {}, None)
    assert json.loads((tmp_path / "results.json").read_text()) == []
