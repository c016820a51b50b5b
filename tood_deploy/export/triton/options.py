"""How a model is served by NVIDIA Triton Inference Server: the options of `tood-export` for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from tood_deploy.errors import ToodError
from tood_deploy.export.options import TRITON, numbers_from_text, option, warm_up_from_text

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["cuda", "cpu"]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MAX_NAME = 200  # characters


@dataclass(frozen=True)
class TritonOptions:
    """How a model is served.

    Attributes:
        name: empty for the name of the model's file.
        backend: None for what runs the model's file. "tensorrt" for an .onnx builds a plan for the
            GPU of this machine.
        queue_delay_us: microseconds.
        gpus: numbers; empty for all.
        warm_up_batches: batches that every instance runs, at every size, before the model counts
            as ready; empty for none.
    """

    GROUP: ClassVar = "triton"
    ONLY: ClassVar = (TRITON,)

    name: str = option(
        "", "--name", "of the model on the server (default: the file's name)", metavar="NAME"
    )
    backend: Backend | None = option(
        None, "--backend", "what runs the model (default: onnxruntime)", choices=get_args(Backend)
    )
    queue_delay_us: int = option(
        1000,
        "--queue-delay",
        "microseconds that an image waits for others (default: 1000)",
        parse=int,
        metavar="US",
    )
    device: Device = option(
        "cuda",
        "--device",
        "what the instances run on (default: cuda)",
        choices=get_args(Device),
        old_choices=(("gpu", "cuda"),),
    )
    gpus: tuple[int, ...] = option(
        (),
        "--gpus",
        "numbers of the GPUs that get instances (default: all)",
        parse=numbers_from_text,
        metavar="N,...",
    )
    instances: int = option(
        1, "--instances", "on each GPU, or on the CPU (default: 1)", parse=int, metavar="N"
    )
    warm_up_batches: tuple[int, ...] = option(
        (1,),
        "--warm-up",
        "batches to run before the model counts as ready, or none (default: 1)",
        parse=warm_up_from_text,
        metavar="N,...",
    )

    def __post_init__(self) -> None:
        if self.name and not (NAME.fullmatch(self.name) and len(self.name) <= MAX_NAME):
            shown = self.name if len(self.name) <= MAX_NAME else f"{self.name[:40]}..."
            raise ToodError(
                f"model name is {shown!r} ({len(self.name)} characters); expected up to {MAX_NAME} "
                "letters, digits, _ . and -, as it becomes a folder and part of addresses; give "
                "--name"
            )
        backends, devices = get_args(Backend), get_args(Device)
        if self.backend not in (None, *backends) or self.device not in devices:
            raise ToodError(
                f"backend is {self.backend!r} on {self.device!r}; "
                f"expected {' or '.join(backends)} on {' or '.join(devices)}"
            )
        if min(self.instances, *self.warm_up_batches, 1) < 1 or self.queue_delay_us < 0:
            raise ToodError(
                f"instances {self.instances}, queue delay {self.queue_delay_us}, warm-up batches "
                f"{self.warm_up_batches}; expected instances and batches of at least 1, "
                "a delay of at least 0 microseconds"
            )
        if self.device == "cpu" and self.gpus:
            raise ToodError(
                f"device is cpu, and GPUs {', '.join(map(str, self.gpus))} are given; "
                "leave them out, or give device cuda"
            )
