"""Find objects in images by a model on `tood-serve`, or on Triton Inference Server.

    pip install "tritonclient[http]"
    python examples/triton_client.py tood street.jpg dog.jpg --url localhost:8000

    pip install "tritonclient[grpc]"          # Triton alone speaks gRPC
    python examples/triton_client.py tood street.jpg dog.jpg --url grpc://localhost:8001

The client scales and pads images as `Detector` does and maps boxes back; it asks the server for
what it must know of the model. `tood_deploy` is needed for its pre-processing alone: NumPy and
OpenCV, no runtime.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.errors import ToodError
from tood_deploy.preprocess import ImageTransform, resize_and_pad
from tood_deploy.presets import Sizing

OUTPUTS = ("num_dets", "boxes", "scores", "labels")
TYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}  # as the protocol calls them
MAX_REQUESTS = 16  # at the same time


@dataclass(frozen=True)
class ServedModel:
    """The server's description of a model.

    Attributes:
        name: of the model.
        sizing: how images are brought to the size of the model's input.
        class_names: one for each class.
    """

    name: str
    sizing: Sizing
    class_names: tuple[str, ...]


def read_model(client: Any, name: str) -> ServedModel:
    """Ask the server for a model's configuration."""
    answer = client.get_model_config(name)
    if isinstance(answer, dict):  # over HTTP
        parameters = {key: value["string_value"] for key, value in answer["parameters"].items()}
    else:
        stated = answer.config.parameters
        parameters = {key: value.string_value for key, value in stated.items()}
    sizing: dict[str, Any] = json.loads(parameters["sizing"])
    for key, value in sizing.items():
        sizing[key] = tuple(value) if isinstance(value, list) else value
    return ServedModel(name, Sizing(**sizing), tuple(json.loads(parameters["class_names"])))


def request_arrays(
    image_bgr: NDArray[np.uint8], sizing: Sizing, conf: float, iou: float
) -> tuple[dict[str, NDArray[Any]], ImageTransform]:
    """Prepare the request for one image.

    Args:
        image_bgr: (H, W, 3) uint8 BGR.
        sizing: how it is brought to the size of the model's input.
        conf, iou: thresholds.

    Returns:
        Arrays with a batch axis by the inputs' names, and the transform that maps boxes back.
    """
    image, transform = resize_and_pad(image_bgr, sizing)
    arrays: dict[str, NDArray[Any]] = {
        "images": image[None],
        "valid_hw": np.array([transform.resized_hw], np.int32),
        "score_threshold": np.array([[conf]], np.float32),
        "iou_threshold": np.array([[iou]], np.float32),
    }
    return arrays, transform


def detections_from(
    answer: Mapping[str, NDArray[Any]], transform: ImageTransform, class_names: Sequence[str]
) -> Detections:
    """Read the detections of one image, with boxes in its own pixels.

    Args:
        answer: arrays of the server by the outputs' names.
        transform: of the image.
        class_names: of the model.

    Raises:
        ToodError: the server's engine suppresses in a fixed number of rounds, which were too few
            for this image.
    """
    count = int(answer["num_dets"].reshape(-1)[0])
    if count < 0:
        raise ToodError(
            f"num_dets is {count}: the rounds of suppression were too few for this image, so its "
            "detections are not known; build the served engine with more --nms-rounds, or with "
            "--nms loop"
        )
    boxes = transform.boxes_to_image(answer["boxes"][0, :count])
    return Detections(
        boxes, answer["scores"][0, :count], answer["labels"][0, :count], tuple(class_names)
    )


