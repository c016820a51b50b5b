"""The tensors of the Open Inference Protocol (KServe v2 REST) and its binary extension.

Bytes of a request come in, arrays go out, and the other way round. Shapes are those of the form
that Triton serves (docs/serving.md). Knows no HTTP server and no runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy import __version__
from tood_deploy.errors import InputError
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import Manifest, client_parameters
from tood_deploy.matching import NetDetections
from tood_deploy.presets import SIZE_DIVISOR

JsonObject = dict[str, Any]
VERSION = "1"
BINARY_HEADER = "inference-header-content-length"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository")
DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "FP32": np.float32}
MAX_JSON_BYTES = 32 * 2**20  # numbers as text: an image of 1344 x 1344 takes 22 MB
THRESHOLDS = INPUTS[2:]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the served form, without its batch axis.

    Attributes:
        name: as the graph calls it.
        datatype: as the protocol calls it.
        dims: -1 where any number will do.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]

    def metadata(self) -> JsonObject:
        """Return what the model's metadata says of it."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.dims]}

    def config(self) -> JsonObject:
        """Return what Triton's configuration of a model says of it."""
        return {"name": self.name, "data_type": f"TYPE_{self.datatype}", "dims": [*self.dims]}


def input_tensors() -> tuple[Tensor, ...]:
    """Return the inputs of every model."""
    dims = ((-1, -1, 3), (2,), (1,), (1,))
    kinds = ("UINT8", "INT32", "FP32", "FP32")
    return tuple(map(Tensor, INPUTS, kinds, dims))


def output_tensors(max_det: int) -> tuple[Tensor, ...]:
    """Return the outputs of a model that gives up to `max_det` detections an image."""
    dims = ((1,), (max_det, 4), (max_det,), (max_det,))
    kinds = ("INT32", "FP32", "FP32", "INT32")
    return tuple(map(Tensor, OUTPUTS, kinds, dims))


def server_metadata() -> JsonObject:
    """Return what the server says of itself."""
    return {"name": "tood-serve", "version": __version__, "extensions": [*EXTENSIONS]}


def model_metadata(name: str, manifest: Manifest, platform: str) -> JsonObject:
    """Return a model's metadata.

    Args:
        name: that it is served under.
        manifest: of the artefact.
        platform: what runs it.
    """
    return {
        "name": name,
        "versions": [VERSION],
        "platform": platform,
        "inputs": [tensor.metadata() for tensor in input_tensors()],
        "outputs": [tensor.metadata() for tensor in output_tensors(manifest.max_det)],
    }


