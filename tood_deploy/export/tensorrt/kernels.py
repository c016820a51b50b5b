"""What TensorRT-RTX's builder made of a network, read from its log: no GPU is needed.

Comes in: the list of layers that the builder prints. Goes out: kernels with their types, shapes and
streams, and what they come to. Which kernel runs in the end the library chooses on the GPU; how
many there are and what they read and write is settled here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tood_deploy.errors import ArtefactError

# One line a layer. Names may hold commas and brackets, so the keys are what is looked for.
LAYER = re.compile(
    r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w*), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName:.*?"
    r"StreamId: (?P<stream>\d+)",
    re.MULTILINE,
)
TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[^\]]*)\],.*?Datatype: (?P<type>\w+)"
)
REGION = re.compile(r"_myl(\d+)_\d+$")  # at the end of a name; every profile has its own
PARTS = re.compile(r"[A-Z][a-z0-9]*")  # of a generated kernel's name, an operation each
GENERATED = "__myl_"
# Layers that order streams and loops, or compute shapes on the host.
NO_KERNEL = ("signal", "wait", "cjmp", "jmp", "label", "shape_call")
MOVING = {"Move", "Resh", "Tran", "Cast", "Copy"}
BYTES = {
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Int8": 1,
    "UInt8": 1,
    "Bool": 1,
    "Int32": 4,
    "Int64": 8,
}
PRECISIONS = {"Int8": "int8", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32"}


@dataclass(frozen=True)
class KernelTensor:
    """What a kernel reads or writes.

    Attributes:
        name: of the builder.
        shape: at a batch of one; a batch or size that is open counts as 1.
        type: as the builder writes it, such as "Half".
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * BYTES.get(self.type, 4)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the builder; a generated one lists its operations.
        kind: such as "kgen" (generated), "correlation" (a convolution), "gemm".
        inputs, constants, outputs: what it reads and writes.
        stream: that it runs on.
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    stream: int

    @property
    def only_moves(self) -> bool:
        """Return whether it computes nothing: it copies, turns or converts values."""
        if self.kind == "copy":
            return True
        operations = self.name.removeprefix(GENERATED).partition("_")[0]
        return self.name.startswith(GENERATED) and set(PARTS.findall(operations)) <= MOVING

    @property
    def bytes(self) -> int:
        """Return what it reads and writes, each once."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.constants, *self.outputs))

    @property
    def precision(self) -> str:
        """Return the lowest precision among what it reads and writes; "" for whole numbers."""
        types = {tensor.type for tensor in (*self.inputs, *self.outputs)}
        return next((name for type_, name in PRECISIONS.items() if type_ in types), "")


@dataclass(frozen=True)
class KernelSummary:
    """What the kernels of an engine come to.

    Attributes:
        kernels: how many launches an image takes; of a loop's body once.
        moving: those of them that only copy, turn or convert.
        streams: that they are spread over.
        mib: read and written by all of them for one image, weights included.
        by_precision: how many there are of every precision.
        by_kind: how many there are of every kind.
        requantised: 8-bit convolutions that write float32, so that another kernel quantises.
    """

    kernels: int
    moving: int
    streams: int
    mib: float
    by_precision: Mapping[str, int]
    by_kind: Mapping[str, int]
    requantised: int

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.by_precision.items())
        streams = f"{self.streams} stream{'s' if self.streams > 1 else ''}"
        text = (
            f"the built engine has {self.kernels} kernels on {streams} ({types}); {self.moving} of "
            f"them only move or convert; {self.mib:.0f} MiB read and written an image, each value "
            "once a kernel"
        )
        if self.requantised:
            text += (
                f"; {self.requantised} convolutions of 8 bits write float32, which another kernel "
                "quantises"
            )
        return text


def kernels_from_log(text: str, profiles: int = 1) -> tuple[Kernel, ...]:
    """Return the kernels in the builder's list that one run launches: those of the first profile.

    Args:
        text: the message that begins with `KERNEL_LIST`.
        profiles: that the engine was built with.

    Raises:
        ArtefactError: there is none in it: another version writes it otherwise.
    """
    kernels = tuple(
        Kernel(
            match["name"],
            match["kind"],
            tuple(_tensors(match["inputs"])),
            tuple(_tensors(match["constants"])),
            tuple(_tensors(match["outputs"])),
            int(match["stream"]),
        )
        for match in LAYER.finditer(text)
        if match["kind"] not in NO_KERNEL
    )
    if not kernels:
        raise ArtefactError(
            "the builder's log lists no kernels in the form of TensorRT-RTX 1.7; use that version "
            "to see them"
        )
    regions = sorted({_region(kernel) for kernel in kernels})
    first = regions[: max(1, len(regions) // profiles)]
    return tuple(kernel for kernel in kernels if _region(kernel) in first)


def _region(kernel: Kernel) -> int:
    match = REGION.search(kernel.name)
    return int(match[1]) if match else 0


def _tensors(text: str) -> Iterator[KernelTensor]:
    for match in TENSOR.finditer(text):
        sides = [side.strip() for side in match["shape"].split(",") if side.strip()]
        shape = tuple(int(side) if side.isdecimal() else 1 for side in sides)
        yield KernelTensor(match["name"], shape, match["type"])


def summarise(kernels: Sequence[Kernel]) -> KernelSummary:
    """Return what kernels come to."""
    precisions = Counter(kernel.precision or "whole numbers" for kernel in kernels)
    return KernelSummary(
        len(kernels),
        sum(kernel.only_moves for kernel in kernels),
        len({kernel.stream for kernel in kernels}),
        sum(kernel.bytes for kernel in kernels) / 2**20,
        dict(precisions.most_common()),
        dict(Counter(kernel.kind for kernel in kernels).most_common()),
        sum(_is_requantised(kernel) for kernel in kernels),
    )


def _is_requantised(kernel: Kernel) -> bool:
    """Return whether it is a convolution or product of 8 bits with float32 behind it."""
    reads, writes = ({tensor.type for tensor in side} for side in (kernel.inputs, kernel.outputs))
    return not kernel.name.startswith(GENERATED) and "Int8" in reads and writes == {"Float"}
