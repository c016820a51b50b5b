"""One process or many: what a worker knows of the others.

Everything works, and costs nothing, in a single process. Knows no data and no network.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tood_deploy.errors import DeviceError


def rank() -> int:
    """Return this worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this worker is the one that writes and prints."""
    return rank() == 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all workers, detached."""
    values = values.detach().float().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Tell whether the flag is raised on any worker; all get the same answer."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(value: Any) -> list[Any]:
    """Return every worker's value, in order of their numbers, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all workers."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the group that torchrun describes in the environment, if any; leave it at the end.

    Args:
        device: "cpu" or "cuda"; every worker of a machine takes the GPU of its local number.

    Yields:
        This worker's device.

    Raises:
        DeviceError: CUDA was asked for and is not there, or has fewer GPUs than workers.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(device if device != "cuda" else f"cuda:{local_rank}")
    if chosen.type == "cuda":
        _claim_gpu(local_rank)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def _claim_gpu(local_rank: int) -> None:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= visible:
        raise DeviceError(
            f"worker {local_rank} of this machine needs a GPU, PyTorch {torch.__version__} sees "
            f"{visible}; start as many workers as there are GPUs, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
