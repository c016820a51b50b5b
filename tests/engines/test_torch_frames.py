"""Resizing on the device, against OpenCV: one grey level at most, the same padding and channels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import fake_torch_cuda

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.torch_fast import FastTorchEngine, resize_and_pad_frames
from tood_deploy.errors import ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.model import load_checkpoint
from tood_deploy.preprocess import plan_resize, resize_and_pad


@pytest.mark.parametrize(
    "size_hw", [(100, 140), (37, 53), (1, 1), (1, 90), (333, 20), (480, 640), (96, 128)]
)
@pytest.mark.parametrize("imgsz", [(96, 128), (64, 320)])
def test_equals_opencv_within_one_grey_level(
    size_hw: tuple[int, int], imgsz: tuple[int, int]
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (*size_hw, 3), np.uint8)
    for image in (noise, synthetic_image(*size_hw, 1)):
        expected, transform = resize_and_pad(image, imgsz)
        images, valid_hw = resize_and_pad_frames([torch.from_numpy(image)], [transform])
        assert valid_hw.tolist() == [list(transform.resized_hw)]
        difference = np.abs(images[0].numpy().astype(int) - expected)
        assert difference.max() <= 1
        rows, columns = transform.resized_hw
        assert not images[0, rows:].any()
        assert not images[0, :, columns:].any()


def test_frames_of_several_sizes_in_a_batch() -> None:
    frames = [synthetic_image(60, 90, 0), synthetic_image(120, 180, 1)]
    transforms = [plan_resize(frame, (64, 96)) for frame in frames]
    tensors = [torch.from_numpy(frame) for frame in frames]
    images, valid_hw = resize_and_pad_frames(tensors, transforms)
    assert images.shape == (2, 64, 96, 3)
    assert valid_hw.dtype == torch.int32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_detector_finds_the_same(
    device: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        fake_torch_cuda.install(monkeypatch)
    frame = synthetic_image(75, 110, 4)
    with FastTorchEngine(load_checkpoint(tiny_checkpoint), device=device) as engine:
        plain = Detector(engine, conf=0.05, imgsz=(64, 96))
        resizing = Detector(engine, conf=0.05, imgsz=(64, 96), device_resize=True)
        expected, found = plain(frame), resizing(frame)
    assert abs(len(found) - len(expected)) <= 2
    np.testing.assert_allclose(found.scores[:5], expected.scores[:5], atol=0.02)


def test_other_runtimes_do_not(tiny_checkpoint: Path) -> None:
    with pytest.raises(ToodError, match="fast form"):
        Detector(tiny_checkpoint, device_resize=True)
