"""Cameras and streams: the latest frame of each, whenever one is wanted.

Comes in: addresses. A connection that is lost is made again, if that is asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from av.container import InputContainer
from av.error import ExitError, FFmpegError
from av.format import Flags
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.address import RECONNECTING, redacted, scheme_of, without_secrets
from tood_deploy.inference.frame import ALL_FRAMES, Frame, Selection, Source
from tood_deploy.inference.video import TIMEOUT_S, find_video_stream, open_container, upright_bgr

MICROSECOND = Fraction(1, 1_000_000)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # between attempts to connect again
MAX_CLOCK_ERROR_S = 5.0  # of a stream's own times against those at which its frames come
MAX_BUFFERED, BUFFERED_WAIT_S = 3, 0.002
# FFmpeg's default looks at seconds of a stream before it gives the first frame.
LIVE_OPTIONS = {"fpsprobesize": "0", "analyzeduration": "500000"}
SCHEME_OPTIONS = {
    "rtsp": {"rtsp_transport": "tcp"},
    "rtsps": {"rtsp_transport": "tcp"},
    "udp": {"overrun_nonfatal": "1"},
}


@dataclass(frozen=True)
class Reconnection:
    """Whether and for how long a lost connection is made again.

    Attributes:
        wanted: None: for rtsp and http alone.
        timeout_s: without a frame, after which it is given up.
    """

    wanted: bool | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise ToodError(
                f"--reconnect-timeout is {self.timeout_s}; expected a positive number of seconds"
            )

    def applies_to(self, address: str) -> bool:
        """Tell whether the connection to an address is made again."""
        return scheme_of(address) in RECONNECTING if self.wanted is None else self.wanted


NO_RECONNECTION = Reconnection(wanted=False)


@dataclass(frozen=True)
class _Arrived:
    """A frame that came.

    Attributes:
        frame: decoded.
        index: its number in the stream.
        seconds: its time, from the first.
        arrived_s: when its data came, in seconds of `time.perf_counter`.
    """

    frame: VideoFrame
    index: int
    seconds: float
    arrived_s: float


class StreamClock:
    """Times of frames from the first on: the stream's own where it has some, else of arrival."""

    def __init__(self) -> None:
        self._first_arrived_s: float | None = None
        self._shift_s: float | None = None
        self._last_s = 0.0

    def restart(self) -> None:
        """Take the stream's times as new ones: after a new connection."""
        self._shift_s = None

    def seconds(self, stream_s: float | None, arrived_s: float) -> float:
        """Return the time of a frame, from the first; never less than that of the one before.

        Args:
            stream_s: its time by the stream; None where the stream has no times.
            arrived_s: when it came.
        """
        if self._first_arrived_s is None:
            self._first_arrived_s = arrived_s
        elapsed_s = arrived_s - self._first_arrived_s
        seconds = elapsed_s
        if stream_s is not None:
            if (
                self._shift_s is None
                or abs(stream_s + self._shift_s - elapsed_s) > MAX_CLOCK_ERROR_S
            ):
                self._shift_s = elapsed_s - stream_s
            seconds = stream_s + self._shift_s
        self._last_s = max(self._last_s, seconds)
        return self._last_s


