"""What of a video is missing, by evidence: errors, an index, gaps in its times.

Comes in: the packets and frames as they are read. A header's count or duration alone is no promise:
recorders write chunks without frames, start times twice, and images five seconds apart.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tood_deploy.inference.address import for_ffmpeg

CONSTANT_SHARE = 0.8  # of the spacings that are alike, for gaps to be counted in frames
MIN_SPACINGS = 4
SHORT_TAIL_S = 0.5  # of a header that says more than the file holds, without another sign of damage
MAX_LEADING = 1000  # packets before the first key frame that are remembered
MAX_CHECKED_GAPS, MAX_CHECKED_PACKETS = 20, 1000
CONNECTIONS = frozenset(("http", "https", "tcp", "tls"))
TRANSPORT_PACKETS = (188, 192, 204)  # bytes: plain, of Blu-ray and cameras, with error correction
HIDING_CODECS = ("vp8", "vp9", "av1", "libdav1d", "libvpx")  # have frames that are not shown
SELF_DESCRIBING = ("matroska", "mov", "mpegts", "avi")  # say themselves where they are cut

_lock = threading.Lock()
_levels: list[int] = []  # asked for by the blocks that listen
_skipped_repeated: list[bool] = []  # as it was before each of the blocks


@contextmanager
def library_lines(level: int = av.logging.ERROR) -> Iterator[list[tuple[int, str, str]]]:
    """Yield the list of the lines that FFmpeg writes in this thread during the block.

    Each is (level, where it comes from, text). Lines of other threads are dropped. PyAV's callback
    is in place only for the block: a decoder's thread that waits in it for Python's lock would stop
    the release of that decoder, which holds the lock. A program that listens itself is not
    disturbed, but that lines which repeat the last one, also of another file, come in the block.

    Args:
        level: of the least important lines.
    """
    with _lock:
        _skipped_repeated.append(av.logging.get_skip_repeated())
        av.logging.set_skip_repeated(False)
        ours = bool(_levels) or av.logging.get_level() in (None, av.logging.PANIC)
        if ours:
            _levels.append(level)
            av.logging.set_level(max(_levels))
    try:
        with av.logging.Capture(local=False), av.logging.Capture() as lines:
            yield lines
    finally:
        with _lock:
            # Of blocks that overlap the last one to end gives back what the first one met.
            skipped = _skipped_repeated.pop()
            if not _skipped_repeated:
                av.logging.set_skip_repeated(skipped)
            if ours:
                _levels.remove(level)
            if ours and not _levels:
                # Not None: a thread that is still in the callback compares with it.
                av.logging.set_level(av.logging.PANIC)
                av.logging.set_libav_level(av.logging.PANIC)
                av.logging.restore_default_callback()


def frames_text(count: int, kind: str = "") -> str:
    """Return a count of frames as the start of a sentence, with its verb."""
    return f"{count} {kind}{'frame was' if count == 1 else 'frames were'}"


class LossLedger:
    """Counts what is missing, while a video is read.

    Attributes:
        broken: packets and frames that could not be decoded.
        failures: packets among them.
        packets: read so far.
        read_error: why reading ended, where it was not the end of the file.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container, self.stream = container, stream
        self.broken = self.failures = self.packets = 0
        self.read_error = ""
        self.container_error = ""
        self.time_base = stream.time_base or Fraction(1, 90_000)
        self._format = container.format.name
        self._times = array("q")
        self._end = self._last_dts = 0
        self._decodable = self._shown = 0  # packets and frames that have times
        self._first_shown, self._last_shown = 2**63 - 1, -(2**63)
        self._has_fields = False
        self._leading: set[int] = set()
        self._key_seen = self._suspect = self._ends_cut = self._opened_with_errors = False

    def hear_opening(self, lines: list[tuple[int, str, str]]) -> None:
        """Take what FFmpeg said while the file was opened, which reads small ones to their end.

        Alone it is no proof: a header may be odd, and all frames there.
        """
        self._suspect = self._suspect or any(self._is_error(line) for line in lines)
        self._opened_with_errors = self._suspect

    def _is_error(self, line: tuple[int, str, str]) -> bool:
        level, source, _ = line
        return level <= av.logging.ERROR and (source == self._format or source in CONNECTIONS)

    def hear(self, lines: list[tuple[int, str, str]]) -> None:
        """Take what FFmpeg said while a packet was read."""
        for line in filter(self._is_error, lines):
            self.container_error = self.container_error or " ".join(line[2].split())

    def count(self, packet: Packet) -> bool:
        """Take a packet that was read; tell whether it is whole, and can be decoded."""
        self.packets += 1
        self._ends_cut = packet.is_corrupt
        self._last_dts = packet.dts if packet.dts is not None else self._last_dts + 1
        self._suspect = self._suspect or packet.is_corrupt
        # Else only part of it is there. In MPEG-TS the mark is also set where two recordings meet.
        whole = not packet.is_corrupt or self._format == "mpegts"
        self.broken += not whole
        if (time := self.time_of(packet)) is not None:
            self._count_time(packet, time, whole)
        return whole

    @property
    def has_decoding_times_alone(self) -> bool:
        """Whether the container says when to decode, and not when to show."""
        return self._format == "avi"

    def time_of(self, packet: Packet) -> int | None:
        """Return when a packet is shown; where only that is known, when it is decoded."""
        return packet.dts if self.has_decoding_times_alone else packet.pts

    def _count_time(self, packet: Packet, pts: int, whole: bool) -> None:
        self._end = max(self._end, pts + (packet.duration or 0))
        if packet.is_discard:  # cut away by an edit list
            return
        self._times.append(pts)
        self._decodable += whole
        self._key_seen = self._key_seen or packet.is_keyframe
        if not self._key_seen and len(self._leading) < MAX_LEADING:
            self._leading.add(pts)

    def fail(self) -> None:
        """Count a packet that could not be decoded."""
        self.broken += 1
        self.failures += 1

    def is_whole(self, frame: VideoFrame, time: int | None) -> bool:
        """Tell whether a decoded frame can be used; count it as broken where not.

        Args:
            frame: as the decoder gives it.
            time: in the units that its packet was counted with.
        """
        if time is not None:
            self._leading.discard(time)
            self._first_shown = min(self._first_shown, time)
            self._last_shown = max(self._last_shown, time)
        self._has_fields = self._has_fields or frame.interlaced_frame
        self._shown += time is not None or self.has_decoding_times_alone
        if frame.is_corrupt:
            self.broken += 1
            return False
        return True

    def rank(self, pts: int) -> int:
        """Return how many of the packets read so far are shown before this time."""
        return int(np.count_nonzero(np.frombuffer(self._times, np.int64) < pts))

    @property
    def end_s(self) -> float:
        """Seconds at which what was read ends."""
        return float(self._end * self.time_base)

    def losses(self, read_to_end: bool) -> list[tuple[int, str]]:
        """Return how many frames are missing and how that is known, for every kind of loss.

        Args:
            read_to_end: whether all packets were asked for.
        """
        broken = self.broken + (self._never_shown() if read_to_end else 0)
        losses = [(broken, f"{frames_text(broken, 'broken ')} skipped")] if broken else []
        if self._leading and len(self._leading) < self.packets:
            count = len(self._leading)
            losses.append(
                (
                    count,
                    f"it begins between two key frames, {frames_text(count)} lost before the next",
                )
            )
        spacing = self._constant_spacing()
        if spacing and (self._is_damaged or self.broken or self._suspect):
            missing = sum(count for _, _, count in self._gaps(spacing))
            if missing:
                losses.append((missing, f"{frames_text(missing)} lost between others"))
        if read_to_end and (tail := self._loss_at_end(spacing)):
            losses.append(tail)
        if self._is_damaged and not spacing and not losses:
            reason = self.read_error or self.container_error
            losses.append((1, f"frames may be missing, FFmpeg says: {reason}"))
        return losses

    def _never_shown(self) -> int:
        """Return how many packets were decoded without an error, and yet gave no frame.

        A decoder that fails at the end of the file gives no error for it, and H.264's none for what
        it skips to the next key frame. An intact video may have such packets, too: the second
        fields of interlaced frames, hidden frames, and frames that refer to what was before the
        first key frame.
        """
        silent = self._decodable - self._shown - self.failures - len(self._leading)
        codec, times = self.stream.codec_context.name, self._sorted_times()
        if silent <= 0 or codec.startswith(HIDING_CODECS):
            return 0
        if self.broken or self._is_damaged or self._suspect:
            return silent
        if codec == "h264" and not self._has_fields:
            return max(0, silent - int(np.count_nonzero(times < self._first_shown)))
        return silent if silent == np.count_nonzero(times > self._last_shown) else 0

    def gaps_unexplained(self) -> list[tuple[int, int, int]]:
        """Return (last time before, first time after, frames) of gaps without a sign of damage.

        Only in a video of constant rate.
        """
        spacing = self._constant_spacing()
        damaged = self._is_damaged or self.broken or self._suspect
        return [] if damaged or not spacing else self._gaps(spacing)

    @property
    def repeats_frames(self) -> bool:
        """Whether the container has a mark for "as before", so that gaps are nothing unusual."""
        return self._format == "avi"

    @property
    def has_room(self) -> bool:
        """Whether an AVI file counts, or has times for, more frames than were read."""
        return self.packets < max(self.stream.frames, self._last_dts + 1)

    @property
    def _is_damaged(self) -> bool:
        return bool(self.container_error or self.read_error)

    def _sorted_times(self) -> NDArray[np.int64]:
        return np.unique(np.frombuffer(self._times, np.int64))

    def _constant_spacing(self) -> float:
        """Return the time from frame to frame, in units; 0 where it varies."""
        spacings = np.diff(self._sorted_times())
        if len(spacings) < MIN_SPACINGS:
            return 0.0
        median = float(np.median(spacings))
        alike = np.abs(spacings - median) <= max(1.0, 0.1 * median)
        return float(spacings[alike].mean()) if alike.mean() >= CONSTANT_SHARE else 0.0

    def _gaps(self, spacing: float) -> list[tuple[int, int, int]]:
        times = self._sorted_times()
        missing = np.rint(np.diff(times) / spacing).astype(int) - 1
        return [
            (int(times[i]), int(times[i + 1]), int(missing[i])) for i in np.flatnonzero(missing > 0)
        ]

    def _loss_at_end(self, spacing: float) -> tuple[int, str] | None:
        """Return what the end of the file lacks: by its index, else by its header."""
        if self._format.startswith("mov"):
            return self._fewer_than(len(self.stream.index_entries), self.packets)
        if self._format == "avi":
            # FFmpeg shortens the duration, and not the count, of a file that is cut.
            is_cut = self._ends_cut or (self.stream.duration or 0) < self.stream.frames
            held = self._last_dts + 1 if is_cut else self.stream.frames
            missing = len(self.stream.index_entries) - self.packets
            return self._fewer_than(self.stream.frames, held - max(0, missing))
        if self._format == "mpegts" and self._ends_within_a_packet():
            return 1, "cut or damaged: it ends within a packet"
        promised_s, held = self._promised_end_s(), self.end_s
        missing = round((promised_s - held) / float(spacing * self.time_base)) if spacing else 1
        excess_s = promised_s - held
        damaged = self._is_damaged or self._ends_cut or (self._opened_with_errors and spacing > 0)
        # Two signs: errors at the opening or even times, and a header that says much more.
        only_header = self._opened_with_errors or (
            not self._format.startswith(SELF_DESCRIBING) and spacing > 0
        )
        if not (excess_s > 0 and missing > 0 and (damaged or only_header)):
            return None
        if not damaged and (excess_s <= SHORT_TAIL_S or len(self.container.streams) > 1):
            return None
        text = f"cut or damaged: it ends after {held:.1f} of {promised_s:.1f} seconds"
        return missing, text

    def _ends_within_a_packet(self) -> bool:
        """Tell whether an MPEG transport stream has no whole number of packets, of any kind."""
        size = self.container.size
        return size > 0 and all(size % packet for packet in TRANSPORT_PACKETS)

    @staticmethod
    def _fewer_than(promised: int, held: int) -> tuple[int, str] | None:
        text = f"cut or damaged: it holds {held} of {promised} frames"
        return (promised - held, text) if held < promised else None

    def _promised_end_s(self) -> float:
        """Return when the video ends by its header, in seconds; 0 where it does not say.

        What Matroska and FLV state is the end, also where the video does not start at 0.
        """
        if self.stream.duration:
            return float(self.stream.duration * self.time_base)
        return (self.container.duration or 0) / av.time_base


