"""Every kind of output, and the thread that writes."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from inference.fakes import fill_disk, found, read_video, red_image, video_frame, write_all
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.inference import sinks as window_module
from tood_deploy.inference.frame import Frame, Input, Part
from tood_deploy.inference.sinks import (
    Annotated,
    Crops,
    Finished,
    Sink,
    SinkThread,
    Window,
    crop_box,
    write_image,
)
from tood_deploy.inference.text_sinks import CocoResults, JsonLines, TextLines
from tood_deploy.reporter import Reporter

ONE = found((8, 8, 24, 24))


class Memory(Sink):
    """Remembers what it was given, and how it was left."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.indices: list[int] = []
        self.error, self.left_with = error, "nothing yet"

    def write(self, frame: Frame, detections: Detections) -> None:
        if self.error is not None and frame.index == 3:
            raise self.error
        self.indices.append(frame.index)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.left_with = kind.__name__ if kind else ""


def put_all(sink: Memory, count: int = 50, error: BaseException | None = None) -> None:
    with SinkThread([sink]) as thread:
        for i in range(count):
            thread.put(video_frame(i, i), ONE)
        if error is not None:
            raise error


def test_order_is_kept() -> None:
    sink = Memory()
    put_all(sink)
    assert (sink.indices, sink.left_with) == (list(range(50)), "")


def test_an_error_of_a_sink_reaches_the_caller() -> None:
    sink = Memory(OutputError("the disk is full"))
    with pytest.raises(OutputError, match="the disk is full"):
        put_all(sink)
    assert (sink.indices, sink.left_with) == ([0, 1, 2], "OutputError")


def test_an_error_with_the_last_frame_reaches_the_caller() -> None:
    sink = Memory(OutputError("the disk is full"))
    with pytest.raises(OutputError, match="the disk is full"):
        put_all(sink, count=4)


def test_an_error_of_the_caller_reaches_the_sinks() -> None:
    sink = Memory()
    with pytest.raises(RuntimeError):
        put_all(sink, error=RuntimeError())
    assert sink.left_with == "RuntimeError"


def test_an_interruption_completes_the_outputs() -> None:
    sink = Memory()
    with pytest.raises(KeyboardInterrupt):
        put_all(sink, error=KeyboardInterrupt())
    assert (len(sink.indices), sink.left_with) == (50, "")


def test_a_closed_window_ends_without_an_error() -> None:
    sink = Memory(Finished())
    put_all(sink)
    assert (sink.indices, sink.left_with) == ([0, 1, 2], "")


def test_a_image(tmp_path: Path) -> None:
    write_all(
        Annotated({("a.png", None): tmp_path / "new" / "a.png"}), (Frame(red_image(), "a.png"), ONE)
    )
    image = cv2.imread(str(tmp_path / "new" / "a.png"))
    assert image is not None
    assert (image == ONE.plot(red_image())).all()


def test_a_video_keeps_the_times_of_its_frames(tmp_path: Path) -> None:
    times = [500, 510, 600, 603, 1000]
    write_all(
        Annotated({("v.avi", None): tmp_path / "v.mp4"}),
        *((video_frame(i, time), ONE) for i, time in enumerate(times)),
    )
    written = read_video(tmp_path / "v.mp4")
    assert [time for time, _ in written] == pytest.approx([time / 1000 for time in times])
    assert np.abs(written[0][1].astype(int) - ONE.plot(red_image())).mean() < 15


def test_videos_and_images_in_turn(tmp_path: Path) -> None:
    files: dict[Part, Path] = {(name, None): tmp_path / f"{name}.mp4" for name in ("one", "two")}
    files["p", None] = tmp_path / "p.png"
    items = [
        (video_frame(i % 3, 40 * (i % 3), name="one" if i < 3 else "two"), ONE) for i in range(6)
    ]
    write_all(Annotated(files), *items, (Frame(red_image(), "p"), ONE))
    assert [len(read_video(files[name, None])) for name in ("one", "two")] == [3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "p.png", "two.mp4"]


