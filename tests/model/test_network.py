"""The networks against the reference: keys, parameter counts, and every level's maps."""

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
from tood_deploy.model import HeadOutput, build_model
from tood_deploy.presets import PRESETS

CONFIGS = {
    "r50-1x": "tood_r50_fpn_1x_coco",
    "r50-anchor-1x": "tood_r50_fpn_anchor-based_1x_coco",
    "r50-2x": "tood_r50_fpn_ms-2x_coco",
    "r101-2x": "tood_r101_fpn_ms-2x_coco",
    "x101-2x": "tood_x101-64x4d_fpn_ms-2x_coco",
    "r101-dcn-2x": "tood_r101-dconv-c3-c5_fpn_ms-2x_coco",
    "x101-dcn-2x": "tood_x101-64x4d-dconv-c4-c5_fpn_ms-2x_coco",
}
PARAMETERS = {
    "r50-1x": 32_200_494,
    "r50-anchor-1x": 32_200_494,
    "r50-2x": 32_200_494,
    "r101-2x": 51_192_622,
    "x101-2x": 90_098_734,
    "r101-dcn-2x": 53_619_760,
    "x101-dcn-2x": 97_813_444,
}
LEVELS = range(5)
Goldens = Callable[[str], dict[str, NDArray[Any]]]


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_model(name).state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        assert (
            sum(parameter.numel() for parameter in build_model(name).parameters())
            == PARAMETERS[name]
        )


@pytest.mark.shared
@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_has_the_layout_of_mmdetection(name: str, shared: Path) -> None:
    expected = json.loads((shared / "reference" / "keys" / f"{CONFIGS[name]}.json").read_text())
    assert shapes_of(name) == {key: tuple(shape) for key, shape in expected.items()}


def run(model: nn.Module, images: NDArray[np.float32]) -> HeadOutput:
    with torch.inference_mode():
        return model(torch.from_numpy(images))


@pytest.mark.shared
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "r50-2x"])
def test_maps_equal_the_reference(
    name: str, goldens: Goldens, seeded_model: Callable[..., Any]
) -> None:
    model = seeded_model(name, convention="mmdet")
    for image in ("synth", "demo__320"):
        compare_maps(model, goldens(f"{CONFIGS[name]}__{image}"), image, goldens)


def compare_maps(model: Any, golden: dict[str, NDArray[Any]], image: str, goldens: Goldens) -> None:
    maps: dict[str, NDArray[np.float32]] = {}
    record_maps(model, maps)
    out = run(model, goldens(f"input__{image}")["input"])
    compared = 0
    for level in LEVELS:
        for key, found, tolerance in (
            (f"cls_score_{level}", out.scores[level], 2e-6),
            (f"bbox_pred_{level}", out.boxes_strides[level], 1e-3),
        ):
            if key in golden:
                np.testing.assert_allclose(
                    found.numpy(), golden[key], rtol=0, atol=tolerance, err_msg=key
                )
                compared += 1
    for key in (key for key in golden if key.endswith("_stats") and key[0] in "cp"):
        np.testing.assert_allclose(
            statistics(maps[key.removesuffix("_stats")]),
            golden[key],
            rtol=1e-5,
            atol=1e-6,
            err_msg=key,
        )
        compared += 1
    if not compared:  # the golden holds detections alone, which test_postprocess.py compares
        assert {"det_scores", "det_bboxes"} <= golden.keys()


def record_maps(model: Any, maps: dict[str, NDArray[np.float32]]) -> None:
    """Makes the model leave C2 to C5 and P3 to P7 in `maps` when it runs."""

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: maps.__setitem__(name, output.numpy())

    for number in range(1, 5):
        model.backbone.get_submodule(f"layer{number}").register_forward_hook(keep(f"c{number + 1}"))
    for number, conv in enumerate(model.neck.fpn_convs, start=3):
        conv.register_forward_hook(keep(f"p{number}"))


def statistics(values: NDArray[np.float32]) -> list[float]:
    wide = values.astype(np.float64)
    return [
        float(value)
        for value in (wide.mean(), wide.std(ddof=1), np.abs(wide).max(), np.linalg.norm(wide))
    ]


def test_deformable_maps_equal_plain_ones_when_nothing_is_shifted(
    seeded_model: Callable[..., Any],
) -> None:
    """Offsets of zero and a mask of one half make a deformable network an ordinary one at half strength."""
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
    for scores, boxes, stride in zip(
        out.scores, out.boxes_strides, (8, 16, 32, 64, 128), strict=True
    ):
        rows, columns = (max(1, -(-side // stride)) for side in size_hw)
        assert scores.shape == (1, 80, rows, columns)
        assert boxes.shape == (1, 4, rows, columns)
        assert scores.isfinite().all()
        assert boxes.isfinite().all()


def test_initial_scores_are_the_prior() -> None:
    """Both class and alignment bias start at a probability of 0.01, so does their geometric mean."""
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


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ToodError, match=r"'r50'.*r50-1x.*tiny"):
        build_model("r50")


def test_basic_blocks_refuse_deformation() -> None:
    with pytest.raises(ToodError, match="basic blocks"):
        build_model(replace(PRESETS["tiny"], deform_stages=(3,)))
