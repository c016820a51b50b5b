"""What a user asks an export for, as plain values: the source, the target, and all that decides between them.

Makes nothing and imports nothing heavy, so that `preflight` can look at an order before anything long begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tood_deploy.export.image_check import ImageSet
from tood_deploy.export.option_rules import ENGINES
from tood_deploy.export.pictures import MOST_PICTURES
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.profiles import DEFAULT_BATCH, Batch, Profiles, batch_from_text, default_shapes, shapes_from_text
from tood_deploy.export.tensorrt.shape_plan import propose_shapes
from tood_deploy.export.tensorrt.shape_report import plot_proposal, proposal_table
from tood_deploy.export.triton.options import TritonOptions

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Target = Literal["onnx", "openvino", "engine", "triton"]

# What the names of each target's files end in, the usual one first; for Triton it is a folder.
SUFFIXES: dict[Target, tuple[str, ...]] = {"onnx": (".onnx",), "openvino": (".xml",), "engine": ENGINES, "triton": ("",)}


@dataclass(frozen=True)
class CheckpointOptions:
    """What a checkpoint is loaded and first exported with.

    Attributes:
        load: what `load_checkpoint` takes beside the file.
        imgsz: (short side, long side) that the artefact's pictures are scaled to fit; the preset's own where not given.
        max_det: the most detections a picture; the preset's own where not given.
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
    most_images: int = MOST_PICTURES
    annotations: Path | None = None
    annotated: ImageSet | None = None

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
        images: the folder whose pictures "auto" is chosen by.
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
        verify_images: a folder of pictures to verify on, in addition to the built-in ones.
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
        return self.to == "engine" or (self.to == "triton" and self.triton.backend == "tensorrt" and not self.from_engine)

    @property
    def from_engine(self) -> bool:
        """Tell whether the source is an engine, which can be served alone."""
        return self.source.lower().endswith(ENGINES)

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
