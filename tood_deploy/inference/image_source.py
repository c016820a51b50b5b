"""Image files as sources of frames: one image, several pages, or an animation; also over HTTP.

Knows no detector and no videos.
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from collections.abc import Iterator
from fractions import Fraction
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from tood_deploy.data.image_file import ReadOptions, decode_file, decode_frames
from tood_deploy.data.image_header import check_header, read_header
from tood_deploy.data.images import header_of, read_file
from tood_deploy.errors import InputError
from tood_deploy.inference.address import redacted
from tood_deploy.inference.frame import (
    ALL_FRAMES,
    Chooser,
    Frame,
    Input,
    Selection,
    Source,
    VideoFormat,
    WindowReader,
)

MILLISECOND = Fraction(1, 1000)
FETCH_TIMEOUT_S = 10.0
MAX_FETCHED_BYTES = 1 << 30
HEADER_BYTES = 65_536


class ImageSource(Source):
    """One image file, or all pages of it."""

    kind = "images"

    def __init__(
        self,
        path: str | Path,
        options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
        pages: int = 1,
        data: bytes | None = None,
    ) -> None:
        """Take where it is; nothing is read yet.

        Args:
            path: of the file, or its address.
            options: how to read it.
            pages: how many the file has, or is to give.
            data: what it holds, where it has been read.
        """
        super().__init__((str(path),), pages)
        self.path, self.options, self.pages, self._data = str(path), options, pages, data

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The file."""
        return (Input(self.path, "images", self.pages),)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the image or its pages; a page that cannot be read is told and left out.

        Raises:
            InputError: the image, or every page, cannot be read.
        """
        if self.by_window and self._data is None and (reader := self._window_reader()) is not None:
            none = np.zeros((0, 0, 3), np.uint8)
            yield Frame(none, self.path, original_hw=reader.size_hw, reader=reader)
            return
        data = read_file(Path(self.path)) if self._data is None else self._data
        header = check_header(data, self.path, self.options.max_pixels)
        left_out = len(header.positions) - self.pages
        if left_out > 0:
            self.notes.append(
                f"{self.path}: the first of {len(header.positions)} pages or frames is taken"
            )
        failures: list[InputError] = []
        for index, position in enumerate(header.positions[: self.pages]):
            try:
                decoded = decode_file(data, self.path, self.options, self.fit, position)
            except InputError as error:
                failures.append(error)
                continue
            self.notes += decoded.notes
            yield Frame(
                decoded.image_bgr,
                self.path,
                index,
                original_hw=decoded.original_hw,
                page=index + 1 if self.pages > 1 else None,
            )
        if len(failures) == self.pages:
            raise failures[0]
        for error in failures:
            self.skip(str(error))

    def _window_reader(self) -> WindowReader | None:
        """Return what reads the image by window, where it is too large to be decoded at once."""
        header = header_of(Path(self.path))
        if header is None or header.size_hw is None or len(header.positions) > 1:
            return None
        if header.size_hw[0] * header.size_hw[1] <= self.options.max_pixels:
            return None
        from tood_deploy.inference.windowed import RasterReader

        return RasterReader(self.path, header, self.options.bit_depth)


class AnimationSource(Source):
    """An animation (GIF, WebP, PNG, AVIF): every frame as it is shown, with its time."""

    kind = "video"

    def __init__(
        self,
        path: str | Path,
        options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
        data: bytes | None = None,
        selection: Selection = ALL_FRAMES,
    ) -> None:
        """Take where it is; nothing is read yet.

        Args:
            path: of the file, or its address.
            options: how to read it.
            data: what it holds, where it has been read.
            selection: which frames to give.
        """
        super().__init__((str(path),), None)
        self.path, self.options, self._data = str(path), options, data
        self.selection = selection

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The file."""
        return (Input(self.path, "video", animated=True),)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames; where one is damaged, it is told, and the rest is left out.

        Raises:
            InputError: not even the first can be read.
        """
        data = read_file(Path(self.path)) if self._data is None else self._data
        count = len(check_header(data, self.path, self.options.max_pixels).positions)
        index, shown_ms, chooser = 0, 0, Chooser(self.selection)
        try:
            for image, duration_ms in decode_frames(data, self.path, self.options):
                if chooser.takes(index, shown_ms / 1000):
                    yield Frame(
                        *(image, self.path, index, shown_ms, MILLISECOND),
                        duration=duration_ms,
                        video=VideoFormat(),
                    )
                if chooser.is_done:
                    return
                index, shown_ms = index + 1, shown_ms + duration_ms
        except InputError as error:
            if index == 0:
                raise
            self.skip(str(error), count - index)


def image_source(name: str, options: ReadOptions, data: bytes) -> ImageSource | AnimationSource:
    """Return the source of an image file that has been read.

    Args:
        name: of the file, or its address.
        options: how to read it.
        data: what it holds.

    Raises:
        InputError: not an image, or too large.
    """
    header = check_header(data, name, options.max_pixels)
    if header.moving and not options.first_page:
        return AnimationSource(name, options, data)
    pages = 1 if options.first_page or header.moving else len(header.positions)
    return ImageSource(name, options, pages, data)


def fetch_image(address: str) -> bytes | None:
    """Return what an http(s):// address serves where that is one image; None for anything else.

    Raises:
        InputError: it is an image that is too large or does not arrive whole.
    """
    try:
        with urllib.request.urlopen(_request(address), timeout=FETCH_TIMEOUT_S) as response:
            kind = response.headers.get_content_type()
            if kind.startswith(("multipart/", "video/", "audio/")):
                return None
            start = response.read(HEADER_BYTES)
            path = urlsplit(address).path
            if not kind.startswith("image/") and read_header(BytesIO(start), path) is None:
                return None
            data = start + response.read(MAX_FETCHED_BYTES)
            expected = response.headers.get("Content-Length")
    except (OSError, HTTPException, ValueError):  # what opens streams says why
        return None
    if expected is not None and expected.isdecimal() and len(data) != int(expected):
        raise InputError(
            f"{redacted(address)}: {len(data)} of {expected} bytes of an image came; try again"
        )
    return data


def _request(address: str) -> urllib.request.Request:
    """Return the request for an address; a name and password in it go into a header."""
    parts = urlsplit(address)
    if parts.username is None:
        return urllib.request.Request(address)
    host = parts.netloc.rpartition("@")[2]
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    return request
