"""What a user asks an export for, as plain values: the source, the target, and all that decides between them. Makes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tood_deploy.export.precision.lowering import PrecisionOptions
from tood_deploy.export.tensorrt.engine_options import EngineOptions
from tood_deploy.export.tensorrt.profiles import Profiles, batch_from_text, default_shapes, shapes_from_text
from tood_deploy.export.tensorrt.shape_plan import propose_shapes
from tood_deploy.export.tensorrt.shape_report import plot_proposal, proposal_table
from tood_deploy.export.triton.options import TritonOptions

Target = Literal["onnx", "openvino", "engine", "triton"]

# What the names of each target's files end in, the usual one first; for Triton it is a folder.
SUFFIXES: dict[Target, tuple[str, ...]] = {"onnx": (".onnx",), "openvino": (".xml",), "engine": (".engine", ".plan"), "triton": ("",)}


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

    def profiles(self, imgsz: tuple[int, int], tell: Callable[[Any], None]) -> Profiles | None:
        """The profiles; None where nothing was asked for. A proposal is told as a table."""
        if self.shapes is None and self.batch is None:
            return None
        shapes = default_shapes(imgsz)
        if self.shapes == "auto":
            assert self.images is not None
            proposal = propose_shapes(self.images, imgsz)
            tell(proposal_table(proposal))
            if self.plot is not None:
                plot_proposal(proposal, self.plot)
            shapes = proposal.shapes_hw
        elif self.shapes is not None:
            shapes = shapes_from_text(self.shapes)
        return Profiles(shapes, batch_from_text(self.batch)) if self.batch else Profiles(shapes)


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        source: a checkpoint, a preset's name, or an .onnx of tood-export.
        output: the file, or for Triton the repository.
        to: what to make.
        precision: of the network.
        checkpoint: how a checkpoint is taken.
        sizes, engine, flavour: of engines and served models.
        triton: how a model is served.
        verify_images: a folder of pictures to verify on, in addition to the built-in ones.
        command: that makes the same again, for the manifest.
        quiet: no progress bars.
    """

    source: str
    output: Path
    to: Target = "onnx"
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    flavour: str | None = None
    triton: TritonOptions = field(default_factory=TritonOptions)
    verify_images: Path | None = None
    command: str = ""
    quiet: bool = False


def default_output(source: str, to: Target, precision: str | None) -> Path:
    """The source's name in the present folder; what is made from an .onnx says in its name what it is, as both have a manifest."""
    stem = Path(source).stem
    if source.lower().endswith(".onnx") and to != "triton":
        parts = (stem, to if to != "onnx" else None, precision)
        stem = "-".join(part for part in parts if part)
    return Path(f"{stem}{SUFFIXES[to][0]}")
