"""Servers on this machine that send videos, for the tests of streams."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, Protocol

import cv2
import pytest
from inference.fakes import moving_images

Answer = Callable[[BinaryIO], object]
MULTIPART = "multipart/x-mixed-replace; boundary=frame"


@contextmanager
def serve(content_type: str, answer: Answer, length: int | None = None) -> Iterator[str]:
    """A server on this machine that answers every request with what `answer` writes.

    Gives its address. `length`: of the content, where it is to be told.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            if length is not None:
                self.send_header("Content-Length", str(length))
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


class StartAgain(Protocol):
    def __call__(self, again: bool = True) -> None: ...


@contextmanager
def rtsp_server() -> Iterator[tuple[str, StartAgain]]:
    """GStreamer's RTSP server; the test is skipped where it is not installed.

    Gives its address, with a login, and what kills it and, if asked, starts it again.
    """
    python = shutil.which("python3", path="/usr/bin")
    script = Path(__file__).with_name("rtsp_server.py")
    if python is None or subprocess.run([python, script], capture_output=True).returncode == 1:
        pytest.skip(
            "no RTSP server: apt-get install python3-gi gir1.2-gst-rtsp-server-1.0 "
            "gstreamer1.0-plugins-good"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: list[subprocess.Popen[str]] = []

    def start(again: bool = True) -> None:
        for server in running:
            server.kill()
            server.communicate()
        running.clear()
        if again:
            command = [python, str(script), str(port), "joe", "s3cret"]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert running[0].stdout is not None
            assert running[0].stdout.readline() == "ready\n"

    start()
    try:
        yield f"rtsp://joe:s3cret@127.0.0.1:{port}/live", start
    finally:
        start(again=False)
