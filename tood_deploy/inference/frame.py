"""One decoded image and where it came from; and what gives such images, one after another.

Knows no files.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError, ToodError
from tood_deploy.preprocess import ImageSize, ImageTransform

Kind = Literal["images", "video", "live"]
Part = tuple[str, int | None]  # an input's name, and the number of a page where it has several


@dataclass(frozen=True)
class Input:
    """What one name stands for.

    Attributes:
        name: path or address.
        kind: "images", "video" (an animation, too) or "live".
        pages: how many it gives, where it is a file of several images.
        animated: whether it is an image file that moves, such as a GIF.
    """

    name: str
    kind: Kind = "images"
    pages: int = 1
    animated: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """What outputs are written for: the file, or each of its pages."""
        if self.pages == 1:
            return ((self.name, None),)
        return tuple((self.name, page) for page in range(1, self.pages + 1))


@dataclass(frozen=True)
class Moment:
    """A place in a video.

    Attributes:
        value: seconds from its start, or the number of a frame from 0.
        is_frame: which of the two.
    """

    value: float
    is_frame: bool = False

    @classmethod
    def parse(cls, text: str, option: str) -> Self:
        """Return what a user wrote: seconds ("12.5"), or a number of frames ("300f").

        Args:
            text: of the option.
            option: its name, for the error.

        Raises:
            ToodError: it is neither.
        """
        number, is_frame = text.removesuffix("f"), text.endswith("f")
        try:
            return cls(int(number) if is_frame else float(number), is_frame)
        except ValueError as error:
            raise ToodError(
                f"{option} is {text}; expected seconds, such as 12.5, or a frame, such as 300f"
            ) from error

    def is_reached(self, index: int, seconds: float) -> bool:
        """Tell whether the frame of this number and time is at the moment or behind it."""
        return index >= self.value if self.is_frame else seconds >= self.value - 1e-6


@dataclass(frozen=True)
class Selection:
    """Which frames of a video or stream are given: all, as it stands here.

    Attributes:
        stride: every so many-th.
        start, end: from the first moment on, up to before the second.
        max_frames: at most so many of each video or stream.
    """

    stride: int = 1
    start: Moment | None = None
    end: Moment | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--stride", self.stride), ("--max-frames", self.max_frames)):
            if value is not None and value < 1:
                raise ToodError(f"{option} is {value}; expected 1 or more")
        for option, moment in (("--start", self.start), ("--end", self.end)):
            if moment is not None and not 0 <= moment.value < float("inf"):
                raise ToodError(f"{option} is {moment.value}; expected seconds or frames from 0 on")


ALL_FRAMES = Selection()


class Chooser:
    """Goes through a video in order, and chooses frames.

    Attributes:
        is_done: whether no more frames are wanted.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection, self.is_done = selection, False
        self._first: int | None = None
        self._given = 0

    def takes(self, index: int, seconds: float) -> bool:
        """Tell whether a frame is given.

        Args:
            index: its number in the video, from 0.
            seconds: its time from the start of the video.
        """
        chosen = self.selection
        if chosen.end is not None and chosen.end.is_reached(index, seconds):
            self.is_done = True
        if self.is_done or (chosen.start and not chosen.start.is_reached(index, seconds)):
            return False
        self._first = index if self._first is None else self._first
        if (index - self._first) % chosen.stride:
            return False
        self._given += 1
        self.is_done = self._given == chosen.max_frames
        return True


@dataclass(frozen=True)
class VideoFormat:
    """How the video that a frame belongs to is played, apart from its pixels.

    Attributes:
        sample_aspect: width of a pixel over its height, in the upright image.
        rate: average frames a second; None where not stated.
        lead_s: by how many seconds the sound starts before the video.
        end_s: when the video ends by its header; None where not stated.
        color: range, primaries, transfer and matrix, as FFmpeg and ISO/IEC 23091-2 number them.
        sound: the file, where it holds sound and can be opened again; None where not.
    """

    sample_aspect: Fraction = Fraction(1)
    rate: Fraction | None = None
    lead_s: float = 0.0
    end_s: float | None = None
    color: tuple[int, int, int, int] = (1, 1, 1, 1)
    sound: str | None = None


