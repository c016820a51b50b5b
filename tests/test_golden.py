"""The stored self-test survives JSON bit for bit, and damage is one clear line."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tood_deploy.engines.self_test import Golden, GoldenCase
from tood_deploy.errors import ArtefactError
from tood_deploy.manifest_sections import SelfTest, SelfTestCase
from tood_deploy.matching import NetDetections

RNG = np.random.default_rng(7)


@pytest.fixture
def golden() -> Golden:
    rows = NetDetections(
        RNG.random((3, 4), np.float32) * 100,
        RNG.random(3, np.float32),
        np.array([0, 5, 79], np.int32),
    )
    nothing = NetDetections(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    )
    image = RNG.integers(0, 256, (21, 33, 3)).astype(np.uint8)
    return Golden(
        image,
        0.6,
        "PyTorch",
        (GoldenCase((32, 64), 0.25, rows), GoldenCase((64, 64), 0.0, nothing)),
    )


def test_json_keeps_every_bit(golden: Golden) -> None:
    stored = SelfTest.from_dict(json.loads(json.dumps(golden.for_manifest().to_dict())))
    again = Golden.from_manifest(stored, "a.onnx")
    assert np.array_equal(again.image, golden.image)
    assert (again.iou_threshold, again.reference) == (0.6, "PyTorch")
    for old, new in zip(golden.cases, again.cases, strict=True):
        assert (old.net_hw, old.score_threshold) == (new.net_hw, new.score_threshold)
        for name in ("boxes", "scores", "labels"):
            before, after = getattr(old.expected, name), getattr(new.expected, name)
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)


def test_the_image_lies_in_every_slot(golden: Golden) -> None:
    images, valid_hw = golden.inputs((64, 96), batch=3)
    assert images.shape == (3, 64, 96, 3)
    assert valid_hw.tolist() == [[21, 33]] * 3
    for image in images:
        assert np.array_equal(image[:21, :33], golden.image)
        assert image.sum() == golden.image.sum(dtype=int)


@pytest.mark.parametrize(
    "damage",
    [
        {"image_png": "?"},
        {"image_png": "aGFsbG8="},
        {"cases": (SelfTestCase((32, 64), 0.0, ((1.0, 2.0),), (1.0,), (1,)),)},
    ],
)
def test_damage_is_one_clear_line(damage: dict[str, Any], golden: Golden) -> None:
    with pytest.raises(
        ArtefactError,
        match=r"a\.onnx: the self-test in its manifest is damaged.*export the model again",
    ):
        Golden.from_manifest(replace(golden.for_manifest(), **damage), "a.onnx")
