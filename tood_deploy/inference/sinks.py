"""Where results go: one face for all kinds of output, a thread that writes, and all that is drawn.

Comes in: frames with their detections. Knows no detector.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.files import atomic_path, check_writable
from tood_deploy.inference.frame import Frame, Input, Part
from tood_deploy.inference.output_paths import plan_names, shorten
from tood_deploy.inference.video_writer import USUAL_ENCODING, VideoEncoding, VideoWriter

WAITING_FRAMES = 2


class Finished(Exception):  # noqa: N818 - not an error
    """Raised by a sink that wants no more: its window was closed."""


class FrameOutputError(OutputError):
    """One frame that an output cannot take; the output itself is intact, and takes the next."""


class Sink(ABC):
    """Takes results one after another.

    A context manager: left with an error, it leaves no half-written file behind.
    """

    @abstractmethod
    def write(self, frame: Frame, detections: Detections) -> None:
        """Take one frame and its detections.

        Raises:
            FrameOutputError: this frame cannot be written, the next may be.
            OutputError: nothing can be written any more.
            BrokenPipeError: nobody reads stdout any more.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(  # noqa: B027 - most have nothing to undo
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the output; removes it where there was an error."""


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Make an OSError, such as a full disk, the OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: writing failed ({error.strerror or error}); expected a place with room that "
            "can be written"
        ) from error


class SinkThread:
    """Feeds sinks in a thread of its own, over a bounded queue.

    Ctrl-C completes the outputs, an error removes them. Where nobody reads stdout any more, the
    other outputs are completed.

    Attributes:
        problems: frames that an output could not take, a sentence each.
        broken_pipe: whether nobody reads stdout any more.
    """

    def __init__(self, sinks: Sequence[Sink], endless: bool = False) -> None:
        """Take the sinks; nothing is written yet.

        Args:
            sinks: get every frame, in this order.
            endless: whether the source need not end: without stdout the run then ends, whatever
                other outputs there are.
        """
        self.sinks, self.endless = sinks, endless
        self.problems: list[str] = []
        self.broken_pipe = False
        self._active = list(sinks)
        self._waiting: Queue[tuple[Frame, Detections] | None] = Queue(WAITING_FRAMES)
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)
        self._files = ExitStack()
        self._error: BaseException | None = None

    def put(self, frame: Frame, detections: Detections) -> None:
        """Hand over one result; waits while two others wait.

        Raises:
            OutputError: an earlier one could not be written.
            Finished: a sink wants no more.
        """
        if self._error is not None:
            raise self._error
        self._waiting.put((frame, detections))

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # so that `put` never waits for a thread that has given up
            try:
                for sink in list(self._active):
                    self._write(sink, *item)
            except BaseException as error:  # raised again by put and __exit__
                self._error = error

    def _write(self, sink: Sink, frame: Frame, detections: Detections) -> None:
        try:
            sink.write(frame, detections)
        except FrameOutputError as error:
            self.problems.append(str(error))
        except BrokenPipeError:
            self.broken_pipe = True
            self._active.remove(sink)
            if self.endless or not self._active:
                raise Finished from None

    def __enter__(self) -> Self:
        for sink in self.sinks:
            self._files.enter_context(sink)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._waiting.put(None)
        self._thread.join()
        failure = self._error if error is None or isinstance(error, KeyboardInterrupt) else error
        if failure is None or isinstance(failure, Finished):
            self._files.close()
            return isinstance(error, Finished)
        self._files.__exit__(type(failure), failure, failure.__traceback__)
        if failure is not error:
            raise failure
        return False


JPEG_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]


def write_image(path: Path, image_bgr: NDArray[np.uint8]) -> None:
    """Write an image (H, W, 3) uint8 BGR, whole or not at all, in the format its suffix names.

    Raises:
        FrameOutputError: the format cannot hold it.
        OutputError: the folder cannot be written, or the disk is full.
    """
    options = JPEG_QUALITY if path.suffix.lower() in (".jpg", ".jpeg", ".jpe") else []
    try:
        written, data = cv2.imencode(path.suffix, image_bgr, options)
    except cv2.error:
        written, data = False, np.zeros(0, np.uint8)
    if not written:
        size = f"{image_bgr.shape[1]} x {image_bgr.shape[0]}"
        raise FrameOutputError(
            f"{path}: {size} pixels cannot be written as {path.suffix}; choose another --output, "
            "ending in .png"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


class Annotated(Sink):
    """One annotated file per input.

    An image for an image, a video with the same frame times for a video. The videos of streams are
    written at the same time, of files one after the other.
    """

    def __init__(
        self,
        files: Mapping[Part, Path],
        live: bool = False,
        encoding: VideoEncoding = USUAL_ENCODING,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take the file of each input, or of each of its pages.

        Args:
            files: where to write.
            live: whether the inputs are streams.
            encoding: of the videos.
            note: is told what of a video cannot be kept.

        Raises:
            OutputError: a folder cannot be written.
        """
        self.files, self.live, self.encoding, self.note = files, live, encoding, note
        self._writers: dict[Path, VideoWriter] = {}
        for folder in {path.parent for path in files.values()}:
            check_writable(folder)

    def write(self, frame: Frame, detections: Detections) -> None:
        """Draw a frame and add it to its file."""
        path, drawn = self.files[frame.part], detections.plot(frame.image_bgr)
        if path not in self._writers and not self.live:
            self._close(None)
        if frame.pts is None or frame.time_base is None:
            write_image(path, drawn)
            return
        if path not in self._writers:
            self._writers[path] = VideoWriter(
                *(path, (drawn.shape[1], drawn.shape[0]), frame.time_base),
                *(frame.video, self.encoding, self.note),
            )
        self._writers[path].write(drawn, frame.pts, frame.duration)

    def _close(self, error: BaseException | None) -> None:
        """Complete the videos being written, or remove them where there was an error."""
        with ExitStack() as stack:  # all of them, also where one fails
            while self._writers:
                _, writer = self._writers.popitem()
                stack.callback(writer.__exit__, type(error) if error else None, error, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with output_errors(", ".join(map(str, self.files.values()))):
            self._close(error)


UNSAFE = re.compile(r"[^\w-]+")  # in a class name that becomes part of a file name
MAX_CLASS_LETTERS = 40  # of one
CROP_SUFFIX, CROP_NAME = ".jpg", re.compile(r"(_\d{6})?_\d{3}_[\w-]*\.jpg$")


class Crops(Sink):
    """JPEG files `<input>_<frame>_<number>_<class>.jpg`, the best object of a frame first.

    Images have no frame number.
    """

    def __init__(self, folder: Path, inputs: Sequence[Input]) -> None:
        """Take the folder and all inputs.

        Raises:
            OutputError: the folder cannot be written, or holds an input under the name of a crop.
        """
        check_writable(folder)
        self.stems = {
            part: path.with_suffix("")
            for part, path in plan_names(inputs, folder, lambda _: CROP_SUFFIX).items()
        }
        known = {(os.path.realpath(stem.parent), stem.name) for stem in self.stems.values()}
        for file in inputs:
            path = Path(os.path.realpath(file.name))
            stem = CROP_NAME.sub("", path.name)
            if stem != path.name and (str(path.parent), stem) in known:
                raise OutputError(
                    f"--crops {folder}: {file.name} is an input and has the name of a crop; choose "
                    "another --crops"
                )

    def write(self, frame: Frame, detections: Detections) -> None:
        """Cut out what lies inside the image."""
        stem = self.stems[frame.part]
        number = "" if frame.pts is None else f"_{frame.index:06d}"
        for i, (box, name) in enumerate(zip(detections.boxes, detections.names(), strict=True)):
            crop = crop_box(frame.image_bgr, box)
            if crop.size:
                ending = f"{number}_{i:03d}_{UNSAFE.sub('-', name)[:MAX_CLASS_LETTERS]}.jpg"
                short = shorten(stem, room=len(os.fsencode(ending)))
                write_image(Path(short.parent, f"{short.name}{ending}"), crop)


def crop_box(image_bgr: NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the part (h, w, 3) of the image that a box, xyxy in pixels, touches.

    No rows or columns where it lies outside.
    """
    height, width = image_bgr.shape[:2]
    left, top = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(box[2:]), 0, (width, height)).astype(int)
    return image_bgr[top:bottom, left:right]


TITLE = "tood-infer: q or Esc ends"
CLOSING_KEYS = (ord("q"), 27)


class Window(Sink):
    """Shows every frame; q, Esc or closing the window ends the run as if the source had ended."""

    def __init__(self) -> None:
        """Make sure that there is something to show on.

        Raises:
            OutputError: OpenCV has no windows, or there is no display.
        """
        if any(line.split() == ["GUI:", "NONE"] for line in cv2.getBuildInformation().splitlines()):
            raise OutputError(
                "--show: this OpenCV is built without windows; replace opencv-python-headless by "
                "opencv-python, or use --output"
            )
        if sys.platform.startswith("linux") and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise OutputError(
                "--show: no display (neither DISPLAY nor WAYLAND_DISPLAY is set); use --output"
            )

    def write(self, frame: Frame, detections: Detections) -> None:
        """Show a frame, and asks for keys."""
        cv2.imshow(TITLE, detections.plot(frame.image_bgr))
        closed = (
            cv2.waitKey(1) & 0xFF in CLOSING_KEYS
            or cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1
        )
        if closed:
            raise Finished

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        cv2.destroyAllWindows()
