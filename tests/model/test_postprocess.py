"""Candidates and detections: against plain loops over the published rules, and against the reference's own detections."""

import hashlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tood_deploy.matching import NetDetections, match_boxes
from tood_deploy.model import FusedDetector, HeadOutput
from tood_deploy.model.postprocess import MAX_CANDIDATES, BatchResult, detect, select_candidates
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


def published_candidates(
    out: HeadOutput,
    image: int,
    per_level: int,
    threshold: float,
    convention: str,
    hw: tuple[int, int],
) -> set[Any]:
    """The candidates of one image by the published rules, written as they read: (score, label, box)."""
    found: list[tuple[float, int, tuple[float, ...]]] = []
    for scores, boxes, stride in zip(out.scores, out.boxes_strides, STRIDES, strict=True):
        rows = scores[image].flatten(1).T
        flat = boxes[image].flatten(1).T * stride
        if convention == "authors":
            limit = torch.tensor([hw[1], hw[0], hw[1], hw[0]], dtype=torch.float32)
            flat = torch.minimum(flat.clamp(min=0), limit)
            anchors = rows.max(1).values.argsort(descending=True)[:per_level].tolist()
            pairs = [
                (rows[a, k].item(), k, tuple(flat[a].tolist()))
                for a in anchors
                for k in range(rows.shape[1])
            ]
        else:
            pairs = [
                (rows[a, k].item(), k, tuple(flat[a].tolist()))
                for a in range(len(rows))
                for k in range(rows.shape[1])
            ]
            pairs = sorted(pairs, reverse=True)[:per_level]
            pairs = [pair for pair in pairs if pair[2][2] > pair[2][0] and pair[2][3] > pair[2][1]]
        found += [pair for pair in pairs if pair[0] > threshold]
    return set(sorted(found, reverse=True)[:MAX_CANDIDATES])


@pytest.mark.parametrize("convention", ["mmdet", "authors"])
@pytest.mark.parametrize("per_level", [1, 7, 40, 1000])
def test_candidates_follow_the_published_rules(convention: Any, per_level: int) -> None:
    out, hw = random_head(per_level), torch.tensor([[90, 120], [64, 128]])
    candidates = select_candidates(out, hw, 0.05, convention=convention, per_level=per_level)
    assert (candidates.scores[:, :-1] >= candidates.scores[:, 1:]).all()
    for image in range(2):
        real = candidates.scores[image] > 0
        found = {
            (score, label, tuple(box))
            for score, label, box in zip(
                candidates.scores[image][real].tolist(),
                candidates.labels[image][real].tolist(),
                candidates.boxes_net[image][real].tolist(),
                strict=True,
            )
        }
        expected = published_candidates(
            out, image, per_level, 0.05, convention, (int(hw[image, 0]), int(hw[image, 1]))
        )
        assert found == expected


def test_threshold_is_strict() -> None:
    out = HeadOutput(
        [torch.zeros(1, 1, h, w) for h, w in GRIDS], [torch.ones(1, 4, h, w) for h, w in GRIDS]
    )
    out.boxes_strides[0][0, :, 0, 0] = torch.tensor([0.0, 0, 1, 1])
    out.scores[0][0, 0, 0, 0] = 0.5
    sizes = torch.tensor([[96, 128]])
    assert detect(out, sizes, 0.5, 0.6).num_dets.item() == 0
    assert detect(out, sizes, 0.499, 0.6).num_dets.item() == 1


def test_rows_past_the_last_detection_are_zero() -> None:
    found = detect(random_head(3, classes=1), torch.tensor([[96, 128]] * 2), 0.5, 0.3)
    for image, count in enumerate(found.num_dets.tolist()):
        assert 0 < count < 100
        assert (found.scores[image, :count] > 0.5).all()
        for rows in found[1:]:
            assert not rows[image, count:].any()


def test_one_class_and_max_det() -> None:
    found = detect(random_head(4, classes=1), torch.tensor([[96, 128]] * 2), 0.0, 1.0, max_det=7)
    assert found.boxes_net.shape == (2, 7, 4)
    assert found.num_dets.tolist() == [7, 7]
    assert not found.labels.any()


def to_rows(found: BatchResult, boxes: NDArray[np.float32] | None = None) -> NetDetections:
    count = int(found.num_dets[0])
    net = found.boxes_net[0, :count].numpy()
    return NetDetections(
        net if boxes is None else boxes,
        found.scores[0, :count].numpy(),
        found.labels[0, :count].numpy(),
    )


def read_demo(shared: Any) -> NDArray[np.uint8]:
    image = cv2.imread(str(shared / "reference" / "images" / "demo.jpg"))
    assert image is not None
    return np.asarray(image, np.uint8)


