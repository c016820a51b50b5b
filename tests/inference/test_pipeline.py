import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference.fakes import RedEngine, moving_images, red_image, write_image, write_video
from numpy.typing import NDArray

from tood_deploy import Detector, Moment, Selection, ToodError
from tood_deploy.engines import BatchDetections
from tood_deploy.errors import InputError, InputWarning
from tood_deploy.inference.frame import Frame, Source
from tood_deploy.inference.pipeline import InFlight, Timings, detect_frames


class Images(Source):
    """Frames from memory; remembers how many were read and when."""

    kind = "images"

    def __init__(self, images: list[NDArray[np.uint8]], error: Exception | None = None) -> None:
        super().__init__(("memory",), len(images))
        self.images, self.error, self.read = images, error, 0

    def __iter__(self) -> Iterator[Frame]:
        for i, image in enumerate(self.images):
            self.read += 1
            yield Frame(image, "memory", i)
        if self.error is not None:
            raise self.error


def detector(engine: RedEngine | None = None) -> Detector:
    return Detector(engine or RedEngine(), imgsz=(96, 128))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_every_frame_in_order_with_its_own_boxes(batch: int) -> None:
    results = list(detect_frames(detector(), Images(moving_images(13)), batch))
    assert [frame.index for frame, _ in results] == list(range(13))
    for i, (_, found) in enumerate(results):
        np.testing.assert_allclose(found.boxes, [[2 * i, 8, 2 * i + 16, 24]], atol=1)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_results_do_not_depend_on_the_batch(batch: int) -> None:
    images = [
        red_image(48, 64),
        red_image(64, 48),
        red_image(48, 64),
        red_image(48, 64),
        red_image(33, 200),
        red_image(48, 64),
    ]
    alone = [detector()(image) for image in images]
    engine = RedEngine()
    together = [found for _, found in detect_frames(detector(engine), Images(images), batch)]
    for one, other in zip(alone, together, strict=True):
        assert (one.boxes == other.boxes).all()
        assert (one.scores == other.scores).all()
    assert max(engine.batches) <= batch


def test_only_images_of_one_padded_size_share_a_batch() -> None:
    images = [red_image(48, 64)] * 3 + [red_image(64, 48)] * 3 + [red_image(48, 64)] * 5
    engine = RedEngine()
    list(detect_frames(detector(engine), Images(images), batch=4))
    assert engine.batches == [3, 3, 4, 1]


