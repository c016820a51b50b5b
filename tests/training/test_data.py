"""Augmentation and batches: boxes stay on their objects, the order follows from seed and epoch."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tood_deploy.errors import InputError
from tood_deploy.training.data import (
    Augment,
    Sample,
    TrainingData,
    collate,
    epoch_batches,
    load_batches,
    mirror,
    mirror_vertically,
    recolour,
    scale,
)
from tood_deploy.training.records import Record, read_image, read_labelled_images


def white_box(height: int, width: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def outline(image: NDArray[np.uint8]) -> list[int]:
    y, x = np.nonzero(image[..., 0] > 127)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


@given(
    flip=st.booleans(), vertical=st.booleans(), short=st.integers(40, 200), seed=st.integers(0, 99)
)
def test_boxes_stay_on_their_objects(flip: bool, vertical: bool, short: int, seed: int) -> None:
    box = (30, 22, 71, 60)
    augment = Augment((100, 300), (short, short), float(flip), float(vertical), colour=0.1)
    image, boxes = augment(
        white_box(100, 140, box), np.array([box], np.float32), np.random.default_rng(seed)
    )
    assert min(image.shape[:2]) == short
    np.testing.assert_allclose(boxes[0], outline(image), atol=max(1.0, short / 100))


def test_mirrors_are_exact_and_undo_themselves() -> None:
    box = (3, 5, 17, 9)
    for change in (mirror, mirror_vertically):
        image, boxes = change(white_box(20, 31, box), np.array([box], np.float32))
        assert boxes[0].tolist() == outline(image)
        back, again = change(image, boxes)
        np.testing.assert_array_equal(back, white_box(20, 31, box))
        np.testing.assert_array_equal(again, [box])


def test_scaling_uses_a_factor_for_each_direction() -> None:
    image, boxes = scale(
        np.zeros((427, 640, 3), np.uint8), np.array([[0, 0, 640, 427]], np.float32), (320, 320)
    )
    assert image.shape == (214, 320, 3)
    np.testing.assert_allclose(boxes, [[0, 0, 320, 214]])


def test_no_colour_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    assert np.abs(recolour(image, 1, 1, 1).astype(int) - image).max() <= 1
    assert recolour(image, 1.5, 1, 1).mean() > image.mean()


def records(shapes: list[tuple[int, int]]) -> list[Record]:
    return [
        Record(i, Path(f"{i}.jpg"), shape, np.zeros((1, 4), np.float32), np.zeros(1, np.int64))
        for i, shape in enumerate(shapes)
    ]


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 9),
    by_aspect=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_image_comes_once_an_epoch(
    count: int, batch: int, by_aspect: bool, epoch: int
) -> None:
    data = records([(10, 20) if i % 3 else (20, 10) for i in range(count)])
    batches = epoch_batches(data, batch, seed=5, epoch=epoch, by_aspect=by_aspect)
    assert Counter(index for step in batches for index in step) == Counter(range(count))
    assert batches == epoch_batches(data, batch, seed=5, epoch=epoch, by_aspect=by_aspect)
    assert len(batches) == -(-count // batch)


def test_orders_differ_between_epochs_and_seeds() -> None:
    data = records([(10, 20)] * 30)
    orders = {
        str(epoch_batches(data, 4, seed=seed, epoch=epoch, by_aspect=False))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batches_hold_one_kind_of_aspect_but_for_the_last() -> None:
    data = records([(10, 20) if i % 2 else (20, 10) for i in range(41)])
    for step in epoch_batches(data, 4, seed=0, epoch=0, by_aspect=True)[:-2]:
        assert len({index % 2 for index in step}) == 1


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_step_has_an_image_for_every_worker(count: int) -> None:
    batches = epoch_batches(
        records([(10, 20)] * count), 4, seed=0, epoch=0, by_aspect=True, at_least=4
    )
    assert [len(step) for step in batches] == [4] * len(batches)
    assert set(range(count)) == {index for step in batches for index in step}


def test_collate_pads_to_multiples_of_32() -> None:
    samples = [
        Sample(np.full((40, 33, 3), 7, np.uint8), np.ones((2, 4), np.float32), np.array([0, 1]), 5),
        Sample(
            np.full((20, 64, 3), 9, np.uint8),
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
            6,
            ("bad.jpg",),
        ),
    ]
    batch = collate(samples)
    assert batch.images.shape == (2, 64, 64, 3)
    assert batch.valid_hw.tolist() == [[40, 33], [20, 64]]
    assert int(batch.images[1].sum()) == 20 * 64 * 3 * 9
    assert batch.targets[0].valid_hw == (40, 33)
    assert batch.image_ids == [5, 6]
    assert batch.unreadable == ["bad.jpg"]


def test_worker_processes_change_nothing(scenes: Path) -> None:
    annotations = read_labelled_images(scenes / "annotations.json", scenes / "images")
    data = TrainingData(annotations.records, Augment((64, 96), (48, 64), 0.5, 0.5, 0.2), seed=1)
    steps = epoch_batches(data.records, 4, seed=1, epoch=2, by_aspect=True)
    alone, shared_out = (
        [batch.images for batch in load_batches(data, steps, 2, workers)] for workers in (0, 2)
    )
    assert len(alone) == 3
    for first, second in zip(alone, shared_out, strict=True):
        assert torch.equal(first, second)


def test_an_unreadable_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    good = records([(10, 12)] * 2)
    paths = [tmp_path / "bad.jpg", tmp_path / "good.png"]
    paths[0].write_bytes(b"\xff\xd8 cut")
    cv2.imwrite(str(paths[1]), np.full((10, 12, 3), 50, np.uint8))
    data = TrainingData(
        [
            Record(r.image_id, path, r.size_hw, r.boxes, r.labels)
            for r, path in zip(good, paths, strict=True)
        ],
        Augment((32, 40)),
        seed=0,
    )
    sample = data[0, 0]
    assert sample.image_id == 1
    assert sample.unreadable == ("bad.jpg",)
    with pytest.raises(InputError, match=r"2 images in a row cannot be read \(bad.jpg"):
        _ = TrainingData([data.records[0]] * 2, Augment((32, 40)), seed=0)[0, 0]


def test_an_image_of_another_size_than_annotated_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((10, 12, 3), np.uint8))
    record = Record(0, path, (10, 13), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert read_image(record) is None
