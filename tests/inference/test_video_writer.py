"""Annotated videos are the source with boxes on it: times, aspect, colours, sound."""

import errno
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.error import FFmpegError
from inference.fakes import MILLISECOND, read_video, red_image

from tood_deploy.errors import OutputError
from tood_deploy.inference.video_writer import VideoWriter


@pytest.mark.parametrize("size", [(47, 63), (1, 1), (16, 300), (48, 64)])
def test_odd_sizes_are_padded(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "v.mp4"
    with VideoWriter(path, (size[1], size[0]), MILLISECOND) as writer:
        for i in range(3):
            writer.write(np.full((*size, 3), 90, np.uint8), 40 * i)
    image = read_video(path)[0][1]
    assert image.shape[:2] == tuple(max(16, side + side % 2) for side in size)
    np.testing.assert_allclose(image, 90, atol=6)


def test_a_frame_of_another_size_is_scaled(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", (64, 48), MILLISECOND) as writer:
        writer.write(red_image(48, 64), 0)
        writer.write(red_image(96, 128), 40)
    assert [image.shape for _, image in read_video(tmp_path / "v.mp4")] == [(48, 64, 3)] * 2


def test_rows_that_do_not_lie_together(tmp_path: Path) -> None:
    wide = np.hstack([red_image(), red_image()])
    for name, images in (
        ("view", [wide[:, :64], wide[::-1, :64]]),
        ("copy", [red_image(), red_image()[::-1].copy()]),
    ):
        with VideoWriter(tmp_path / f"{name}.mp4", (64, 48), MILLISECOND) as writer:
            for i, image in enumerate(images):
                writer.write(image, 40 * i)
    for (_, one), (_, other) in zip(
        read_video(tmp_path / "view.mp4"), read_video(tmp_path / "copy.mp4"), strict=True
    ):
        assert (one == other).all()


def test_times_that_do_not_grow_are_moved(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", (64, 48), MILLISECOND) as writer:
        for pts in (0, 40, 40, 30, 80):
            writer.write(red_image(), pts)
    assert [time for time, _ in read_video(tmp_path / "v.mp4")] == pytest.approx(
        [0, 0.04, 0.041, 0.042, 0.08]
    )


def test_colours_survive_writing(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", (64, 48), MILLISECOND) as writer:
        writer.write(red_image(), 0)
    image = read_video(tmp_path / "v.mp4")[0][1]
    np.testing.assert_allclose(image[16, 16], (0, 0, 250), atol=12)


def test_frames_too_large_for_h264(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be encoded as H\.264"):
        VideoWriter(tmp_path / "v.mp4", (40000, 16), MILLISECOND)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A container that cannot take any more packets."""

    def __init__(self, container: Any) -> None:
        self.container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def mux(self, _: object) -> None:
        raise FFmpegError(errno.ENOSPC, "No space left on device")


def write_frames(path: Path, count: int) -> None:
    with VideoWriter(path, (64, 48), MILLISECOND) as writer:
        for i in range(count):
            writer.write(red_image(), i)


@pytest.mark.parametrize("frames", [1, 100])  # noticed when completing the file, or while writing
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    real = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: FullDisk(real(*args, **options)))
    with pytest.raises(OutputError, match="No space left on device"):
        write_frames(tmp_path / "v.mp4", frames)
    assert list(tmp_path.iterdir()) == []