class Camera:
    """One camera or stream, read in a thread of its own.

    Attributes:
        name: its address without secrets.
        latest: the last frame that came and was not taken.
        dropped: frames that came and were not taken.
        frames: that came.
        broken: that could not be decoded.
        given: frames that were taken.
        ended: whether no more will come.
        end: why; "" where nobody wants more.
    """

    def __init__(
        self,
        address: str,
        max_pixels: int,
        stride: int,
        reconnection: Reconnection,
        changed: threading.Condition,
        tell: Callable[[str], None],
    ) -> None:
        """Connect to nothing yet.

        Args:
            address: of the stream, or a device file.
            max_pixels: refuse larger frames.
            stride: take every so many-th frame.
            reconnection: what to do when the connection is lost.
            changed: is notified of every frame and of the end.
            tell: takes lines on lost and new connections.
        """
        self.address, self.name = address, redacted(address)
        self.max_pixels, self.stride, self.reconnection = max_pixels, stride, reconnection
        self.latest: _Arrived | None = None
        self.dropped = self.frames = self.broken = self.given = 0
        self.ended, self.end = False, ""
        self._changed, self._tell, self._clock = changed, tell, StreamClock()
        self._closing = threading.Event()

    def start(self) -> None:
        """Connect, and read until the end or `close`."""
        threading.Thread(target=self._read, name="live", daemon=True).start()

    def close(self) -> None:
        """Make the thread end, as soon as what it waits for has come."""
        self._closing.set()

    def _read(self) -> None:
        reason = "closed"
        try:
            reason = self._read_connections()
        except Exception as error:  # a thread's own error is seen by nobody
            reason = f"{type(error).__name__}: {error}"
        finally:
            with self._changed:
                self.ended, self.end = True, reason
                self._changed.notify_all()

    def _read_connections(self) -> str:
        """Read one connection after another; return why there is none any more."""
        reconnects, last_frame_s, pause_s = 0, time.monotonic(), FIRST_PAUSE_S
        while True:
            frames_before = self.frames
            reason = self._read_connection()
            if self._closing.is_set():
                return "closed"
            if not self.frames or not self.reconnection.applies_to(self.address):
                return reason
            if self.frames > frames_before:
                last_frame_s, pause_s = time.monotonic(), FIRST_PAUSE_S
                reconnects += 1
                self._tell(
                    f"{self.name}: the connection was lost after {self.frames} frames ({reason}); "
                    f"connecting again, for the {_ordinal(reconnects)} time"
                )
            left_s = last_frame_s + self.reconnection.timeout_s - time.monotonic()
            if left_s <= 0:
                return f"{reason}; none again within {self.reconnection.timeout_s:g} seconds"
            self._closing.wait(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _read_connection(self) -> str:
        """Connect and read to the end of the connection; return why it ended."""
        scheme = scheme_of(self.address)
        is_device = not scheme
        options = {} if is_device else LIVE_OPTIONS | SCHEME_OPTIONS.get(scheme, {})
        try:
            container = open_container(self.address, options=options)
        except InputError as error:
            return str(error).removeprefix(f"{self.name}: ").partition(";")[0]
        with container:
            try:
                stream = find_video_stream(container, self.name, self.max_pixels)
            except InputError as error:
                return str(error).removeprefix(f"{self.name}: ")
            # Threads over frames would hold some of them back.
            stream.codec_context.thread_type = "SLICE"
            self._clock.restart()
            return self._read_frames(container, stream)

    def _read_frames(self, container: InputContainer, stream: VideoStream) -> str:
        """Take the frames of a connection; return why it ended."""
        has_times = not container.format.flags & Flags.no_timestamps.value
        held = None  # the last frame that was read to find out the format: it came earlier
        buffered, asked_s = 0 if has_times else MAX_BUFFERED, time.perf_counter()
        try:
            for packet in container.demux(stream):
                arrived_s = time.perf_counter()
                at_once = packet.size > 0 and arrived_s - asked_s < BUFFERED_WAIT_S
                buffered = buffered - 1 if at_once and buffered else 0
                for frame in self._decode(stream, packet):
                    if buffered:
                        held = frame
                        self.frames += 1
                        self.dropped += 1
                    else:
                        held = None
                        self._take(frame, frame.time if has_times else None, arrived_s)
                if self._closing.is_set():
                    return "closed"
                asked_s = time.perf_counter()
        except ExitError:
            return f"nothing came for {TIMEOUT_S:.0f} seconds"
        except FFmpegError as error:
            return without_secrets(str(error.strerror or error), self.address)
        finally:
            if held is not None:  # nothing came later
                self.frames -= 1
                self.dropped -= 1
                self._take(held, None, time.perf_counter())
        return "no more data"

    def _decode(self, stream: VideoStream, packet: Packet) -> list[VideoFrame]:
        try:
            return stream.codec_context.decode(packet) if packet.size else []
        except FFmpegError:
            self.broken += 1
            return []

    def _take(self, frame: VideoFrame, stream_s: float | None, arrived_s: float) -> None:
        """Make a frame the latest one."""
        if frame.is_corrupt:
            self.broken += 1
            return
        index, self.frames = self.frames, self.frames + 1
        seconds = self._clock.seconds(stream_s, arrived_s)
        if index % self.stride:
            return
        with self._changed:
            self.dropped += self.latest is not None
            self.latest = _Arrived(frame, index, seconds, arrived_s)
            self._changed.notify_all()


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number}{ending or 'th'}"


