"""Annotated videos are the source with boxes on it: times, aspect, colours, sound."""

import errno
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.error import FFmpegError
from inference.fakes import (
    MILLISECOND,
    found,
    moving_images,
    read_video,
    red_image,
    video_frame,
    without_packets,
    write_video,
)

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.inference.frame import Moment, Part, Selection
from tood_deploy.inference.sinks import Annotated
from tood_deploy.inference.video import VideoSource
from tood_deploy.inference.video_writer import ENCODERS, VideoEncoding, VideoWriter


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


@dataclass(frozen=True)
class Played:
    """What a player makes of a video file.

    Attributes:
        times: of its frames, in seconds, from 0 on.
        start_s, end_s: of the whole file.
        rate: average frames a second.
        aspect: of a pixel.
        size_wh: of a frame.
        color: range, primaries, transfer, matrix.
        luma: mean of the first frame's.
    """

    times: list[float]
    start_s: float
    end_s: float
    rate: float
    aspect: Fraction
    size_wh: tuple[int, int]
    color: tuple[int, int, int, int]
    luma: float


def play(path: Path) -> Played:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        context, first = stream.codec_context, frames[0]
        start_s = (container.start_time or 0) / av.time_base
        return Played(
            [frame.time - first.time for frame in frames],
            start_s,
            start_s + (container.duration or 0) / av.time_base,
            float(stream.average_rate or 0),
            context.sample_aspect_ratio or Fraction(1),
            (context.width, context.height),
            (first.color_range, first.color_primaries, first.color_trc, first.colorspace),
            float(np.frombuffer(bytes(first.planes[0]), np.uint8).mean()),
        )


def annotate(source: Path, out: Path, notes: list[str] | None = None, **options: Any) -> Played:
    """Write a video of the source's frames, without boxes, and play it."""
    lines: list[str] = [] if notes is None else notes
    with Annotated({(str(source), None): out}, note=lines.append, **options) as sink:
        for frame in VideoSource(str(source)):
            sink.write(frame, found())
    return play(out)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    "times",
    [[40 * i for i in range(10)], [0, 40, 90, 1000, 1010, 4000], [0, 5000, 10000, 15000], [0]],
)
def test_it_plays_as_the_source_does(tmp_path: Path, times: list[int], suffix: str) -> None:
    b_frames = 2 if len(times) == 10 else 0
    source = write_video(tmp_path / "a.mp4", moving_images(len(times)), times, b_frames=b_frames)
    played, expected = annotate(source, tmp_path / f"out{suffix}"), play(source)
    assert played.times == pytest.approx(expected.times, abs=0.001)
    assert played.start_s == 0
    assert played.end_s == pytest.approx(expected.end_s - expected.start_s, abs=0.001)
    assert played.rate == pytest.approx(expected.rate, rel=0.01)


