"""Cameras, streams, pipes and addresses."""

import io
import os
import socket
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import pytest
from inference.fakes import RedEngine, moving_images, write_image, write_video
from inference.servers import MULTIPART, camera, rtsp_server, serve

from tood_deploy import Detector
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference import live, video
from tood_deploy.inference.address import redacted, without_secrets
from tood_deploy.inference.frame import Moment, Selection
from tood_deploy.inference.live import LiveSource, Reconnection, StreamClock
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.source import open_source
from tood_deploy.inference.video import VideoSource

ALWAYS = Reconnection(wanted=True, timeout_s=5)


def test_a_number_is_a_camera(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    addresses = ["0", "/dev/video7", "rtsp://camera/1", "rtmp://a/b", "udp://127.0.0.1:1"]
    source = open_source(addresses)
    assert source.names == ("/dev/video0", *addresses[1:])
    assert source.kind == "live"


def test_a_camera_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InputError, match=r"/dev/video97: .*cannot be opened"):
        list(open_source("97"))


def test_a_live_source_stands_alone(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="expected it alone"):
        open_source(["rtsp://camera/1", image])


def test_the_latest_frame_wins_and_the_others_are_counted() -> None:
    with serve(MULTIPART, camera(60, 0.01)) as address:
        source, engine = open_source(address), RedEngine(0.05)
        assert isinstance(source, LiveSource)
        frames = [frame for frame, _ in detect_frames(Detector(engine, imgsz=(48, 64)), source)]
    indices = [frame.index for frame in frames]
    assert indices == sorted(set(indices))
    assert 4 < len(frames) < 30
    assert source.dropped == indices[-1] + 1 - len(frames) > 20


def test_frames_are_timed_by_their_arrival() -> None:
    """Also the first ones, some of which came before the format was known."""
    with serve(MULTIPART, camera(10, 0.05)) as address:
        frames = list(open_source(address))
    times = [frame.timestamp_s or 0.0 for frame in frames]
    assert times[0] == 0
    assert [later - earlier for earlier, later in pairwise(times)] == pytest.approx(
        [0.05] * (len(times) - 1), abs=0.04
    )


def test_a_stream_has_its_own_times_where_they_are_right() -> None:
    clock = StreamClock()
    arrived = [100.0, 100.3, 100.31, 100.32]
    own = [7.0, 7.1, 7.2, 7.3]
    assert [clock.seconds(*pair) for pair in zip(own, arrived, strict=True)] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )
    assert clock.seconds(900.0, 100.4) == pytest.approx(0.4)  # it jumped
    assert clock.seconds(900.1, 100.5) == pytest.approx(0.5)
    clock.restart()
    assert clock.seconds(0.0, 103.0) == pytest.approx(3.0)
    assert clock.seconds(None, 104.0) == pytest.approx(4.0)


def test_a_lost_connection_is_made_again() -> None:
    shown: list[str] = []
    with serve(MULTIPART, camera(8, 0.01)) as address:
        source = open_source(address, selection=Selection(max_frames=12), reconnection=ALWAYS)
        source.on_news = lambda: shown.extend(source.problems[-1:])
        frames = list(source)
    assert len(frames) == 12
    times = [frame.timestamp_s or 0.0 for frame in frames]
    assert times == sorted(times)
    assert "connecting again, for the 1st time" in shown[0]
    assert source.skipped == 0


def test_a_server_that_stays_away_is_given_up() -> None:
    source = None
    with serve(MULTIPART, camera(8, 0.01)) as address:
        reconnection = Reconnection(wanted=True, timeout_s=0.6)
        source = open_source(address, reconnection=reconnection)
        frames = iter(source)
        next(frames)
    assert len(list(frames)) < 10
    assert source.skipped == 1
    assert "none again within 0.6 seconds" in source.problems[-1]


def test_connections_that_are_made_again_by_themselves() -> None:
    usual = Reconnection()
    assert [usual.applies_to(name) for name in ("rtsp://a", "https://a", "udp://a", "/dev/video0")]
    assert not any(usual.applies_to(name) for name in ("udp://a", "rtmp://a", "/dev/video0"))
    with pytest.raises(ToodError, match="--reconnect-timeout is 0"):
        Reconnection(timeout_s=0)


