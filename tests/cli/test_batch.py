"""tood-batch: what it refuses, and jobs on clusters of this machine, whose workers are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from inference.fakes import write_image

pytest.importorskip("pyarrow")

import pyarrow.parquet as pq

from tood_deploy.cli.batch import main
from tood_deploy.demo.scenes import make_scene
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command in a folder with an image and what is named as a model."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png")
    (tmp_path / "m.onnx").write_bytes(b"model")
    (tmp_path / "m.json").write_text(Manifest(PRESETS["tiny"]).to_json())

    def call(*arguments: str) -> tuple[int, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capfd.readouterr().err

    return call


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("m.pth a.png", "tood-export"),
        ("m.onnx absent", "absent"),
        ("m.onnx a.png --threads 2", "--cpus-per-worker"),
        ("m.onnx a.png --gpus-per-worker 1", "--device cuda"),
        ("m.onnx a.png --gpus-per-worker 1.5 --device cuda", "1.5"),
        ("m.onnx a.png --workers 0", "--workers"),
        ("m.onnx a.png --coco-annotations a.json", "--format coco"),
        ("m.onnx a.png --address nowhere", "HOST:PORT"),
        ("m.onnx a.png --column url", "--column"),
        ("m.onnx a.png --conf 7", "7"),
        ("absent.onnx a.png", "absent"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    arguments: str, named: str, run: Run, tmp_path: Path
) -> None:
    code, err = run(*arguments.split(), "--output", "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert named in err
    assert not (tmp_path / "out").exists()


def test_an_address_that_does_not_answer(run: Run, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, err = run("m.onnx", "a.png", "--output", "out", "--address", address)
    assert (code, err.count("\n")) == (2, 1), err
    assert address in err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files(run: Run, tmp_path: Path) -> None:
    write_image(tmp_path / "out" / "b.png")
    code, err = run("m.onnx", "a.png", "--output", "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert "b.png" in err


# With Ray, slow from here on.

WAIT_S = 150.0
COPIES = 25  # of the scenes: so many that a job takes as long as three kills


@pytest.fixture(scope="module")
def demo_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tood_deploy.export.export import export_onnx
    from tood_deploy.model import load_checkpoint

    path = tmp_path_factory.mktemp("demo") / "demo.onnx"
    weights = ROOT / "tood_deploy" / "weights" / "tiny-demo.safetensors"
    export_onnx(load_checkpoint(weights), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many images, two of them damaged."""
    folder, data = tmp_path_factory.mktemp("images"), b""
    for seed in range(20):
        data = cv2.imencode(".jpg", make_scene(seed).image_bgr)[1].tobytes()
        for copy in range(COPIES):
            (folder / f"{seed:02}-{copy:03}.jpg").write_bytes(data)
    (folder / "cut.jpg").write_bytes(data[:200])
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two nodes on this machine, of one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        nodes.add_node(**node)
        yield str(nodes.address)
        nodes.shutdown()


@pytest.fixture
def batch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a job, in a process that ends with the test.

    There is a token, which these clusters do not ask for.
    """
    code = "import sys; from tood_deploy.cli.batch import main; sys.exit(main())"
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": "0" * 64}
    jobs: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        job = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        job.kill()
        job.communicate()


def working(since_s: float) -> list[Any]:
    """Return the workers of this test's cluster that have computed for so long."""
    import psutil

    workers = []
    for process in psutil.Process().children(recursive=True):
        try:
            is_worker = process.name().startswith("ray::MapWorker")
            if is_worker and process.cpu_times().user >= since_s:
                workers.append(process)
        except psutil.Error:  # it has just ended
            continue
    return workers