def detect(
    client: Any,
    triton: Any,
    model: ServedModel,
    images_bgr: Sequence[NDArray[np.uint8]],
    conf: float,
    iou: float,
) -> Iterator[Detections]:
    """Send all images at the same time, for the server to batch; yield detections in order.

    Args:
        client: an `InferenceServerClient`; its calls may come from several threads.
        triton: the module `tritonclient.grpc` or `tritonclient.http` that it is from.
        model: what to ask for.
        images_bgr: (H, W, 3) uint8 each, of any sizes; those of one padded size can share a batch.
        conf: score that a detection must exceed.
        iou: overlap above which the lower-scored of two boxes of one class goes.
    """

    def ask(image_bgr: NDArray[np.uint8]) -> Detections:
        arrays, transform = request_arrays(image_bgr, model.sizing, conf, iou)
        inputs = []
        for name, array in arrays.items():
            inputs.append(triton.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        outputs = [triton.InferRequestedOutput(name) for name in OUTPUTS]
        result = client.infer(model.name, inputs, outputs=outputs)
        answer = {name: result.as_numpy(name) for name in OUTPUTS}
        return detections_from(answer, transform, model.class_names)

    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        yield from pool.map(ask, images_bgr)


class HttpClients(threading.local):
    """A client over HTTP for every thread: its connections are for one alone."""

    def __init__(self, url: str) -> None:
        """Connect when something is asked for.

        Args:
            url: host and port of the server's HTTP service.
        """
        from tritonclient import http  # pyright: ignore[reportMissingImports]

        self._client = http.InferenceServerClient(url)
        self.get_model_config, self.infer = self._client.get_model_config, self._client.infer


def connect(url: str) -> tuple[Any, Any]:
    """Return a client for an address, and the module of `tritonclient` that it is from.

    Raises:
        ToodError: the address is of neither protocol.
    """
    protocol, _, place = url.rpartition("://")
    if protocol in ("", "http"):
        from tritonclient import http  # pyright: ignore[reportMissingImports]

        return HttpClients(place), http
    if protocol == "grpc":
        from tritonclient import grpc  # pyright: ignore[reportMissingImports]

        return grpc.InferenceServerClient(place), grpc
    raise ToodError(f"--url {url}: expected HOST:PORT, http://HOST:PORT or grpc://HOST:PORT")


def read_images(paths: Sequence[Path]) -> list[NDArray[np.uint8]]:
    """Return all images, (H, W, 3) uint8 BGR each.

    Raises:
        ToodError: some cannot be read.
    """
    images: list[Any] = [cv2.imread(str(path), cv2.IMREAD_COLOR) for path in paths]
    pairs = zip(paths, images, strict=True)
    if unreadable := [str(path) for path, image in pairs if image is None]:
        raise ToodError(f"cannot be read as images: {', '.join(unreadable)}")
    return images


def print_detections(path: Path, detections: Detections) -> None:
    """Print a line for each object of an image."""
    columns = (detections.boxes, detections.scores, detections.names())
    for box, score, name in zip(*columns, strict=True):
        print(f"{path}\t{name}\t{score:.3f}\t{' '.join(f'{side:.1f}' for side in box)}")


def build_parser() -> argparse.ArgumentParser:
    """Return the options of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="its name on the server")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument(
        "--url",
        default="localhost:8000",
        help="HOST:PORT of the server's HTTP service, or grpc://HOST:PORT (default: %(default)s)",
    )
    parser.add_argument("--conf", type=float, default=0.3)
    parser.add_argument("--iou", type=float, default=0.6)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each object, and return the exit code.

    It is 2 at an image that cannot be read or that the engine has no answer for, and where the
    server does not answer or refuses.
    """
    arguments = build_parser().parse_args(argv)
    # No extra of tood_deploy: it wants older versions of some packages than tood_deploy does.
    from tritonclient.utils import InferenceServerException  # pyright: ignore[reportMissingImports]

    try:
        client, triton = connect(arguments.url)
        images = read_images(arguments.images)
        model = read_model(client, arguments.model)
        answers = detect(client, triton, model, images, arguments.conf, arguments.iou)
        for path, detections in zip(arguments.images, answers, strict=True):
            print_detections(path, detections)
    except ToodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, InferenceServerException) as error:
        reason = " ".join(str(error).split())
        print(f"error: --url {arguments.url}: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