def test_an_error_leaves_no_half_written_video(tmp_path: Path) -> None:
    sink = Annotated({("v.avi", None): tmp_path / "v.mp4"})
    with pytest.raises(RuntimeError, match="broke"):
        write_all(sink, (video_frame(0, 0), ONE), error=RuntimeError("broke"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_before_the_first_frame(tmp_path: Path) -> None:
    with Annotated({("a", None): tmp_path / "new" / "a.png"}):
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, Path, "write_bytes")
    with pytest.raises(OutputError, match="No space left on device"):
        write_image(tmp_path / "a.jpg", red_image())
    assert list(tmp_path.iterdir()) == []


def test_a_image_too_large_for_its_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"70000 x 1 pixels cannot be written as \.jpg"):
        write_image(tmp_path / "a.jpg", np.zeros((1, 70000, 3), np.uint8))


def test_every_object(tmp_path: Path) -> None:
    sink = Crops(tmp_path / "crops", [Input("one/v.avi", "video"), Input("one/a.png")])
    write_all(
        sink,
        (video_frame(12, 0, name="one/v.avi"), found((8, 8, 24, 24), (-5, -5, 10, 12))),
        (Frame(red_image(), "one/a.png"), found((40, 30, 90, 90), (-9, -9, -3, -3))),
    )
    files = {path.name: cv2.imread(str(path)) for path in (tmp_path / "crops").iterdir()}
    assert {name: image.shape[:2] for name, image in files.items() if image is not None} == {
        "v_000012_000_red-thing.jpg": (16, 16),
        "v_000012_001_other-thing.jpg": (12, 10),
        "a_000_red-thing.jpg": (18, 24),
    }


def test_inputs_of_one_name(tmp_path: Path) -> None:
    items = [(Frame(red_image(), name), ONE) for name in ("one/a.png", "two/a.png", "two/a.jpg")]
    write_all(Crops(tmp_path, [Input(frame.name) for frame, _ in items]), *items)
    assert len(list(tmp_path.rglob("*.jpg"))) == 3


def test_a_box_is_widened_to_whole_pixels() -> None:
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)[..., None].repeat(3, 2)
    assert crop_box(image, np.array([1.6, 2.2, 3.1, 3.9], np.float32)).shape == (2, 3, 3)
    assert crop_box(image, np.array([20, 20, 30, 30], np.float32)).size == 0


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
            CocoResults(tmp_path / "r.json", {("a", None): 42}, [7, 9]),
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
    def test_a_symbolic_link_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("old")
        (tmp_path / "link").symlink_to("target")
        write_all(JsonLines(str(tmp_path / "link"), live=False), (video_frame(0, 0), ONE))
        assert (tmp_path / "target").read_text() == "old"
        assert json.loads((tmp_path / "link").read_text())["index"] == 0

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


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.uint8]]:
    """A stand-in for a display: the frames it was asked to show.

    The third one is answered with the key q.
    """
    images: list[NDArray[np.uint8]] = []
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:   QT5\n")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, image: images.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda ms: ord("q") if len(images) == 3 else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda title, what: 1.0)
    monkeypatch.setattr(
        cv2, "destroyAllWindows", lambda: images.append(np.zeros((1, 1, 3), np.uint8))
    )
    return images


def test_frames_are_shown_until_q(shown: list[NDArray[np.uint8]]) -> None:
    sink = Window()
    with pytest.raises(Finished):
        write_all(sink, *((video_frame(i, i), ONE) for i in range(10)))
    assert len(shown) == 4
    assert (shown[0] == ONE.plot(red_image())).all()


def test_without_windows_in_opencv() -> None:
    if "GUI:                           NONE" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV has windows")
    with pytest.raises(OutputError, match="opencv-python"):
        Window()


def test_without_a_display(shown: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(OutputError, match="no display"):
        Window()