def golden_rows(golden: dict[str, NDArray[Any]], kind: str) -> NetDetections:
    return NetDetections(
        golden[f"{kind}_bboxes"],
        golden[f"{kind}_scores"],
        golden[f"{kind}_labels"].astype(np.int32),
    )


def assert_equal_detections(
    expected: NetDetections, found: NetDetections, exchanges: int = 1
) -> None:
    """Every one matched, save exchanges at the very edge of a threshold, which equally right runs of the reference show too."""
    match = match_boxes(
        expected, found, min_iou=0, max_score_difference=1e-5, max_box_difference_px=0.05
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


@pytest.mark.shared
@pytest.mark.parametrize("name", MMDET)
def test_detections_equal_mmdetection(
    name: str, goldens: Goldens, seeded_model: Callable[..., Any]
) -> None:
    model = seeded_model(name, convention="mmdet")
    for image, kinds in (
        ("synth", ("det", "uncapped", "pre200")),
        ("demo__320", ("det", "uncapped")),
    ):
        golden, given = goldens(f"{MMDET[name]}__{image}"), goldens(f"input__{image}")
        with torch.inference_mode():
            out = model(torch.from_numpy(given["input"]))
        height, width = given["img_shape"].tolist()
        scale = given["scale_factor"] if "scale_factor" in given else np.ones(2)
        for kind in kinds:
            if f"{kind}_scores" not in golden:
                continue
            per_level = 200 if kind == "pre200" else 1000
            max_det = 2000 if kind == "uncapped" else 100
            found = detect(
                out,
                torch.tensor([[height, width]]),
                0.05,
                0.6,
                candidates_per_level=per_level,
                max_det=max_det,
            )
            count = int(found.num_dets[0])
            boxes = (found.boxes_net[0, :count].numpy() / np.tile(scale, 2)).astype(np.float32)
            assert_equal_detections(golden_rows(golden, kind), to_rows(found, boxes))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["r50-1x", "r50-anchor-1x"])
def test_detections_equal_the_authors(
    name: str, goldens: Goldens, seeded_model: Callable[..., Any], shared: Any
) -> None:
    golden = goldens(f"fcjian_{MMDET[name].replace('anchor-based', 'anchor_based')}__demo__320")
    image, transform = resize_and_pad(read_demo(shared), (214, 320))
    detector = FusedDetector(seeded_model(name, convention="authors"))
    with torch.inference_mode():
        found = detector(
            torch.from_numpy(image)[None], torch.tensor([transform.resized_hw]), 0.05, 0.6
        ).detections
    boxes = transform.boxes_to_image(found.boxes_net[0, : int(found.num_dets[0])].numpy())
    assert_equal_detections(golden_rows(golden, "det"), to_rows(found, boxes), exchanges=0)


@pytest.mark.shared
def test_input_and_detections_at_full_size(
    goldens: Goldens, seeded_model: Callable[..., Any], shared: Any
) -> None:
    """The published test size, from the JPEG on: the network's input to the byte, and 1,003 detections."""
    golden = goldens("tood_r50_fpn_1x_coco__demo__800x1333")
    image, transform = resize_and_pad(read_demo(shared), (800, 1333))
    detector = FusedDetector(seeded_model("r50-1x"), max_det=2000)
    images, valid_hw = torch.from_numpy(image)[None], torch.tensor([transform.resized_hw])
    with torch.inference_mode():
        pixels = detector.normalise(images, valid_hw)
        found = detector(images, valid_hw, 0.05, 0.6).detections
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == str(golden["input_sha256"])
    boxes = transform.boxes_to_image(found.boxes_net[0, : int(found.num_dets[0])].numpy())
    assert_equal_detections(golden_rows(golden, "uncapped"), to_rows(found, boxes), exchanges=2)


@pytest.mark.shared
def test_normalised_input_equals_the_reference_to_the_byte(
    goldens: Goldens, seeded_model: Callable[..., Any]
) -> None:
    golden = goldens("input__demo__320")
    resized = golden["resized_bgr_u8"]
    height, width = golden["img_shape"].tolist()
    padded = np.zeros((224, 320, 3), np.uint8)
    padded[:height, :width] = resized.transpose(1, 2, 0)[:, :, ::-1]
    padded[height:] = 77  # what lies outside the image must not matter
    pixels = FusedDetector(seeded_model("tiny")).normalise(
        torch.from_numpy(padded)[None], torch.tensor([[height, width]])
    )
    assert pixels.numpy().tobytes() == golden["input"].tobytes()
