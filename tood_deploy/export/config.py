"""What a user asks an export for, as plain values: the source, the target, and all that decides between them.

Makes nothing and imports nothing heavy, so that `preflight` can look at an order before anything long begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tood_deploy.data import MAX_CALIBRATION_IMAGES
from tood_deploy.engines.tensorrt.library import TITLES, Flavour
from tood_deploy.errors import ToodError
from tood_deploy.graph_io import ENGINE_SUFFIXES
from tood_deploy.manifest_sections import OptimizationProfile
from tood_deploy.presets import SIZE_DIVISOR

if TYPE_CHECKING:
    from tood_deploy.data.images import ImagesToCheck

Nms = Literal["unrolled", "loop"]

HIGHEST_LEVEL, MOST_ROUNDS = 5, 256

# Found with TensorRT-RTX 1.7.1 and TensorRT's documents: options that one of the two has and the other has not, and what to do instead.
LACKING = {
    "tensorrt_rtx": {
        "optimisation_level": "it chooses kernels on the GPU that runs the engine, and plans of every level are the same",
        "timing_cache": "it chooses kernels on the GPU that runs the engine, so there are no timings to keep",
        "version_compatible": "its plans run in the very version that built them",
        "hardware_compatible": "its plans run on every GPU of their compute capabilities anyway; name these with --compute-capability",
    },
    "tensorrt": {
        "compute_capabilities": "it builds for the GPU of this machine; for Ampere and newer ones give --hardware-compatible"
    },
}
FLAGS = {
    "optimisation_level": "--optimisation-level",
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "compute_capabilities": "--compute-capability",
}


@dataclass(frozen=True)
class EngineOptions:
    """How the builder works; what is None or empty is left to the library.

    Attributes:
        workspace_mib: the most memory that one layer may use for itself, MiB.
        optimisation_level: 0 (built fast) to 5 (runs fast). TensorRT only.
        timing_cache: file of measured times, read and written; makes the next build faster. TensorRT only.
        version_compatible: the engine also runs in later versions of the library. TensorRT only.
        hardware_compatible: the engine also runs on other GPUs, Ampere and newer. TensorRT only.
        compute_capabilities: such as "8.9": the GPUs to build for. TensorRT-RTX only.
        nms: how the engine holds suppression: "unrolled" in a fixed number of rounds, which CUDA graphs can hold; or as the "loop" of the
            .onnx, which ends by the data.
        nms_rounds: of the unrolled form; `nms_unrolled`'s own number where not given.
    """

    workspace_mib: int | None = None
    optimisation_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    nms: Nms = "unrolled"
    nms_rounds: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ToodError(f"workspace is {self.workspace_mib} MiB; expected a positive number")
        if (
            self.optimisation_level is not None
            and not 0 <= self.optimisation_level <= HIGHEST_LEVEL
        ):
            raise ToodError(
                f"optimisation level is {self.optimisation_level}; expected 0 to {HIGHEST_LEVEL}"
            )
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ToodError(
                f"compute capabilities {', '.join(self.compute_capabilities)}: one stands there twice; give each once"
            )
        if self.nms not in ("unrolled", "loop"):
            raise ToodError(f"nms is {self.nms!r}; expected unrolled or loop")
        if self.nms_rounds is not None and self.nms == "loop":
            raise ToodError(
                f"nms is loop, which ends by itself, and {self.nms_rounds} rounds are given; leave --nms-rounds out"
            )
        if self.nms_rounds is not None and not 1 <= self.nms_rounds <= MOST_ROUNDS:
            raise ToodError(f"nms rounds are {self.nms_rounds}; expected 1 to {MOST_ROUNDS}")

    def check(self, flavour: Flavour) -> None:
        """Raises ToodError if an option is set that this flavour does not have."""
        for name, reason in LACKING[flavour.name].items():
            value = getattr(self, name)
            if value not in (None, ()) and value is not False:
                raise ToodError(
                    f"{FLAGS[name]} means nothing to {TITLES[flavour.name]}: {reason}; leave {FLAGS[name]} out"
                )


MOST_SHAPES = 6
DEFAULT_BATCH = (1, 1, 8)

Batch = tuple[int, int, int]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Profiles:
    """The optimisation profiles of one engine.

    Attributes:
        shapes_hw: rows and columns of every padded image size, one profile each, in this order; multiples of 32.
        batch: the smallest batch, the one to be fast at, and the largest; of every profile.
    """

    shapes_hw: tuple[Shape, ...]
    batch: Batch = DEFAULT_BATCH

    def __post_init__(self) -> None:
        if not 1 <= len(self.shapes_hw) <= MOST_SHAPES:
            raise ToodError(
                f"shapes are {len(self.shapes_hw)}; expected 1 to {MOST_SHAPES}, each of them is optimised for by itself"
            )
        for height, width in self.shapes_hw:
            if min(height, width) < SIZE_DIVISOR or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
                fitting = "x".join(
                    str(max(1, -(-side // SIZE_DIVISOR)) * SIZE_DIVISOR) for side in (height, width)
                )
                raise ToodError(
                    f"shape {height}x{width}: expected height and width as multiples of {SIZE_DIVISOR}; give {fitting}"
                )
        if len(set(self.shapes_hw)) < len(self.shapes_hw):
            raise ToodError(f"shapes {self.text()}: one stands there twice; give each once")
        smallest, best, largest = self.batch
        if not 1 <= smallest <= best <= largest:
            raise ToodError(
                f"batch is {smallest},{best},{largest}; expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX"
            )

    def text(self) -> str:
        """The shapes as the command line takes them."""
        return ",".join(f"{height}x{width}" for height, width in self.shapes_hw)

    def for_manifest(self) -> tuple[OptimizationProfile, ...]:
        """Return them as the manifest holds them."""
        return tuple(OptimizationProfile(shape, *self.batch) for shape in self.shapes_hw)


def default_shapes(imgsz: Sequence[int]) -> tuple[Shape, ...]:
    """Landscape and portrait for images that are scaled to fit (short side, long side): 800, 1333 gives 800x1344 and 1344x800."""
    short, long = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in sorted(imgsz))
    return ((short, long),) if short == long else ((short, long), (long, short))


def shapes_from_text(text: str) -> tuple[Shape, ...]:
    """Reads "800x1344,1344x800".

    Raises:
        ToodError: not of that form.
    """
    parts = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise ToodError(
            f"shapes are {text!r}; expected HxW, or several with commas between them, for example 800x1344,1344x800"
        )
    return tuple((int(part[1]), int(part[2])) for part in parts if part)


def batch_from_text(text: str) -> Batch:
    """Reads "1,8,32" (smallest, best, largest), or "8": every batch up to it, fastest at it.

    Raises:
        ToodError: not of that form.
    """
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise ToodError(
            f"batch is {text!r}; expected MIN,OPT,MAX, for example 1,8,32, or one number, the largest"
        )
    numbers = [int(part) for part in parts]
    smallest, best, largest = numbers if len(numbers) == 3 else (1, numbers[0], numbers[0])
    return smallest, best, largest


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
        queue_delay_us: how long a image waits for others to form a batch, microseconds.
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
            raise ToodError(
                f"backend is {self.backend!r} on {self.device!r}; expected {' or '.join(BACKENDS)} on {' or '.join(DEVICES)}"
            )
        if (
            self.instances < 1
            or self.queue_delay_us < 0
            or any(batch < 1 for batch in self.warm_up_batches)
        ):
            found = f"instances {self.instances}, queue delay {self.queue_delay_us}, warm-up batches {self.warm_up_batches}"
            raise ToodError(
                f"{found}; expected instances and batches of at least 1, a delay of at least 0 microseconds"
            )
        if self.device == "cpu" and self.gpus:
            raise ToodError(
                f"device is cpu, and GPUs {', '.join(map(str, self.gpus))} are given; leave them out, or give device gpu"
            )


Precision = Literal["fp32", "bf16", "fp16", "int8"]
Target = Literal["onnx", "openvino", "engine", "triton"]

# What the names of each target's files end in, the usual one first; for Triton it is a folder.
SUFFIXES: dict[Target, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "openvino": (".xml",),
    "engine": ENGINE_SUFFIXES,
    "triton": ("",),
}


@dataclass(frozen=True)
class CheckpointOptions:
    """What a checkpoint is loaded and first exported with.

    Attributes:
        load: what `load_checkpoint` takes beside the file.
        imgsz: (short side, long side) that the artefact's images are scaled to fit; the preset's own where not given.
        max_det: the most detections a image; the preset's own where not given.
        deform: deformable convolutions as ONNX's operator or as gathers; what the target has where not given.
    """

    load: Mapping[str, Any] = field(default_factory=dict)
    imgsz: Sequence[int] | None = None
    max_det: int | None = None
    deform: Literal["op", "gather"] | None = None


@dataclass(frozen=True)
class PrecisionOrder:
    """Which precision is asked for, and the images that it is chosen by.

    Attributes:
        precision: of convolutions; as the source has it where "fp32".
        rest: int8 alone: of what is not 8-bit.
        target_cpu: int8 for CPUs alone: "portable" weights, or "native" ones, which need VNNI instructions.
        tuned: whether the fastest mixture is searched in place of one precision.
        max_drop: the most that quality may drop, where it is measured.
        calib_data: the folder of images to calibrate on.
        most_images: of that folder.
        annotations: of the images that AP is measured on.
        annotated: these images.
    """

    precision: Precision = "fp32"
    rest: str = "fp32"
    target_cpu: str = "portable"
    tuned: bool = False
    max_drop: float | None = None
    calib_data: Path | None = None
    most_images: int = MAX_CALIBRATION_IMAGES
    annotations: Path | None = None
    annotated: ImagesToCheck | None = None

    @property
    def changes_graph(self) -> bool:
        """Tell whether a float32 graph becomes another one."""
        return self.tuned or self.precision != "fp32"


@dataclass(frozen=True)
class SizeOptions:
    """The sizes and batches of an engine or a served model, as the command line has them.

    Attributes:
        shapes: "800x1344,1344x800" or "auto"; landscape and portrait of the model's own size where not given.
        batch: "1,8,32" or "8"; 1 to 8 where not given.
        images: the folder whose images "auto" is chosen by.
        plot: a file for the plot of what "auto" proposes.
    """

    shapes: str | None = None
    batch: str | None = None
    images: Path | None = None
    plot: Path | None = None

    @property
    def batches(self) -> Batch:
        """The smallest batch, the one to be fastest at, and the largest.

        Raises:
            ToodError: not of that form.
        """
        return batch_from_text(self.batch) if self.batch else DEFAULT_BATCH

    def without_proposal(self, imgsz: tuple[int, int]) -> Profiles | None:
        """The profiles as far as they are known without looking at images; None where nothing was asked for.

        Args:
            imgsz: (short side, long side) of the model, whose landscape and portrait stand in for what "auto" will propose.
        """
        if self.shapes is None and self.batch is None:
            return None
        if self.shapes is None or self.shapes == "auto":
            return Profiles(default_shapes(imgsz), self.batches)
        return Profiles(shapes_from_text(self.shapes), self.batches)

    def profiles(self, imgsz: tuple[int, int], tell: Callable[[Any], None]) -> Profiles | None:
        """The profiles; None where nothing was asked for. A proposal is told as a table."""
        if self.shapes != "auto":
            return self.without_proposal(imgsz)
        from tood_deploy.export.tensorrt.shapes import plot_proposal, proposal_table, propose_shapes

        assert self.images is not None
        proposal = propose_shapes(self.images, imgsz)
        tell(proposal_table(proposal))
        if self.plot is not None:
            plot_proposal(proposal, self.plot)
        return Profiles(proposal.shapes_hw, self.batches)


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        source: a checkpoint, a preset's name, or an .onnx of tood-export.
        output: the file, or for Triton the repository.
        to: what to make.
        precision: of the network; how it is made is for `carry_out` to be told.
        checkpoint: how a checkpoint is taken.
        sizes, engine, flavour: of engines and served models.
        triton: how a model is served; its name is that of the source where empty.
        verify_images: a folder of images to verify on, in addition to the built-in ones.
        check_classes: raises ToodError for class names that the annotations do not go with; None where there are none.
        command: that makes the same again, for the manifest.
        quiet: no progress bars.
    """

    source: str
    output: Path
    to: Target = "onnx"
    precision: PrecisionOrder = field(default_factory=PrecisionOrder)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    flavour: str | None = None
    triton: TritonOptions = field(default_factory=TritonOptions)
    verify_images: Path | None = None
    check_classes: Callable[[Sequence[str]], object] | None = None
    command: str = ""
    quiet: bool = False

    @property
    def builds_engine(self) -> bool:
        """Tell whether TensorRT will build something."""
        return self.to == "engine" or (
            self.to == "triton" and self.triton.backend == "tensorrt" and not self.from_engine
        )

    @property
    def from_engine(self) -> bool:
        """Tell whether the source is an engine, which can be served alone."""
        return self.source.lower().endswith(ENGINE_SUFFIXES)

    @property
    def from_onnx(self) -> bool:
        """Tell whether the source is an .onnx of an earlier export, which has been proven equal to its network."""
        return self.source.lower().endswith(SUFFIXES["onnx"])

    @property
    def served_as(self) -> TritonOptions:
        """How a model is served, with its name.

        Raises:
            ToodError: the name of the source cannot be one on a server.
        """
        return replace(self.triton, name=self.triton.name or Path(self.source).stem)


def default_output(source: str, to: Target, precision: str | None) -> Path:
    """The source's name in the present folder; what is made from an .onnx says in its name what it is, as both have a manifest."""
    stem = Path(source).stem
    if source.lower().endswith(".onnx") and to != "triton":
        parts = (stem, to if to != "onnx" else None, precision)
        stem = "-".join(part for part in parts if part)
    return Path(f"{stem}{SUFFIXES[to][0]}")