def test_a_recording_that_starts_late_starts_at_0(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", moving_images(20))
    late = without_packets(whole, tmp_path / "late.ts", (), shift=36_000_000)
    assert play(late).start_s > 35_000
    played = annotate(late, tmp_path / "out.mp4")
    assert (played.start_s, played.end_s) == (0, pytest.approx(0.8, abs=0.001))


@pytest.mark.parametrize(("rotation", "aspect"), [(0, Fraction(2)), (90, Fraction(1, 2))])
def test_pixels_keep_their_shape(tmp_path: Path, rotation: int, aspect: Fraction) -> None:
    source = write_video(
        tmp_path / "a.mp4", moving_images(3), rotation=rotation, aspect=Fraction(2)
    )
    played = annotate(source, tmp_path / "out.mp4")
    assert played.aspect == aspect
    assert played.size_wh == ((48, 64) if rotation else (64, 48))


COLORS = [(1, 1, 1, 1), (2, 6, 6, 6), (1, 9, 16, 9), (2, 1, 1, 1)]


@pytest.mark.parametrize("color", COLORS)
def test_colours_are_marked_and_encoded_as_the_source_s(
    tmp_path: Path, color: tuple[int, int, int, int]
) -> None:
    source = write_video(tmp_path / "a.mp4", moving_images(3), color=color)
    played, expected = annotate(source, tmp_path / "out.mp4"), play(source)
    assert played.color == expected.color == color
    assert played.luma == pytest.approx(expected.luma, abs=1.5)


def with_sound(path: Path, codec: str, rate: int = 48_000) -> Path:
    """Write a second of a moving image, and of noise."""
    video = write_video(path.with_name("silent.mkv"), moving_images(25))
    with av.open(str(video)) as source, av.open(str(path), "w") as out:
        copied = out.add_stream_from_template(source.streams.video[0])
        sound = out.add_stream(codec, rate=rate)
        assert isinstance(sound, AudioStream)
        sound.layout = "mono"
        out.start_encoding()
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
        generator = np.random.default_rng(0)
        size = sound.codec_context.frame_size or 1024
        for start in range(0, rate, size):
            noise = generator.normal(0, 1000, (1, size)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return path


def sound_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [
        ("a.mp4", "aac", ".mp4"),
        ("a.mkv", "libopus", ".mp4"),
        ("a.mkv", "libmp3lame", ".mkv"),
        ("a.mov", "pcm_s16le", ".mov"),
        ("a.ts", "aac", ".mp4"),
    ],
)
def test_sound_is_copied(tmp_path: Path, name: str, codec: str, suffix: str) -> None:
    source, out, notes = with_sound(tmp_path / name, codec), tmp_path / f"out{suffix}", []
    played = annotate(source, out, notes)
    assert notes == []
    assert len(played.times) == 25
    copied, original = sound_packets(out), sound_packets(source)
    assert len(copied) == len(original)
    assert copied == original or name == "a.ts"  # whose packets have headers of their own


def test_sound_that_the_container_does_not_take_is_told(tmp_path: Path) -> None:
    source, notes = with_sound(tmp_path / "a.mkv", "pcm_u8"), []
    played = annotate(source, tmp_path / "out.mp4", notes)
    assert len(played.times) == 25
    assert "its sound cannot be kept in .mp4" in notes[0]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


def test_sound_ends_with_a_video_that_was_stopped(tmp_path: Path) -> None:
    source, out = with_sound(tmp_path / "a.mp4", "aac"), tmp_path / "out.mp4"
    choice = Selection(start=Moment(0.2), end=Moment(0.6))
    with Annotated({(str(source), None): out}) as sink:
        for frame in VideoSource(str(source), selection=choice):
            sink.write(frame, found())
    played = play(out)
    assert len(played.times) == 10
    assert played.end_s == pytest.approx(0.4, abs=0.05)
    assert 15 < len(sound_packets(out)) < 30


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
def test_codecs(tmp_path: Path, codec: str, capfd: pytest.CaptureFixture[str]) -> None:
    if ENCODERS[codec].name not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {ENCODERS[codec].name}")
    source = write_video(tmp_path / "a.mp4", moving_images(5, 96, 128))
    encoding = VideoEncoding(codec, crf=5)
    played = annotate(source, tmp_path / "out.mp4", encoding=encoding)
    assert (len(played.times), played.size_wh) == (5, (128, 96))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec.canonical_name == codec
    assert capfd.readouterr() == ("", "")


def test_av1_is_padded_to_what_its_encoder_takes(tmp_path: Path) -> None:
    if ENCODERS["av1"].name not in av.codecs_available:
        pytest.skip("this build of PyAV has no encoder for AV1")
    source = write_video(tmp_path / "a.mp4", moving_images(3, 16, 160))
    played = annotate(source, tmp_path / "out.mp4", encoding=VideoEncoding("av1"))
    assert (len(played.times), played.size_wh) == (3, (160, 64))


def test_a_smaller_crf_makes_a_larger_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3)).astype(np.uint8)
    source = write_video(tmp_path / "a.mp4", list(noise))
    sizes = []
    for crf in (0, 20, 40):
        annotate(source, tmp_path / f"{crf}.mp4", encoding=VideoEncoding(crf=crf))
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_encodings_that_do_not_exist() -> None:
    for codec, crf in (("h263", None), ("h264", 52), ("vp9", -1)):
        with pytest.raises(ToodError, match="expected"):
            VideoEncoding(codec, crf)


def test_videos_of_several_streams_at_once(tmp_path: Path) -> None:
    files: dict[Part, Path] = {(name, None): tmp_path / f"{name}.mp4" for name in ("a", "b")}
    with Annotated(files, live=True) as sink:
        for i in range(6):
            sink.write(video_frame(i // 2, 40 * (i // 2), name="ab"[i % 2]), found())
    assert [len(play(path).times) for path in files.values()] == [3, 3]


@pytest.mark.shared
def test_media_that_failed_elsewhere(shared: Path, tmp_path: Path) -> None:
    for name in ("sar.mp4", "dvr.ts", "audio.mp4", "mirrored.mp4", "lapse.mkv", "dropped.avi"):
        source, out = shared / "cases" / "media" / name, tmp_path / f"{name}.mp4"
        played, expected = annotate(source, out), play(source)
        assert played.times == pytest.approx(expected.times, abs=0.001), name
        assert (played.start_s, played.aspect) == (0, expected.aspect), name
        if name != "lapse.mkv":  # whose start ffmpeg does not find
            assert played.end_s == pytest.approx(expected.end_s - expected.start_s, abs=0.001)
    assert len(sound_packets(tmp_path / "audio.mp4.mp4")) == 45
