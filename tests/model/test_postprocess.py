"""Candidates and detections against plain loops over the published rules, and the reference's."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from model.crowds import crowd
from numpy.typing import NDArray

from tood_deploy.matching import NetDetections, match_boxes
from tood_deploy.model import FusedDetector, HeadOutput
from tood_deploy.model.postprocess import (
    MAX_CANDIDATES,
    OF_CONVENTION,
    BatchResult,
    Candidates,
    select_candidates,
    suppress,
    suppress_unrolled,
)
from tood_deploy.preprocess import resize_and_pad
from tood_deploy.presets import STRIDES

Goldens = Callable[[str], dict[str, NDArray[Any]]]
GRIDS = ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))


def random_head(seed: int, classes: int = 5, batch: int = 2) -> HeadOutput:
    """Maps with some inverted and many overlapping boxes."""
    generator = torch.Generator().manual_seed(seed)
    scores, boxes = [], []
    for height, width in GRIDS:
        scores.append(torch.rand(batch, classes, height, width, generator=generator) ** 2)
        centre = torch.rand(batch, 2, height, width, generator=generator) * 12
        size = torch.rand(batch, 4, height, width, generator=generator) * 4 - 0.4
        boxes.append(torch.cat((centre - size[:, :2], centre + size[:, 2:]), dim=1))
    return HeadOutput(scores, boxes)


Pair = tuple[float, int, tuple[float, ...]]  # score, label, box


def pairs_of(rows: torch.Tensor, boxes: torch.Tensor, anchors: Iterable[int]) -> list[Pair]:
    """Return all pairs of some anchors, from scores (A, K) and boxes (A, 4)."""
    return [
        (rows[anchor, label].item(), label, tuple(boxes[anchor].tolist()))
        for anchor in anchors
        for label in range(rows.shape[1])
    ]


def published_candidates(
    out: HeadOutput, image: int, hw: list[int], per_level: int, convention: str
) -> set[Pair]:
    """Return one image's candidates above 0.05 by the published rules, written as they read."""
    pairs: list[Pair] = []
    for scores, boxes, stride in zip(*out, STRIDES, strict=True):
        rows, flat = scores[image].flatten(1).T, boxes[image].flatten(1).T * stride
        if convention == "authors":
            limit = torch.tensor([hw[1], hw[0], hw[1], hw[0]], dtype=torch.float32)
            flat = torch.minimum(flat.clamp(min=0), limit)
            anchors = rows.max(1).values.argsort(descending=True)[:per_level].tolist()
            pairs += pairs_of(rows, flat, anchors)
        else:
            best = sorted(pairs_of(rows, flat, range(len(rows))), reverse=True)[:per_level]
            pairs += [pair for pair in best if pair[2][2] > pair[2][0] and pair[2][3] > pair[2][1]]
    kept = sorted((pair for pair in pairs if pair[0] > 0.05), reverse=True)
    return set(kept[:MAX_CANDIDATES])


@pytest.mark.parametrize("convention", ["mmdet", "authors"])
@pytest.mark.parametrize("per_level", [1, 7, 40, 1000])
def test_candidates_follow_the_published_rules(convention: Any, per_level: int) -> None:
    out, hw = random_head(per_level), torch.tensor([[90, 120], [64, 128]])
    rules = OF_CONVENTION[convention]
    candidates = select_candidates(out, hw, 0.05, rules=rules, per_level=per_level)
    assert (candidates.scores[:, :-1] >= candidates.scores[:, 1:]).all()
    for image in range(2):
        real = candidates.scores[image] > 0
        boxes, scores, labels = (part[image][real].tolist() for part in candidates)
        expected = published_candidates(out, image, hw[image].tolist(), per_level, convention)
        assert set(zip(scores, labels, map(tuple, boxes), strict=True)) == expected


SIZES = torch.tensor([[96, 128]] * 2)


def test_threshold_is_strict() -> None:
    scores = [torch.zeros(1, 1, h, w) for h, w in GRIDS]
    out = HeadOutput(scores, [torch.ones(1, 4, h, w) for h, w in GRIDS])
    out.boxes_strides[0][0, :, 0, 0] = torch.tensor([0.0, 0, 1, 1])
    out.scores[0][0, 0, 0, 0] = 0.5
    for threshold, count in ((0.5, 0), (0.499, 1)):
        candidates = select_candidates(out, SIZES[:1], threshold)
        assert suppress(candidates, 0.6).num_dets.item() == count


def test_rows_past_the_last_detection_are_zero() -> None:
    result = suppress(select_candidates(random_head(3, classes=1), SIZES, 0.5), 0.3)
    for image, count in enumerate(result.num_dets.tolist()):
        assert 0 < count < 100
        assert (result.scores[image, :count] > 0.5).all()
        for rows in result[1:]:
            assert not rows[image, count:].any()


def test_one_class_and_max_det() -> None:
    result = suppress(select_candidates(random_head(4, classes=1), SIZES, 0.0), 1.0, max_det=7)
    assert result.boxes_net.shape == (2, 7, 4)
    assert result.num_dets.tolist() == [7, 7]
    assert not result.labels.any()


