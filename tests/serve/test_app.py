"""The HTTP face: encoded images, tensors, limits, errors, time, clients that go, the token."""

import gzip
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from serve.served import CountingEngine, Running, running

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.data.images import decode_image
from tood_deploy.distributions import ImageCounter
from tood_deploy.inference.slicing import Slicing
from tood_deploy.manifest_sections import Parity
from tood_deploy.serve.models import ServeLimits

IMAGES = [synthetic_image(*size_hw, seed) for seed, size_hw in enumerate([(120, 160), (300, 200)])]
SMALL = ServeLimits(queue=4, max_body=200_000, max_pixels=1_000_000, timeout_s=1.0)


def encoded(image: Any, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def solid(red: int) -> bytes:
    return encoded(np.full((32, 32, 3), (0, 0, red), np.uint8))


def form(*files: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    parts = [
        f'--xx\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join([*parts, b"--xx--\r\n"]), {"Content-Type": "multipart/form-data; boundary=xx"}


@pytest.fixture(scope="module")
def server(tiny_artefact: Path) -> Iterator[Running]:
    with running({"tiny": Detector(tiny_artefact, conf=0.1)}) as served:
        yield served


@pytest.fixture
def counting() -> Iterator[tuple[Running, CountingEngine]]:
    engine = CountingEngine()
    with running({"m": Detector(engine, conf=0.0, iou=0.5)}, SMALL) as served:
        yield served, engine
        engine.gate.set()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_an_encoded_image_gets_the_detectors_answer(
    server: Running, tiny_artefact: Path, suffix: str
) -> None:
    data = encoded(IMAGES[0], suffix)
    status, answer, _ = server.ask("POST", "/detect/tiny?conf=0.2&iou=0.5", data)
    assert status == 200
    (found,) = answer["images"]
    assert (found["width"], found["height"]) == (160, 120)
    with Detector(tiny_artefact, conf=0.2, iou=0.5) as detector:
        expected = detector(decode_image(data, "image"))
    assert len(expected) > 0
    rows = found["detections"]
    assert [row["class"] for row in rows] == expected.names()
    assert [row["class_id"] for row in rows] == expected.class_ids.tolist()
    np.testing.assert_allclose([row["score"] for row in rows], expected.scores, atol=1e-6)
    np.testing.assert_allclose([row["box"] for row in rows], expected.boxes, atol=1e-3)


def test_several_images_in_a_form(server: Running, tiny_artefact: Path) -> None:
    body, headers = form(("a.png", encoded(IMAGES[0])), ("b.png", encoded(IMAGES[1])))
    status, answer, _ = server.ask("POST", "/detect/tiny", body, headers)
    assert status == 200
    assert [image["name"] for image in answer["images"]] == ["a.png", "b.png"]
    with Detector(tiny_artefact, conf=0.1) as detector:
        counts = [len(detector(image)) for image in IMAGES]
    assert [len(image["detections"]) for image in answer["images"]] == counts


def test_classes_and_thresholds_of_classes(server: Running, tiny_artefact: Path) -> None:
    data = encoded(IMAGES[0])
    with Detector(tiny_artefact, conf=0.1) as detector:
        names = sorted(set(detector(IMAGES[0]).names()))[:2]
        detector.set_conf({names[0]: 0.25})
    assert len(names) == 2
    status, answer, _ = server.ask("POST", f"/detect/tiny?only={','.join(names)}", data)
    assert status == 200
    assert {row["class"] for row in answer["images"][0]["detections"]} == set(names)
    path = f"/detect/tiny?conf=0.1,{names[0]}=0.25".replace(" ", "%20")
    status, answer, _ = server.ask("POST", path, data)
    with Detector(tiny_artefact, conf=f"0.1,{names[0]}=0.25") as detector:
        expected = detector(IMAGES[0])
    rows = answer["images"][0]["detections"]
    assert [row["class"] for row in rows] == expected.names()


def test_an_image_in_slices(server: Running, tiny_artefact: Path) -> None:
    image = synthetic_image(300, 420, 5)
    status, answer, _ = server.ask("POST", "/detect/tiny?slice=160x224", encoded(image))
    assert status == 200
    with Detector(tiny_artefact, conf=0.1, slicing=Slicing((160, 224))) as detector:
        expected = detector(image)
    rows = answer["images"][0]["detections"]
    assert len(rows) == len(expected) > 0
    np.testing.assert_allclose([row["score"] for row in rows], expected.scores, atol=1e-6)
    np.testing.assert_allclose([row["box"] for row in rows], expected.boxes, atol=1e-3)
    batcher = server.state.models["tiny"].batcher
    assert server.ask("POST", "/detect/tiny?slice=32", encoded(image))[0] == 400  # 100 windows
    assert batcher.depth == 0


def test_the_drawn_image(server: Running) -> None:
    headers = {"Accept": "image/jpeg"}
    status, content, found = server.ask("POST", "/detect/tiny", encoded(IMAGES[0]), headers)
    assert (status, found["content-type"]) == (200, "image/jpeg")
    drawn = decode_image(content, "drawn")
    assert drawn.shape == IMAGES[0].shape
    assert np.abs(drawn.astype(int) - IMAGES[0]).max() > 100
    assert server.ask("POST", "/detect/tiny", b"x", {"Accept": "text/html"})[0] == 406


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/detect/other", b"x", {}, 404, "other"),
        ("/detect/tiny", b"", {}, 400, "empty"),
        ("/detect/tiny", b"no image", {}, 400, "not an image"),
        ("/detect/tiny", encoded(IMAGES[0])[:500], {}, 400, "cut"),
        ("/detect/tiny?conf=2", b"x", {}, 400, "conf"),
        ("/detect/tiny?conf=nan", b"x", {}, 400, "conf"),
        ("/detect/tiny?iou=", b"x", {}, 400, "iou"),
        ("/detect/tiny?conf=/etc/x.json", b"x", {}, 400, "conf"),
        ("/detect/tiny?conf=0.5,nothing=1", b"x", {}, 400, "nothing"),
        ("/detect/tiny?only=nothing", b"x", {}, 400, "nothing"),
        ("/detect/tiny?only=", b"x", {}, 400, "only"),
        ("/detect/tiny?slice=", b"x", {}, 400, "slice"),
        ("/detect/tiny?slice=0", b"x", {}, 400, "slice"),
        ("/detect/tiny?slice=64x64x64", b"x", {}, 400, "slice"),
        ("/detect/tiny?confidence=0.5", b"x", {}, 400, "confidence"),
        ("/detect/tiny?conf=0.5&conf=0.6", b"x", {}, 400, "conf"),
        ("/detect/tiny", b"x", {"Content-Type": "multipart/form-data"}, 400, "form"),
        ("/detect/tiny", b"x", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "form"),
        ("/detect/tiny", b"x", {"Content-Encoding": "br"}, 415, "gzip"),
        ("/detect/tiny", b"x", {"Content-Encoding": "gzip"}, 400, "gzip"),
        ("/v2/models/tiny/infer", b"\xff\xfe", {}, 400, "JSON"),
        ("/v2/models/tiny/infer", b"[" * 100_000, {}, 400, "JSON"),
        ("/v2/models/tiny/infer", b'{"inputs": 3}', {}, 400, "inputs"),
        ("/v2/models/tiny/infer", b'{"id": "\\ud800", "inputs": []}', {}, 400, "inputs"),
        ("/v2/models/\\ud800/infer", b"{}", {}, 404, "no model"),
        ("/v2/models/tiny/versions/2/infer", b"{}", {}, 404, "version"),
        ("/v2/models/tiny/infer", b"{}", {"Inference-Header-Content-Length": "9"}, 400, "length"),
        ("/v2/models/tiny/infer", b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "number"),
        ("/nothing", b"", {}, 404, "Not Found"),
        ("/metrics", b"", {}, 405, "GET"),
    ],
)
def test_bad_requests_are_named(
    server: Running, path: str, body: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    found, answer, _ = server.ask("POST", path, body, headers)
    assert (found, [*answer]) == (status, ["error"])
    assert words in answer["error"]
    assert "\n" not in answer["error"]


def test_a_bomb_is_refused_by_its_header(server: Running) -> None:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0
    )
    data = header + b"\0\0\0\0" + b"\0\0\0\0IEND\xaeB`\x82"
    status, answer, _ = server.ask("POST", "/detect/tiny", data)
    assert status == 400
    assert "3,600,000,000 pixels" in answer["error"]


def tensors(**changes: Any) -> dict[str, Any]:
    """Return the inputs of a request in JSON, some of them changed."""
    values: dict[str, tuple[str, list[int], Any]] = {
        "images": ("UINT8", [1, 32, 32, 3], [200] * (32 * 32 * 3)),
        "valid_hw": ("INT32", [1, 2], [32, 32]),
        "score_threshold": ("FP32", [1, 1], [0.5]),
        "iou_threshold": ("FP32", [1, 1], [0.5]),
    } | changes
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": shape, "data": data}
            for name, (datatype, shape, data) in values.items()
        ]
    }


