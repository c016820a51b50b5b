"""Videos are read whole and in time."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error as av_error
import numpy as np
import pytest
from inference.fakes import moving_images, without_packets, write_video

from tood_deploy.errors import InputError, ToodError, shortage_of
from tood_deploy.inference.frame import Moment, Selection
from tood_deploy.inference.video import VideoSource, raise_decoder_shortage

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


ONE = 1 << 16
ORIENTATIONS = {  # a, b, c, d of the matrix; what ffmpeg's own player does with it
    (1, 0, 0, 1): lambda image: image,
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, -1, 1, 0): lambda image: np.rot90(image, 1),
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: image[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("turn", ORIENTATIONS)
def test_all_eight_orientations(
    tmp_path: Path, turn: tuple[int, int, int, int], suffix: str
) -> None:
    a, b, c, d = (ONE * value for value in turn)
    image = moving_images(1)[0]
    matrix = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    path = write_video(tmp_path / f"a{suffix}", [image] * 2, matrix=matrix)
    frame = next(iter(VideoSource(str(path))))
    expected = ORIENTATIONS[turn](image)
    np.testing.assert_allclose(frame.image_bgr.astype(int), expected.astype(int), atol=60)


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
    again = VideoSource(str(cut))  # FFmpeg says of it what it said last
    assert len(list(again)) + again.skipped == 40


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


def read_losses(path: Path) -> tuple[int, int, list[str]]:
    """Return how many frames came, how many are said to be lost, and the notes."""
    source = VideoSource(str(path))
    return len(list(source)), source.skipped, source.notes


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".flv", ".ts", ".mov"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_intact_videos_have_no_losses(tmp_path: Path, suffix: str, b_frames: int) -> None:
    path = write_video(tmp_path / f"a{suffix}", moving_images(30), b_frames=b_frames)
    assert read_losses(path) == (30, 0, [])
    times = [frame.timestamp_s or 0.0 for frame in VideoSource(str(path))]
    assert [time - times[0] for time in times] == pytest.approx([0.04 * i for i in range(30)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".flv"])
def test_a_frame_in_five_seconds_is_no_loss(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", moving_images(4), [0, 5000, 10000, 15000])
    assert read_losses(path) == (4, 0, [])


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_a_late_start_is_no_loss(tmp_path: Path, suffix: str) -> None:
    whole = write_video(tmp_path / "a.mkv", moving_images(30))
    late = without_packets(whole, tmp_path / f"late{suffix}", (), shift=36_000_000)
    assert read_losses(late) == (30, 0, [])


def test_a_chunk_without_a_frame_is_no_loss(tmp_path: Path) -> None:
    """AVI has them where a frame is shown for longer."""
    path = write_video(tmp_path / "a.avi", moving_images(8), [0, 40, 80, 400, 440, 480, 520, 560])
    assert read_losses(path) == (8, 0, [])
    times = [frame.timestamp_s for frame in VideoSource(str(path))]
    assert times[3] == pytest.approx(0.4)


@pytest.mark.parametrize("replaced", [0, 16], ids=["repeated", "in place of the next"])
def test_a_frame_that_an_index_names_twice_hides_another(tmp_path: Path, replaced: int) -> None:
    path = write_dense(tmp_path / "a.avi")
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"idx1") + 8 + 16 * 20
    data[entry + 16 : entry + 16 + replaced] = data[entry : entry + 16]
    path.write_bytes(data)
    assert read_losses(path) == (59, 1, [])


def test_a_pause_is_noted_and_no_loss(tmp_path: Path) -> None:
    times = [40 * i for i in range(20)] + [3000 + 40 * i for i in range(20)]
    frames, lost, notes = read_losses(write_video(tmp_path / "a.mp4", moving_images(40), times))
    assert (frames, lost) == (40, 0)
    assert "a gap of 55 frames after 0.76 s" in notes[0]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv"])
def test_lost_packets_that_others_refer_to(tmp_path: Path, suffix: str) -> None:
    whole = write_video(tmp_path / f"a{suffix}", moving_images(40))
    part = without_packets(whole, tmp_path / f"part{suffix}", range(13, 17))
    assert read_losses(part) == (36, 4, [])


def write_dense(path: Path, movflags: str = "") -> Path:
    """Write 60 frames; as recorders write AVI, with a chunk for each and no others."""
    if path.suffix == ".avi":
        times, rate = range(60), Fraction(1, 25)
        return write_video(path, moving_images(60), times, time_base=rate)
    if movflags:
        return write_video(path, moving_images(60), movflags=movflags)
    return write_video(path, moving_images(60))


@pytest.mark.parametrize("suffix", [".mkv", ".flv", ".ts", ".avi"])
def test_zeros_in_the_middle_are_counted_in_frames(tmp_path: Path, suffix: str) -> None:
    path = write_dense(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(1000) + data[middle + 1000 :])
    frames, lost, _ = read_losses(path)
    assert frames < 60
    assert frames + lost == pytest.approx(60, abs=1)


@pytest.mark.parametrize("suffix", [".mkv", ".flv", ".avi", ".mp4"])
def test_cut_files_are_counted_in_frames(tmp_path: Path, suffix: str) -> None:
    path = write_dense(tmp_path / f"a{suffix}", "faststart" if suffix == ".mp4" else "")
    data = path.read_bytes()
    start = data.index(b"movi") if suffix == ".avi" else 0
    path.write_bytes(data[: start + (len(data) - start) * 6 // 10])
    frames, lost, _ = read_losses(path)
    assert 10 < frames < 50
    assert frames + lost == pytest.approx(60, abs=1)


def test_a_recording_that_begins_between_two_key_frames(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.ts", moving_images(40))
    frames, lost, _ = read_losses(without_packets(whole, tmp_path / "part.ts", range(4)))
    assert frames + lost == 36
    assert lost == 6


def test_a_decoder_without_memory_or_threads_is_no_damage() -> None:
    for error in (av_error.MemoryError(12, "no memory"), av_error.BlockingIOError(11, "threads")):
        with pytest.raises((MemoryError, OSError)) as caught:
            raise_decoder_shortage(error)
        assert shortage_of(caught.value)
    raise_decoder_shortage(av_error.InvalidDataError(1094995529, "damaged"))


def test_one_frame(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv", ".avi"):
        assert read_losses(write_video(tmp_path / f"a{suffix}", moving_images(1))) == (1, 0, [])


@pytest.mark.shared
def test_media_that_failed_elsewhere(shared: Path) -> None:
    media, faults = shared / "cases" / "media", shared / "cases" / "faults"
    frames = {"dropped.avi": 10, "seg0.mkv": 4, "seg1.mkv": 4, "lapse.mkv": 4, "dvr.ts": 10}
    for name, count in frames.items():
        assert read_losses(media / name) == (count, 0, []), name
    parts = {"long.mkv": (300, 0), "cut-half.mkv": (145, 155), "removed-middle.mkv": (210, 90)}
    parts |= {"zeroed-middle.mkv": (210, 90), "mkv-52-10-of-24-frames-silent.mkv": (10, 14)}
    for name, expected in parts.items():
        assert read_losses(faults / name)[:2] == expected, name


def selected(path: Path, **options: Any) -> list[int]:
    return [frame.index for frame in VideoSource(str(path), selection=Selection(**options))]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_chosen_frames_are_those_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", moving_images(60), b_frames=2)
    whole = list(VideoSource(str(path)))
    second = Moment(1.0)
    choices = {
        range(0, 60, 7): {"stride": 7},
        range(25, 60): {"start": second},
        range(25, 35, 3): {"start": second, "end": Moment(1.4), "stride": 3},
        range(33, 38): {"start": Moment(33, is_frame=True), "max_frames": 5},
        range(12): {"end": Moment(12, is_frame=True)},
    }
    for expected, options in choices.items():
        source = VideoSource(str(path), selection=Selection(**options))
        frames = list(source)
        assert [frame.index for frame in frames] == list(expected), options
        assert source.skipped == 0
        for frame in frames:
            assert frame.pts == whole[frame.index].pts
            np.testing.assert_array_equal(frame.image_bgr, whole[frame.index].image_bgr)


def test_seconds_count_from_the_start_of_the_recording(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", moving_images(30))
    late = without_packets(whole, tmp_path / "late.mkv", (), shift=36_000_000)
    assert selected(late, start=Moment(1.0)) == list(range(25, 30))


def test_no_frame_is_chosen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_images(30))
    with pytest.raises(InputError, match=r"none of its .* frames is chosen"):
        selected(path, start=Moment(9.0))


@pytest.mark.parametrize(
    "options",
    [{"stride": 0}, {"max_frames": 0}, {"start": Moment(-1)}, {"end": Moment(float("nan"))}],
)
def test_what_cannot_be_chosen(options: dict[str, Any]) -> None:
    with pytest.raises(ToodError, match="expected"):
        Selection(**options)


def test_moments() -> None:
    assert Moment.parse("12.5", "--start") == Moment(12.5)
    assert Moment.parse("300f", "--start") == Moment(300, is_frame=True)
    for text in ("soon", "1.5f", ""):
        with pytest.raises(ToodError, match=f"--end is {text}"):
            Moment.parse(text, "--end")
