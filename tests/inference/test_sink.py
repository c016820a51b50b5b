import pytest
from inference.fakes import found, video_frame

from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sinks import Finished, Sink, SinkThread

ONE = found((8, 8, 24, 24))


class Memory(Sink):
    """Remembers what it was given, and how it was left."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.indices: list[int] = []
        self.error, self.left_with = error, "nothing yet"

    def write(self, frame: Frame, detections: Detections) -> None:
        if self.error is not None and frame.index == 3:
            raise self.error
        self.indices.append(frame.index)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.left_with = kind.__name__ if kind else ""


def put_all(sink: Memory, count: int = 50, error: BaseException | None = None) -> None:
    with SinkThread([sink]) as thread:
        for i in range(count):
            thread.put(video_frame(i, i), ONE)
        if error is not None:
            raise error


def test_order_is_kept() -> None:
    sink = Memory()
    put_all(sink)
    assert (sink.indices, sink.left_with) == (list(range(50)), "")


def test_an_error_of_a_sink_reaches_the_caller() -> None:
    sink = Memory(OutputError("the disk is full"))
    with pytest.raises(OutputError, match="the disk is full"):
        put_all(sink)
    assert (sink.indices, sink.left_with) == ([0, 1, 2], "OutputError")


def test_an_error_with_the_last_frame_reaches_the_caller() -> None:
    sink = Memory(OutputError("the disk is full"))
    with pytest.raises(OutputError, match="the disk is full"):
        put_all(sink, count=4)


def test_an_error_of_the_caller_reaches_the_sinks() -> None:
    sink = Memory()
    with pytest.raises(RuntimeError):
        put_all(sink, error=RuntimeError())
    assert sink.left_with == "RuntimeError"


def test_an_interruption_completes_the_outputs() -> None:
    sink = Memory()
    with pytest.raises(KeyboardInterrupt):
        put_all(sink, error=KeyboardInterrupt())
    assert (len(sink.indices), sink.left_with) == (50, "")


def test_a_closed_window_ends_without_an_error() -> None:
    sink = Memory(Finished())
    put_all(sink)
    assert (sink.indices, sink.left_with) == ([0, 1, 2], "")
