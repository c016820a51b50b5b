"""Which of a few sets of buffers a call may use, among threads. Knows no GPU.

A slot is free, busy (a call is at work with it) or held (a batch was submitted and waits to be collected).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tood_deploy.errors import ToodError

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Ticket:
    """A batch that was submitted and can be collected once.

    Attributes:
        index: the slot it lies in.
        batch: how many pictures it holds.
        thread: the thread that submitted it.
    """

    index: int
    batch: int
    thread: int = field(default_factory=threading.get_ident)


class Slots(Generic[Item]):
    """Hands out slots. A call waits where another thread is going to give one back."""

    def __init__(self, items: Sequence[Item], name: str) -> None:
        """Takes the sets of buffers; `name` is the engine's, for errors."""
        self._items = tuple(items)
        self._name = name
        self._free = set(range(len(items)))
        self._held: dict[int, Ticket] = {}
        self._busy = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def take(self) -> Iterator[tuple[Item, Callable[[int], Ticket]]]:
        """A free slot for the block, and a function that keeps it for a batch of so many pictures beyond the block.

        Raises:
            ToodError: all slots hold batches that this thread submitted and did not collect; or the engine was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or self._blocked_by_caller())
            self._check_open()
            if not self._free:
                raise ToodError(f"{self._name}: {len(self._items)} batches are submitted already; collect the oldest one first")
            index = min(self._free)  # one caller at a time stays with one slot, whose buffers are warm
            self._free.remove(index)
            self._busy += 1
        try:
            yield self._items[index], lambda batch: self._held.setdefault(index, Ticket(index, batch))
        finally:
            self._give_back(index)

    @contextmanager
    def resume(self, ticket: Ticket) -> Iterator[Item]:
        """The slot of a submitted batch for the block; free after it.

        Raises:
            ToodError: the ticket was collected before or is of another engine; or the engine was closed.
        """
        with self._changed:
            self._check_open()
            if self._held.get(ticket.index) is not ticket:
                raise ToodError(f"{self._name}: this ticket was collected already, or is another engine's; collect each ticket once")
            del self._held[ticket.index]
            self._busy += 1
        try:
            yield self._items[ticket.index]
        finally:
            self._give_back(ticket.index)

    def close(self) -> None:
        """Lets nobody in any more, and waits for the calls at work; batches that were not collected are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy)

    def _give_back(self, index: int) -> None:
        with self._changed:
            self._busy -= 1
            if index not in self._held:
                self._free.add(index)
            self._changed.notify_all()

    def _blocked_by_caller(self) -> bool:
        caller = threading.get_ident()
        return len(self._held) == len(self._items) and all(ticket.thread == caller for ticket in self._held.values())

    def _check_open(self) -> None:
        if self._closed:
            raise ToodError(f"{self._name}: the engine was closed; open the model again")
