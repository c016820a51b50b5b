"""How Triton Inference Server shall serve a model. Knows neither Triton nor models; imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tood_deploy.errors import ToodError

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["gpu", "cpu"]
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "tensorrt")
DEVICES: tuple[Device, ...] = ("gpu", "cpu")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TritonOptions:
    """How a model is served.

    Attributes:
        name: of the model on the server; its file's name where empty.
        backend: what runs it; by the file's ending where not given. "tensorrt" for an .onnx file builds a plan for the GPU of this machine.
        queue_delay_us: how long a picture waits for others to form a batch, microseconds.
        device: what the instances run on.
        gpus: numbers of the GPUs that get instances; all where empty.
        instances: on each GPU, or on the CPU.
        warm_up_batches: batches that every instance runs, at every size, before the model counts as ready; empty for none.
    """

    name: str = ""
    backend: Backend | None = None
    queue_delay_us: int = 1000
    device: Device = "gpu"
    gpus: tuple[int, ...] = ()
    instances: int = 1
    warm_up_batches: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.name and not NAME.fullmatch(self.name):
            raise ToodError(
                f"model name is {self.name!r}; expected letters, digits, _ . and -, as it becomes a folder and part of addresses"
            )
        if self.backend not in (None, *BACKENDS) or self.device not in DEVICES:
            raise ToodError(f"backend is {self.backend!r} on {self.device!r}; expected {' or '.join(BACKENDS)} on {' or '.join(DEVICES)}")
        if self.instances < 1 or self.queue_delay_us < 0 or any(batch < 1 for batch in self.warm_up_batches):
            found = f"instances {self.instances}, queue delay {self.queue_delay_us}, warm-up batches {self.warm_up_batches}"
            raise ToodError(f"{found}; expected instances and batches of at least 1, a delay of at least 0 microseconds")
        if self.device == "cpu" and self.gpus:
            raise ToodError(f"device is cpu, and GPUs {', '.join(map(str, self.gpus))} are given; leave them out, or give device gpu")
