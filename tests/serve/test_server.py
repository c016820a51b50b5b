"""The process: from a port to readiness, and from SIGTERM to exit code 0."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import pytest

from tood_deploy.data.image_set import synthetic_image

ROOT = Path(__file__).resolve().parents[2]
SERVE = "import sys; from tood_deploy.cli.serve import main; sys.exit(main(sys.argv[1:]))"
JPEG = cv2.imencode(".jpg", synthetic_image(240, 320, 0))[1].tobytes()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", SERVE, *arguments]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    serving = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield serving
    finally:
        serving.kill()
        serving.communicate()


def get(port: int, path: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def wait_until_ready(port: int) -> None:
    """Wait; until then the server says that it is not ready, or does not listen yet."""
    for _ in range(600):
        status = get(port, "/v2/health/ready")
        if status == 200:
            return
        assert status in (0, 503)
        time.sleep(0.1)
    raise AssertionError("the server does not become ready")


def run_to_the_end(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_exits_with_0(tiny_artefact: Path) -> None:
    port = free_port()
    with process(f"a={tiny_artefact}", f"b={tiny_artefact}", "--port", str(port)) as serving:
        wait_until_ready(port)
        with ThreadPoolExecutor(8) as pool:
            calls = [
                pool.submit(get, port, f"/detect/{'ab'[number % 2]}", JPEG) for number in range(8)
            ]
            time.sleep(0.05)
            serving.send_signal(signal.SIGTERM)
            statuses = [call.result() for call in calls]
        stdout, stderr = serving.communicate(timeout=60)
    assert serving.returncode == 0, stderr
    assert set(statuses) <= {200, 0}  # 0: came after the door was closed
    entries = [json.loads(line) for line in stdout.splitlines()]
    answered = [entry for entry in entries if entry["path"].startswith("/detect/")]
    assert [entry["status"] for entry in answered] == [200] * statuses.count(200)
    assert "for programs on this machine alone" in stderr.splitlines()[0]
    assert stderr.splitlines()[-1] == "stopped; everything that was accepted was answered"


@pytest.mark.slow
def test_ctrl_c_exits_with_130(tiny_artefact: Path) -> None:
    port = free_port()
    with process(str(tiny_artefact), "--port", str(port), "--quiet") as serving:
        wait_until_ready(port)
        serving.send_signal(signal.SIGINT)
        stdout, stderr = serving.communicate(timeout=60)
    assert (serving.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"


@pytest.mark.slow
def test_wrong_use_is_one_line_and_exit_2(tiny_artefact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny_artefact.read_bytes()[:1000])
    port = str(free_port())
    code, stderr = run_to_the_end(str(broken), "--port", port)
    assert (code, stderr.splitlines()[-1].split(":")[0]) == (2, "error")
    assert "broken.onnx" in stderr.splitlines()[-1]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, stderr = run_to_the_end(
            str(tiny_artefact), "--port", str(taken.getsockname()[1]), "--quiet"
        )
    assert (code, stderr.count("\n")) == (2, 1)
    assert "another program listens there" in stderr