def test_unrolled_suppression_gives_the_same_detections() -> None:
    candidates = Candidates(*crowd(11, 2, 1500, 5, 400.0))
    unrolled, exact = suppress_unrolled(candidates, 0.6)
    assert exact.all()
    pairs = zip(unrolled, suppress(candidates, 0.6), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def rows_of(result: BatchResult, boxes: NDArray[np.float32]) -> NetDetections:
    """Return the first image's detections with boxes in its own pixels."""
    count = int(result.num_dets[0])
    return NetDetections(boxes, result.scores[0, :count].numpy(), result.labels[0, :count].numpy())


def net_boxes(result: BatchResult) -> NDArray[np.float32]:
    return result.boxes_net[0, : int(result.num_dets[0])].numpy()


def read_demo(shared: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(shared / "reference" / "images" / "demo.jpg"))
    assert image is not None
    return np.asarray(image, np.uint8)


def assert_equals_golden(
    golden: dict[str, NDArray[Any]], kind: str, rows: NetDetections, exchanges: int = 1
) -> None:
    """Every detection is matched, save some exchanges at the very edge of a threshold.

    Equally right runs of the reference exchange these too.
    """
    boxes, scores, labels = (golden[f"{kind}_{part}"] for part in ("bboxes", "scores", "labels"))
    expected = NetDetections(boxes, scores, labels.astype(np.int32))
    match = match_boxes(
        expected, rows, min_iou=0, max_score_difference=1e-5, max_box_difference_px=0.05
    ).counts
    assert match.exchanged <= exchanges, match
    assert len(expected) > 50


MMDET = {
    "r50-1x": "tood_r50_fpn_1x_coco",
    "r50-anchor-1x": "tood_r50_fpn_anchor-based_1x_coco",
    "r101-2x": "tood_r101_fpn_ms-2x_coco",
    "x101-2x": "tood_x101-64x4d_fpn_ms-2x_coco",
    "r101-dcn-2x": "tood_r101-dconv-c3-c5_fpn_ms-2x_coco",
    "x101-dcn-2x": "tood_x101-64x4d-dconv-c4-c5_fpn_ms-2x_coco",
}
KINDS = {"det": (1000, 100), "uncapped": (1000, 2000), "pre200": (200, 100)}  # per level, at most


@pytest.mark.shared
@pytest.mark.parametrize("name", MMDET)
def test_detections_equal_mmdetection(
    name: str, goldens: Goldens, seeded_model: Callable[..., Any]
) -> None:
    model = seeded_model(name, convention="mmdet")
    for image in ("synth", "demo__320"):
        golden, given = goldens(f"{MMDET[name]}__{image}"), goldens(f"input__{image}")
        with torch.inference_mode():
            out = model(torch.from_numpy(given["input"]))
        valid_hw = torch.tensor([given["img_shape"].tolist()])
        scale = np.tile(given["scale_factor"] if "scale_factor" in given else np.ones(2), 2)
        kinds = [kind for kind in KINDS if f"{kind}_scores" in golden]
        assert kinds
        for kind in kinds:
            per_level, max_det = KINDS[kind]
            candidates = select_candidates(out, valid_hw, 0.05, per_level=per_level)
            result = suppress(candidates, 0.6, max_det)
            boxes = (net_boxes(result) / scale).astype(np.float32)
            assert_equals_golden(golden, kind, rows_of(result, boxes))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["r50-1x", "r50-anchor-1x"])
def test_detections_equal_the_authors(
    name: str, goldens: Goldens, seeded_model: Callable[..., Any], shared: Path
) -> None:
    golden = goldens(f"fcjian_{MMDET[name].replace('anchor-based', 'anchor_based')}__demo__320")
    image, transform = resize_and_pad(read_demo(shared), (214, 320))
    detector = FusedDetector(seeded_model(name, convention="authors"))
    images, valid_hw = torch.from_numpy(image)[None], torch.tensor([transform.resized_hw])
    with torch.inference_mode():
        result = detector(images, valid_hw, 0.05, 0.6).detections
    rows = rows_of(result, transform.boxes_to_image(net_boxes(result)))
    assert_equals_golden(golden, "det", rows, exchanges=0)


@pytest.mark.shared
def test_input_and_detections_at_full_size(
    goldens: Goldens, seeded_model: Callable[..., Any], shared: Path
) -> None:
    """The published test size, from the JPEG on: the input to the byte, and 1,003 detections."""
    golden = goldens("tood_r50_fpn_1x_coco__demo__800x1333")
    image, transform = resize_and_pad(read_demo(shared), (800, 1333))
    detector = FusedDetector(seeded_model("r50-1x"), max_det=2000)
    images, valid_hw = torch.from_numpy(image)[None], torch.tensor([transform.resized_hw])
    with torch.inference_mode():
        pixels = detector.normalise(images, valid_hw)
        result = detector(images, valid_hw, 0.05, 0.6).detections
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == str(golden["input_sha256"])
    rows = rows_of(result, transform.boxes_to_image(net_boxes(result)))
    assert_equals_golden(golden, "uncapped", rows, exchanges=2)


@pytest.mark.shared
def test_normalised_input_equals_the_reference_to_the_byte(
    goldens: Goldens, seeded_model: Callable[..., Any]
) -> None:
    golden = goldens("input__demo__320")
    resized = golden["resized_bgr_u8"]
    height, width = golden["img_shape"].tolist()
    padded = np.zeros((224, 320, 3), np.uint8)
    padded[:height, :width] = resized.transpose(1, 2, 0)[:, :, ::-1]
    padded[height:] = 77  # the pixels outside the image must not matter
    valid_hw = torch.tensor([[height, width]])
    pixels = FusedDetector(seeded_model("tiny")).normalise(torch.from_numpy(padded)[None], valid_hw)
    assert pixels.numpy().tobytes() == golden["input"].tobytes()
