"""Batches of one padded size, a bound on the wait and on the queue, and an answer for everybody."""

import threading
import time
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.served import CountingEngine

from tood_deploy.matching import NetDetections
from tood_deploy.serve.batcher import Batcher, PendingImage, QueueFull


def image(red: int, *, size_hw: tuple[int, int] = (32, 32), conf: float = 0.0) -> PendingImage:
    pixels = np.full((*size_hw, 3), red, np.uint8)
    return PendingImage(pixels, size_hw, conf, 0.6)


def ask(batcher: Batcher, *images: PendingImage) -> list[Future[NetDetections]]:
    batcher.reserve(len(images))
    return [batcher.submit(one) for one in images]


def new_batcher(engine: CountingEngine, capacity: int = 64, delay_s: float = 0.0) -> Batcher:
    return Batcher(engine, max_batch=4, delay_s=delay_s, capacity=capacity)


def test_images_that_come_while_the_engine_is_busy_share_batches() -> None:
    engine = CountingEngine()
    batcher = new_batcher(engine)
    engine.gate.clear()
    answers = ask(batcher, image(1))
    time.sleep(0.05)
    answers += ask(batcher, *map(image, range(2, 11)))
    engine.gate.set()
    assert [len(answer.result(5)) for answer in answers] == [*range(1, 11)]
    batcher.close()
    assert engine.batches == [1, 4, 4, 1]


def test_an_image_alone_waits_no_longer_than_the_bound() -> None:
    batcher = new_batcher(CountingEngine(), delay_s=0.05)
    started = time.perf_counter()
    (answer,) = ask(batcher, image(3))
    assert len(answer.result(5)) == 3
    assert 0.04 < time.perf_counter() - started < 2
    batcher.close()


def test_a_full_batch_does_not_wait() -> None:
    engine = CountingEngine()
    batcher = new_batcher(engine, delay_s=20)
    answers = ask(batcher, *map(image, (1, 2, 3, 4)))
    assert [len(answer.result(5)) for answer in answers] == [1, 2, 3, 4]
    batcher.close()


def test_other_sizes_and_other_thresholds() -> None:
    """Sizes never share a batch; score thresholds do, and every image gets its own cut."""
    engine = CountingEngine()
    batcher = new_batcher(engine)
    engine.gate.clear()
    first = ask(batcher, image(1))
    time.sleep(0.05)
    mixed = [image(90, conf=0.5), image(90, size_hw=(64, 32)), image(90, conf=0.895)]
    answers = ask(batcher, *mixed)
    engine.gate.set()
    counts = [len(answer.result(5)) for answer in first + answers]
    assert counts == [1, 49, 90, 10]
    assert engine.batches == [1, 2, 1]
    assert (answers[0].result().scores > 0.5).all()
    batcher.close()


def test_a_full_queue_refuses_and_room_comes_back() -> None:
    engine = CountingEngine()
    batcher = new_batcher(engine, capacity=3)
    engine.gate.clear()
    running = ask(batcher, image(1))
    while batcher.depth:
        time.sleep(0.01)
    waiting = ask(batcher, image(2), image(3))
    with pytest.raises(QueueFull):
        batcher.reserve(2)
    batcher.reserve(1)
    batcher.release(1)
    batcher.cancel([])
    engine.gate.set()
    assert [len(answer.result(5)) for answer in running + waiting] == [1, 2, 3]
    assert batcher.depth == 0
    batcher.close()
    with pytest.raises(QueueFull):
        batcher.reserve(1)


def test_what_is_cancelled_is_not_run_and_gives_its_place_back() -> None:
    engine = CountingEngine()
    batcher = new_batcher(engine)
    engine.gate.clear()
    (running,) = ask(batcher, image(1))
    while batcher.depth:
        time.sleep(0.01)
    pending = [image(2), image(3)]
    answers = ask(batcher, *pending)
    batcher.cancel(pending[:1])
    assert batcher.depth == 1
    assert answers[1].cancel()  # as asyncio does it, behind the batcher's back
    engine.gate.set()
    assert len(running.result(5)) == 1
    batcher.close()
    assert (batcher.depth, engine.batches) == (0, [1])
    with pytest.raises(CancelledError):
        answers[0].result(1)


def test_one_image_that_breaks_its_batch_takes_no_other_with_it() -> None:
    engine = CountingEngine()
    batcher = new_batcher(engine, delay_s=20)
    engine.broken = 3
    answers = ask(batcher, *map(image, (1, 2, 3, 4)))
    assert [len(answers[place].result(5)) for place in (0, 1, 3)] == [1, 2, 4]
    with pytest.raises(RuntimeError, match="out of memory"):
        answers[2].result(5)
    assert [len(answer.result(5)) for answer in ask(batcher, *map(image, (5, 6, 7, 8)))] == [
        5,
        6,
        7,
        8,
    ]
    batcher.close()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([32, 64]), st.floats(0, 1)), max_size=40)
)
def test_everybody_gets_their_own_answer(asked: list[tuple[int, int, float]]) -> None:
    """From several threads, in any order: what one image gets does not depend on the others."""
    batcher = new_batcher(CountingEngine(in_flight=2), delay_s=0.001)
    answers: dict[int, NetDetections] = {}

    def client(numbers: range) -> None:
        for number in numbers:
            red, side, conf = asked[number]
            (answer,) = ask(batcher, image(red, size_hw=(side, 32), conf=conf))
            answers[number] = answer.result(10)

    threads = [
        threading.Thread(target=client, args=(range(start, len(asked), 3),)) for start in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    scores = np.linspace(0.99, 0.0, 100, dtype=np.float32)
    for number, (red, _, conf) in enumerate(asked):
        assert len(answers[number]) == min(red, int((scores > np.float32(conf)).sum()))