def model_config(name: str, manifest: Manifest, platform: str, max_batch: int) -> JsonObject:
    """Return a model's configuration as Triton gives it, as far as clients need it.

    Args:
        name: that it is served under.
        manifest: of the artefact.
        platform: what runs it.
        max_batch: the largest batch that the server forms.
    """
    parameters = client_parameters(manifest)
    return {
        "name": name,
        "platform": platform,
        "backend": platform,
        "max_batch_size": max_batch,
        "input": [tensor.config() for tensor in input_tensors()],
        "output": [tensor.config() for tensor in output_tensors(manifest.max_det)],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


@dataclass(frozen=True, eq=False)
class InferRequest:
    """An inference request.

    Attributes:
        images: (B, H, W, 3) uint8 RGB, padded.
        valid_hw: (B, 2) int32 rows and columns that hold real pixels.
        conf, iou: (B,) float32 thresholds of every image.
        outputs: names of the outputs to send, and whether in binary.
        id: of the client, "" without one.
    """

    images: NDArray[np.uint8]
    valid_hw: NDArray[np.int32]
    conf: NDArray[np.float32]
    iou: NDArray[np.float32]
    outputs: Mapping[str, bool]
    id: str = ""


def read_request(body: bytes, json_bytes: int | None) -> InferRequest:
    """Read an inference request.

    Args:
        body: JSON, behind which the binary tensors follow.
        json_bytes: how long the JSON is; all of it where the request does not say.

    Raises:
        InputError: anything that is not a request for these tensors.
    """
    if json_bytes is not None and not 0 <= json_bytes <= len(body):
        raise InputError(
            f"{BINARY_HEADER} is {json_bytes}, the body has {len(body)} bytes; expected the length "
            "of its JSON"
        )
    document = _read_json(body[:json_bytes] if json_bytes is not None else body)
    tensors = _read_tensors(
        document, memoryview(body)[len(body) if json_bytes is None else json_bytes :]
    )
    images, valid_hw, conf, iou = (tensors[name] for name in INPUTS)
    _check_images(images, valid_hw)
    for name, values in zip(THRESHOLDS, (conf, iou), strict=True):
        if not ((values >= 0) & (values <= 1)).all():  # a NaN is neither
            raise InputError(f"{name} is not between 0 and 1")
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise InputError(f"id is {type(request_id).__name__}; expected a string")
    return InferRequest(
        images, valid_hw, conf[:, 0], iou[:, 0], _requested_outputs(document), request_id
    )


def _read_json(text: bytes) -> JsonObject:
    if len(text) > MAX_JSON_BYTES:
        raise InputError(
            f"{len(text)} bytes of JSON, more than {MAX_JSON_BYTES}; send tensors in binary"
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON ({error}); {_expected()}") from error
    if not isinstance(document, dict):
        raise InputError(f"the body is no JSON object; {_expected()}")
    return document


def _expected() -> str:
    return f"expected an inference request with the inputs {', '.join(INPUTS)}"


def _objects(document: JsonObject, key: str) -> list[JsonObject]:
    """Return a list of JSON objects with names; empty where the document has none."""
    values = document.get(key, [])
    named = isinstance(values, list) and all(
        isinstance(value, dict) and isinstance(value.get("name"), str) for value in values
    )
    if not named:
        raise InputError(f"{key} is not a list of objects with a name; {_expected()}")
    return values


def _parameter(owner: JsonObject, key: str) -> Any:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InputError(f"parameters is {type(parameters).__name__}; expected an object")
    return parameters.get(key)


def _read_tensors(document: JsonObject, binary: memoryview) -> dict[str, NDArray[Any]]:
    """Return the arrays of all inputs, (B, ...)."""
    given = _objects(document, "inputs")
    names = [value["name"] for value in given]
    if sorted(names) != sorted(INPUTS):
        raise InputError(f"inputs are {', '.join(names)[:200] or 'none'}; {_expected()}")
    expected = {tensor.name: tensor for tensor in input_tensors()}
    arrays, position = {}, 0
    for value in given:
        size = _parameter(value, "binary_data_size")
        if size is None:
            arrays[value["name"]] = _tensor_from_json(value, expected[value["name"]])
            continue
        if not isinstance(size, int) or not 0 <= size <= len(binary) - position:
            raise InputError(
                f"binary_data_size of {value['name']} is {size!r}, and {len(binary) - position} "
                "bytes follow; expected the number of its bytes"
            )
        data = binary[position : position + size]
        arrays[value["name"]] = _tensor_from_bytes(value, expected[value["name"]], data)
        position += size
    if position != len(binary):
        raise InputError(f"{len(binary) - position} bytes follow the last tensor; expected none")
    return arrays


def _tensor_shape(value: JsonObject, tensor: Tensor) -> tuple[int, ...]:
    """Return the stated shape, if it fits the tensor as well as its type."""
    stated, datatype = value.get("shape"), value.get("datatype")
    shape = stated if isinstance(stated, list) else []
    numbers = all(type(side) is int and 0 < side < 2**31 for side in shape)
    fits = len(shape) == len(tensor.dims) + 1 and all(
        dim in (-1, side) for dim, side in zip(tensor.dims, shape[1:], strict=True)
    )
    if not (numbers and fits) or datatype != tensor.datatype:
        wanted = ", ".join(["B", *("N" if dim < 0 else str(dim) for dim in tensor.dims)])
        raise InputError(
            f"{tensor.name} is {str(datatype)[:20]} {str(stated)[:100]}; expected "
            f"{tensor.datatype} [{wanted}]"
        )
    return tuple(shape)


def _tensor_from_bytes(value: JsonObject, tensor: Tensor, data: memoryview) -> NDArray[Any]:
    shape, dtype = _tensor_shape(value, tensor), np.dtype(DTYPES[tensor.datatype])
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size != len(data):
        raise InputError(f"{tensor.name} has {len(data)} bytes; its shape {[*shape]} takes {size}")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def _tensor_from_json(value: JsonObject, tensor: Tensor) -> NDArray[Any]:
    shape = _tensor_shape(value, tensor)
    whole = tensor.datatype != "FP32"
    try:
        numbers = np.asarray(value.get("data")).ravel()
    except (ValueError, OverflowError) as error:
        raise InputError(f"data of {tensor.name} is no list of numbers ({error})") from error
    if numbers.dtype.kind not in ("iu" if whole else "iuf"):
        kind = "whole numbers" if whole else "numbers"
        raise InputError(f"data of {tensor.name} is no list of {kind} of one depth")
    if numbers.size != int(np.prod(shape, dtype=object)):
        raise InputError(f"data of {tensor.name} has {numbers.size} numbers; its shape {[*shape]}")
    limits = np.iinfo(DTYPES[tensor.datatype]) if whole else np.finfo(np.float32)
    if numbers.size and not (limits.min <= numbers.min() and numbers.max() <= limits.max):
        raise InputError(f"data of {tensor.name} does not fit {tensor.datatype}")
    return numbers.astype(DTYPES[tensor.datatype]).reshape(shape)


def _check_images(images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> None:
    """Refuse sides that no network takes, and real pixels outside of the image."""
    height, width = images.shape[1:3]
    if height % SIZE_DIVISOR or width % SIZE_DIVISOR:
        raise InputError(
            f"images are {height} x {width}; expected multiples of {SIZE_DIVISOR}, padded at the "
            "right and bottom"
        )
    if not ((valid_hw >= 1) & (valid_hw <= (height, width))).all():
        raise InputError(f"valid_hw is not within 1 1 and {height} {width}")


def check_batch(request: InferRequest, input_shapes_hw: Sequence[tuple[int, int]]) -> None:
    """Refuse tensors of different batches, and sizes that a model does not take.

    Args:
        request: what was read.
        input_shapes_hw: rows and columns that the model takes; empty where every size will do.

    Raises:
        InputError: either of these.
    """
    counts = [len(array) for array in (request.images, request.valid_hw, request.conf, request.iou)]
    if len(set(counts)) != 1:
        raise InputError(f"batch sizes of the inputs are {counts}; expected one")
    size_hw = request.images.shape[1:3]
    if input_shapes_hw and size_hw not in input_shapes_hw:
        takes = ", ".join(f"{rows} x {columns}" for rows, columns in input_shapes_hw)
        raise InputError(f"images are {size_hw[0]} x {size_hw[1]}; this model takes {takes}")


def _requested_outputs(document: JsonObject) -> dict[str, bool]:
    """Return which outputs to send, and whether in binary."""
    everywhere = _parameter(document, "binary_data_output") is True
    given = _objects(document, "outputs")
    if not given:
        return dict.fromkeys(OUTPUTS, everywhere)
    outputs = {}
    for value in given:
        if value["name"] not in OUTPUTS:
            raise InputError(
                f"the output {value['name'][:100]} does not exist; expected {', '.join(OUTPUTS)}"
            )
        binary = _parameter(value, "binary_data")
        outputs[value["name"]] = everywhere if binary is None else binary is True
    return outputs


def answer_arrays(rows: Sequence[NetDetections], max_det: int) -> dict[str, NDArray[Any]]:
    """Return the outputs by name, rows past the detections zero.

    Args:
        rows: of every image.
        max_det: rows D of the outputs.
    """
    count = len(rows)
    arrays: dict[str, NDArray[Any]] = {
        tensor.name: np.zeros((count, *tensor.dims), DTYPES[tensor.datatype])
        for tensor in output_tensors(max_det)
    }
    num_dets, boxes, scores, labels = (arrays[name] for name in OUTPUTS)
    for i, detections in enumerate(rows):
        num_dets[i] = len(detections)
        boxes[i, : len(detections)] = detections.boxes
        scores[i, : len(detections)] = detections.scores
        labels[i, : len(detections)] = detections.labels
    return arrays


def write_answer(
    model: str, request: InferRequest, arrays: Mapping[str, NDArray[Any]]
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON where tensors follow it in binary.

    Args:
        model: its name.
        request: says which outputs are wanted, and how.
        arrays: from `answer_arrays`.
    """
    kinds = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    outputs, binary = [], []
    for name, in_binary in request.outputs.items():
        array = arrays[name]
        output: JsonObject = {"name": name, "datatype": kinds[array.dtype], "shape": [*array.shape]}
        if in_binary:
            binary.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    document = {"model_name": model, "model_version": VERSION, "outputs": outputs}
    document |= {"id": request.id} if request.id else {}
    text = json.dumps(document).encode("ascii")
    return b"".join([text, *binary]), len(text) if binary else None