class LiveSource(Source):
    """Cameras and streams, one or several. Connects when the first frame is asked for.

    The age of a result is that of its frame.
    """

    kind = "live"

    def __init__(
        self,
        addresses: str | Sequence[str],
        max_pixels: int = MAX_PIXELS,
        selection: Selection = ALL_FRAMES,
        reconnection: Reconnection = NO_RECONNECTION,
    ) -> None:
        """Take what to read; nothing is opened yet.

        Args:
            addresses: device files such as /dev/video0, or addresses of streams.
            max_pixels: refuse larger frames.
            selection: which frames to give.
            reconnection: what to do when a connection is lost.

        Raises:
            InputError: a start or end in something that has none.
        """
        listed = [addresses] if isinstance(addresses, str) else list(dict.fromkeys(addresses))
        self._changed = threading.Condition()
        self._cameras = [
            Camera(address, max_pixels, selection.stride, reconnection, self._changed, self._warn)
            for address in listed
        ]
        super().__init__(tuple(camera.name for camera in self._cameras), selection.max_frames)
        if selection.start is not None or selection.end is not None:
            raise InputError(
                f"{self.names[0]}: a camera or stream has no beginning that times could be counted "
                "from; leave --start and --end out"
            )
        self.max_frames = selection.max_frames
        self._closing = False
        self._open = list(self._cameras)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the latest frame whenever asked, until all connections end or `close`.

        Raises:
            InputError: no connection gave a frame.
        """
        for camera in self._cameras:
            camera.start()
        failures: list[InputError] = []
        while (taken := self._wait(failures)) is not None:
            camera, arrived = taken
            pts = round(arrived.seconds / MICROSECOND)
            yield Frame(
                *(upright_bgr(arrived.frame), camera.name, arrived.index, pts, MICROSECOND),
                decoded_s=arrived.arrived_s,
            )
        if self._closing:
            return
        if len(failures) == len(self._cameras):
            raise failures[0]
        for failure in failures:
            self.skip(str(failure))

    def close(self) -> None:
        """End the streams: the reading threads close the connections."""
        with self._changed:
            self._closing = True
            for camera in self._cameras:
                camera.close()
            self._changed.notify_all()

    def _wait(self, failures: list[InputError]) -> tuple[Camera, _Arrived] | None:
        """Wait for a frame of any camera; None where no more will come.

        Args:
            failures: gets an error for each camera that ended without a frame.
        """
        with self._changed:
            while self._open and not self._closing:
                ready = next((camera for camera in self._open if camera.latest), None)
                if ready is not None:
                    return self._take_from(ready)
                for camera in [camera for camera in self._open if camera.ended]:
                    self._open.remove(camera)
                    self._tell_end(camera, failures)
                if self._open:
                    self._changed.wait()
        return None

    def _take_from(self, camera: Camera) -> tuple[Camera, _Arrived] | None:
        arrived, camera.latest = camera.latest, None
        assert arrived is not None
        camera.given += 1
        self.dropped = sum(other.dropped for other in self._cameras)
        self._open.remove(camera)  # behind the others, whose turn is next
        if camera.given == self.max_frames:
            camera.close()
        else:
            self._open.append(camera)
        return camera, arrived

    def _tell_end(self, camera: Camera, failures: list[InputError]) -> None:
        if not camera.given:
            failures.append(
                InputError(
                    f"{camera.name}: not one frame came ({camera.end}); check the camera or the "
                    "stream"
                )
            )
            return
        broken = f", {camera.broken} more were broken" if camera.broken else ""
        self.skip(
            f"{camera.name}: the connection ended after {camera.frames} frames "
            f"({camera.end}){broken}"
        )

    def _warn(self, line: str) -> None:
        """Keep a line on a connection, and show it at once: the next frame may not come soon."""
        self.problems.append(line)
        self.on_news()
