"""Crops of a photograph, which latencies are measured on by default."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from inference.fakes import RedEngine

from tood_deploy.benchmark.latency.worker import Case, read_frames
from tood_deploy.data import image_set as module
from tood_deploy.data.image_set import crop_size, photograph_set
from tood_deploy.errors import InputError
from tood_deploy.inference.detector import Detector
from tood_deploy.preprocess import fit_size, pad_size, resize_and_pad

IMGSZ = [(800, 1333), (640, 640), (480, 640), (1344, 1344), (1024, 1535), (64, 96), (33, 1344)]


def test_says_what_they_are() -> None:
    assert photograph_set((800, 1333), 8).description == (
        "8 crops, 307x512, of a photograph, grace_hopper.jpg of matplotlib "
        f"{metadata.version('matplotlib')}"
    )


@pytest.mark.parametrize("imgsz", IMGSZ)
def test_have_the_canvas_of_an_image_of_the_input_size(imgsz: tuple[int, int]) -> None:
    images = [image.read() for image in photograph_set(imgsz, 3)]
    assert {pad_size(fit_size(image.shape[:2], imgsz)) for image in images} == {pad_size(imgsz)}
    assert {image.shape for image in images} == {(*crop_size((600, 512), imgsz), 3)}
    assert all(image.flags.c_contiguous for image in images)


@pytest.mark.parametrize("imgsz", [(800, 1333), (640, 640)])
def test_are_different_and_full_of_content(imgsz: tuple[int, int]) -> None:
    images = [image.read() for image in photograph_set(imgsz, 8)]
    assert len({image.tobytes() for image in images}) == 8
    for image in images:
        assert image.std() > 30
        tiles = [
            tile for rows in np.array_split(image, 4) for tile in np.array_split(rows, 4, axis=1)
        ]
        assert min(tile.std() for tile in tiles) > 2, "a part of it is plain"


def test_every_second_is_mirrored_and_all_of_the_photograph_is_seen() -> None:
    first, last = (photograph_set((300, 512), 2).images[i].read() for i in range(2))
    assert first.shape == (300, 512, 3)
    whole = np.concatenate([first, last[:, ::-1]])
    assert np.array_equal(photograph_set((512, 512), 1).images[0].read(), whole[:512])


def test_are_the_default_of_latencies() -> None:
    detector = Detector(RedEngine(), imgsz=(64, 96))
    frames, description = read_frames(detector, Case("red", "red"))
    assert len(frames) == 8
    assert description.startswith("8 crops, 341x512, of a photograph")
    assert {resize_and_pad(frame, (64, 96))[0].shape for frame in frames} == {(64, 96, 3)}


def test_matplotlib_is_not_imported_for_them() -> None:
    """It would take a tenth of the memory that is measured."""
    code = (
        "import sys; from tood_deploy.data.image_set import photograph_set; "
        "photograph_set((64, 96), 1); "
        "print('matplotlib' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


def test_a_photograph_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PHOTOGRAPH", Path("matplotlib/none.jpg"))
    with pytest.raises(InputError, match=r"none\.jpg: .*No such file"):
        photograph_set((64, 96), 8)


def test_without_matplotlib_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module, "distribution", missing)
    with pytest.raises(InputError, match=r"No package metadata"):
        photograph_set((64, 96), 8)


def test_a_shape_that_no_part_has_is_an_error() -> None:
    with pytest.raises(InputError, match="imgsz is 1 2300"):
        photograph_set((1, 2300), 8)
