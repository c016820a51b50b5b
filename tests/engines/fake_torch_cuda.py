"""A stand-in for PyTorch's CUDA: streams, events and graphs that run at once, on the CPU.

A graph keeps the function that was recorded, as the fake of `torch.cuda.graph` cannot see kernels;
what `replay` gives is written into the tensors of the recording, as a GPU would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tood_deploy.engines import torch_fast, torch_graphs
from tood_deploy.engines.torch_graphs import Recorded


class Stream:
    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, event: "Event") -> None:
        assert event.recorded, "a stream waits for what was never recorded"

    def synchronize(self) -> None: ...


class Event:
    def __init__(self) -> None:
        self.recorded = False

    def record(self, _: Any = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "the host waits for what was never recorded"


class Graph:
    """Counts replays; `owner` is the recording that it belongs to."""

    def __init__(self) -> None:
        self.replays = 0
        self.owner: Any = None

    def replay(self) -> None:
        self.replays += 1
        from torch.utils._pytree import tree_leaves as flat

        fresh = self.owner.function(*self.owner.inputs)
        for old, new in zip(flat(self.owner.outputs), flat(fresh), strict=True):
            old.copy_(new)


@contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


class WatchedRecorded(Recorded):
    """Keeps its function for the fake graph, and itself in `made`."""

    made: list["WatchedRecorded"]

    def __init__(self, function: Callable[..., Any], inputs: Any, pool: Any = None) -> None:
        self.function = function
        super().__init__(function, inputs, pool)
        self.graph.owner = self  # pyright: ignore[reportAttributeAccessIssue] - the fake's own
        self.made.append(self)


def install(monkeypatch: pytest.MonkeyPatch) -> list[WatchedRecorded]:
    """Put the stand-in in PyTorch's place, and return the recordings, which grow."""
    cuda = torch.cuda
    for name, fake in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": nothing,
        "graph": nothing,
        "current_stream": Stream,
        "graph_pool_handle": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation: True,
    }.items():
        monkeypatch.setattr(cuda, name, fake)
    made: list[WatchedRecorded] = []
    monkeypatch.setattr(WatchedRecorded, "made", made, raising=False)
    monkeypatch.setattr(torch_graphs, "Recorded", WatchedRecorded)
    monkeypatch.setattr(torch_graphs, "WARM_UPS", 0)
    monkeypatch.setattr(
        torch_graphs, "pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(torch_fast, "place_of", lambda _: torch.device("cpu"))
    return made
