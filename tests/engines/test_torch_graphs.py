"""Recording and replay, with a stand-in for CUDA graphs."""

import pytest
import torch
from engines import fake_torch_cuda

from tood_deploy.engines import torch_graphs


def test_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch_cuda.install(monkeypatch)
    monkeypatch.setattr(torch_graphs, "WARM_UPS", 3)
    calls: list[torch.Tensor] = []

    def double(value: torch.Tensor) -> torch.Tensor:
        calls.append(value)
        return value * 2

    given = torch.tensor([1.0])
    recorded = torch_graphs.Recorded(double, (given,))
    assert len(calls) == torch_graphs.WARM_UPS + 1
    assert recorded(torch.tensor([5.0])).item() == 10
    assert given.item() == 1, "the caller's tensor stays as it is"
    assert recorded(*recorded.inputs).item() == 10


def test_settings_of_convolutions_are_put_back() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with torch_graphs.honest_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before
