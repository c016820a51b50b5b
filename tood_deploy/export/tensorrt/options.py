"""What an engine is built for: padded image sizes, batches, and how TensorRT's builder works.

The options of `tood-export` for engines and served models, and the profiles that they come to.
Builds nothing and knows no library but by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from tood_deploy.engines.tensorrt.library import Flavour
from tood_deploy.errors import ToodError
from tood_deploy.export.options import (
    AUTO_SHAPES,
    BUILD,
    GRAPH_SOURCE,
    MIN_OPT_MAX,
    PROFILES,
    comma_separated,
    flag_of,
    option,
    options_of,
)
from tood_deploy.manifest_sections import OptimizationProfile
from tood_deploy.presets import SIZE_DIVISOR

Nms = Literal["unrolled", "loop"]
MAX_OPTIMISATION_LEVEL, MAX_NMS_ROUNDS = 5, 256
MAX_SHAPES = 6
DEFAULT_BATCH = (1, 1, 8)

Batch = tuple[int, int, int]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Profiles:
    """The optimisation profiles of one engine.

    Attributes:
        shapes_hw: rows and columns of every padded image size, one profile each, in this order;
            multiples of 32.
        batch: the smallest batch (min), the one to be fastest at (opt), and the largest (max); of
            every profile.
    """

    shapes_hw: tuple[Shape, ...]
    batch: Batch = DEFAULT_BATCH

    def __post_init__(self) -> None:
        if not 1 <= len(self.shapes_hw) <= MAX_SHAPES:
            raise ToodError(
                f"shapes are {len(self.shapes_hw)}; expected 1 to {MAX_SHAPES}, as the engine is "
                "optimised for each by itself"
            )
        for height, width in self.shapes_hw:
            _check_shape(height, width)
        if len(set(self.shapes_hw)) < len(self.shapes_hw):
            raise ToodError(f"shapes {self.text()}: one stands there twice; give each once")
        check_batch(self.batch)

    def text(self) -> str:
        """Return the shapes as the command line takes them."""
        return ",".join(f"{height}x{width}" for height, width in self.shapes_hw)

    def for_manifest(self) -> tuple[OptimizationProfile, ...]:
        """Return them as the manifest holds them."""
        return tuple(OptimizationProfile(shape, *self.batch) for shape in self.shapes_hw)


def _check_shape(height: int, width: int) -> None:
    """Refuse a size that is no multiple of 32, and name the next one that is."""
    if min(height, width) < SIZE_DIVISOR or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
        fitting = "x".join(
            str(max(1, -(-side // SIZE_DIVISOR)) * SIZE_DIVISOR) for side in (height, width)
        )
        raise ToodError(
            f"shape {height}x{width}: expected height and width as multiples of {SIZE_DIVISOR}; "
            f"give {fitting}"
        )


def check_batch(batch: Batch) -> None:
    """Refuse batches that are not in order.

    Raises:
        ToodError: not 1 <= min <= opt <= max.
    """
    smallest, best, largest = batch
    if not 1 <= smallest <= best <= largest:
        raise ToodError(
            f"batch is {smallest},{best},{largest}; "
            "expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX"
        )


def default_shapes(imgsz: Sequence[int]) -> tuple[Shape, ...]:
    """Return landscape and portrait for images that are scaled to fit (short side, long side).

    (800, 1333) gives 800x1344 and 1344x800.
    """
    short, long = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in sorted(imgsz))
    return ((short, long),) if short == long else ((short, long), (long, short))


def shapes_from_text(text: str) -> tuple[Shape, ...]:
    """Read "800x1344,1344x800".

    Raises:
        ToodError: not of that form.
    """
    parts = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise ToodError(
            f"shapes are {text!r}; expected HxW, or several with commas between them, "
            "for example 800x1344,1344x800"
        )
    return tuple((int(part[1]), int(part[2])) for part in parts if part)


def shapes_or_auto(text: str) -> tuple[Shape, ...] | Literal["auto"]:
    """Read what `shapes_from_text` reads, or "auto".

    Raises:
        ToodError: neither of them.
    """
    return "auto" if text == "auto" else shapes_from_text(text)


def batch_from_text(text: str) -> Batch:
    """Read "1,8,32" (min, opt, max), or "8": every batch up to it, fastest at it.

    Raises:
        ToodError: not of that form.
    """
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise ToodError(
            f"batch is {text!r}; expected MIN,OPT,MAX, for example 1,8,32, "
            "or one number, the largest"
        )
    numbers = [int(part) for part in parts]
    smallest, best, largest = numbers if len(numbers) == 3 else (1, numbers[0], numbers[0])
    check_batch((smallest, best, largest))
    return smallest, best, largest


def int8_notes(flavour: Flavour) -> list[str]:
    """Return what must be known of 8-bit layers in a library; nothing where they are fast."""
    if flavour.name == "tensorrt":
        return []
    return [
        f"int8: {flavour.title} fuses no 8-bit convolution (every one writes float32 and is "
        "quantised again by a kernel of its own: 9 bytes a value, 2 in fp16), so the engine will "
        "be slower than in fp16 and no more accurate; --precision fp16 is what to give it, or "
        "--flavour tensorrt for int8"
    ]


@dataclass(frozen=True)
class SizeOptions:
    """The padded image sizes and batches of an engine or a served model."""

    GROUP: ClassVar = "engine and triton"
    ONLY: ClassVar = (GRAPH_SOURCE, PROFILES)

    max_batch: int | None = option(
        None,
        "--max-batch",
        "the largest batch: every batch from 1 to N is taken, N fastest (default: 8, 1 fastest)",
        parse=int,
        metavar="N",
        never=(MIN_OPT_MAX,),
    )
    batch: Batch | None = option(
        None,
        "--batch",
        "the smallest batch, the one to be fastest at, and the largest",
        parse=batch_from_text,
        metavar="MIN,OPT,MAX",
    )
    shapes: tuple[Shape, ...] | Literal["auto"] | None = option(
        None,
        "--shapes",
        "padded image sizes, 1 to 6, or auto with --images (default: landscape and portrait of "
        "--imgsz); for sliced images the size of a slice, then that of the whole image, such as "
        "640x640,480x640",
        parse=shapes_or_auto,
        metavar="HxW,...",
    )
    shapes_plot: Path | None = option(
        None,
        "--shapes-plot",
        "a plot of what --shapes auto proposes (.png, .svg, .pdf)",
        parse=Path,
        metavar="FILE",
        only=(AUTO_SHAPES,),
    )

    def __post_init__(self) -> None:
        if self.max_batch is not None and self.max_batch < 1:
            raise ToodError(f"the largest batch is {self.max_batch}; expected at least 1")
        if isinstance(self.shapes, tuple):
            Profiles(self.shapes)  # refuses what cannot be

    @property
    def batches(self) -> Batch:
        """Return the smallest batch, the one to be fastest at, and the largest."""
        if self.max_batch is not None:
            return 1, self.max_batch, self.max_batch
        return self.batch or DEFAULT_BATCH

    def profiles(
        self, imgsz: tuple[int, int], proposed: tuple[Shape, ...] | None = None
    ) -> Profiles | None:
        """Return the profiles; None where nothing was asked for.

        Args:
            imgsz: (short side, long side) of the model, for its landscape and portrait.
            proposed: what "auto" has come to; landscape and portrait stand in before it has.
        """
        if self.shapes is None and self.batch is None and self.max_batch is None:
            return None
        chosen = self.shapes if isinstance(self.shapes, tuple) else proposed
        return Profiles(chosen or default_shapes(imgsz), self.batches)


@dataclass(frozen=True)
class EngineOptions:
    """How TensorRT's builder works; what is None or empty is left to the library.

    What one of the two libraries lacks was found with TensorRT-RTX 1.7.1 and TensorRT's documents.

    Attributes:
        workspace_mib: MiB.
        compute_capabilities: such as "8.9".
        nms_rounds: of the unrolled form; None for the number of `nms_unrolled`.
    """

    GROUP: ClassVar = "engine and triton"
    ONLY: ClassVar = (GRAPH_SOURCE, BUILD)

    workspace_mib: int | None = option(
        None, "--workspace", "the most memory of one layer", parse=int, metavar="MIB"
    )
    optimisation_level: int | None = option(
        None,
        "--optimisation-level",
        "0 builds fast, 5 runs fast (TensorRT)",
        parse=int,
        metavar="N",
        lacking="tensorrt_rtx",
        instead="it chooses kernels on the GPU that runs the engine, and plans of every "
        "level are the same",
    )
    timing_cache: Path | None = option(
        None,
        "--timing-cache",
        "measured times, read and written (TensorRT)",
        parse=Path,
        metavar="FILE",
        lacking="tensorrt_rtx",
        instead="it chooses kernels on the GPU that runs the engine, so there are no timings "
        "to keep",
    )
    version_compatible: bool = option(
        False,
        "--version-compatible",
        "also runs in later versions (TensorRT)",
        parse=None,
        lacking="tensorrt_rtx",
        instead="its plans run in the very version that built them",
    )
    hardware_compatible: bool = option(
        False,
        "--hardware-compatible",
        "also runs on other GPUs, Ampere and newer (TensorRT)",
        parse=None,
        lacking="tensorrt_rtx",
        instead="its plans run on every GPU of their compute capabilities anyway; name these "
        "with --compute-capability",
    )
    compute_capabilities: tuple[str, ...] = option(
        (),
        "--compute-capability",
        "the GPUs to build for (TensorRT-RTX)",
        parse=comma_separated,
        metavar="X.Y,...",
        lacking="tensorrt",
        instead="it builds for the GPU of this machine; for Ampere and newer ones give "
        "--hardware-compatible",
    )
    nms: Nms = option(
        "unrolled",
        "--nms",
        "suppression in a fixed number of rounds, as CUDA graphs need it, or as a loop in the "
        "network (default: unrolled)",
        choices=("unrolled", "loop"),
    )
    nms_rounds: int | None = option(
        None,
        "--nms-rounds",
        "how many; an image for which they are too few is an error (default: 16)",
        parse=int,
        metavar="N",
    )

    def __post_init__(self) -> None:
        level, rounds = self.optimisation_level, self.nms_rounds
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ToodError(f"workspace is {self.workspace_mib} MiB; expected a positive number")
        if level is not None and not 0 <= level <= MAX_OPTIMISATION_LEVEL:
            raise ToodError(
                f"optimisation level is {level}; expected 0 to {MAX_OPTIMISATION_LEVEL}"
            )
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            names = ", ".join(self.compute_capabilities)
            raise ToodError(f"compute capabilities {names}: one stands there twice; give each once")
        if self.nms not in get_args(Nms):
            raise ToodError(f"nms is {self.nms!r}; expected {' or '.join(get_args(Nms))}")
        if rounds is not None and self.nms == "loop":
            raise ToodError(
                f"nms is loop, which ends by itself, and {rounds} rounds are given; "
                f"leave {flag_of(EngineOptions, 'nms_rounds')} out"
            )
        if rounds is not None and not 1 <= rounds <= MAX_NMS_ROUNDS:
            raise ToodError(f"nms rounds are {rounds}; expected 1 to {MAX_NMS_ROUNDS}")

    def check(self, flavour: Flavour) -> None:
        """Refuse options that one of the two libraries lacks.

        Raises:
            ToodError: there is one; the message says why, and what to do.
        """
        for name, one in options_of(EngineOptions):
            value = getattr(self, name)  # 0 is a level, and given
            if one.lacking == flavour.name and value not in (None, ()) and value is not False:
                raise ToodError(
                    f"{one.flag} means nothing to {flavour.title}: {one.instead}; "
                    f"leave {one.flag} out"
                )
