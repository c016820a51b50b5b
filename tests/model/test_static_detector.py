"""The fast form of a detector: the same answers, one graph, and what stays in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import ToodError
from tood_deploy.model import build_model
from tood_deploy.model.detector import DenseDetector, FusedDetector
from tood_deploy.model.static_detector import (
    StaticDetector,
    convert_network,
    finish_exactly,
    pack,
    unpack,
)
from tood_deploy.presets import PRESETS

TOLERANCES = {"num_dets": 0, "labels": 0, "scores": 1e-5, "boxes_net": 0.05}


@pytest.fixture(scope="module")
def model(seeded_model: Callable[..., Any]) -> DenseDetector:
    return seeded_model("tiny").eval().requires_grad_(False)


def batch_of(height: int, width: int) -> tuple[Tensor, ...]:
    images = torch.from_numpy(np.stack([synthetic_image(height, width, seed) for seed in range(2)]))
    valid_hw = torch.tensor([[height - 4, width - 6], [height, width]], dtype=torch.int32)
    return images, valid_hw, torch.tensor(0.05), torch.tensor(0.6)


def assert_equal_detections(result: Any, expected: Any) -> None:
    for name, atol in TOLERANCES.items():
        parts = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(*parts, atol=atol, rtol=0)


@torch.no_grad()
def test_equals_the_fused_detector(model: DenseDetector) -> None:
    inputs = batch_of(64, 96)
    result, expected = StaticDetector(model)(*inputs), FusedDetector(model)(*inputs).detections
    assert result.exact.all()
    assert_equal_detections(result.detections, expected)
    candidates = StaticDetector(model).find_candidates(*inputs[:3]).candidates
    assert_equal_detections(finish_exactly(candidates, 0.6, 100, voting=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paa-r50-1x", "fcos-r50-1x", "vfnet-r50-1x", "r101-dcn-2x"])
@torch.no_grad()
def test_of_other_detectors(name: str, seeded_model: Callable[..., Any]) -> None:
    """One that votes, one that ranks by another score, deformable ones."""
    model = seeded_model(name).eval().requires_grad_(False)
    inputs = batch_of(64, 96)
    expected = FusedDetector(model)(*inputs).detections
    assert expected.num_dets.min() > 0
    assert_equal_detections(StaticDetector(model)(*inputs).detections, expected)


def test_nothing_is_left_of_batch_norms_and_the_network_stays(model: DenseDetector) -> None:
    before = model.backbone.conv1.weight.clone()
    converted: Any = convert_network(model, "fp32")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert torch.equal(model.backbone.conv1.weight, before)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    kernel = converted.backbone.layer1[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_network_is_copied_before_it_is_moved(model: DenseDetector) -> None:
    """To a GPU, that is; here to the device without numbers."""
    detector = StaticDetector(model).to("meta")
    assert detector.fused.model.backbone.conv1.weight.is_meta
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_half_precision_keeps_what_it_must(model: DenseDetector) -> None:
    converted: Any = convert_network(model, "bf16")
    for layer in (converted.backbone.conv1, converted.bbox_head.inter_convs[0].gn):
        assert layer.weight.dtype == torch.bfloat16
    assert converted.bbox_head.scales[0].scale.dtype == torch.float32
    assert model.backbone.conv1.weight.dtype == torch.float32


def test_deformable_convolutions_are_refused_in_half_precision() -> None:
    with torch.device("meta"):
        model = build_model(PRESETS["r101-dcn-2x"])
    with pytest.raises(ToodError, match="deformable"):
        convert_network(model, "fp16")


def test_packing_loses_nothing(model: DenseDetector) -> None:
    with torch.no_grad():
        expected = FusedDetector(model)(*batch_of(64, 64)).detections
    result, exact = unpack(pack(expected, torch.tensor([True, False])))
    assert exact.tolist() == [True, False]
    for part, other in zip(result, expected, strict=True):
        assert part.dtype == other.dtype
        assert torch.equal(part, other)


@pytest.mark.slow
@torch.no_grad()
def test_is_one_graph_for_compilers(model: DenseDetector) -> None:
    detector, inputs = StaticDetector(model, "bf16"), batch_of(64, 96)
    compiled = torch.compile(detector, backend="eager", fullgraph=True, dynamic=False)
    for part, other in zip(compiled(*inputs).detections, detector(*inputs).detections, strict=True):
        torch.testing.assert_close(part, other)
