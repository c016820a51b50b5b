"""Where results go: one face for all kinds of output, and a thread that writes while the detector runs on."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Self

from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.inference.frame import Frame

WAITING_FRAMES = 2


class Finished(Exception):  # noqa: N818 - not an error
    """Raised by a sink that wants no more: its window was closed."""


class Sink(ABC):
    """Takes results one after another. A context manager: left with an error, it leaves no half-written file behind."""

    @abstractmethod
    def write(self, frame: Frame, found: Detections) -> None:
        """Takes one frame and what was found in it.

        Raises:
            OutputError: it cannot be written.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # noqa: B027
        """Completes the output; removes it where there was an error."""


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Makes an OSError, such as a full disk, the OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: writing failed ({error.strerror or error}); expected a place with room that can be written") from error


class SinkThread:
    """Feeds sinks in a thread of its own, over a bounded queue. Ctrl-C completes the outputs, an error removes them."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks
        self._waiting: Queue[tuple[Frame, Detections] | None] = Queue(WAITING_FRAMES)
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)
        self._files = ExitStack()
        self._error: BaseException | None = None

    def put(self, frame: Frame, found: Detections) -> None:
        """Hands over one result; waits while two others wait.

        Raises:
            OutputError: an earlier one could not be written.
            Finished: a sink wants no more.
        """
        if self._error is not None:
            raise self._error
        self._waiting.put((frame, found))

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # so that `put` never waits for a thread that has given up
            try:
                for sink in self.sinks:
                    sink.write(*item)
            except BaseException as error:  # raised again by put and __exit__
                self._error = error

    def __enter__(self) -> Self:
        for sink in self.sinks:
            self._files.enter_context(sink)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
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
