"""What a user names becomes a source of frames: files, folders, cameras, streams."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pytest
from inference.fakes import RedEngine, moving_images, red_image, write_image, write_video
from inference.test_file_list import write_animation, write_pages

from tood_deploy import Detector
from tood_deploy.data.image_header import KNOWN_KINDS
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference import image_source as image_source_module
from tood_deploy.inference import source as source_module
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.source import ImageSource, LiveSource, open_source
from tood_deploy.inference.video import VideoSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "c.webp"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.md").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"no image either")
    write_image(tmp_path / "images" / "inner" / "d.png")
    return tmp_path / "images"


def names(source: Any) -> list[str]:
    return [Path(frame.name).name for frame in source]


def test_a_image_and_a_video(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_source(folder / "b.png"), ImageSource)
    assert isinstance(open_source(write_video(tmp_path / "v.mp4", moving_images(2))), VideoSource)


def test_a_folder_gives_its_own_images_in_order(folder: Path) -> None:
    source = open_source(folder)
    assert names(source) == ["a.JPG", "b.png", "c.webp"]
    assert (source.kind, source.length, source.skipped) == ("images", 3, 0)


def test_a_glob(folder: Path) -> None:
    assert names(open_source(f"{folder}/*.png")) == ["b.png"]
    assert names(open_source(f"{folder}/**/*.png")) == ["b.png", "d.png"]


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    assert names(open_source(write_image(tmp_path / "a[1].png"))) == ["a[1].png"]


def test_a_list_is_relative_to_its_own_folder(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text(f"# chosen\n\nb.png\n  inner/d.png \n{folder / 'a.JPG'}\n")
    assert names(open_source(listed)) == ["b.png", "d.png", "a.JPG"]


def test_several_sources_each_file_once(folder: Path) -> None:
    assert names(open_source([folder / "c.webp", folder, folder / "inner" / ".." / "b.png"])) == [
        "c.webp",
        "a.JPG",
        "b.png",
    ]


def test_images_and_videos_together(folder: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(2))
    source = open_source([folder / "b.png", video])
    assert names(source) == ["b.png", "v.mp4", "v.mp4"]
    assert (source.kind, source.length) == ("video", None)


def test_a_file_without_a_known_suffix_is_recognised(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png").rename(tmp_path / "image")
    write_video(tmp_path / "v.mp4", moving_images(2)).rename(tmp_path / "video")
    assert isinstance(open_source(tmp_path / "image"), ImageSource)
    assert isinstance(open_source(tmp_path / "video"), VideoSource)


def test_one_bad_image_is_told_and_the_rest_goes_on(folder: Path) -> None:
    (folder / "aa.jpg").write_text("text under a wrong name")
    (folder / "zz.png").write_bytes(b"")
    source = open_source(folder)
    assert names(source) == ["a.JPG", "b.png", "c.webp"]
    assert source.skipped == 2
    assert [problem.split(": ")[1] for problem in source.problems] == [
        f"not an image; expected {KNOWN_KINDS}",
        "empty file; expected an image",
    ]


def test_a_listed_file_that_is_missing_is_told(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text("b.png\nnone.png\n")
    source = open_source(listed)
    assert names(source) == ["b.png"]
    assert "No such file" in source.problems[0]


def test_nothing_readable_at_all_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"none of the 2 .*a\.jpg: not an image"):
        list(open_source(tmp_path))


def test_a_bad_image_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("text")
    for spec in (tmp_path / "a.jpg", tmp_path):
        with pytest.raises(InputError, match="not an image"):
            list(open_source(spec))


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    cases = {
        tmp_path / "none.jpg": "no such file or folder",
        tmp_path / "empty": "no image or video",
        tmp_path / "empty.txt": "names no file",
        tmp_path / "binary.txt": "cannot be read as a list",
        f"{tmp_path}/*.png": "no file has such a name",
        "x" * 5000: "no such file",
    }
    for spec, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_source(spec)
    with pytest.raises(InputError, match="no source given"):
        open_source([])


def test_the_pixel_limit_reaches_every_file(tmp_path: Path) -> None:
    write_image(tmp_path / "small.png", np.zeros((4, 4, 3), np.uint8))
    write_image(tmp_path / "large.png", red_image())
    source = open_source(tmp_path, max_pixels=100)
    assert names(source) == ["small.png"]
    assert "--max-pixels" in source.problems[0]
    with pytest.raises(ToodError, match="max_pixels is 0"):
        open_source(tmp_path, max_pixels=0)


def test_a_number_is_a_camera(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        source_module, "_open_address", lambda address, max_pixels: asked.append(address)
    )
    monkeypatch.chdir(tmp_path)
    for spec in ("0", "/dev/video7", "rtsp://camera/1", "https://server/stream"):
        open_source(spec)
    assert asked == ["/dev/video0", "/dev/video7", "rtsp://camera/1", "https://server/stream"]


def test_a_camera_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InputError, match="/dev/video97: cannot be opened"):
        open_source("97")


def test_a_live_source_stands_alone(folder: Path) -> None:
    with pytest.raises(InputError, match="expected it alone"):
        open_source(["rtsp://camera/1", folder])


Answer = Callable[[BinaryIO], object]
MULTIPART = "multipart/x-mixed-replace; boundary=frame"


@contextmanager
def serve(content_type: str, answer: Answer) -> Iterator[str]:
    """A server on this machine that answers every request with what `answer` writes.

    Gives its address.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            with suppress(OSError):  # the client has gone
                answer(self.wfile)  # pyright: ignore[reportArgumentType]

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/stream"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def camera(frames: int, seconds_apart: float, sent: list[int] | None = None) -> Answer:
    """What a network camera sends: JPEG after JPEG; their numbers go into `sent`."""
    jpegs = [cv2.imencode(".jpg", image)[1].tobytes() for image in moving_images(24)]

    def answer(client: BinaryIO) -> None:
        for i in range(frames):
            jpeg = jpegs[i % len(jpegs)]
            client.write(
                b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
                + jpeg
                + b"\r\n"
            )
            client.flush()
            if sent is not None:
                sent.append(i)
            time.sleep(seconds_apart)

    return answer