def test_tensors_as_json(counting: tuple[Running, CountingEngine]) -> None:
    request = tensors() | {"id": "mine", "outputs": [{"name": "scores"}, {"name": "num_dets"}]}
    status, answer, _ = counting[0].ask("POST", "/v2/models/m/infer", json.dumps(request).encode())
    assert status == 200
    assert (answer["id"], answer["model_name"]) == ("mine", "m")
    scores, num_dets = answer["outputs"]
    assert (scores["name"], scores["shape"]) == ("scores", [1, 100])
    assert (num_dets["shape"], num_dets["data"]) == ([1, 1], [49])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": ("UINT8", [1, 32, 32, 3], [1, 2])}, "2 numbers"),
        ({"images": ("FP32", [1, 32, 32, 3], [])}, "expected UINT8"),
        ({"images": ("UINT8", [1, 33, 32, 3], [1] * 33 * 32 * 3)}, "multiples of 32"),
        ({"images": ("UINT8", [32, 32, 3], [])}, "images"),
        ({"images": ("UINT8", [1, 2**40, 2**40, 3], [])}, "images"),
        ({"images": ("UINT8", [1, -32, 32, 3], [])}, "images"),
        ({"images": ("UINT8", [True, 32, 32, 3], [])}, "images"),
        ({"images": ("UINT8", [1, 32, 32, 3], [300] * (32 * 32 * 3))}, "does not fit"),
        ({"images": ("UINT8", [1, 32, 32, 3], ["a"] * (32 * 32 * 3))}, "whole numbers"),
        ({"images": ("UINT8", [1, 32, 32, 3], [10**30] * (32 * 32 * 3))}, "whole numbers"),
        ({"valid_hw": ("INT32", [1, 2], [33, 32])}, "valid_hw"),
        ({"valid_hw": ("INT32", [1, 2], [0, 32])}, "valid_hw"),
        ({"valid_hw": ("INT32", [2, 2], [32, 32, 32, 32])}, "batch sizes"),
        ({"score_threshold": ("FP32", [1, 1], [float("nan")])}, "score_threshold"),
        ({"iou_threshold": ("FP32", [1, 1], [1.5])}, "iou_threshold"),
        ({"iou_threshold": ("FP32", [1, 1], [[[1], [2, 3]]])}, "iou_threshold"),
        ({"more": ("FP32", [1, 1], [1.5])}, "more"),
    ],
)
def test_wrong_tensors_are_named(
    counting: tuple[Running, CountingEngine], changes: dict[str, Any], words: str
) -> None:
    body = json.dumps(tensors(**changes)).encode()
    status, answer, _ = counting[0].ask("POST", "/v2/models/m/infer", body)
    assert status == 400
    assert words in answer["error"]