def test_a_frozen_server_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "TIMEOUT_S", 0.5)
    ended = threading.Event()

    def freeze(client: BinaryIO) -> None:
        camera(6, 0.01)(client)
        ended.wait(5)

    real = live.open_container
    monkeypatch.setattr(live, "open_container", lambda name, options: real(name, 0.5, options))
    with serve(MULTIPART, freeze) as address:
        source = open_source(address)
        assert len(list(source)) > 0
        ended.set()
    assert "nothing came for" in source.problems[0]


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    with serve(MULTIPART, lambda _: ended.wait(5)) as address:
        with pytest.raises(InputError, match="no answer within"):
            video.open_container(address, timeout_s=0.4)
        ended.set()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"
        with pytest.raises(InputError, match="no answer within"):
            video.open_container(address, timeout_s=0.4)


@pytest.mark.slow
def test_a_camera_by_rtsp() -> None:
    """A real server, that asks for a password, is killed, comes again, and is killed for good."""
    with rtsp_server() as (address, start):
        for wrong in (address.replace("s3cret", "0th3r"), address.replace("/live", "/none")):
            with pytest.raises(InputError, match=r"not one frame came .*40[14]") as error:
                list(open_source(wrong))
            assert "0th3r" not in str(error.value)
        source = open_source(address, reconnection=Reconnection(timeout_s=20))
        seconds: list[float] = []
        for frame in source:
            assert frame.image_bgr.shape == (120, 160, 3)
            seconds.append(frame.timestamp_s or 0.0)
            if len(seconds) == 3:
                start()
            if len(seconds) == 6:
                source.close()
        again = open_source(address, reconnection=Reconnection(timeout_s=1.5))
        for _ in again:
            start(again=False)
    assert seconds == sorted(seconds)
    assert "connecting again, for the 1st time" in source.problems[0]
    assert "none again within 1.5 seconds" in again.problems[-1]
    assert not any(
        "s3cret" in text for text in (*source.problems, *again.problems, source.names[0])
    )


def test_passwords_are_never_shown() -> None:
    address = "rtsp://joe:s3cret@127.0.0.1:9/x?channel=1&token=abc"
    shown = "rtsp://joe:***@127.0.0.1:9/x?channel=1&token=***"
    assert redacted(address) == shown
    assert redacted("a:b@c.mp4") == "a:b@c.mp4"
    assert without_secrets(f"{address} failed: s3cret", address) == f"{shown} failed: ***"
    source = open_source(address)
    assert source.names == (shown,)
    with pytest.raises(InputError) as raised:
        list(source)
    with pytest.raises(InputError) as of_http:
        open_source(address.replace("rtsp", "http"))
    for text in (str(raised.value), str(of_http.value)):
        assert "s3cret" not in text
        assert "abc" not in text
        assert "joe" in text


def test_several_streams_at_once() -> None:
    with serve(MULTIPART, camera(12, 0.02)) as one, serve(MULTIPART, camera(12, 0.02)) as other:
        source = open_source([one, other])
        frames = list(source)
    assert {frame.name for frame in frames} == {one, other}
    assert len(source.problems) == 2
    assert len(frames) + source.dropped == sum(
        1 + max(frame.index for frame in frames if frame.name == name) for name in (one, other)
    )


def test_one_of_several_streams_that_is_not_there() -> None:
    with serve(MULTIPART, camera(12, 0.01)) as address:
        source = LiveSource([address, "rtsp://127.0.0.1:9/none"])
        assert len(list(source)) > 0
    assert source.skipped == 2
    assert any("rtsp://127.0.0.1:9/none: not one frame came" in line for line in source.problems)


def test_every_other_frame_of_a_stream() -> None:
    with serve(MULTIPART, camera(20, 0.01)) as address:
        source = open_source(address, selection=Selection(stride=2, max_frames=4))
        frames = list(source)
    assert len(frames) == 4
    assert all(frame.index % 2 == 0 for frame in frames)
    with pytest.raises(InputError, match="no beginning"):
        LiveSource("rtsp://a/b", selection=Selection(start=Moment(1)))


