"""Frames of video files: every one, with its true time, upright.

Broken ones are counted and left out. PyAV decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.errors import InputError, OutputError
from tood_deploy.files import atomic_path
from tood_deploy.inference.frame import Frame, Source

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
END_TOLERANCE_S = 0.5
TIMEOUT_S = 10.0


def open_container(name: str, timeout_s: float = TIMEOUT_S) -> InputContainer:
    """Open a file, a camera's device file or an address with PyAV.

    A silence of `timeout_s` seconds is an error.

    Raises:
        InputError: nothing there, or not a video.
    """
    camera_format = "v4l2" if name.startswith("/dev/") else None
    options = {"rtsp_transport": "tcp", "fflags": "nobuffer"} if name.startswith("rtsp") else {}
    try:
        return av.open(name, format=camera_format, options=options, timeout=timeout_s)
    except FFmpegError as error:
        raise InputError(
            f"{name}: cannot be opened as a video ({error.strerror or error}); expected an image, "
            "video, camera or stream"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: cannot be opened ({error}); expected an image, video, camera or stream"
        ) from error


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


def upright_bgr(frame: VideoFrame) -> NDArray[np.uint8]:
    """Return the frame as (H, W, 3) uint8 BGR, turned the way its metadata says."""
    image = np.asarray(
        frame.to_ndarray(format="bgr24", threads=1), np.uint8
    )  # threads made anew for each frame do not pay
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90 turns
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


class VideoSource(Source):
    """One video file, or a recording at an address."""

    kind = "video"

    def __init__(self, name: str, max_pixels: int = MAX_PIXELS) -> None:
        """Read the header.

        Raises:
            InputError: not a video, or one without a video stream.
        """
        super().__init__((name,), None)
        self.name, self.max_pixels = name, max_pixels
        with open_container(name) as container:
            stream = find_video_stream(container, name, max_pixels)
            self.length = stream.frames or _estimated_frames(container, stream)

    def __iter__(self) -> Iterator[Frame]:
        """Yield every frame that can be decoded; what could not is told at the end.

        Raises:
            InputError: there is not a single one.
        """
        with open_container(self.name) as container:
            decoder = Decoder(container, find_video_stream(container, self.name, self.max_pixels))
            index = -1
            for index, (frame, pts) in enumerate(decoder.frames()):
                yield Frame(upright_bgr(frame), self.name, index, pts, decoder.time_base)
            if index < 0:
                raise InputError(
                    f"{self.name}: not one frame can be decoded; expected a video, this one is "
                    "empty or damaged"
                )
            if decoder.broken:
                self.skip(
                    f"{self.name}: {decoder.broken} broken frames were skipped", decoder.broken
                )
            if loss := decoder.loss_at_end():
                self.skip(
                    f"{self.name}: cut or damaged: {loss}; what could be decoded, {index + 1} "
                    "frames, is kept",
                    0,
                )
                self.skipped += max(1, decoder.missing)


class Decoder:
    """Reads packets and decodes them, past whatever is broken.

    Attributes:
        broken: packets and frames that could not be decoded.
        missing: packets that the header promises and the file does not hold, as far as it can be
            told.
        time_base: seconds of one unit of the frames' pts.
        end: why reading ended.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container, self.stream = container, stream
        self.broken = self.packets = 0
        self.time_base = stream.time_base or Fraction(1, 90_000)
        self.end, self.end_s = "no more data", 0.0
        self._last_pts: int | None = None

    @property
    def missing(self) -> int:
        """Packets that the header promises and the file does not hold.

        0 where the header does not say.
        """
        return max(0, self.stream.frames - self.packets)

    def frames(self) -> Iterator[tuple[VideoFrame, int]]:
        """Yield every good frame and its pts, which always grows."""
        for packet in self._packets():
            try:
                decoded = self.stream.codec_context.decode(packet)
            except FFmpegError:
                self.broken += 1
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    self.broken += 1
                else:
                    yield frame, self._next_pts(frame)

    def loss_at_end(self) -> str:
        """Return what is missing at the end of the file, by its header; "" where nothing is."""
        promised_s = _promised_end_s(self.container, self.stream)
        if self.missing:
            return f"it holds {self.packets} of {self.stream.frames} frames"
        if not self.stream.frames and promised_s - self.end_s > END_TOLERANCE_S:
            return f"it ends after {self.end_s:.1f} of {promised_s:.1f} seconds"
        return ""

    def _packets(self) -> Iterator[Packet | None]:
        """Yield all packets, then None, which makes the decoder give what it still holds."""
        failures = 0
        while failures < MAX_FAILURES_IN_A_ROW:
            try:
                for packet in self.container.demux(self.stream):
                    failures = 0
                    if packet.size:
                        self._count(packet)
                        yield packet
                break
            except InvalidDataError:
                failures += 1
            except (
                FFmpegError
            ) as error:  # a lost connection or a failing disk: asking again would only wait again
                self.end = str(error.strerror or error)
                break
        yield None

    def _count(self, packet: Packet) -> None:
        self.packets += 1
        if packet.pts is not None:
            self.end_s = max(
                self.end_s, float((packet.pts + (packet.duration or 0)) * self.time_base)
            )

    def _next_pts(self, frame: VideoFrame) -> int:
        """Return the frame's own time if it grows, else one frame after the last."""
        step = max(1, round(1 / (float(self.stream.guessed_rate or 25) * self.time_base)))
        after_last = 0 if self._last_pts is None else self._last_pts + step
        stalls = frame.pts is None or (self._last_pts is not None and frame.pts <= self._last_pts)
        pts = after_last if frame.pts is None or stalls else frame.pts
        self._last_pts = pts
        return pts


