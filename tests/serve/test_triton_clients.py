"""NVIDIA's own client over HTTP, and our example on top of it, against the server."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from serve.served import Running, running

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.preprocess import resize_and_pad

triton = pytest.importorskip("tritonclient.http")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}
NET_HW = (96, 128)
IMAGES = [synthetic_image(120, 160, 0), synthetic_image(300, 200, 1), synthetic_image(97, 333, 2)]


@pytest.fixture(scope="module")
def detector(tiny_artefact: Path) -> Iterator[Detector]:
    with Detector(tiny_artefact) as detector:
        yield detector


@pytest.fixture(scope="module")
def server(detector: Detector) -> Iterator[Running]:
    with running({"tiny": detector}) as served:
        yield served


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("triton_client")


def request_inputs(image: Any, conf: float, *, batch: int = 1, binary: bool = True) -> list[Any]:
    padded, transform = resize_and_pad(image, NET_HW)
    arrays = {
        "images": np.stack([padded] * batch),
        "valid_hw": np.array([transform.resized_hw] * batch, np.int32),
        "score_threshold": np.full((batch, 1), conf, np.float32),
        "iou_threshold": np.full((batch, 1), 0.5, np.float32),
    }
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    return inputs


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_repository_index()[0]["state"] == "READY"
    metadata = client.get_model_metadata("tiny")
    assert [tensor["name"] for tensor in metadata["inputs"]] == [
        "images",
        "valid_hw",
        "score_threshold",
        "iou_threshold",
    ]
    assert metadata["outputs"][1] == {"name": "boxes", "datatype": "FP32", "shape": [-1, 100, 4]}
    config = client.get_model_config("tiny")
    assert config["max_batch_size"] == 8
    assert "class_names" in config["parameters"]


@pytest.mark.parametrize(
    ("binary", "packing"), [(True, None), (True, "gzip"), (True, "deflate"), (False, None)]
)
def test_tensors_in_binary_and_as_json(
    client: Any, detector: Detector, binary: bool, packing: str | None
) -> None:
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("num_dets", "boxes", "scores", "labels")
    ]
    result = client.infer(
        "tiny",
        request_inputs(IMAGES[0], 0.1, batch=2, binary=binary),
        outputs=outputs,
        request_id="mine",
        request_compression_algorithm=packing,
        response_compression_algorithm=packing,
    )
    assert result.get_response()["id"] == "mine"
    padded, transform = resize_and_pad(IMAGES[0], NET_HW)
    valid_hw = np.array([transform.resized_hw], np.int32)
    expected = detector.engine.infer(padded[None], valid_hw, 0.1, 0.5)
    assert expected.num_dets[0] > 0
    for slot in (0, 1):
        assert result.as_numpy("num_dets")[slot] == expected.num_dets
        np.testing.assert_allclose(result.as_numpy("boxes")[slot], expected.boxes_net[0], atol=1e-3)
        np.testing.assert_allclose(result.as_numpy("scores")[slot], expected.scores[0], atol=1e-6)
        np.testing.assert_array_equal(result.as_numpy("labels")[slot], expected.labels[0])


def test_errors_reach_the_client(client: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match="no model 'other'"):
        client.infer("other", request_inputs(IMAGES[0], 0.1))
    wrong = request_inputs(IMAGES[0], 0.1)[:3]
    with pytest.raises(triton.InferenceServerException, match="iou_threshold"):
        client.infer("tiny", wrong)


def test_the_example_finds_what_the_detector_finds(
    example: ModuleType,
    server: Running,
    detector: Detector,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        cv2.imwrite(path, image)
    arguments = ["tiny", *paths, "--url", f"127.0.0.1:{server.port}", "--conf", "0.1"]
    assert example.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    detector.set_conf(0.1)
    detections = [detector(image) for image in IMAGES]
    expected = [
        f"{path}\t{name}\t{score:.3f}"
        for path, own in zip(paths, detections, strict=True)
        for name, score in zip(own.names(), own.scores.tolist(), strict=True)
    ]
    assert [line.rpartition("\t")[0] for line in lines] == expected
    assert "tritonclient.http" in sys.modules


@pytest.mark.parametrize(
    ("model", "url", "named"),
    [
        ("other", "http://127.0.0.1:PORT", "other"),
        ("tiny", "127.0.0.1:1", "127.0.0.1:1"),
        ("tiny", "https://127.0.0.1:PORT", "grpc://"),
    ],
)
def test_the_example_says_what_is_wrong(
    model: str,
    url: str,
    named: str,
    example: ModuleType,
    server: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), IMAGES[0])
    assert example.main([model, str(path), "--url", url.replace("PORT", str(server.port))]) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_the_example_speaks_grpc_where_the_address_says_so(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    grpc = ModuleType("tritonclient.grpc")
    monkeypatch.setattr(grpc, "InferenceServerClient", opened.append, raising=False)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", grpc)
    monkeypatch.setattr("tritonclient.grpc", grpc, raising=False)
    assert example.connect("grpc://host:8001")[1] is grpc
    assert opened == ["host:8001"]