def test_a_canvas_that_no_image_of_the_model_needs_is_refused(server: Running) -> None:
    changes = {
        "images": ("UINT8", [1, 32, 9600, 3], [1] * (32 * 9600 * 3)),
        "valid_hw": ("INT32", [1, 2], [32, 9600]),
    }
    body = json.dumps(tensors(**changes)).encode()
    status, answer, _ = server.ask("POST", "/v2/models/tiny/infer", body)
    assert status == 400
    assert "307,200 pixels" in answer["error"]


def test_bodies_are_bounded_packed_or_not(counting: tuple[Running, CountingEngine]) -> None:
    server, _ = counting
    assert server.ask("POST", "/detect/m", b"x" * 200_001)[0] == 413
    packed = gzip.compress(b"\0" * 100_000_000)
    assert len(packed) < 200_000
    assert server.ask("POST", "/detect/m", packed, {"Content-Encoding": "gzip"})[0] == 413
    image = {"Content-Encoding": "deflate"}
    assert server.ask("POST", "/detect/m", zlib.compress(solid(7)), image)[0] == 200
    half = {"Content-Encoding": "gzip"}
    assert server.ask("POST", "/detect/m", gzip.compress(solid(7))[:-20], half)[0] == 400
    assert server.state.budget._held == 0


