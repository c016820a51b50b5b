"""One product a level in place of 24 convolutions: the same network, for each image of a batch."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export.small_graph import save_small
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.export.precision.half import lower_precision
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.export.tensorrt.join_stages import join_stages
from tood_deploy.graph_io import HEAD_OUTPUTS, STAGE_OF_MAP, STAGE_VALUES
from tood_deploy.onnx_file import OnnxArtefact, open_session, read_onnx, with_outputs
from tood_deploy.parity.onnx_reference import OnnxRunner, onnx_reference
from tood_deploy.parity.verify import verify_float32

NET_HW = (64, 96)
LEVELS = 5


@pytest.fixture(scope="module")
def plain(tiny_artefact: Path) -> OnnxArtefact:
    return read_onnx(tiny_artefact)


@pytest.fixture(scope="module")
def joined(plain: OnnxArtefact) -> OnnxArtefact:
    return join_stages(plain)


def head_of(model: onnx.ModelProto, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """Return the head's maps in images without padding."""
    session = open_session(with_outputs(model, HEAD_OUTPUTS).SerializeToString())
    feeds = {
        "images": images,
        "valid_hw": np.array([NET_HW] * len(images), np.int32),
        "score_threshold": np.array(0.05, np.float32),
        "iou_threshold": np.array(0.6, np.float32),
    }
    maps: Any = session.run(list(HEAD_OUTPUTS), feeds)
    return maps


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """Three that differ: every one has weights of its own."""
    return np.stack([synthetic_image(*NET_HW, seed) for seed in range(3)])


def test_the_maps_are_those_of_the_shipped_graph(
    plain: OnnxArtefact, joined: OnnxArtefact, images: NDArray[np.uint8]
) -> None:
    pairs = zip(
        HEAD_OUTPUTS, head_of(plain.model, images), head_of(joined.model, images), strict=True
    )
    for name, expected, found in pairs:
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_it_is_the_network_by_the_rules_of_an_export(
    plain: OnnxArtefact, joined: OnnxArtefact
) -> None:
    verify_float32(onnx_reference(plain), OnnxRunner(joined.model))


@pytest.mark.slow
def test_half_precision_stays_half(plain: OnnxArtefact, images: NDArray[np.uint8]) -> None:
    lowered, _ = lower_precision(plain.model, "fp16")
    model = join_stages(replace(plain, model=lowered)).model
    constants = [value for value in model.graph.initializer if value.name.startswith("joined_")]
    largest = max(constants, key=lambda value: np.prod(value.dims))
    assert largest.data_type == onnx.TensorProto.FLOAT16
    for expected, found in zip(head_of(lowered, images), head_of(model, images), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


def test_five_products_and_means_are_left(plain: OnnxArtefact, joined: OnnxArtefact) -> None:
    before, after = (
        Counter(node.op_type for node in artefact.model.graph.node) for artefact in (plain, joined)
    )
    assert after["MatMul"] - before["MatMul"] == LEVELS
    assert before["Conv"] - after["Conv"] == (24 + 2) * LEVELS
    assert before["ReduceMean"] - after["ReduceMean"] == 5 * LEVELS
    onnx.checker.check_model(joined.model, full_check=True)


def test_all_named_values_stay(joined: OnnxArtefact) -> None:
    made = {name for node in joined.model.graph.node for name in node.output}
    assert {*STAGE_OF_MAP, *STAGE_VALUES["candidates"]} <= made


def test_the_manifest_says_so_and_the_file_is_as_it_was(
    plain: OnnxArtefact, joined: OnnxArtefact
) -> None:
    assert joined.manifest.build.details["joined_levels"] == LEVELS
    assert (joined.path, joined.sha256) == (plain.path, plain.sha256)
    assert read_onnx(plain.path).model == plain.model


def test_a_graph_without_such_sums_stays_as_it_is(tmp_path: Path) -> None:
    artefact = read_onnx(save_small(tmp_path / "a.onnx"))
    assert join_stages(artefact) is artefact


@pytest.mark.slow
def test_layers_of_8_bits_stay_as_they_are(plain: OnnxArtefact) -> None:
    ranges = dict.fromkeys(calibrated_values(plain.model), (-4.0, 4.0))
    artefact = replace(plain, model=quantize(plain.model, ranges, scheme="s8s8"))
    assert join_stages(artefact) is artefact