class WindowReader(ABC):
    """Reads parts of an image that is too large to be decoded at once.

    Attributes:
        size_hw: rows and columns of the upright image.
    """

    size_hw: tuple[int, int]

    @abstractmethod
    def read_windows(self, windows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield every window's number and pixels, in the order that suits the file.

        Args:
            windows: (N, 4) xyxy in pixels of the upright image.

        Yields:
            Position in `windows`, and (h, w, 3) uint8 BGR.

        Raises:
            InputError: the file is damaged.
        """

    @abstractmethod
    def read_to_fit(self, fit: ImageSize) -> NDArray[np.uint8]:
        """Return the whole image, (h, w, 3) uint8 BGR, scaled down to fit.

        Raises:
            InputError: the file is damaged.
        """


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a source.

    Attributes:
        image_bgr: (H, W, 3) uint8 BGR, upright.
        name: path or address of what it came from.
        index: its number in that file or stream, from 0; a live stream counts the frames that were
            dropped, too.
        page: its number, from 1, in a file of several images; None where it is the only one.
        pts, time_base: its time is pts * time_base seconds, as the file has it; None for an image.
        decoded_s: when it was decoded, in seconds of `time.perf_counter`.
        original_hw: rows and columns of the image in its file, where it was decoded smaller, or is
            read by window; None elsewhere.
        reader: reads parts of an image that is too large to be decoded at once; `image_bgr` has no
            rows then.
        duration: how long it is shown, in units of time_base; None where not known.
        video: how its video is played; None for an image or a stream.
    """

    image_bgr: NDArray[np.uint8]
    name: str
    index: int = 0
    pts: int | None = None
    time_base: Fraction | None = None
    decoded_s: float = field(default_factory=time.perf_counter)
    original_hw: tuple[int, int] | None = None
    page: int | None = None
    reader: WindowReader | None = None
    duration: int | None = None
    video: VideoFormat | None = None

    @property
    def part(self) -> Part:
        """What its outputs are planned for."""
        return self.name, self.page

    @property
    def size_hw(self) -> tuple[int, int]:
        """Rows and columns of the image in its file, which boxes are in pixels of."""
        return self.original_hw or (self.image_bgr.shape[0], self.image_bgr.shape[1])

    @property
    def timestamp_s(self) -> float | None:
        """Seconds, as the file has them (live: since the first frame came); None for an image."""
        return (
            None if self.pts is None or self.time_base is None else float(self.pts * self.time_base)
        )

    def age_s(self) -> float:
        """Return seconds since it was decoded."""
        return time.perf_counter() - self.decoded_s


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image ready for the network: (rows, columns, 3) uint8 RGB, and the way back.

    Where the device resizes, the image is as it was read: (H, W, 3) uint8 BGR.
    """

    image: NDArray[np.uint8]
    transform: ImageTransform


class Source(ABC):
    """Gives frames when iterated over.

    What cannot be read is counted and told, and the rest goes on.

    Attributes:
        kind: "images", "video" (every frame, in time) or "live" (the latest frame wins).
        names: the files or addresses it reads.
        length: how many frames it will give, as far as its header tells; None where unknown.
        skipped: images and frames that could not be read.
        dropped: frames of a live source that nobody had time for.
        problems: what was lost, one line each, in the order it happened.
        notes: what was not lost, but should be known, in the same way.
        lists: text files that names were read from.
        fit: the size that images will be scaled to fit: JPEG images may then be decoded at 1/2, 1/4
            or 1/8 of their size where that is enough; None, as at first: all of their pixels.
        on_news: called where there are problems that may not wait for the next frame.
        by_window: whether images with more pixels than are decoded at once are read by window.
    """

    kind: Kind
    fit: ImageSize | None = None
    by_window: bool = False

    def __init__(self, names: tuple[str, ...], length: int | None) -> None:
        self.names, self.length = names, length
        self.skipped = 0
        self.dropped = 0
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.lists: tuple[str, ...] = ()
        self.on_news: Callable[[], None] = lambda: None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What each of the names stands for."""
        return tuple(Input(name, self.kind) for name in self.names)

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]: ...

    def decode_to_fit(self, imgsz: ImageSize) -> None:
        """Let JPEG images be decoded smaller, as `fit` says.

        Raises:
            InputError: the source is no images.
        """
        if self.kind != "images":
            raise InputError(
                f"{self.names[0]}: a video or stream has no smaller decoding, JPEG images have; "
                "leave --fast-decode out"
            )
        self.fit = imgsz

    def skip(self, problem: str, count: int = 1) -> None:
        """Count what could not be read and keeps the line that says so."""
        self.skipped += count
        self.problems.append(problem)

    def close(self) -> None:  # noqa: B027 - most sources hold nothing between frames
        """End a wait for the next frame."""
