"""What tests of engines share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engines.tensorrt_bench import Bench


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    """A fake GPU and a plan on it, of either flavour, whichever is installed.

    In the end nothing of the GPU's may be held.
    """
    from engines.tensorrt_bench import fake_bench

    with fake_bench(request.param, tmp_path, monkeypatch) as bench:
        yield bench
