import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import cv2
import pytest
from inference.fakes import RedEngine, moving_images, write_video

from tood_deploy import Detector
from tood_deploy.errors import InputError
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.source import LiveSource, open_source
from tood_deploy.inference.video import VideoSource

Answer = Callable[[BinaryIO], object]
MULTIPART = "multipart/x-mixed-replace; boundary=frame"


@contextmanager
def serve(content_type: str, answer: Answer) -> Iterator[str]:
    """A server on this machine that answers every request with what `answer` writes; gives its address."""

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
    """MPEG transport stream, as cameras send it; the end of the data is the end of the connection."""
    data = write_video(tmp_path / "a.ts", moving_images(30)).read_bytes()

    def answer(client: BinaryIO) -> None:
        for chunk in iter(io.BytesIO(data * 3).read, b""):
            client.write(chunk)

    with serve("video/mp2t", answer) as address:
        source = open_source(address)
        assert len(list(source)) >= 1
