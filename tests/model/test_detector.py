"""The networks against the reference: keys, parameter counts, and every level's maps.

And the detector around them: what leaves no trace in the weights, against naive computations.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tood_deploy.errors import ToodError
from tood_deploy.model import FusedDetector, HeadOutput, build_model
from tood_deploy.presets import PRESETS, STRIDES

# Every published preset's configuration in MMDetection and number of parameters.
PUBLISHED = {
    "r50-1x": ("tood_r50_fpn_1x_coco", 32_200_494),
    "r50-anchor-1x": ("tood_r50_fpn_anchor-based_1x_coco", 32_200_494),
    "r50-2x": ("tood_r50_fpn_ms-2x_coco", 32_200_494),
    "r101-2x": ("tood_r101_fpn_ms-2x_coco", 51_192_622),
    "x101-2x": ("tood_x101-64x4d_fpn_ms-2x_coco", 90_098_734),
    "r101-dcn-2x": ("tood_r101-dconv-c3-c5_fpn_ms-2x_coco", 53_619_760),
    "x101-dcn-2x": ("tood_x101-64x4d-dconv-c4-c5_fpn_ms-2x_coco", 97_813_444),
}
Goldens = Callable[[str], dict[str, NDArray[Any]]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][1]


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_has_the_layout_of_mmdetection(name: str, shared: Path) -> None:
    path = shared / "reference" / "keys" / f"{PUBLISHED[name][0]}.json"
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in build_model(name).state_dict().items()}
    assert shapes == json.loads(path.read_text())


def run(model: nn.Module, images: NDArray[np.float32]) -> HeadOutput:
    with torch.inference_mode():
        return model(torch.from_numpy(images))


@pytest.mark.shared
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "r50-2x"])
def test_maps_equal_the_reference(
    name: str, goldens: Goldens, seeded_model: Callable[..., Any]
) -> None:
    model = seeded_model(name, convention="mmdet")
    for image in ("synth", "demo__320"):
        golden, given = goldens(f"{PUBLISHED[name][0]}__{image}"), goldens(f"input__{image}")
        compare_maps(model, golden, given["input"])


def compare_maps(model: Any, golden: dict[str, NDArray[Any]], images: NDArray[np.float32]) -> None:
    maps: dict[str, NDArray[np.float32]] = {}
    record_maps(model, maps)
    out = run(model, images)
    compared = 0
    for level, (scores, boxes) in enumerate(zip(*out, strict=True)):
        for key, tensor, atol in (("cls_score", scores, 2e-6), ("bbox_pred", boxes, 1e-3)):
            if (key := f"{key}_{level}") in golden:
                np.testing.assert_allclose(tensor, golden[key], rtol=0, atol=atol, err_msg=key)
                compared += 1
    for key in (key for key in golden if key.endswith("_stats") and key[0] in "cp"):
        values = statistics(maps[key.removesuffix("_stats")])
        np.testing.assert_allclose(values, golden[key], rtol=1e-5, atol=1e-6, err_msg=key)
        compared += 1
    if not compared:  # the golden holds detections alone, which test_postprocess.py compares
        assert {"det_scores", "det_bboxes"} <= golden.keys()


def record_maps(model: Any, maps: dict[str, NDArray[np.float32]]) -> None:
    """Make the model leave C2 to C5 and P3 to P7 in `maps` when it runs."""

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: maps.__setitem__(name, output.numpy())

    for number in range(1, 5):
        model.backbone.get_submodule(f"layer{number}").register_forward_hook(keep(f"c{number + 1}"))
    for number, conv in enumerate(model.neck.fpn_convs, start=3):
        conv.register_forward_hook(keep(f"p{number}"))


def statistics(values: NDArray[np.float32]) -> list[float]:
    wide = values.astype(np.float64)
    return [wide.mean(), wide.std(ddof=1), np.abs(wide).max(), float(np.linalg.norm(wide))]


def test_deformable_maps_equal_plain_ones_when_nothing_is_shifted(
    seeded_model: Callable[..., Any],
) -> None:
    """Offsets of zero and a mask of one half make it an ordinary convolution at half strength."""
    model = seeded_model("r101-dcn-2x")
    layer = model.backbone.layer2[0].conv2
    layer.init_offsets()
    x = torch.randn(1, 128, 12, 10)
    plain = torch.nn.functional.conv2d(x, layer.weight, stride=2, padding=1) / 2
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size_hw", [(32, 32), (32, 96), (64, 32)])
def test_smallest_inputs_give_every_level(
    size_hw: tuple[int, int], seeded_model: Callable[..., Any]
) -> None:
    out = run(seeded_model("tiny"), np.zeros((1, 3, *size_hw), np.float32))
    for scores, boxes, stride in zip(*out, STRIDES, strict=True):
        rows, columns = (max(1, -(-side // stride)) for side in size_hw)
        assert scores.shape == (1, 80, rows, columns)
        assert boxes.shape == (1, 4, rows, columns)
        assert scores.isfinite().all()
        assert boxes.isfinite().all()


def test_initial_scores_are_the_prior() -> None:
    """Class and alignment bias start at a probability of 0.01, so does their geometric mean."""
    torch.manual_seed(0)
    out = run(build_model("tiny"), np.zeros((1, 3, 64, 64), np.float32))
    for scores in out.scores:
        assert scores.median().item() == pytest.approx(0.01, rel=0.05)


def test_batch_holds_independent_images(seeded_model: Callable[..., Any]) -> None:
    model, rng = seeded_model("tiny"), np.random.default_rng(0)
    images = rng.standard_normal((3, 3, 64, 96)).astype(np.float32)
    together = run(model, images)
    for i in range(3):
        alone = run(model, images[i : i + 1])
        for first, second in zip(alone.scores, together.scores, strict=True):
            torch.testing.assert_close(first[0], second[i], rtol=0, atol=1e-5)


def test_unknown_preset_is_answered_with_the_nearest_and_where_all_are() -> None:
    with pytest.raises(ToodError, match=r"'r50'; expected .*r50-1x.*docs/presets\.md"):
        build_model("r50")


def test_basic_blocks_refuse_deformation() -> None:
    with pytest.raises(ToodError, match="basic blocks"):
        build_model(replace(PRESETS["tiny"], deform_stages=(3,)))


class TestSettings:
    def test_batch_norms_have_the_presets_epsilon(self, seeded_model: Callable[..., Any]) -> None:
        backbone = seeded_model("tiny", batch_norm_eps=0.5).double().eval().backbone
        for norm in (part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)):
            x = torch.randn(1, norm.num_features, 3, 2, dtype=torch.float64)
            parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            mean, var, weight, bias = (part[:, None, None] for part in parts if part is not None)
            torch.testing.assert_close(norm(x), (x - mean) / (var + 0.5).sqrt() * weight + bias)

    def test_every_norm_takes_the_setting_at_every_depth(self) -> None:
        preset = replace(PRESETS["x101-dcn-2x"], batch_norm_eps=0.25, norm_eps=0.125)
        with torch.device("meta"):
            modules = list(build_model(preset).modules())
        assert {part.eps for part in modules if isinstance(part, nn.BatchNorm2d)} == {0.25}
        assert {part.eps for part in modules if isinstance(part, nn.GroupNorm)} == {0.125}

    @pytest.mark.parametrize("order", ["rgb", "bgr"])
    @pytest.mark.parametrize("pad_value", [(0.0, 0.0, 0.0), (0.5, -1.0, 2.0)])
    def test_pixels_are_normalised_padded_and_ordered(
        self, order: str, pad_value: Any, seeded_model: Callable[..., Any]
    ) -> None:
        mean, std = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)
        fields = {"mean": mean, "std": std, "channel_order": order, "pad_value": pad_value}
        detector = FusedDetector(seeded_model("tiny", **fields))
        images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
        valid_hw = np.array([[4, 3], [1, 6]], np.int32)
        pixels = detector.normalise(torch.from_numpy(images), torch.from_numpy(valid_hw))
        for image, row, column, place in np.ndindex(2, 4, 6, 3):
            channel = "rgb".index(order[place])
            expected = pad_value[channel]
            if row < valid_hw[image, 0] and column < valid_hw[image, 1]:
                expected = (images[image, row, column, channel] - mean[channel]) / std[channel]
            assert pixels[image, place, row, column] == pytest.approx(expected)

    def test_candidates_and_detections_are_as_many_as_the_preset_says(
        self, seeded_model: Callable[..., Any]
    ) -> None:
        detector = FusedDetector(seeded_model("tiny", candidates_per_level=3, max_det=7)).eval()
        images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
        valid_hw = torch.tensor([[64, 96]], dtype=torch.int32)
        with torch.inference_mode():
            stages = detector(torch.from_numpy(images), valid_hw, 0.0, 0.9)
        assert stages.candidates.scores.shape == (1, 3 * len(STRIDES))
        assert stages.detections.scores.shape == (1, 7)
        best = torch.cat([level.flatten(1).topk(3).values for level in stages.head.scores], dim=1)
        torch.testing.assert_close(stages.candidates.scores, best.sort(descending=True).values)