def test_a_full_queue_says_when_to_come_again(counting: tuple[Running, CountingEngine]) -> None:
    server, engine = counting
    engine.gate.clear()
    with ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(server.ask, "POST", "/detect/m", solid(i)) for i in range(1, 13)]
        time.sleep(0.5)
        engine.gate.set()
        answers = [call.result() for call in calls]
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) <= 4 + 8 + 1  # the queue, a batch, one under way
    for red, (status, answer, headers) in enumerate(answers, 1):
        if status == 503:
            assert int(headers["retry-after"]) >= 1
        else:
            assert len(answer["images"][0]["detections"]) == red
    body, headers = form(*[("a", solid(1))] * 5)
    assert server.ask("POST", "/detect/m", body, headers)[0] in (400, 413)
    assert server.state.models["m"].batcher.depth == 0


def test_time_is_limited(counting: tuple[Running, CountingEngine]) -> None:
    server, engine = counting
    engine.gate.clear()
    first = threading.Thread(target=server.ask, args=("POST", "/detect/m", solid(1)))
    first.start()
    assert engine.entered.wait(5)
    status, answer, headers = server.ask("POST", "/detect/m", solid(2))
    assert (status, "Retry-After".lower() in headers) == (504, True)
    assert "1 seconds" in answer["error"]
    first.join()
    engine.gate.set()
    assert server.ask("POST", "/detect/m", solid(3))[0] == 200
    assert server.state.models["m"].batcher.depth == 0
    assert sum(engine.batches) == 2  # what nobody waited for was not run


def wait_for_depth(server: Running, depth: int) -> None:
    """Wait until so many images are in the queue."""
    deadline = time.perf_counter() + 0.8  # less than the time limit, which would empty it too
    while server.state.models["m"].batcher.depth != depth:
        assert time.perf_counter() < deadline
        time.sleep(0.01)