def packets_without_index(name: str, stream_index: int) -> int:
    """Return how many packets a file has where it is read from start to end, as a pipe is.

    Args:
        name: of the file.
        stream_index: of its video.
    """
    try:
        with av.open(for_ffmpeg(name), options={"seekable": "0"}) as container:
            stream = container.streams[stream_index]
            return sum(packet.size > 0 for packet in container.demux(stream))
    except (FFmpegError, IndexError):  # it was read before: what cannot be read again is no proof
        return 0


def references_are_missing(name: str, stream_index: int, gap: tuple[int, int, int]) -> bool:
    """Decode what follows a gap, and tell whether the decoder misses frames that it refers to.

    Args:
        name: of the file.
        stream_index: of its video.
        gap: last time before it, first time after it, in units of the stream; number of frames.
    """
    try:
        with av.open(for_ffmpeg(name)) as container:
            stream = container.streams[stream_index]
            assert isinstance(stream, VideoStream)
            stream.codec_context.thread_count = 1  # what it says is heard in this thread
            packets = _packets_around(container, stream, gap)
            for packet in packets:
                with library_lines(av.logging.DEBUG) as lines:
                    stream.codec_context.decode(packet)
                # Frames shown before the key frame refer to what lies before it.
                is_later = (packet.pts or 0) > (packets[0].pts or 0)
                if is_later and any(map(_misses_references, lines)):
                    return True
    except FFmpegError:  # it was read before: what cannot be read again is no proof
        return False
    return False


def _packets_around(
    container: InputContainer, stream: VideoStream, gap: tuple[int, int, int]
) -> list[Packet]:
    """Return the packets from the last key frame before a gap to some frames behind it.

    They are looked for from the start: seeking is not exact in every container.
    """
    before, after, _ = gap
    packets: list[Packet] = []
    for packet in container.demux(stream):
        if packet.pts is None or packet.pts > after + 8 * (after - before):
            break
        if packet.is_keyframe and packet.pts <= before:
            packets.clear()
        packets.append(packet)
        if len(packets) > MAX_CHECKED_PACKETS:
            return []
    return packets


def _misses_references(line: tuple[int, str, str]) -> bool:
    level, _, text = line
    return level <= av.logging.ERROR or "Frame num gap" in text