def _estimated_frames(container: InputContainer, stream: VideoStream) -> int | None:
    start_s = float((stream.start_time or 0) * (stream.time_base or 0))
    duration_s = _promised_end_s(container, stream) - start_s
    return (
        round(duration_s * float(stream.guessed_rate)) or None
        if duration_s > 0 and stream.guessed_rate
        else None
    )


def _promised_end_s(container: InputContainer, stream: VideoStream) -> float:
    """Return when the video ends by its header, in seconds; 0 where it is not stated."""
    if stream.duration and stream.time_base:
        return float((stream.start_time or 0) + stream.duration) * float(stream.time_base)
    if container.duration and len(container.streams) == 1:
        return ((container.start_time or 0) + container.duration) / av.time_base
    return 0.0


ENCODER = "libx264"
ENCODER_OPTIONS = {"preset": "veryfast", "crf": "20"}
SMALLEST_SIDE = 16  # of a frame that players take
BT709, LIMITED_RANGE = (
    1,
    1,
)  # ISO/IEC 23091-2: what players assume of a video that is not marked otherwise


class VideoWriter:
    """A video under a temporary name.

    Leaving the context completes and renames it, leaving with an error removes it.
    """

    def __init__(self, path: Path, frame_wh: tuple[int, int], time_base: Fraction) -> None:
        """Open the file.

        Args:
            path: .mp4, .mkv or .mov.
            frame_wh: width and height of the frames; padded to even numbers, as H.264 wants.
            time_base: seconds of one unit of the frames' times.

        Raises:
            OutputError: the place cannot be written, or the frames are too large for H.264.
        """
        self.path, self.frame_wh, self.time_base = path, frame_wh, time_base
        self._last_pts: int | None = None
        self._reformatter = VideoReformatter()
        self._file = atomic_path(path)
        self._temporary = self._file.__enter__()
        try:
            self._container = av.open(str(self._temporary), "w")
            self._stream = self._container.add_stream(ENCODER, options=dict(ENCODER_OPTIONS))
            self._stream.width, self._stream.height = (
                max(SMALLEST_SIDE, side + side % 2) for side in frame_wh
            )
            self._stream.pix_fmt = "yuv420p"
            context = self._stream.codec_context
            context.time_base = time_base
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
            context.open()
        except (FFmpegError, ValueError, OverflowError) as error:
            self._drop(error)
            raise OutputError(
                f"{path}: frames of {frame_wh[0]} x {frame_wh[1]} cannot be encoded as H.264 "
                f"({error})"
            ) from error

    def write(self, image_bgr: NDArray[np.uint8], pts: int) -> None:
        """Add a frame; one of another size than the first is scaled to it.

        Args:
            image_bgr: (H, W, 3) uint8 BGR.
            pts: its time in units of `time_base`; moved behind the last frame's where it is not
                later.

        Raises:
            OutputError: writing failed, for example on a full disk.
        """
        if self._last_pts is not None and pts <= self._last_pts:
            pts = self._last_pts + 1
        self._last_pts = pts
        frame = VideoFrame.from_numpy_buffer(
            np.ascontiguousarray(self._fit(image_bgr)), format="bgr24"
        )
        frame = self._reformatter.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1
        )
        frame.pts, frame.time_base = pts, self.time_base
        self._encode(frame)

    def _fit(self, image_bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
        width, height = self.frame_wh
        if image_bgr.shape[:2] != (height, width):
            image_bgr = np.asarray(
                cv2.resize(image_bgr, (width, height), interpolation=cv2.INTER_AREA), np.uint8
            )
        right, bottom = self._stream.width - width, self._stream.height - height
        if right or bottom:
            image_bgr = np.asarray(
                cv2.copyMakeBorder(image_bgr, 0, bottom, 0, right, cv2.BORDER_REPLICATE), np.uint8
            )
        return image_bgr

    def _encode(self, frame: VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except FFmpegError as error:
            raise OutputError(
                f"{self.path}: writing failed ({error.strerror or error}); expected a place with "
                "room that can be written"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._drop(error)
            return
        try:
            self._encode(None)
            self._container.close()
        except (FFmpegError, OutputError) as failure:
            self._drop(failure)
            raise OutputError(
                f"{self.path}: writing failed ({failure}); expected a place with room that can be "
                "written"
            ) from failure
        self._file.__exit__(None, None, None)

    def _drop(self, error: BaseException) -> None:
        """Close what is open and removes the temporary file."""
        with suppress(FFmpegError):  # writing the trailer of a file that is removed anyway
            if hasattr(self, "_container"):
                self._container.close()
        with suppress(OSError, OutputError):  # the caller tells the first error
            self._file.__exit__(type(error), error, error.__traceback__)
