"""The example client against a stand-in for the server that runs the repository's model in ONNX
Runtime, by the configuration in it."""

import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import ToodError
from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton.config import read_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.export.triton.repository import triton_repository

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
KINDS = {"UINT8": np.uint8, "INT32": np.int32, "FP32": np.float32}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("triton_client")


class Input:
    """As `tritonclient`'s InferInput, which checks data against the declared shape and type."""

    def __init__(self, name: str, shape: list[int], datatype: str) -> None:
        self.name, self.shape, self.datatype = name, shape, datatype
        self.array: NDArray[Any] = np.zeros(0)

    def set_data_from_numpy(self, array: NDArray[Any]) -> None:
        assert list(array.shape) == self.shape
        assert array.dtype == KINDS[self.datatype]
        self.array = array


class Server:
    """Checks requests as Triton does by the configuration, and answers in the shapes that it
    states."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config((folder / "config.pbtxt").read_text(encoding="utf-8"))
        self.session = ort.InferenceSession(
            folder / "1" / self.config.default_model_filename, providers=["CPUExecutionProvider"]
        )
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def get_model_config(self, name: str) -> Any:
        assert name == self.config.name
        return SimpleNamespace(config=self.config)

    def infer(self, name: str, inputs: Sequence[Input], outputs: Sequence[str]) -> Any:
        assert name == self.config.name
        feeds = {each.name: each.array for each in inputs}
        for stated in self.config.input:
            batch, *shape = feeds[stated.name].shape
            assert batch <= self.config.max_batch_size
            assert len(shape) == len(stated.dims)
            assert all(
                known in (-1, found) for known, found in zip(stated.dims, shape, strict=True)
            )
        with self.lock:
            self.requests.append(feeds)
            made: Any = self.session.run(list(outputs), feeds)
        dims = {stated.name: list(stated.dims) for stated in self.config.output}
        answer = {
            key: array.reshape(len(array), *dims[key])
            for key, array in zip(outputs, made, strict=True)
        }
        return SimpleNamespace(as_numpy=answer.__getitem__)


TRITON = SimpleNamespace(InferInput=Input, InferRequestedOutput=str)


@pytest.fixture(scope="module")
def server(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    options = TritonOptions(name="tood", warm_up_batches=())
    repository = tmp_path_factory.mktemp("triton") / "repo"
    return Server(
        triton_repository(
            tiny_artefact, repository, options, profiles=Profiles(((256, 320),))
        ).folder
    )


def test_detections_are_those_of_the_detector(
    example: ModuleType, server: Server, tiny_artefact: Path
) -> None:
    images = [
        synthetic_image(height, width, seed)
        for seed, (height, width) in enumerate([(120, 160), (300, 200), (97, 333)])
    ]
    model = example.read_model(server, "tood")
    found = list(example.detect(server, TRITON, model, images, 0.1, 0.5))
    with Detector(tiny_artefact, conf=0.1, iou=0.5) as detector:
        for image, mine in zip(images, found, strict=True):
            expected = detector(image)
            assert len(expected) > 0
            np.testing.assert_array_equal(mine.class_ids, expected.class_ids)
            np.testing.assert_allclose(mine.scores, expected.scores, atol=1e-6)
            np.testing.assert_allclose(mine.boxes, expected.boxes, atol=1e-3)
            assert mine.names() == expected.names()


def test_model_is_read_from_the_server(example: ModuleType, server: Server) -> None:
    model = example.read_model(server, "tood")
    assert (model.name, model.sizing.imgsz, len(model.class_names)) == ("tood", (240, 320), 80)


def test_images_of_one_padded_size_can_share_a_batch(example: ModuleType, server: Server) -> None:
    """Triton joins requests whose shapes behind the batch axis are the same."""
    server.requests.clear()
    images = [synthetic_image(120, 160, 0), synthetic_image(118, 158, 1)]
    list(example.detect(server, TRITON, example.read_model(server, "tood"), images, 0.1, 0.5))
    shapes = [{name: array.shape for name, array in feeds.items()} for feeds in server.requests]
    assert shapes[0] == shapes[1]
    assert all(shape[0] == 1 for shape in shapes[0].values())


def test_a_image_without_an_answer_is_an_error(example: ModuleType) -> None:
    """As an engine without a loop gives it where its rounds of suppression were too few."""
    answer = {"num_dets": np.array([[-1]], np.int32)} | {
        name: np.zeros((1, 100), np.float32) for name in ("boxes", "scores", "labels")
    }
    with pytest.raises(
        ToodError, match=r"num_dets is -1: the rounds of suppression were too few .*--nms loop"
    ):
        example.detections_from(answer, None, ())
