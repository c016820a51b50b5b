"""Which set of buffers a call gets, among threads."""

import threading
import time
from collections.abc import Callable

import pytest

from tood_deploy.engines.tensorrt.slot import Slots, Ticket
from tood_deploy.errors import ToodError


def submit(slots: Slots[str], batch: int = 1) -> Ticket:
    with slots.take() as (_, hold):
        return hold(batch)


def collect(slots: Slots[str], ticket: Ticket) -> str:
    with slots.resume(ticket) as item:
        return item


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except ToodError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_one_caller_stays_with_one_slot() -> None:
    slots = Slots("ab", "engine")
    for _ in range(5):
        with slots.take() as (item, _):
            assert item == "a"
        assert collect(slots, submit(slots)) == "a"


def test_two_batches_in_two_slots_in_any_order() -> None:
    slots = Slots("ab", "engine")
    first, second = submit(slots, 3), submit(slots, 4)
    assert (first.batch, second.batch) == (3, 4)
    assert (collect(slots, second), collect(slots, first)) == ("b", "a")
    assert collect(slots, submit(slots)) == "a"


def test_a_third_batch_of_one_thread_is_an_error_not_a_wait_for_ever() -> None:
    slots = Slots("ab", "engine")
    tickets = [submit(slots), submit(slots)]
    with pytest.raises(
        ToodError, match="engine: 2 batches are submitted already; collect the oldest one first"
    ):
        submit(slots)
    assert [collect(slots, ticket) for ticket in tickets] == ["a", "b"]


def test_another_thread_waits_for_a_slot() -> None:
    slots = Slots("ab", "engine")
    tickets = [submit(slots), submit(slots)]
    thread, results = in_thread(lambda: collect(slots, submit(slots)))
    time.sleep(0.05)
    assert results == []
    collect(slots, tickets[1])
    thread.join(5)
    assert results == ["b"]


def test_a_call_that_fails_gives_its_slot_back() -> None:
    slots = Slots("a", "engine")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), slots.take():
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), slots.resume(submit(slots)):
            raise ZeroDivisionError


def test_a_ticket_is_collected_once_and_where_it_was_given() -> None:
    slots, others = Slots("ab", "engine"), Slots("ab", "other")
    ticket = submit(slots)
    with pytest.raises(
        ToodError, match="other: this ticket was collected already, or is another engine's"
    ):
        collect(others, ticket)
    collect(slots, ticket)
    submit(slots)
    with pytest.raises(ToodError, match="collect each ticket once"):
        collect(slots, ticket)


def test_closing_waits_for_calls_at_work_and_not_for_tickets() -> None:
    slots = Slots("ab", "engine")
    ticket = submit(slots)
    entered, leave = threading.Event(), threading.Event()

    def work() -> str:
        with slots.take() as (item, _):
            entered.set()
            leave.wait(5)
            return item

    at_work, worked = in_thread(work)
    assert entered.wait(5)
    closing, closed = in_thread(slots.close)
    time.sleep(0.05)
    assert closed == []
    with pytest.raises(ToodError, match="engine: the engine was closed; open the model again"):
        submit(slots)
    leave.set()
    for thread in (at_work, closing):
        thread.join(5)
    assert (worked, closed) == (["b"], [None])
    with pytest.raises(ToodError, match="was closed"):
        collect(slots, ticket)


def test_closing_wakes_those_who_wait() -> None:
    slots = Slots("a", "engine")
    submit(slots)
    thread, results = in_thread(lambda: submit(slots))
    time.sleep(0.05)
    slots.close()
    thread.join(5)
    assert "was closed" in str(results[0])
