"""What to read: turns what a user names into a source of frames.

Comes in: images, folders, globs, lists, videos, cameras, addresses. Knows no detector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

from av.format import Flags

from tood_deploy.data.image_file import ReadOptions
from tood_deploy.data.image_header import MAX_PIXELS
from tood_deploy.errors import InputError, shortage_of
from tood_deploy.inference.address import local_path, redacted, scheme_of, stream_address
from tood_deploy.inference.file_list import Spec, list_files
from tood_deploy.inference.frame import ALL_FRAMES, Frame, Input, Kind, Selection, Source
from tood_deploy.inference.image_source import (
    AnimationSource,
    ImageSource,
    fetch_image,
    image_source,
)
from tood_deploy.inference.live import NO_RECONNECTION, LiveSource, Reconnection
from tood_deploy.inference.video import VideoSource, open_container

PLAYLISTS = ("hls", "dash")


@dataclass(frozen=True)
class VideoOptions:
    """How videos and streams are read.

    Attributes:
        selection: which frames to give.
        reconnection: what to do when the connection to a stream is lost.
    """

    selection: Selection = ALL_FRAMES
    reconnection: Reconnection = NO_RECONNECTION


def open_source(
    specs: Spec | Sequence[Spec],
    max_pixels: int = MAX_PIXELS,
    *,
    first_page: bool = False,
    bit_depth: int | None = None,
    selection: Selection = ALL_FRAMES,
    reconnection: Reconnection = NO_RECONNECTION,
) -> Source:
    """Open what a user named.

    Args:
        specs: one or several of: an image; a folder (its own files, not its subfolders'); a glob; a
            text file with one path a line (relative to that file's folder); a video; "-" for a
            video from stdin, or a named pipe; cameras ("0" or /dev/video0) and addresses of
            streams, which stand alone or beside one another; the address of a file.
        max_pixels: refuse images and frames with more.
        first_page: of image files with several pages or frames, take the first alone.
        bit_depth: how many bits of 16-bit images hold data, where their files do not say.
        selection: which frames of videos and streams to give.
        reconnection: what to do when the connection to a stream is lost; not made again where not
            given.

    Raises:
        InputError: nothing there, nothing that can be read, or a camera or stream beside files.
        ToodError: a value out of range.
    """
    options = ReadOptions(max_pixels, bit_depth, first_page)
    chosen = VideoOptions(selection, reconnection)
    listed = [specs] if isinstance(specs, str | PathLike) else list(specs)
    listed = [local_path(spec) for spec in listed]
    addresses = [address for address in map(stream_address, listed) if address]
    if addresses:
        return _open_addresses(addresses, listed, options, chosen)
    files = list_files(listed, first_page)
    if not files.inputs:
        raise InputError(
            "no source given; expected images, a folder, a video, a camera or an address"
        )
    single = len(files.inputs) == 1
    if selection != ALL_FRAMES and all(file.kind == "images" for file in files.inputs):
        raise InputError(
            f"{files.inputs[0].name}: images have no frames to choose from, videos have; leave "
            "--stride, --start, --end and --max-frames out"
        )
    source = (
        _open_file(files.inputs[0], options, chosen)
        if single
        else FileSources(files.inputs, options, chosen)
    )
    source.lists = files.lists
    source.notes[:0] = files.notes
    return source


def _open_addresses(
    addresses: list[str], listed: Sequence[Spec], options: ReadOptions, chosen: VideoOptions
) -> Source:
    """Return the source of addresses: streams are read at the same time, a file in full.

    Args:
        addresses: of streams and files, and device files of cameras.
        listed: all that was named.
        options: how images are read.
        chosen: how videos and streams are.

    Raises:
        InputError: files beside streams.
    """
    if len(addresses) < len(listed):
        raise InputError(
            f"{redacted(addresses[0])}: a camera or stream beside other sources; expected it "
            "alone or beside other streams, as it need not end"
        )
    ending = [_open_address(address, options, chosen) for address in addresses]
    if len(ending) == 1 and ending[0] is not None:
        return ending[0]
    if any(source is not None for source in ending):
        name = redacted(next(a for a, source in zip(addresses, ending, strict=True) if source))
        raise InputError(f"{name}: a file beside other addresses; expected it alone")
    return LiveSource(addresses, options.max_pixels, chosen.selection, chosen.reconnection)


class FileSources(Source):
    """Several images and videos, one after another.

    One that cannot be read is told, and the rest goes on.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
        chosen: VideoOptions = VideoOptions(),
    ) -> None:
        super().__init__(tuple(file.name for file in inputs), sum(file.pages for file in inputs))
        self._inputs, self.options, self.chosen = tuple(inputs), options, chosen
        self.kind: Kind = "images"
        if any(file.kind == "video" for file in inputs):
            self.kind, self.length = "video", None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What each of the names stands for."""
        return self._inputs

    def __iter__(self) -> Iterator[Frame]:
        """Raise InputError where not one of them can be read."""
        given = 0
        for file in self._inputs:
            try:
                for frame in self._frames_of(file):
                    given += 1
                    yield frame
            except InputError as error:
                self.skip(str(error))
            except Exception as error:  # whatever a library meets in one file, the rest goes on
                cure = "expected an image or video: copy or convert it again"
                reason = f"{type(error).__name__}: {error}"
                if shortage := shortage_of(error):
                    reason, cure = shortage, "read it alone, or where there is more"
                self.skip(f"{file.name}: cannot be read ({reason}); {cure}")
        if not given:
            raise InputError(
                f"none of the {len(self._inputs)} images and videos can be read; the first: "
                f"{self.problems[0]}"
            )

    def _frames_of(self, file: Input) -> Iterator[Frame]:
        source = _open_file(file, self.options, self.chosen)
        source.fit, source.by_window = self.fit, self.by_window
        try:
            yield from source
        finally:
            self.skipped += source.skipped
            self.problems += source.problems
            self.notes += source.notes


def _open_address(address: str, options: ReadOptions, chosen: VideoOptions) -> Source | None:
    """Return what is served over HTTP and has an end: an image, or a video; None for a stream."""
    if scheme_of(address) not in ("http", "https"):
        return None
    if (data := fetch_image(address)) is not None:
        return image_source(redacted(address), options, data)
    with open_container(address) as container:
        # A playlist of a live stream is a file with a length, too.
        has_length = container.size > 0 and container.format.name not in PLAYLISTS
        has_times = not container.format.flags & Flags.no_timestamps.value
        is_file = bool(container.duration) and has_times
    if not (is_file or has_length):
        return None
    return VideoSource(address, options.max_pixels, chosen.selection)


def _open_file(file: Input, options: ReadOptions, chosen: VideoOptions) -> Source:
    if file.animated:
        return AnimationSource(file.name, options, selection=chosen.selection)
    if file.kind == "images":
        return ImageSource(file.name, options, file.pages)
    return VideoSource(file.name, options.max_pixels, chosen.selection)
