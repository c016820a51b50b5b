"""Frames of video files: every one, with its true time, upright.

Broken ones are counted and left out. PyAV decodes.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import ExitError, FFmpegError, InvalidDataError
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.errors import NO_HANDLES, InputError, raise_shortage
from tood_deploy.files import absent_or
from tood_deploy.inference.address import STDIN, for_ffmpeg, redacted, without_secrets
from tood_deploy.inference.frame import (
    ALL_FRAMES,
    Chooser,
    Frame,
    Moment,
    Selection,
    Source,
    VideoFormat,
)
from tood_deploy.inference.video_loss import (
    MAX_CHECKED_GAPS,
    LossLedger,
    frames_text,
    library_lines,
    packets_without_index,
    references_are_missing,
)

VIDEO_SUFFIXES = frozenset(
    (
        ".264 .265 .3gp .asf .avi .flv .h264 .hevc .m2ts .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg "
        ".mts "
        ".ogv .ts .webm .wmv"
    ).split()
)
DECODER_THREADS = 4
MAX_FAILURES_IN_A_ROW = (
    50  # then the rest is given up: a cut file fails at every packet that is not there
)
TIMEOUT_S = 10.0
REORDERED_FRAMES = 16  # the most that H.264 and HEVC decode before they show one
# Before a decoder is freed: its threads may wait for Python's lock to say something, see
# `library_lines`, and are waited for while the lock is held.
RELEASE_S = 0.001
MAX_WAITING_PACKETS = 5000  # kept while looking for the start


def open_container(
    name: str, timeout_s: float = TIMEOUT_S, options: dict[str, str] | None = None
) -> InputContainer:
    """Open a file, a pipe ("-" is stdin), a camera's device file or an address with PyAV.

    A silence of `timeout_s` seconds is an error.

    Args:
        name: of it.
        timeout_s: for opening, and for every packet.
        options: of FFmpeg's reader.

    Raises:
        InputError: nothing there, or not a video.
    """
    shown, expected = redacted(name), "expected an image, video, camera or stream"
    silence = (
        f"{shown}: no answer within {timeout_s:.0f} seconds; check that the camera or server is on "
        "and sends"
    )
    asked_s = time.monotonic()
    camera_format = "v4l2" if name.startswith("/dev/") else None
    try:
        # Unbuffered: what has come is read at once.
        file = (
            getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
            if name == STDIN
            else for_ffmpeg(name)
        )
        return av.open(file, "r", format=camera_format, options=options or {}, timeout=timeout_s)
    except ExitError as error:
        raise InputError(silence) from error
    except FFmpegError as error:
        if time.monotonic() - asked_s >= timeout_s:  # RTSP says of it that the data are invalid
            raise InputError(silence) from error
        reason = without_secrets(str(error.strerror or error), name)
        raise InputError(f"{shown}: cannot be opened as a video ({reason}); {expected}") from error
    except (OSError, ValueError) as error:
        reason = without_secrets(str(error), name)
        raise InputError(f"{shown}: cannot be opened ({reason}); {expected}") from error


def find_video_stream(
    container: InputContainer, name: str, max_pixels: int = MAX_PIXELS
) -> VideoStream:
    """Return the video of a container, its decoder set up; a cover image does not count.

    Args:
        container: open.
        name: of the file or address, for errors.
        max_pixels: refuse larger frames.

    Raises:
        InputError: there is none, or its frames are too large.
    """
    streams = [
        stream
        for stream in container.streams.video
        if Disposition.attached_pic not in stream.disposition
    ]
    if not streams:
        raise InputError(f"{name}: holds no video; expected a file with a video stream")
    if all(stream.codec_context is None for stream in streams):
        raise InputError(
            f"{name}: holds video of a codec that is not known; expected a common one, such as "
            "H.264: convert it"
        )
    streams = [stream for stream in streams if stream.codec_context is not None]
    stream = max(streams, key=lambda other: other.codec_context.width * other.codec_context.height)
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > max_pixels:
        raise InputError(
            f"{name}: frames of {pixels:,} pixels, more than {max_pixels:,}; if you trust it, "
            "raise the limit with --max-pixels"
        )
    stream.codec_context.thread_type = "AUTO"
    stream.codec_context.thread_count = DECODER_THREADS
    return stream


Orientation = tuple[bool, bool, bool]  # rows and columns exchanged; then mirrored in x, in y


def orientation_of(frame: VideoFrame) -> Orientation:
    """Return how a frame is turned for display, as its matrix says.

    The matrix [a b; c d] takes x, y to a x + c y, b x + d y (ISO/IEC 14496-12, 8.3.2). Matroska's
    projection and H.264's SEI message come as such a matrix, too. Angles between the quarters are
    taken for the nearest.
    """
    try:
        matrix: SideData | None = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # a kind of side data that this PyAV does not know
        quarters = round(frame.rotation / 90) % 4  # counter-clockwise
        return quarters % 2 == 1, quarters in (2, 3), quarters in (1, 2)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def upright_bgr(frame: VideoFrame) -> NDArray[np.uint8]:
    """Return the frame as (H, W, 3) uint8 BGR, turned and mirrored the way its metadata says."""
    image = np.asarray(
        frame.to_ndarray(format="bgr24", threads=1), np.uint8
    )  # threads made anew for each frame do not pay
    exchanged, mirrored_x, mirrored_y = orientation_of(frame)
    if exchanged:
        image = image.transpose(1, 0, 2)
    if mirrored_x:
        image = image[:, ::-1]
    if mirrored_y:
        image = image[::-1]
    return np.ascontiguousarray(image)


class VideoSource(Source):
    """One video: a file, what a pipe gives, or a recording at an address."""

    kind = "video"

    def __init__(
        self, name: str, max_pixels: int = MAX_PIXELS, selection: Selection = ALL_FRAMES
    ) -> None:
        """Read the header.

        Args:
            name: path, address, or "-" for stdin.
            max_pixels: refuse larger frames.
            selection: which frames to give.

        Raises:
            InputError: not a video, or one without a video stream.
        """
        self.name, self.address = redacted(name), name
        super().__init__((self.name,), None)
        self.max_pixels, self.selection = max_pixels, selection
        self._is_pipe = name == STDIN or ("://" not in name and absent_or(Path(name).is_fifo))
        container = open_container(name)
        stream = find_video_stream(container, self.name, max_pixels)
        if selection.start is None and selection.end is None:
            length = stream.frames or _estimated_frames(container, stream)
            self.length = _selected(length, selection)
        # A pipe can be opened only once.
        self._opened = container if self._is_pipe else None
        if self._opened is None:
            container.close()

    def __iter__(self) -> Iterator[Frame]:
        """Yield every selected frame that can be decoded; what could not is told at the end.

        Raises:
            InputError: there is not a single one.
        """
        with library_lines() as lines:
            opened = self._opened or open_container(self.address)
        with opened as container:
            stream = find_video_stream(container, self.name, self.max_pixels)
            ledger = LossLedger(container, stream)
            ledger.hear_opening(lines)
            decoder = Decoder(container, stream, ledger)
            given, video = 0, None
            try:
                for frame, index, pts in decoder.selected(self.selection):
                    video = video or self._format(container, stream, frame)
                    given += 1
                    yield Frame(
                        *(upright_bgr(frame), self.name, index, pts, decoder.time_base),
                        duration=frame.duration or None,
                        video=video,
                    )
                self._tell_losses(decoder, stream.index, given)
            finally:
                time.sleep(RELEASE_S)

    def _tell_losses(self, decoder: Decoder, stream_index: int, given: int) -> None:
        """Count what is missing, and keep a line for it.

        Raises:
            InputError: no frame was given.
        """
        ledger = decoder.ledger
        if not given and decoder.decoded:
            raise InputError(
                f"{self.name}: none of its {decoder.decoded} frames is chosen; expected --start "
                "within the video and before --end"
            )
        if not given:
            cure = (
                "; an .mp4 with its index at the end needs a file's name" if self._is_pipe else ""
            )
            raise InputError(
                f"{self.name}: not one frame can be decoded; expected a video, this one is "
                f"empty or damaged{cure}"
            )
        losses = ledger.losses(decoder.read_to_end)
        for count, text in losses:
            kept = f"; what could be decoded, {given} frames, is kept" if "cut" in text else ""
            self.skip(f"{self.name}: {text}{kept}", count)
        if losses or self._is_pipe:
            return
        if decoder.read_to_end and (count := self._left_out_by_index(ledger, stream_index)):
            self.skip(f"{self.name}: {frames_text(count)} lost, which its index leaves out", count)
            return
        self._tell_gaps(ledger, stream_index)

    def _tell_gaps(self, ledger: LossLedger, stream_index: int) -> None:
        """Tell gaps in the times of an intact file: lost, where later frames refer to them."""
        gaps = ledger.gaps_unexplained()[:MAX_CHECKED_GAPS]
        lost = [gap for gap in gaps if references_are_missing(self.address, stream_index, gap)]
        if lost:
            count = sum(frames for _, _, frames in lost)
            self.skip(
                f"{self.name}: {frames_text(count)} lost between others, which refer to them", count
            )
        elif gaps and not ledger.repeats_frames:
            seconds = float((gaps[0][0]) * ledger.time_base)
            others = f", and {len(gaps) - 1} more" if len(gaps) > 1 else ""
            self.notes.append(
                f"{self.name}: its times have a gap of {gaps[0][2]} frames after {seconds:.2f} s"
                f"{others}; nothing shows that frames were lost"
            )

    def _left_out_by_index(self, ledger: LossLedger, stream_index: int) -> int:
        """Return how many frames an AVI file holds that its index does not name.

        Fewer packets than the times have room for may also be chunks without a frame.
        """
        if not (ledger.repeats_frames and ledger.has_room and "://" not in self.address):
            return 0
        return max(0, packets_without_index(self.address, stream_index) - ledger.packets)

    def _format(
        self, container: InputContainer, stream: VideoStream, frame: VideoFrame
    ) -> VideoFormat:
        context, base = stream.codec_context, stream.time_base or Fraction(0)
        aspect = stream.sample_aspect_ratio or context.sample_aspect_ratio or Fraction(1)
        start = stream.start_time or 0
        lead_s = max(0.0, float(start * base) - (container.start_time or 0) / av.time_base)
        end_s = None
        if stream.duration:
            end_s = float((start + stream.duration) * base)
        elif container.duration and len(container.streams) == 1:
            end_s = container.duration / av.time_base
        has_sound = bool(container.streams.audio)
        if has_sound and self._is_pipe:
            self.notes.append(f"{self.name}: its sound is not kept, a pipe is read only once")
        return VideoFormat(
            1 / aspect if orientation_of(frame)[0] else aspect,
            stream.average_rate or stream.guessed_rate,
            lead_s,
            end_s,
            (frame.color_range, frame.color_primaries, frame.color_trc, frame.colorspace),
            self.address if has_sound and not self._is_pipe else None,
        )


def raise_decoder_shortage(error: FFmpegError) -> None:
    """Raise the error of a decoder that lacks memory or threads: the video is not to blame.

    Raises:
        OSError: its threads do not start.
        FFmpegError: it has no memory.
    """
    if isinstance(error, BlockingIOError):
        raise OSError(errno.EMFILE, NO_HANDLES) from error
    raise_shortage(error)


class Decoder:
    """Reads packets and decodes them, past whatever is broken.

    Attributes:
        ledger: counts what is missing.
        time_base: seconds of one unit of the frames' pts.
        decoded: good frames so far, given or not.
        read_to_end: whether no packet is left.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, ledger: LossLedger) -> None:
        """Read nothing yet.

        Args:
            container: open.
            stream: of it, that is decoded.
            ledger: takes what is read.
        """
        self.container, self.stream, self.ledger = container, stream, ledger
        self.time_base = ledger.time_base
        self.decoded, self.read_to_end = 0, False
        self._last_pts: int | None = None
        self._start: Moment | None = None
        self._first_dts: int | None = None
        self._delay: int | None = None

    def selected(self, selection: Selection) -> Iterator[tuple[VideoFrame, int, int]]:
        """Yield the chosen frames, each with its number and pts."""
        self._start, chooser, index = selection.start, Chooser(selection), -1
        for frame, pts in self.frames():
            index += 1
            if self._start is not None:
                # Frames before the first key frame were not decoded, and some behind it cannot be.
                index = max(index, self.ledger.rank(pts))
            if chooser.takes(index, float((pts - self._start_pts()) * self.time_base)):
                self._start = None
                yield frame, index, pts
            if chooser.is_done:
                return

    def frames(self) -> Iterator[tuple[VideoFrame, int]]:
        """Yield every good frame and its pts, which always grows."""
        for packet in self._from_start(self._packets()):
            try:
                decoded = self.stream.codec_context.decode(packet)
            except FFmpegError as error:
                raise_decoder_shortage(error)
                if self._start is None:
                    self.ledger.fail()
                continue
            if self._first_dts is None and packet is not None:
                self._first_dts = packet.dts
            for frame in decoded:
                time = self._time_of(frame)
                # What follows the first key frame may refer to frames before it, that are left out.
                if self.ledger.is_whole(frame, time) or self._start is not None:
                    self.decoded += 1
                    yield frame, self._growing(time)

    def _start_pts(self) -> int:
        """Return the time that seconds from the start are counted from, in units."""
        return self.stream.start_time or 0

    def _from_start(self, packets: Iterator[Packet | None]) -> Iterator[Packet | None]:
        """Leave out the packets before the key frame that the start needs."""
        waiting: list[Packet] = []
        if self._start is None:
            yield from packets
            return
        for packet in packets:
            reached = packet is None or self._reaches_start(packet)
            if packet is not None and packet.is_keyframe and not reached:
                waiting.clear()
            if packet is not None:
                waiting.append(packet)
            if reached or len(waiting) > MAX_WAITING_PACKETS:
                yield from waiting
                if packet is None:
                    yield None
                break
        yield from packets

    def _reaches_start(self, packet: Packet) -> bool:
        """Tell whether frames at or behind the start may need this packet to be decoded."""
        if packet.pts is None or self._start is None:
            return True
        if self._start.is_frame:
            return self.ledger.packets > self._start.value - REORDERED_FRAMES
        seconds = float((packet.pts - self._start_pts()) * self.time_base)
        return self._start.is_reached(0, seconds)

    def _packets(self) -> Iterator[Packet | None]:
        """Yield all packets, then None, which makes the decoder give what it still holds."""
        failures, packets = 0, self.container.demux(self.stream)
        while failures < MAX_FAILURES_IN_A_ROW:
            try:
                with library_lines() as lines:
                    packet = next(packets, None)
            except InvalidDataError as error:
                failures += 1
                self.ledger.container_error = self.ledger.container_error or str(error.strerror)
                packets = self.container.demux(self.stream)
                continue
            except FFmpegError as error:  # a lost connection or a failing disk: asking again waits
                raise_shortage(error)
                reason = str(error.strerror or error)
                self.ledger.read_error = without_secrets(reason, self.container.name)
                break
            self.ledger.hear(lines)
            if packet is None:
                break
            failures = 0
            if packet.size and self.ledger.count(packet):
                yield packet
        self.read_to_end = True
        yield None

    def _time_of(self, frame: VideoFrame) -> int | None:
        """Return a frame's own time; None where it has none.

        From AVI, which has no times to show frames at, the decoder gives those that they were
        decoded at, in order, and later by its delay.
        """
        if not self.ledger.has_decoding_times_alone:
            return frame.pts
        if frame.dts is None:
            return None
        if self._delay is None:
            self._delay = frame.dts - (self._first_dts or 0)
        return frame.dts - self._delay

    def _growing(self, time: int | None) -> int:
        """Return a frame's own time if it grows, else one frame after the last."""
        step = max(1, round(1 / (float(self.stream.guessed_rate or 25) * self.time_base)))
        after_last = 0 if self._last_pts is None else self._last_pts + step
        stalls = time is None or (self._last_pts is not None and time <= self._last_pts)
        self._last_pts = after_last if time is None or stalls else time
        return self._last_pts


def _estimated_frames(container: InputContainer, stream: VideoStream) -> int | None:
    """Return how many frames the header's duration and rate make; None where it has none."""
    if stream.duration and stream.time_base:
        duration_s = float(stream.duration * stream.time_base)
    else:
        duration_s = (container.duration or 0) / av.time_base
    return round(duration_s * float(stream.guessed_rate or 0)) or None


def _selected(length: int | None, selection: Selection) -> int | None:
    """Return how many of so many frames are given."""
    if length is not None:
        length = -(-length // selection.stride)
    if selection.max_frames is None:
        return length
    return selection.max_frames if length is None else min(length, selection.max_frames)
