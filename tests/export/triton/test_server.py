"""A repository of ours on a real Triton Inference Server, that of NVIDIA's pytriton.

Its wheel has the Python back end alone, so a few lines of Python run the model; configuration,
warm-up, batching and shapes are those that were exported. The back end knows no NumPy 2: its
tensors would be empty. So both live in an environment of their own, made with
`pip install nvidia-pytriton onnxruntime "numpy<2"`; `TOOD_PYTRITON` names its python.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton.config import config_text, read_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.export.triton.repository import triton_repository

http: Any = pytest.importorskip("tritonclient.http")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "TOOD_PYTRITON" not in os.environ,
        reason="TOOD_PYTRITON does not name a python that has nvidia-pytriton",
    ),
]
ROOT = Path(__file__).resolve().parents[3]
SIZES_HW = ((256, 320), (320, 256))
WAIT_SECONDS = 120
FIND = """
import importlib.util, json, sys
folder = importlib.util.find_spec("pytriton").submodule_search_locations[0]
print(json.dumps([folder, f"{sys.version_info.major}.{sys.version_info.minor}"]))
"""


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        http_url, grpc_url: host and port.
        runs: the file that the model appends the size of every batch to.
    """

    http_url: str
    grpc_url: str
    runs: Path

    def batches(self) -> list[int]:
        """Return the sizes of all batches so far."""
        return [int(line) for line in self.runs.read_text(encoding="utf-8").split()]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def write_repository(model: Path, repository: Path) -> None:
    """Export the model, and exchange what runs it in its configuration alone."""
    options = TritonOptions(
        name="tood", device="cpu", warm_up_batches=(1, 2), queue_delay_us=300_000
    )
    profiles = Profiles(SIZES_HW, (1, 1, 4))
    served = triton_repository(model, repository, options, profiles=profiles)
    file = served.folder / "config.pbtxt"
    config = read_config(file.read_text(encoding="utf-8"))
    config.platform, config.backend, config.default_model_filename = "", "python", "model.py"
    file.write_text(config_text(config), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("ort_model.py"), served.path.with_name("model.py"))


def install_back_end(package: Path, version: str, folder: Path) -> None:
    """Copy the Python back end with the program that it starts.

    Args:
        package: the folder of pytriton.
        version: of its Python.
        folder: to make.
    """
    shutil.copytree(package / "tritonserver" / "backends", folder)
    program = package / "tritonserver" / "python_backend_stubs" / version
    shutil.copy(program / "triton_python_backend_stub", folder / "python")


@pytest.fixture(scope="module")
def server(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server with the model, ready."""
    place = tmp_path_factory.mktemp("triton")
    python = os.environ["TOOD_PYTRITON"]
    found = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True)
    place_of_package, version = json.loads(found.stdout)
    package = Path(place_of_package)
    install_back_end(package, version, place / "backends")
    write_repository(tiny_artefact, place / "repo")
    ports = free_ports(3)
    names = ("--http-port", "--grpc-port", "--metrics-port")
    arguments = [str(part) for pair in zip(names, ports, strict=True) for part in pair]
    environment = os.environ | {
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(package.parent / "nvidia_pytriton.libs"),
        "TOOD_TEST_RUNS": str(place / "runs"),
    }
    folders = ["--model-repository", place / "repo", "--backend-directory", place / "backends"]
    program = package / "tritonserver" / "bin" / "tritonserver"
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *folders, *arguments, "--exit-timeout-secs", "2"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_ready(process, f"127.0.0.1:{ports[0]}", place / "log")
        yield Server(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", place / "runs")
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server runs the model; fail with its log where it ended, or takes too long."""
    end = time.monotonic() + WAIT_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if http.InferenceServerClient(url).is_model_ready("tood"):
                return
        except OSError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server is not ready: {log.read_text(errors='replace')[-3000:]}")


def test_the_warm_up_ran_at_every_size_before_the_model_was_ready(server: Server) -> None:
    assert sorted(server.batches()[: 2 * len(SIZES_HW)]) == [1, 1, 2, 2]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_example_client_finds_what_the_detector_does(
    protocol: str, server: Server, tiny_artefact: Path, tmp_path: Path
) -> None:
    pytest.importorskip(f"tritonclient.{protocol}")
    images = [synthetic_image(height, width, 0) for height, width in ((120, 160), (300, 200))]
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        cv2.imwrite(str(path), image)
    url = server.http_url if protocol == "http" else server.grpc_url
    options = ["--url", url, "--conf", "0.1", *(["--http"] if protocol == "http" else [])]
    process = subprocess.run(
        [sys.executable, ROOT / "examples" / "triton_client.py", "tood", *paths, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    with Detector(tiny_artefact, conf=0.1, iou=0.6) as detector:
        for path, image in zip(paths, images, strict=True):
            expected = detector(image)
            own = [line[1:] for line in lines if line[0] == str(path)]
            assert len(own) == len(expected) > 0
            assert [name for name, _, _ in own] == list(expected.names())
            boxes = [[float(side) for side in box.split()] for _, _, box in own]
            np.testing.assert_allclose(boxes, expected.boxes, atol=0.06)


def test_requests_at_the_same_time_share_a_batch(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("triton_client")
    client = example.HttpClients(server.http_url)
    model = example.read_model(client, "tood")
    before = len(server.batches())
    images = [synthetic_image(120, 160, seed) for seed in range(4)]
    found = list(example.detect(client, http, model, images, 0.1, 0.6))
    batches = server.batches()[before:]
    assert (len(found), sum(batches)) == (4, 4)
    assert max(batches) > 1
