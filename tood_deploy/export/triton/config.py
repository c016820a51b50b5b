"""Write the configuration of a model on Triton Inference Server.

Comes in: a manifest and how the model is served. Goes out: the text of `config.pbtxt`, and the data
that the warm-up runs on. Knows neither the repository nor a runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.export.tensorrt.options import Profiles, Shape
from tood_deploy.export.triton.options import Backend, TritonOptions
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import METADATA_KEY, Manifest, client_parameters
from tood_deploy.preprocess import resize_and_pad

DESCRIPTOR = "triton_model_config.binpb"


@cache
def _message_class() -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto.FromString(
        resources.files("tood_deploy.export.triton").joinpath("schemas", DESCRIPTOR).read_bytes()
    )
    pool = (
        descriptor_pool.DescriptorPool()
    )  # its own: tritonclient, in the same process, registers the same names
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def new_config(**fields: Any) -> Any:
    """Return a `ModelConfig` with these fields.

    Nested messages are dictionaries, enumerations names.

    Raises:
        ValueError, TypeError: the schema has no such field, or it takes no such value.
    """
    return _message_class()(**fields)


def config_text(config: Message) -> str:
    """Return the text of `config.pbtxt`."""
    return text_format.MessageToString(config, as_utf8=True)


def read_config(text: str) -> Any:
    """Return the `ModelConfig` in the text of a `config.pbtxt`.

    Raises:
        google.protobuf.text_format.ParseError: it is none by Triton's schema.
    """
    return text_format.Parse(text, _message_class()())


LABELS_FILE = "labels.txt"
WARM_UP_FOLDER = "warmup"  # where Triton looks for the files that a warm-up names
MODEL_FILES: dict[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
PLATFORMS: dict[Backend, str] = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
WARM_UP_CONF, WARM_UP_IOU = 0.05, 0.6
OURS = METADATA_KEY  # the parameter by which a configuration of ours is known


def triton_config(
    manifest: Manifest, backend: Backend, options: TritonOptions, profiles: Profiles
) -> Any:
    """Return the `ModelConfig` of a model.

    Args:
        manifest: of the model.
        backend: what runs it.
        options: with the model's name.
        profiles: the largest batch, and the sizes to warm up; a TensorRT plan has just these.
    """
    max_batch = profiles.batch[-1]
    return new_config(
        name=options.name,
        platform=PLATFORMS[backend],
        backend=backend,
        default_model_filename=MODEL_FILES[backend],
        max_batch_size=max_batch,
        input=_inputs(),
        output=_outputs(manifest.max_det),
        dynamic_batching={"max_queue_delay_microseconds": options.queue_delay_us}
        if max_batch > 1
        else None,
        instance_group=[
            _instances(options, len(profiles.shapes_hw) if backend == "tensorrt" else 0)
        ],
        model_warmup=[
            _warm_up(shape, batch)
            for shape in profiles.shapes_hw
            for batch in options.warm_up_batches
        ],
        optimization=_cuda_graphs(profiles) if backend == "tensorrt" else None,
        parameters={
            name: {"string_value": value} for name, value in client_parameters(manifest).items()
        },
    )


def _inputs() -> list[dict[str, Any]]:
    images, valid_hw, score_threshold, iou_threshold = INPUTS
    return [
        {"name": images, "data_type": "TYPE_UINT8", "dims": [-1, -1, 3]},
        {"name": valid_hw, "data_type": "TYPE_INT32", "dims": [2]},
        {"name": score_threshold, "data_type": "TYPE_FP32", "dims": [1]},
        {"name": iou_threshold, "data_type": "TYPE_FP32", "dims": [1]},
    ]


def _outputs(max_det: int) -> list[dict[str, Any]]:
    num_dets, boxes, scores, labels = OUTPUTS
    return [
        {
            "name": num_dets,
            "data_type": "TYPE_INT32",
            "dims": [1],
            "reshape": {"shape": []},
        },  # the graph gives it without a second axis
        {"name": boxes, "data_type": "TYPE_FP32", "dims": [max_det, 4]},
        {"name": scores, "data_type": "TYPE_FP32", "dims": [max_det]},
        {
            "name": labels,
            "data_type": "TYPE_INT32",
            "dims": [max_det],
            "label_filename": LABELS_FILE,
        },
    ]


def _instances(options: TritonOptions, profiles: int) -> dict[str, Any]:
    group: dict[str, Any] = {
        "count": options.instances,
        "kind": "KIND_CPU" if options.device == "cpu" else "KIND_GPU",
        "gpus": options.gpus,
    }
    return group | (
        {"profile": [str(number) for number in range(profiles)]} if profiles > 1 else {}
    )


def _cuda_graphs(profiles: Profiles) -> dict[str, Any] | None:
    """Return which batches of a plan are recorded as CUDA graphs: 1, 2, 4 and so on, the largest.

    None for a plan of several sizes: Triton would try every recording in every profile.
    """
    if len(profiles.shapes_hw) > 1:
        return None
    smallest, _, largest = profiles.batch
    batches = [2**power for power in range(largest.bit_length()) if smallest <= 2**power < largest]
    image, *others = _inputs()
    fixed = [image | {"dims": [*next(iter(profiles.shapes_hw)), 3]}, *others]
    shapes = {one["name"]: {"dim": one["dims"]} for one in fixed}
    specs = [{"batch_size": batch, "input": shapes} for batch in (*batches, largest)]
    return {"cuda": {"graphs": True, "graph_spec": specs}}


def _warm_up(shape: Shape, batch: int) -> dict[str, Any]:
    inputs = {}
    for name, array in warm_up_arrays(shape).items():
        kind = next(one["data_type"] for one in _inputs() if one["name"] == name)
        inputs[name] = {
            "data_type": kind,
            "dims": array.shape,
            "input_data_file": f"{_size_name(shape)}/{name}",
        }
    return {"name": f"{_size_name(shape)}, batch {batch}", "batch_size": batch, "inputs": inputs}


def warm_up_arrays(shape: Shape) -> dict[str, NDArray[Any]]:
    """Return a synthetic image that fills a padded size, as one request: name to array.

    A request of batch 1 has no batch axis.
    """
    height, width = shape
    image, transform = resize_and_pad(
        synthetic_image(height, width, seed=0), (min(shape), max(shape)), shape
    )
    thresholds = (np.array([value], np.float32) for value in (WARM_UP_CONF, WARM_UP_IOU))
    return dict(
        zip(INPUTS, (image, np.array(transform.resized_hw, np.int32), *thresholds), strict=True)
    )


def write_warm_up(folder: Path, shapes_hw: Sequence[Shape]) -> None:
    """Write the files that the configuration's warm-up names: a folder a size, a file an input.

    Little-endian, as Triton reads them.
    """
    for shape in shapes_hw:
        place = folder / _size_name(shape)
        place.mkdir(parents=True)
        for name, array in warm_up_arrays(shape).items():
            (place / name).write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _size_name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"
