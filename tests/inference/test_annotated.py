from pathlib import Path

import cv2
import numpy as np
import pytest
from inference.fakes import fill_disk, found, read_video, red_image, video_frame, write_all

from tood_deploy.errors import OutputError
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sinks import Annotated, write_image

ONE = found((8, 8, 24, 24))


def test_a_image(tmp_path: Path) -> None:
    write_all(Annotated({"a.png": tmp_path / "new" / "a.png"}), (Frame(red_image(), "a.png"), ONE))
    image = cv2.imread(str(tmp_path / "new" / "a.png"))
    assert image is not None
    assert (image == ONE.plot(red_image())).all()


def test_a_video_keeps_the_times_of_its_frames(tmp_path: Path) -> None:
    times = [500, 510, 600, 603, 1000]
    write_all(
        Annotated({"v.avi": tmp_path / "v.mp4"}),
        *((video_frame(i, time), ONE) for i, time in enumerate(times)),
    )
    written = read_video(tmp_path / "v.mp4")
    assert [time for time, _ in written] == pytest.approx([time / 1000 for time in times])
    assert np.abs(written[0][1].astype(int) - ONE.plot(red_image())).mean() < 15


def test_videos_and_images_in_turn(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.mp4" for name in ("one", "two")} | {"p": tmp_path / "p.png"}
    items = [
        (video_frame(i % 3, 40 * (i % 3), name="one" if i < 3 else "two"), ONE) for i in range(6)
    ]
    write_all(Annotated(files), *items, (Frame(red_image(), "p"), ONE))
    assert [len(read_video(files[name])) for name in ("one", "two")] == [3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "p.png", "two.mp4"]


def test_an_error_leaves_no_half_written_video(tmp_path: Path) -> None:
    sink = Annotated({"v.avi": tmp_path / "v.mp4"})
    with pytest.raises(RuntimeError, match="broke"):
        write_all(sink, (video_frame(0, 0), ONE), error=RuntimeError("broke"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_before_the_first_frame(tmp_path: Path) -> None:
    with Annotated({"a": tmp_path / "new" / "a.png"}):
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, Path, "write_bytes")
    with pytest.raises(OutputError, match="No space left on device"):
        write_image(tmp_path / "a.jpg", red_image())
    assert list(tmp_path.iterdir()) == []


def test_a_image_too_large_for_its_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"70000 x 1 pixels cannot be written as \.jpg"):
        write_image(tmp_path / "a.jpg", np.zeros((1, 70000, 3), np.uint8))
