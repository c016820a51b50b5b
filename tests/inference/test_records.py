import json
from pathlib import Path

import pytest
from inference.fakes import fill_disk, found, red_image, video_frame, write_all

from tood_deploy.errors import OutputError
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sinks import CocoResults, JsonLines, TextLines
from tood_deploy.reporter import Reporter

ONE = found((8, 8, 24, 24))


class TestCocoResults:
    def test_rows_with_running_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "r.json"
        items = [
            (Frame(red_image(), name), found((1, 2, 4, 6), (0, 0, 1, 1))) for name in ("a", "b")
        ]
        write_all(CocoResults(path, None, None), *items)
        rows = json.loads(path.read_text())
        assert [(row["image_id"], row["category_id"]) for row in rows] == [
            (1, 1),
            (1, 2),
            (2, 1),
            (2, 2),
        ]
        assert rows[0]["bbox"] == [1, 2, 3, 4]
        assert rows[0]["score"] == pytest.approx(0.9)

    def test_given_ids(self, tmp_path: Path) -> None:
        write_all(
            CocoResults(tmp_path / "r.json", {"a": 42}, [7, 9]),
            (Frame(red_image(), "a"), found((0, 0, 1, 1), (0, 0, 2, 2))),
        )
        assert [
            (row["image_id"], row["category_id"])
            for row in json.loads((tmp_path / "r.json").read_text())
        ] == [(42, 7), (42, 9)]

    def test_nothing_found_is_an_empty_list(self, tmp_path: Path) -> None:
        write_all(CocoResults(tmp_path / "r.json", None, None), (Frame(red_image(), "a"), found()))
        assert json.loads((tmp_path / "r.json").read_text()) == []

    def test_an_error_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        path.write_text("old")
        sink = CocoResults(path, None, None)
        with pytest.raises(RuntimeError):
            write_all(sink, (Frame(red_image(), "a"), ONE), error=RuntimeError())
        assert path.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["r.json"]

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sink = CocoResults(tmp_path / "r.json", None, None)
        fill_disk(monkeypatch, Path, "open")
        with pytest.raises(OutputError, match="No space left"), sink:
            sink.write(Frame(red_image(), "a"), ONE)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot be written"):
            CocoResults(tmp_path / "file" / "r.json", None, None)


class TestJsonLines:
    def test_the_size_is_that_of_the_file(self, tmp_path: Path) -> None:
        write_all(
            JsonLines(str(tmp_path / "r.jsonl"), live=False),
            (Frame(red_image(), "a.jpg", original_hw=(96, 128)), ONE),
        )
        record = json.loads((tmp_path / "r.jsonl").read_text())
        assert (record["height"], record["width"]) == (96, 128)

    def test_a_line_is_there_as_soon_as_it_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "r.jsonl"
        with JsonLines(str(path), live=False) as sink:
            sink.write(video_frame(3, 120), ONE)
            (line,) = path.read_text().splitlines()
            record = json.loads(line)
        assert record == {
            "source": "v.avi",
            "index": 3,
            "timestamp_s": 0.12,
            "height": 48,
            "width": 64,
            "detections": [
                {
                    "box": [8, 8, 24, 24],
                    "score": pytest.approx(0.9),
                    "class_id": 0,
                    "class_name": "red thing",
                }
            ],
        }

    def test_stdout_and_the_age_of_live_frames(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_all(
            JsonLines("-", live=True), (video_frame(0, 0), found()), (video_frame(1, 40), ONE)
        )
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [len(record["detections"]) for record in records] == [0, 1]
        assert all(record["age_ms"] >= 0 for record in records)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sink = JsonLines(str(tmp_path / "r.jsonl"), live=False)
        fill_disk(monkeypatch, Path, "open")
        with pytest.raises(OutputError, match="No space left"):
            sink.write(video_frame(0, 0), ONE)


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    write_all(
        TextLines(Reporter()),
        (video_frame(0, 1240), found(*[(0, 0, 1, 1)] * 3)),
        (Frame(red_image(), "a.png"), found()),
    )
    assert capsys.readouterr().out == "v.avi 1.240 s: 2 red thing, 1 other/thing\na.png: nothing\n"