def test_slow_and_broken_clients_hold_nothing_up(counting: tuple[Running, CountingEngine]) -> None:
    server, engine = counting
    slow = [server.connect() for _ in range(20)]
    for connection in slow:
        connection.sendall(b"POST /detect/m HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    broken = server.connect()
    broken.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
    started = time.perf_counter()
    assert server.ask("POST", "/detect/m", solid(3))[0] == 200
    assert time.perf_counter() - started < 1
    slow[0].close()
    assert b" 408 " in slow[1].recv(1000)
    engine.gate.clear()
    engine.entered.clear()
    gone = server.connect()
    data = solid(5)
    head = f"POST /detect/m HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    holding = threading.Thread(target=server.ask, args=("POST", "/detect/m", solid(1)))
    holding.start()
    assert engine.entered.wait(5)
    gone.sendall(head + data)
    wait_for_depth(server, 1)
    gone.close()
    wait_for_depth(server, 0)
    engine.gate.set()
    holding.join()
    for connection in [*slow, broken]:
        connection.close()


def test_a_failing_network_is_a_500_with_a_reason(counting: tuple[Running, CountingEngine]) -> None:
    server, engine = counting
    engine.broken = 9
    status, answer, _ = server.ask("POST", "/detect/m", solid(9))
    assert status == 500
    assert "out of memory" in answer["error"]
    assert server.ask("POST", "/detect/m", solid(8))[0] == 200


def test_token_log_and_ids() -> None:
    lines: list[str] = []
    engine = CountingEngine()
    with running({"m": Detector(engine)}, SMALL, token="secret", log=lines) as server:
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert server.ask("GET", "/")[0] == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, _, headers = server.ask("POST", "/detect/m", solid(1), header)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        right = {"Authorization": "Bearer secret", "X-Request-Id": "id 1\u00e9"}
        status, _, headers = server.ask("POST", "/detect/m", solid(1), right)
        assert (status, headers["x-request-id"]) == (200, "id1")
    entries = [json.loads(line) for line in lines]
    assert [entry["status"] for entry in entries] == [200, 200, 401, 401, 401, 200]
    assert (
        entries[-1] | {"path": "/detect/m", "model": "m", "images": 1, "id": "id1"} == entries[-1]
    )
    assert not any("secret" in line for line in lines)


def test_models_that_are_still_being_opened(counting: tuple[Running, CountingEngine]) -> None:
    server, _ = counting
    assert server.ask("GET", "/v2/health/ready")[0] == 200
    server.state.names.append("later")
    status, _, headers = server.ask("GET", "/v2/health/ready")
    assert (status, "retry-after" in headers) == (503, True)
    assert server.ask("GET", "/v2/health/live")[0] == 200
    assert server.ask("POST", "/detect/later", b"x")[0] == 503
    assert server.ask("POST", "/detect/m", solid(1))[0] == 200


def test_metrics_count(counting: tuple[Running, CountingEngine]) -> None:
    server, _ = counting
    server.ask("POST", "/detect/m", solid(1))
    server.ask("POST", "/detect/m", b"x")
    text = server.ask("GET", "/metrics")[1].decode()
    for line in (
        'tood_requests_total{model="m",route="/detect/{name}",status="200"} 1.0',
        'tood_errors_total{model="m",route="/detect/{name}",status="400"} 1.0',
        'tood_images_total{model="m"} 1.0',
        'tood_batch_size_count{model="m"} 1.0',
        'tood_queue_depth{model="m"} 0.0',
    ):
        assert line in text
    for stage in ("read", "decode", "queue", "infer", "total"):
        assert f'tood_stage_seconds_bucket{{le="30.0",model="m",stage="{stage}"}}' in text


def drift_of(server: Running) -> dict[str, float]:
    """Return the figure of every distribution."""
    text = server.ask("GET", "/metrics")[1].decode()
    rows = re.findall(
        r'^tood_drift_psi\{distribution="(\w+)",model="m"\} (\S+)', text, re.MULTILINE
    )
    return {kind: float(value) for kind, value in rows}


def test_drift_from_calibration() -> None:
    """Images like those of calibration give a small figure, other sizes and counts a large one."""
    engine = CountingEngine()
    counter = ImageCounter(80)
    scores = np.linspace(0.99, 0.0, 100, dtype=np.float32)[:20]
    for _ in range(40):
        counter.add((32, 32), scores, np.zeros(20, np.int32))
    parity = Parity(statistics=counter.statistics())
    engine.manifest = replace(engine.manifest, parity=parity)
    with running({"m": Detector(engine, conf=0.3)}) as server:
        assert drift_of(server) == {}
        for _ in range(20):
            server.ask("POST", "/detect/m", solid(20))
        assert set(drift_of(server)) == {"scores", "classes", "sizes"}
        assert max(drift_of(server).values()) < 0.25
        large = encoded(np.full((320, 320, 3), (0, 0, 70), np.uint8))
        for _ in range(20):
            server.ask("POST", "/detect/m", large)
        drift = drift_of(server)
        assert min(drift["scores"], drift["sizes"]) > 0.25
        before = drift_of(server)
        for query in ("conf=0.5", "only=person", "slice=64"):
            assert server.ask("POST", f"/detect/m?{query}", solid(20))[0] == 200
        assert drift_of(server) == before


def test_without_calibration_there_is_no_drift(counting: tuple[Running, CountingEngine]) -> None:
    server, _ = counting
    server.ask("POST", "/detect/m", solid(20))
    text = server.ask("GET", "/metrics")[1].decode()
    assert "tood_drift_psi{" not in text
    assert "tood_calibration_share{" not in text
    assert 'tood_served_share{bin="0",distribution="sizes",model="m"} 1.0' in text
