"""Videos are read whole and in time."""

from pathlib import Path

import av
import numpy as np
import pytest
from inference.fakes import moving_images, write_video

from tood_deploy.errors import InputError
from tood_deploy.inference.video import VideoSource

VARIABLE_TIMES = [500, 510, 600, 603, 900, 1000, 1500, 1501]


def reds_left(image: np.ndarray) -> int:
    return int(np.nonzero((image[..., 2] > 150) & (image[..., 1] < 100))[1].min())


def test_every_frame_with_its_own_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_images(8), VARIABLE_TIMES)
    source = VideoSource(str(path))
    frames = list(source)
    assert [frame.timestamp_s for frame in frames] == pytest.approx(
        [time / 1000 for time in VARIABLE_TIMES]
    )
    assert [frame.index for frame in frames] == list(range(8))
    assert [reds_left(frame.image_bgr) for frame in frames] == pytest.approx(
        [2 * i for i in range(8)], abs=1
    )
    assert (source.kind, source.length, source.skipped, source.problems) == ("video", 8, 0, [])


def test_colours_survive(tmp_path: Path) -> None:
    frame = next(iter(VideoSource(str(write_video(tmp_path / "a.mp4", moving_images(2))))))
    np.testing.assert_allclose(frame.image_bgr[16, 8], (0, 0, 250), atol=20)
    np.testing.assert_allclose(frame.image_bgr[40, 50], (60, 60, 60), atol=6)


@pytest.mark.parametrize("size", [(48, 64), (34, 66), (272, 480)])
def test_pixels_are_those_of_the_default_conversion(tmp_path: Path, size: tuple[int, int]) -> None:
    noise = [
        np.random.default_rng(i).integers(0, 255, (*size, 3)).astype(np.uint8) for i in range(3)
    ]
    path = write_video(tmp_path / "a.mp4", noise)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    for frame, image in zip(VideoSource(str(path)), expected, strict=True):
        assert (frame.image_bgr == image).all()


@pytest.mark.parametrize(("rotation", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_rotation_is_honoured(tmp_path: Path, rotation: int, turns: int) -> None:
    images = moving_images(2)
    frame = next(iter(VideoSource(str(write_video(tmp_path / "a.mp4", images, rotation=rotation)))))
    np.testing.assert_allclose(
        frame.image_bgr.astype(int), np.rot90(images[0], turns).astype(int), atol=60
    )
    assert frame.image_bgr.flags.c_contiguous


def test_a_phone_held_upright_is_turned_clockwise(tmp_path: Path) -> None:
    """Phones write the matrix [0 1; -1 0], a quarter turn clockwise.

    Checked on the file's bytes, not by PyAV's own convention.
    """
    path = write_video(tmp_path / "a.mp4", moving_images(2), rotation=-90)
    data = path.read_bytes()
    matrix = data[data.index(b"tkhd") + 44 :][:20]
    assert [
        int.from_bytes(matrix[i : i + 4], "big", signed=True) >> 16 for i in (0, 4, 12, 16)
    ] == [0, 1, -1, 0]
    frame = next(iter(VideoSource(str(path))))
    assert frame.image_bgr.shape == (64, 48, 3)
    assert reds_left(frame.image_bgr) > 20  # the square at the top left is now at the top right


def test_a_cut_file_keeps_what_was_decoded(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", moving_images(40), movflags="faststart")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    source = VideoSource(str(cut))
    frames = list(source)
    assert 5 < len(frames) < 40
    assert [frame.timestamp_s for frame in frames] == pytest.approx(
        [0.04 * i for i in range(len(frames))]
    )
    assert source.skipped == pytest.approx(40 - len(frames), abs=1)
    assert any(
        "of 40 frames" in problem and f"{len(frames)} frames, is kept" in problem
        for problem in source.problems
    )


def test_a_cut_matroska_file_tells_the_missing_seconds(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", moving_images(40))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    source = VideoSource(str(cut))
    assert 5 < len(list(source)) < 40
    assert source.skipped >= 1
    assert "of 1.6 seconds" in source.problems[0]


def test_broken_frames_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_images(40))
    with av.open(str(path)) as container:
        packets = [
            (packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size
        ]
    data = bytearray(path.read_bytes())
    for start, size in packets[15:18]:  # keeps each packet's length field
        data[start + 4 : start + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    source = VideoSource(str(path))
    frames = list(source)
    assert 30 <= len(frames) < 40
    assert source.skipped >= 3
    assert "broken frames were skipped" in source.problems[0]
    assert frames[-1].timestamp_s == pytest.approx(39 * 0.04)


def test_a_file_whose_index_is_cut_off_is_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", moving_images(20))  # the index is at the end
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be opened as a video"):
        VideoSource(str(cut))


@pytest.mark.parametrize("data", [b"", b"plain text, no video\n" * 100])
def test_what_is_no_video_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be opened as a video"):
        VideoSource(str(path))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match="holds no video"):
        VideoSource(str(path))


def test_a_video_without_frames_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_images(4), movflags="faststart")
    path.write_bytes(path.read_bytes().split(b"mdat")[0] + b"mdat")
    with pytest.raises(InputError, match="not one frame can be decoded"):
        list(VideoSource(str(path)))


def test_frames_too_large_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_images(2))
    with pytest.raises(InputError, match=r"3,072 pixels, more than 3,000; .*--max-pixels"):
        VideoSource(str(path), max_pixels=3000)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"), [("car-parking-6s", 75), ("person-bicycle-car", 43), ("mmdet-demo", 67)]
)
def test_real_clips_are_read_in_full(shared: Path, name: str, count: int) -> None:
    path = shared / "data" / "clips" / f"{name}.mp4"
    source = VideoSource(str(path))
    times = [frame.timestamp_s for frame in source]
    with av.open(str(path)) as container:
        assert times == [frame.time for frame in container.decode(video=0)]
    assert (len(times), source.skipped) == (count, 0)
