"""The detectors that TOOD is measured against: maps and detections against the reference's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.test_detector import record_maps, statistics
from model.test_postprocess import assert_equals_golden, net_boxes, rows_of
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from tood_deploy.model import FusedDetector, build_model
from tood_deploy.model.head import HeadMaps, SeparateTowers, probability
from tood_deploy.model.postprocess import suppress
from tood_deploy.presets import STRIDES

Arrays = dict[str, NDArray[Any]]

# Of every preset its configuration in MMDetection, and what the reference counts: parameters, and
# 10^9 multiply-adds of convolutions and matrix products at 800 x 1344.
FCOS = "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco"
FAMILY = {
    "atss-r50-1x": ("atss_r50_fpn_1x_coco", 32_295_322, 214.73),
    "gfl-r50-1x": ("gfl_r50_fpn_1x_coco", 32_440_537, 217.98),
    "paa-r50-1x": ("paa_r50_fpn_1x_coco", 32_295_322, 214.73),
    "fcos-r50-1x": (FCOS, 32_297_370, 209.78),
    "vfnet-r50-1x": ("vfnet_r50_fpn_1x_coco", 32_891_554, 228.10),
    "retinanet-r50-1x": ("retinanet_r50_fpn_1x_coco", 37_968_692, 250.49),
}
KEYS = ("cls_score", "bbox_pred", "centerness")


@pytest.mark.parametrize("name", FAMILY)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == FAMILY[name][1]


@pytest.mark.parametrize("name", FAMILY)
def test_multiply_adds(name: str) -> None:
    with torch.device("meta"):
        model, images = build_model(name), torch.zeros(1, 3, 800, 1344)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(FAMILY[name][2], abs=0.01)


@pytest.mark.shared
@pytest.mark.parametrize("name", FAMILY)
def test_state_dict_has_the_layout_of_mmdetection(name: str, shared: Path) -> None:
    path = shared / "reference" / "goldens_family" / "keys" / f"{FAMILY[name][0]}.json"
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in build_model(name).state_dict().items()}
    assert shapes == json.loads(path.read_text())


def golden_of(shared: Path, name: str, image: str) -> Arrays:
    path = shared / "reference" / "goldens_family" / f"{FAMILY[name][0]}__{image}.npz"
    with np.load(path) as arrays:
        return dict(arrays)


def input_of(detector: FusedDetector, given: Arrays) -> torch.Tensor:
    """Return the network's input: FCOS normalises the image in its own way."""
    if "resized_bgr_u8" not in given or detector.model.preset.detector != "fcos":
        return torch.from_numpy(given["input"])
    (height, width), shape = given["img_shape"].tolist(), given["input"].shape[2:]
    padded = np.zeros((*shape, 3), np.uint8)
    padded[:height, :width] = given["resized_bgr_u8"].transpose(1, 2, 0)[:, :, ::-1]
    return detector.normalise(torch.from_numpy(padded)[None], torch.tensor([[height, width]]))


@pytest.mark.shared
@pytest.mark.parametrize("name", FAMILY)
def test_maps_and_detections_equal_the_reference(
    name: str, goldens: Callable[[str], Arrays], seeded_model: Callable[..., Any], shared: Path
) -> None:
    model = seeded_model(name)
    detector, kept = FusedDetector(model), {}
    record_maps(model, kept)
    for image in ("synth", "demo__320"):
        golden, given = golden_of(shared, name, image), goldens(f"input__{image}")
        pixels = input_of(detector, given)
        with torch.inference_mode():
            maps = model.bbox_head.maps(model.neck(model.backbone(pixels)))
            compare_maps(model, maps, kept, golden)
            compare_detections(detector, maps, golden, given)


def compare_maps(model: Any, maps: HeadMaps, kept: Arrays, golden: Arrays) -> None:
    """Hold a head's raw maps, and its scores, against the golden's."""
    in_pixels = model.preset.detector in ("fcos", "vfnet")
    scores = model.bbox_head.scores(maps)
    for level, stride in enumerate(STRIDES):
        unit = stride if in_pixels else 1
        own = {"cls_score": maps.classes[level], "bbox_pred": maps.regression[level] * unit}
        if maps.quality:
            own["centerness"] = maps.quality[level]
        for key, values in own.items():
            stats = golden[f"{key}_stats_{level}"]
            np.testing.assert_allclose(statistics(values.numpy()), stats, rtol=2e-5, atol=2e-5)
        true = {key: torch.from_numpy(golden.get(f"{key}_{level}", np.empty(0))) for key in own}
        if len(true["cls_score"]):
            off = (own["bbox_pred"] - true["bbox_pred"]).abs().max() / unit
            assert off < 1e-3
            golden_maps = [[true[key]] if key in true else [] for key in KEYS]
            of_golden = model.bbox_head.scores(HeadMaps(*golden_maps))[0]
            torch.testing.assert_close(scores[level], of_golden, rtol=0, atol=2e-6)
    for key in (key for key in golden if key.endswith("_stats") and key[0] in "cp"):
        values = statistics(kept[key.removesuffix("_stats")])
        np.testing.assert_allclose(values, golden[key], rtol=1e-5, atol=1e-6, err_msg=key)


def compare_detections(
    detector: FusedDetector, maps: HeadMaps, golden: Arrays, given: Arrays
) -> None:
    """Hold detections, with and without a limit and score voting, against the golden's."""
    head = detector.model.bbox_head
    assert isinstance(head, SeparateTowers)
    valid_hw = torch.tensor([given["img_shape"].tolist()])
    scale = np.tile(given["scale_factor"] if "scale_factor" in given else np.ones(2), 2)
    threshold, iou = golden["score_thr"].item(), detector.model.preset.iou_threshold
    candidates = detector.select_candidates(
        head.decode(maps), valid_hw, threshold, head.ranking(maps)
    )
    results = {
        "det": detector.suppress(candidates, iou),
        "unvoted": suppress(candidates, iou),
        "uncapped": suppress(candidates, iou, 2000),
    }
    for kind, result in results.items():
        if f"{kind}_scores" in golden and not (kind == "uncapped" and "unvoted_scores" in golden):
            boxes = (net_boxes(result) / scale).astype(np.float32)
            assert_equals_golden(golden, kind, rows_of(result, boxes))


def test_probabilities_are_as_exact_as_float32_at_both_ends() -> None:
    logits = torch.linspace(-80, 30, 2001, requires_grad=True)
    values = probability(logits)
    exact = logits.detach().double().sigmoid()
    assert ((values - exact).abs() / exact).max() < 1e-5  # 80 roundings of 6e-8
    values.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (exact * (1 - exact)).float(), rtol=1e-4, atol=1e-7)