def test_the_latest_frame_wins_and_the_others_are_counted() -> None:
    with serve(MULTIPART, camera(60, 0.01)) as address:
        source, engine = open_source(address), RedEngine(0.05)
        assert isinstance(source, LiveSource)
        frames = [frame for frame, _ in detect_frames(Detector(engine, imgsz=(48, 64)), source)]
    indices = [frame.index for frame in frames]
    assert indices == sorted(set(indices))
    assert 4 < len(frames) < 30
    assert source.dropped == indices[-1] + 1 - len(frames) > 20


def test_frames_are_timed_by_their_arrival() -> None:
    with serve(MULTIPART, camera(10, 0.05)) as address:
        times = [frame.timestamp_s or 0.0 for frame in open_source(address)]
    assert times[0] == 0
    spans = [later - earlier for earlier, later in pairwise(times)]
    assert min(spans) >= 0
    assert 0.2 < sum(spans) < 1.5


def test_a_lost_connection_is_told() -> None:
    with serve(MULTIPART, camera(12, 0.005)) as address:
        source = open_source(address)
        assert len(list(source)) > 0
    assert source.skipped == 1
    assert source.problems[0].startswith(f"{address}: the connection ended after ")


def test_closing_ends_a_stream_that_does_not() -> None:
    sent: list[int] = []
    with serve(MULTIPART, camera(2000, 0.005, sent)) as address:
        source = open_source(address)
        stream = detect_frames(Detector(RedEngine(), imgsz=(48, 64)), source)
        for _ in range(3):
            next(stream)
        stream.close()
    assert len(sent) < 2000
    assert source.problems == []


def test_batches_of_a_live_source() -> None:
    with serve(MULTIPART, camera(20, 0.005)) as address:
        engine = RedEngine()
        frames = list(
            detect_frames(Detector(engine, imgsz=(48, 64)), open_source(address), batch=3)
        )
    assert max(engine.batches) == 3
    assert sum(engine.batches) == len(frames)


def test_a_recording_over_http_is_read_in_full(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", moving_images(30), movflags="faststart").read_bytes()
    with serve("video/mp4", lambda client: client.write(data)) as address:
        source = open_source(address)
        frames = list(source)
    assert isinstance(source, VideoSource)
    assert [frame.timestamp_s for frame in frames] == pytest.approx([0.04 * i for i in range(30)])


def test_an_address_without_video_is_an_error() -> None:
    text = b"hello\n" * 1000
    with (
        serve("text/plain", lambda client: client.write(text)) as address,
        pytest.raises(InputError, match="cannot be opened as a video"),
    ):
        open_source(address)
    with pytest.raises(InputError, match="Connection refused"):
        open_source(address)


def test_a_live_stream_without_a_container_length(tmp_path: Path) -> None:
    """MPEG transport stream, as cameras send it.

    The end of the data is the end of the connection.
    """
    data = write_video(tmp_path / "a.ts", moving_images(30)).read_bytes()

    def answer(client: BinaryIO) -> None:
        for chunk in iter(io.BytesIO(data * 3).read, b""):
            client.write(chunk)

    with serve("video/mp2t", answer) as address:
        source = open_source(address)
        assert len(list(source)) >= 1


def test_an_image_at_an_address_is_an_image() -> None:
    data = cv2.imencode(".png", red_image())[1].tobytes()
    for content_type in ("image/png", "application/octet-stream"):
        with serve(content_type, lambda client: client.write(data)) as address:
            source = open_source(address)
            (frame,) = source
        assert (source.kind, frame.name) == ("images", address)
        assert (frame.image_bgr == red_image()).all()


def test_every_page_is_a_frame(tmp_path: Path) -> None:
    path = write_pages(tmp_path / "a.tif")
    source = open_source(path)
    assert [(frame.index, frame.page, frame.timestamp_s) for frame in source] == [
        (0, 1, None),
        (1, 2, None),
        (2, 3, None),
    ]
    assert (source.kind, source.length, source.notes) == ("images", 3, [])
    data = path.read_bytes()
    path.write_bytes(
        data[: len(data) * 2 // 3] + bytes(len(data) // 6) + data[len(data) * 5 // 6 :]
    )
    assert len(list(open_source(path, first_page=True))) == 1


def test_an_animation_is_a_video(tmp_path: Path) -> None:
    source = open_source(write_animation(tmp_path / "a.gif"))
    frames = list(source)
    assert source.kind == "video"
    assert [frame.timestamp_s for frame in frames] == [0.0, 0.1, 0.4]
    assert (frames[0].image_bgr != frames[2].image_bgr).any()
    first = open_source(tmp_path / "a.gif", first_page=True)
    assert len(list(first)) == 1
    assert first.kind == "images"
    assert "the first of 3" in first.notes[0]


def test_whatever_one_file_does_the_rest_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any) -> bytes:
        if Path(path).name == "b.png":
            raise RuntimeError("a library met something")
        return Path(path).read_bytes()

    monkeypatch.setattr(image_source_module, "read_file", fail)
    source = open_source(folder)
    assert names(source) == ["a.JPG", "c.webp"]
    assert source.skipped == 1
    assert "b.png: cannot be read (RuntimeError: a library met something)" in source.problems[0]
