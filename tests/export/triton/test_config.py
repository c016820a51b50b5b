"""Triton's schema of configurations, as far as ours rely on it."""

import pytest
from google.protobuf import text_format

from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton.config import config_text, new_config, read_config, triton_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS


def test_text_and_back() -> None:
    output = {"name": "num_dets", "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []}}
    config = new_config(
        name="a",
        max_batch_size=8,
        output=[output],
        parameters={"classes": {"string_value": 'größer "x"\n'}},
    )
    again = read_config(config_text(config))
    assert again == config
    assert again.output[0].HasField(
        "reshape"
    )  # empty, and yet said: a number for each image, without an axis of its own
    assert again.parameters["classes"].string_value == 'größer "x"\n'


@pytest.mark.parametrize(
    "fields",
    [
        {"max_batch": 8},
        {"max_batch_size": "eight"},
        {"input": [{"name": "a", "data_type": "TYPE_FLOAT"}]},
    ],
)
def test_refuses_what_the_schema_does_not_know(fields: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        new_config(**fields)


def test_refuses_text_that_is_no_configuration() -> None:
    with pytest.raises(text_format.ParseError):
        read_config("max_batch: 8")


def test_published_example_can_be_read() -> None:
    """From Triton's own documentation of dynamic batching and of warm-up."""
    text = """
    name: "model" platform: "onnxruntime_onnx" max_batch_size: 16
    input [ { name: "in" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] } ]
    output [ { name: "out" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } label_filename: "labels.txt" } ]
    dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
    instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0 ] profile: [ "0", "1" ] } ]
    model_warmup [ { name: "w" batch_size: 1 inputs { key: "in" value { data_type: TYPE_FP32 dims: [ 3, 8, 8 ] input_data_file: "f" } } } ]
    """  # noqa: E501
    config = read_config(text)
    assert config.instance_group[0].profile == ["0", "1"]
    assert config.model_warmup[0].inputs["in"].input_data_file == "f"


def test_a_plan_of_one_size_is_recorded_at_few_batches() -> None:
    manifest = Manifest(PRESETS["tiny"])
    profiles = Profiles(((256, 320),), (1, 1, 6))
    config = read_config(
        config_text(triton_config(manifest, "tensorrt", TritonOptions(name="a"), profiles))
    )
    cuda = config.optimization.cuda
    assert cuda.graphs
    assert [spec.batch_size for spec in cuda.graph_spec] == [1, 2, 4, 6]
    assert {name: list(shape.dim) for name, shape in cuda.graph_spec[0].input.items()} == {
        "images": [256, 320, 3],
        "valid_hw": [2],
        "score_threshold": [1],
        "iou_threshold": [1],
    }
    for other in (
        triton_config(manifest, "onnxruntime", TritonOptions(name="a"), profiles),
        triton_config(
            manifest, "tensorrt", TritonOptions(name="a"), Profiles(((64, 96), (96, 64)))
        ),
    ):
        assert not other.HasField("optimization")
