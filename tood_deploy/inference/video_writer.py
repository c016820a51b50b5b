"""Annotated videos: the source with boxes on it, its times, aspect, colours and sound.

Comes in: images with their times. Knows no detections.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import cv2
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import Flags
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.files import atomic_path
from tood_deploy.inference.address import for_ffmpeg, redacted
from tood_deploy.inference.frame import VideoFormat


@dataclass(frozen=True)
class _Encoder:
    """One of FFmpeg's encoders.

    Attributes:
        title: of the codec, for people.
        name: FFmpeg's.
        crf, max_crf: the quality that is taken, and the worst there is; 0 is the best.
        options: that set its speed, and keep it from printing.
        tag: by which players of .mp4 and .mov know the codec, where it is not FFmpeg's.
        smallest_side: of a frame that it takes, and that players show.
    """

    title: str
    name: str
    crf: int
    max_crf: int
    options: dict[str, str]
    tag: str | None = None
    smallest_side: int = 16


ENCODERS = {
    "h264": _Encoder("H.264", "libx264", 20, 51, {"preset": "veryfast"}),
    "hevc": _Encoder(
        "HEVC", "libx265", 24, 51, {"preset": "veryfast", "x265-params": "log-level=none"}, "hvc1"
    ),
    "vp9": _Encoder(
        "VP9", "libvpx-vp9", 30, 63, {"b": "0", "deadline": "realtime", "cpu-used": "8"}
    ),
    # SVT-AV1 waits for ever for frames of 160 x 16.
    "av1": _Encoder("AV1", "libsvtav1", 35, 63, {"preset": "8"}, smallest_side=64),
}
SVT_LOG = "SVT_LOG", "1"  # errors alone: SVT-AV1 would print its settings on stderr
UNSPECIFIED, FULL_RANGE = 2, 2
MATROSKA = ".mkv"
PREROLL_S = 0.1  # of sound that decoders need before what is heard
MATRICES = {  # of ISO/IEC 23091-2, for swscale; the others are what it takes if nothing is stated
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


@dataclass(frozen=True)
class VideoEncoding:
    """How annotated videos are encoded.

    Attributes:
        codec: a key of `ENCODERS`.
        crf: quality, 0 the best; the codec's own where not given.
    """

    codec: str = "h264"
    crf: int | None = None

    def __post_init__(self) -> None:
        if self.codec not in ENCODERS:
            raise ToodError(f"--codec is {self.codec}; expected one of {', '.join(ENCODERS)}")
        worst = ENCODERS[self.codec].max_crf
        if self.crf is not None and not 0 <= self.crf <= worst:
            raise ToodError(
                f"--crf is {self.crf}; expected 0, the best, to {worst} for {self.codec}"
            )


USUAL_ENCODING = VideoEncoding()


class Sound:
    """The sound of a source, copied packet by packet into a video."""

    def __init__(self, name: str, out: OutputContainer) -> None:
        """Open the source again, and add its sound to a file that has no header yet.

        Args:
            name: of the source.
            out: takes what it holds of sound.

        Raises:
            FFmpegError: the source cannot be opened, or has no sound that can be read.
            ValueError: the file's format does not take the codec.
        """
        self._source: InputContainer = av.open(for_ffmpeg(name))
        try:
            self.stream: AudioStream = self._source.streams.audio[0]
            self._out = out.add_stream_from_template(self.stream)
        except BaseException:
            self._source.close()
            raise
        self._packets = self._demux()
        self._next = next(self._packets, None)

    def until(self, origin_s: float, end_s: float, preroll_s: float) -> Iterator[Packet]:
        """Yield the packets that are needed from 0 on, and start before a time of the video.

        Args:
            origin_s: time in the source at which the video starts.
            end_s: time in the source.
            preroll_s: how long before the video starts packets are needed, too.
        """
        while (packet := self._next) is not None:
            base = packet.time_base
            start_s = float((packet.pts or 0) * base)
            if start_s >= end_s:
                return
            self._next = next(self._packets, None)
            if start_s + float((packet.duration or 0) * base) <= origin_s - preroll_s:
                continue
            origin = round(origin_s / base)
            packet.pts = (packet.pts or 0) - origin
            packet.dts = packet.pts
            packet.stream = self._out
            yield packet

    def _demux(self) -> Iterator[Packet]:
        with suppress(FFmpegError):  # of a damaged source: what is missing has been counted
            for packet in self._source.demux(self.stream):
                if packet.size and packet.pts is not None:
                    yield packet

    def close(self) -> None:
        """Close the source."""
        self._source.close()


class VideoWriter:
    """A video under a temporary name.

    Leaving the context completes and renames it, leaving with an error removes it.
    """

    def __init__(
        self,
        path: Path,
        frame_wh: tuple[int, int],
        time_base: Fraction,
        video: VideoFormat | None = None,
        encoding: VideoEncoding = USUAL_ENCODING,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the file.

        Args:
            path: .mp4, .mkv or .mov.
            frame_wh: width and height of the frames; padded to even numbers, as codecs want.
            time_base: seconds of one unit of the frames' times.
            video: how the source is played; where not given, its times are kept as they are.
            encoding: codec and quality.
            note: is told what cannot be kept.

        Raises:
            OutputError: the place cannot be written, or the codec cannot take such frames.
        """
        self.path, self.frame_wh, self.time_base = path, frame_wh, time_base
        self.video = video or VideoFormat()
        self.encoder, self.crf, self.note = ENCODERS[encoding.codec], encoding.crf, note
        self._origin: int | None = 0 if video is None else None
        self._last: VideoFrame | None = None
        self._sound: Sound | None = None
        self._reformatter = VideoReformatter()
        self._file = atomic_path(path)
        self._temporary = self._file.__enter__()
        try:
            self._open(with_sound=True)
        except (FFmpegError, ValueError, OverflowError) as error:
            self._drop(error)
            raise OutputError(
                f"{path}: frames of {frame_wh[0]} x {frame_wh[1]} cannot be encoded as "
                f"{self.encoder.title} ({error}); choose another --codec"
            ) from error

    def _open(self, with_sound: bool) -> None:
        """Open the encoder and write the header: without sound, where it cannot be kept."""
        os.environ.setdefault(*SVT_LOG)
        self._container = av.open(for_ffmpeg(str(self._temporary)), "w")
        crf = self.encoder.crf if self.crf is None else self.crf
        options = self.encoder.options | {"crf": str(crf)}
        stream = self._container.add_stream(self.encoder.name, self.video.rate, options)
        self._stream = cast(VideoStream, stream)
        self._set_up(self._stream)
        if not (with_sound and self.video.sound):
            self._container.start_encoding()
            return
        try:
            self._sound = Sound(self.video.sound, self._container)
            self._container.start_encoding()
        except (FFmpegError, ValueError, IndexError) as error:
            cure = "" if self.path.suffix.lower() == MATROSKA else "; a .mkv file may take it"
            self.note(
                f"{redacted(self.video.sound)}: its sound cannot be kept in {self.path.suffix} "
                f"({error}){cure}"
            )
            self._close_sound()
            with suppress(FFmpegError):  # it has no header
                self._container.close()
            self._open(with_sound=False)

    def _set_up(self, stream: VideoStream) -> None:
        """Set what the encoder needs to know before it is opened."""
        stream.width, stream.height = (
            max(self.encoder.smallest_side, side + side % 2) for side in self.frame_wh
        )
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = self.time_base
        # With B-frames the decoding times, which durations and rates are taken from, lag behind.
        context.max_b_frames = 0
        context.sample_aspect_ratio = self.video.sample_aspect
        context.flags |= int(Flags.frame_duration)
        color_range, primaries, transfer, matrix = self.video.color
        context.color_range, context.color_primaries = color_range, primaries
        context.color_trc, context.colorspace = transfer, matrix if matrix else UNSPECIFIED
        if self.encoder.tag and self.path.suffix.lower() in (".mp4", ".mov"):
            context.codec_tag = self.encoder.tag
        context.open()

    def write(self, image_bgr: NDArray[np.uint8], pts: int, duration: int | None = None) -> None:
        """Add a frame; one of another size than the first is scaled to it.

        Args:
            image_bgr: (H, W, 3) uint8 BGR.
            pts: its time in units of `time_base`; moved behind the last frame's where it is not
                later.
            duration: how long it is shown, in the same units; a frame at the average rate where not
                given.

        Raises:
            OutputError: writing failed, for example on a full disk.
        """
        if self._origin is None:
            self._origin = self._origin_of(pts)
        pts -= self._origin
        if self._last is not None and pts <= (self._last.pts or 0):
            pts = (self._last.pts or 0) + 1
        frame = VideoFrame.from_numpy_buffer(
            np.ascontiguousarray(self._fit(image_bgr)), format="bgr24"
        )
        color_range, primaries, transfer, matrix = self.video.color
        frame = self._reformatter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=MATRICES.get(matrix, Colorspace.DEFAULT),
            dst_color_range=FULL_RANGE if color_range == FULL_RANGE else 1,
            threads=1,
        )
        frame.color_range, frame.colorspace = color_range, matrix if matrix else UNSPECIFIED
        frame.color_primaries, frame.color_trc = primaries, transfer
        frame.pts, frame.time_base = pts, self.time_base
        frame.duration = duration or self._usual_duration()
        # Held back for one frame: what comes next says how long it was shown.
        last, self._last = self._last, frame
        if last is not None:
            last.duration = pts - (last.pts or 0)
            self._encode(last)

    def _origin_of(self, first_pts: int) -> int:
        """Return the source's time that becomes 0, in units.

        Sound may start before the video: as much of it is kept.
        """
        return first_pts - (round(self.video.lead_s / self.time_base) if self._sound else 0)

    def _usual_duration(self) -> int:
        rate = self.video.rate
        return max(1, round(1 / (rate * self.time_base))) if rate else 1

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
            for packet in self._stream.encode(frame):
                end_s = float((packet.dts or 0) * packet.time_base)
                self._copy_sound(end_s)
                self._container.mux(packet)
        except FFmpegError as error:
            raise OutputError(
                f"{self.path}: writing failed ({error.strerror or error}); expected a place with "
                "room that can be written"
            ) from error

    def _copy_sound(self, end_s: float) -> None:
        """Write the sound up to a time of the annotated video."""
        if self._sound is not None:
            origin_s = float((self._origin or 0) * self.time_base)
            # Matroska has no mark for "before 0": the video would start later for it.
            preroll_s = 0.0 if self.path.suffix.lower() == MATROSKA else PREROLL_S
            for packet in self._sound.until(origin_s, origin_s + end_s, preroll_s):
                self._container.mux(packet)

    def _complete(self) -> None:
        """Write what is held back, and the rest of the sound: all, if the video's end is there."""
        if self._last is None:
            return
        last, self._last = self._last, None
        self._correct_duration(last)
        end_s = float(((last.pts or 0) + (last.duration or 0)) * self.time_base)
        self._encode(last)
        self._encode(None)
        source_end_s = end_s + float((self._origin or 0) * self.time_base)
        promised_s = self.video.end_s
        frame_s = float((last.duration or 0) * self.time_base)
        whole = promised_s is not None and source_end_s > promised_s - frame_s / 2
        self._copy_sound(float("inf") if whole else end_s)

    def _correct_duration(self, last: VideoFrame) -> None:
        """Make the last frame end where the source's header says that the video ends.

        What a file with B-frames says of a single frame is how long it took to the next one in the
        order of decoding. An end far away is none: the run was stopped before it.
        """
        if self.video.end_s is None:
            return
        end = round(self.video.end_s / self.time_base) - (self._origin or 0)
        remaining = end - (last.pts or 0)
        if 0 < remaining <= 2 * max(last.duration or 0, self._usual_duration()):
            last.duration = remaining

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
            self._complete()
            self._container.close()
        except (FFmpegError, OutputError) as failure:
            self._drop(failure)
            raise OutputError(
                f"{self.path}: writing failed ({failure}); expected a place with room that can be "
                "written"
            ) from failure
        self._close_sound()
        self._file.__exit__(None, None, None)

    def _close_sound(self) -> None:
        sound, self._sound = self._sound, None
        if sound is not None:
            sound.close()

    def _drop(self, error: BaseException) -> None:
        """Close what is open and remove the temporary file."""
        self._close_sound()
        with suppress(FFmpegError):  # writing the trailer of a file that is removed anyway
            if hasattr(self, "_container"):
                self._container.close()
        with suppress(OSError, OutputError):  # the caller tells the first error
            self._file.__exit__(type(error), error, error.__traceback__)