class Overlapping(RedEngine):
    """Works on several batches at a time.

    Remembers the most that were under way, and those never collected.
    """

    def __init__(self, in_flight: int, fail_at_call: int | None = None) -> None:
        super().__init__()
        self.in_flight, self.fail_at_collect = in_flight, fail_at_call
        self.under_way = self.most_under_way = self.collected = 0

    def _submit(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return images, valid_hw, score_threshold, iou_threshold

    def _collect(self, ticket: Any) -> BatchDetections:
        self.under_way -= 1
        self.collected += 1
        if self.collected == self.fail_at_collect:
            raise RuntimeError("the engine broke")
        return self._run(*ticket)


class TestEngineThatOverlaps:
    @pytest.mark.parametrize(("in_flight", "batch"), [(1, 1), (2, 1), (2, 3), (4, 2), (4, 100)])
    def test_every_frame_in_order_and_nothing_left(self, in_flight: int, batch: int) -> None:
        engine = Overlapping(in_flight)
        results = list(detect_frames(detector(engine), Images(moving_images(13)), batch))
        assert [frame.index for frame, _ in results] == list(range(13))
        for i, (_, found) in enumerate(results):
            np.testing.assert_allclose(found.boxes, [[2 * i, 8, 2 * i + 16, 24]], atol=1)
        assert engine.under_way == 0
        assert engine.most_under_way == min(in_flight, -(-13 // batch))

    def test_has_one_batch_of_a_live_source_at_a_time(self) -> None:
        engine, source = Overlapping(3), Images(moving_images(5))
        source.kind = "live"
        assert len(list(detect_frames(detector(engine), source))) == 5
        assert engine.most_under_way == 1

    def test_that_fails_is_told_and_left_with_nothing_under_way(self) -> None:
        engine = Overlapping(3, fail_at_call=2)
        with pytest.raises(RuntimeError, match="the engine broke"):
            list(detect_frames(detector(engine), Images(moving_images(9))))
        assert engine.under_way == 0

    def test_closing_early_leaves_nothing_under_way(self) -> None:
        engine = Overlapping(3)
        results = detect_frames(detector(engine), Images(moving_images(50)))
        next(results)
        results.close()
        assert engine.under_way == 0
        assert no_threads_left()

    def test_time_is_counted_once(self) -> None:
        timings = Timings()
        engine = Overlapping(2)
        engine.seconds_per_image = 0.01
        started = time.perf_counter()
        list(detect_frames(detector(engine), Images(moving_images(10)), timings=timings))
        assert 0.1 <= 10 * timings.mean_ms("infer") / 1000 <= time.perf_counter() - started


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_images_of_one_canvas_share_a_batch(batch: int) -> None:
    sizes_hw = [(48, 64), (40, 64), (64, 48), (64, 40), (60, 64), (48, 64), (33, 40)]
    images = [red_image(*size_hw, left=2 * i) for i, size_hw in enumerate(sizes_hw)]
    engine = RedEngine()
    engine.input_shapes_hw = ((96, 128), (128, 96))
    results = list(detect_frames(detector(engine), Images(images), batch))
    assert [frame.index for frame, _ in results] == list(range(7))
    for i, (_, found) in enumerate(results):
        np.testing.assert_allclose(found.boxes, [[2 * i, 8, 2 * i + 16, 24]], atol=1)
    assert engine.batches == {1: [1] * 7, 2: [2, 2, 2, 1], 4: [2, 2, 3]}[batch]


def test_no_frames_give_no_results() -> None:
    assert list(detect_frames(detector(), Images([]))) == []


def test_a_source_that_fails_is_told_after_the_frames_before() -> None:
    results = detect_frames(
        detector(), Images(moving_images(5), InputError("the disk broke")), batch=4
    )
    got = []
    with pytest.raises(InputError, match="the disk broke"):
        got.extend(frame.index for frame, _ in iterate_into(results, got))
    assert got == [0, 1, 2, 3, 4]


def iterate_into(results: Iterator, got: list[int]) -> Iterator:
    for frame, _ in results:
        got.append(frame.index)
    return iter(())


def test_an_engine_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="the engine broke"):
        list(detect_frames(detector(RedEngine(fail_at_call=2)), Images(moving_images(20))))
    assert no_threads_left()


def test_a_image_that_cannot_be_scaled_is_told() -> None:
    images = [*moving_images(2), np.zeros((5, 5, 2), np.uint8)]
    with pytest.raises(InputError, match=r"expected uint8 \(H, W, 3\)"):
        list(detect_frames(detector(), Images(images)))
    assert no_threads_left()


def test_closing_early_stops_all_threads() -> None:
    source = Images(moving_images(30) * 100)
    results = detect_frames(detector(RedEngine(0.001)), source)
    for _ in range(3):
        next(results)
    results.close()
    assert no_threads_left()
    assert source.read < 30


def no_threads_left() -> bool:
    return not [
        thread for thread in threading.enumerate() if thread.name in ("_read", "_prepare", "_infer")
    ]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_slow_consumer_holds_the_source_back(batch: int) -> None:
    source = Images(moving_images(30) * 10)
    results = detect_frames(detector(), source, batch)
    next(results)
    time.sleep(0.1)
    assert source.read <= 2 * batch + 3
    results.close()


def test_large_images_are_held_back_by_their_bytes() -> None:
    in_flight = InFlight(min_frames=1, max_frames=10, max_bytes=5 * 48 * 64 * 3)
    frame = Frame(red_image(), "memory")
    for _ in range(4):
        in_flight.enter(frame)
    assert in_flight.wait_for_room()
    in_flight.enter(frame)
    threading.Timer(0.05, in_flight.leave, (frame,)).start()
    started = time.perf_counter()
    assert in_flight.wait_for_room()
    assert time.perf_counter() - started > 0.03
    in_flight.stop()
    assert not in_flight.wait_for_room()


def test_a_batch_larger_than_the_bytes_allowed_still_goes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tood_deploy.inference.pipeline.InFlight.__init__.__defaults__", (1,))
    engine = RedEngine()
    assert len(list(detect_frames(detector(engine), Images(moving_images(9)), batch=4))) == 9
    assert engine.batches == [4, 4, 1]


def test_batch_must_be_positive() -> None:
    with pytest.raises(ToodError, match="batch is 0"):
        detect_frames(detector(), Images([]), 0)


class AtWork:
    """Counts who is at work at the same time."""

    def __init__(self) -> None:
        self.lock, self.now, self.together = threading.Lock(), set[str](), set[frozenset[str]]()

    @contextmanager
    def __call__(self, who: str) -> Iterator[None]:
        with self.lock:
            self.now.add(who)
            self.together.add(frozenset(self.now))
        time.sleep(0.01)
        with self.lock:
            self.now.remove(who)
        yield


def test_reading_inference_and_drawing_overlap() -> None:
    at_work = AtWork()

    class SlowImages(Images):
        def __iter__(self) -> Iterator[Frame]:
            for frame in super().__iter__():
                with at_work("reading"):
                    yield frame

    class SlowEngine(RedEngine):
        def submit(self, *inputs: Any, **named: Any) -> Any:
            with at_work("inference"):
                return super().submit(*inputs, **named)

    for _ in detect_frames(detector(SlowEngine()), SlowImages(moving_images(40))):
        with at_work("drawing"):
            pass
    assert any({"reading", "inference"} <= each for each in at_work.together)
    assert any({"inference", "drawing"} <= each for each in at_work.together)


def test_timings_of_every_frame() -> None:
    timings = Timings()
    list(detect_frames(detector(RedEngine(0.01)), Images(moving_images(8)), 4, timings))
    assert timings.frames == 8
    assert timings.percentile_ms("infer", 50) >= 10
    assert (
        8 * timings.mean_ms("infer") / 1000 <= timings.ended_s - timings.started_s
    )  # per frame, not per batch of 4
    assert timings.percentile_ms("end_to_end", 95) >= timings.percentile_ms("infer", 50)
    line = timings.summary()
    for word in ("8 frames", "fps", "pre ", "infer ", "post ", "end-to-end ", "p95"):
        assert word in line


def test_timings_of_nothing() -> None:
    assert Timings().summary().startswith("0 frames")


def test_stream_of_the_detector(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", moving_images(6))
    image = write_image(tmp_path / "b.png")
    found = list(detector().stream([video, image], batch=2))
    assert [(Path(frame.name).name, frame.index, frame.timestamp_s) for frame, _ in found[-2:]] == [
        ("a.mp4", 5, 0.2),
        ("b.png", 0, None),
    ]
    assert all(len(objects) == 1 for _, objects in found)


def test_stream_of_chosen_frames(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", moving_images(12))
    chosen = Selection(stride=3, start=Moment(2, is_frame=True), end=Moment(0.4), max_frames=2)
    assert [frame.index for frame, _ in detector().stream(video, selection=chosen)] == [2, 5]


def test_stream_warns_of_what_is_lost(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", moving_images(40))
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    image = write_image(tmp_path / "b.png")
    with pytest.warns(InputWarning) as warned:
        list(detector().stream([tmp_path / "bad.png", tmp_path / "cut.mkv", image]))
    texts = [str(warning.message) for warning in warned]
    assert any("bad.png" in text for text in texts)
    assert any("cut.mkv" in text for text in texts)
    assert len(texts) == len(set(texts))


def test_stream_refuses_what_is_not_there_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        detector().stream(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="more than 100"):
        list(detector().stream(write_image(tmp_path / "b.png"), max_pixels=100))