def test_udp(tmp_path: Path) -> None:
    recorded = write_video(tmp_path / "a.ts", moving_images(60))
    address = "udp://127.0.0.1:28471"

    def send() -> None:
        with av.open(str(recorded)) as source, av.open(address, "w", format="mpegts") as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
                    time.sleep(0.01)

    sender = threading.Thread(target=send)
    source = open_source(address, selection=Selection(max_frames=5))
    threading.Timer(0.2, sender.start).start()
    times = [frame.timestamp_s for frame in source]
    source.close()
    sender.join()
    assert len(times) == 5
    assert times == sorted(times, key=lambda time: time or 0.0)


def test_a_file_address(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a b.mp4", moving_images(3))
    source = open_source(path.as_uri())
    assert (source.names, len(list(source))) == ((str(path),), 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mkv", moving_images(30)).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    source = open_source(pipe)
    assert (len(list(source)), source.skipped) == (30, 0)
    writer.join()


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", moving_images(30))
    with path.open(encoding="latin-1") as file:
        monkeypatch.setattr(sys, "stdin", file)
        source = open_source("-")
        assert (source.names, len(list(source)), source.skipped) == (("-",), 30, 0)


def test_a_lost_connection_is_told() -> None:
    with serve(MULTIPART, camera(12, 0.005)) as address:
        source = open_source(address)
        assert len(list(source)) > 0
    assert source.skipped == 1
    assert source.problems[0].startswith(f"{address}: the connection ended after ")


def test_closing_ends_a_stream_that_does_not() -> None:
    sent: list[int] = []
    with serve(MULTIPART, camera(2000, 0.005, sent)) as address:
        source = open_source(address)
        stream = detect_frames(Detector(RedEngine(), imgsz=(48, 64)), source)
        for _ in range(3):
            next(stream)
        stream.close()
    assert len(sent) < 2000
    assert source.problems == []


def test_batches_of_a_live_source() -> None:
    with serve(MULTIPART, camera(20, 0.005)) as address:
        engine = RedEngine()
        frames = list(
            detect_frames(Detector(engine, imgsz=(48, 64)), open_source(address), batch=3)
        )
    assert max(engine.batches) == 3
    assert sum(engine.batches) == len(frames)


def test_a_recording_over_http_is_read_in_full(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", moving_images(30), movflags="faststart").read_bytes()
    with serve("video/mp4", lambda client: client.write(data)) as address:
        source = open_source(address)
        frames = list(source)
    assert isinstance(source, VideoSource)
    assert [frame.timestamp_s for frame in frames] == pytest.approx([0.04 * i for i in range(30)])


def test_an_address_without_video_is_an_error() -> None:
    text = b"hello\n" * 1000
    with (
        serve("text/plain", lambda client: client.write(text)) as address,
        pytest.raises(InputError, match="cannot be opened as a video"),
    ):
        open_source(address)
    with pytest.raises(InputError, match="Connection refused"):
        open_source(address)


def test_a_live_stream_without_a_container_length(tmp_path: Path) -> None:
    """MPEG transport stream, as cameras send it.

    The end of the data is the end of the connection.
    """
    data = write_video(tmp_path / "a.ts", moving_images(30)).read_bytes()

    def answer(client: BinaryIO) -> None:
        for chunk in iter(io.BytesIO(data * 3).read, b""):
            client.write(chunk)

    with serve("video/mp2t", answer) as address:
        source = open_source(address)
        assert len(list(source)) >= 1


@pytest.mark.parametrize("suffix", [".ts", ".avi", ".mkv"])
def test_a_file_over_http_is_read_in_full(tmp_path: Path, suffix: str) -> None:
    """What has a length is a file, whether or not its header says how long it plays."""
    data = write_video(tmp_path / f"a{suffix}", moving_images(40)).read_bytes()
    with serve("video/any", lambda client: client.write(data), length=len(data)) as address:
        source = open_source(address)
        assert isinstance(source, VideoSource)
        assert (len(list(source)), source.skipped) == (40, 0)