def wait_for(what: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    end_s = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def expected(demo_artefact: Path, images: Path) -> dict[str, dict[str, Any]]:
    """What tood-infer finds in one copy of each scene, by the scene's number."""
    from tood_deploy import Detector
    from tood_deploy.inference.text_sinks import frame_record

    with Detector(demo_artefact, conf=0.3) as detector:
        results = detector.stream(str(images / "*-000.jpg"))
        return {
            Path(frame.name).name[:2]: frame_record(frame, detections, False)
            for frame, detections in results
        }


def check_rows(rows: list[dict[str, Any]], images: Path, expected: dict[str, Any]) -> None:
    """One row an image, with what tood-infer finds; errors of the damaged ones alone."""
    assert sorted(row["path"] for row in rows) == sorted(map(str, images.iterdir()))
    for row in rows:
        name = Path(row["path"]).name
        if name in ("cut.jpg", "empty.png"):
            assert name in row["error"]
            continue
        record = expected[name[:2]]
        expected_objects = record["detections"]
        assert row["error"] is None
        assert (row["height"], row["width"]) == (record["height"], record["width"])
        assert row["boxes"] == [one["box"] for one in expected_objects]
        assert row["scores"] == [one["score"] for one in expected_objects]
        assert row["class_names"] == [one["class_name"] for one in expected_objects]


@pytest.mark.slow
def test_workers_that_are_killed_lose_nothing(
    batch: Callable[..., Any],
    cluster: str,
    demo_artefact: Path,
    images: Path,
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    job = batch(demo_artefact, images, "--output", tmp_path / "out", "--address", cluster)
    killed: set[int] = set()
    while len(killed) < 3:
        # What importing and opening the model takes is less, so that it has begun with images.
        fresh = wait_for(lambda: [one for one in working(4.0) if one.pid not in killed])
        fresh[0].kill()
        killed.add(fresh[0].pid)
    _, err = job.communicate(timeout=WAIT_S)
    assert job.returncode == 1, err
    assert "2 of 502 images" in err
    assert len(err.splitlines()) < 20, err  # progress; nothing of Ray's
    assert "retries" not in err
    parts = sorted((tmp_path / "out").glob("part-*"))
    rows = [row for path in parts for row in pq.read_table(path).to_pylist()]
    check_rows(rows, images, expected)


@pytest.mark.slow
def test_a_stopped_job_is_resumed_and_written_as_json(
    batch: Callable[..., Any],
    cluster: str,
    demo_artefact: Path,
    images: Path,
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    command = (demo_artefact, images, "--output", tmp_path / "out", "--address", cluster)
    wait_for(lambda: not working(0.0))  # those of the job before
    job = batch(*command)
    wait_for(lambda: working(5.0))
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=WAIT_S)
    assert job.returncode == 128 + signal.SIGTERM, err
    parts = sorted((tmp_path / "out").glob("part-*"))
    before = sum(pq.read_table(path).num_rows for path in parts)
    assert before < 502
    resumed = batch(*command, "--resume", "--format", "jsonl")
    _, err = resumed.communicate(timeout=WAIT_S)
    assert resumed.returncode == 1, err
    assert sorted((tmp_path / "out").glob("part-*"))[: len(parts)] == parts
    text = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8")
    lines = list(map(json.loads, text.splitlines()))
    assert sorted(line["source"] for line in lines) == sorted(map(str, images.iterdir()))
    for line in lines:
        if "error" not in line:
            one = expected[Path(line["source"]).name[:2]]
            assert line["detections"] == one["detections"]
    other = batch(*command, "--resume", "--conf", "0.5")
    _, err = other.communicate(timeout=WAIT_S)
    assert (other.returncode, err.count("\n")) == (2, 1), err
    assert "another run" in err


@pytest.mark.slow
def test_a_model_that_workers_cannot_open_is_one_line(
    batch: Callable[..., Any], cluster: str, demo_artefact: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"model")
    manifest = json.loads(demo_artefact.with_suffix(".json").read_text(encoding="utf-8"))
    (tmp_path / "m.json").write_text(json.dumps(manifest), encoding="utf-8")
    command = (tmp_path / "m.onnx", images, "--output", tmp_path / "out", "--address", cluster)
    job = batch(*command, "--allow-mismatch", "--quiet")
    _, err = job.communicate(timeout=WAIT_S)
    assert (job.returncode, err.count("\n")) == (2, 1), err
    assert "m.onnx" in err
    assert list((tmp_path / "out").glob("part-*")) == []
