"""What a user asks an export for: every option of `tood-export`, once, as a field of a dataclass.

Parser, values and the rules of which options go together all come from these fields
(`export.options`), so that a new option is one new field; its help text says what it means. Makes
nothing, reads no file and imports nothing heavy, so that `preflight` can look at a configuration
before anything long begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from tood_deploy.data import MAX_CALIBRATION_IMAGES
from tood_deploy.engines.tensorrt.library import Name as FlavourName
from tood_deploy.errors import ToodError
from tood_deploy.export.options import (
    ANNOTATED,
    AP_LIMIT,
    AUTO,
    AUTO_SHAPES,
    CALIBRATED,
    CHECKPOINT_SOURCE,
    CPU_TARGET,
    ENGINE,
    FALLBACK_OF_SEARCH,
    FALLBACK_TARGET,
    GRAPH_SOURCE,
    IMAGE_USER,
    INT8,
    INT8_OR_SEARCH,
    LOWERED,
    SEARCH,
    TORCH,
    TRITON,
    comma_separated,
    option,
)
from tood_deploy.export.tensorrt.options import EngineOptions, SizeOptions
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.graph_io import ENGINE_SUFFIXES, ONNX_SUFFIX, OVMS, TARGET_SUFFIXES, Target

Precision = Literal["fp32", "bf16", "fp16", "int8", "auto"]
FloatPrecision = Literal["fp32", "bf16", "fp16"]
CalibrationMethod = Literal["entropy", "percentile", "minmax"]
Scheme = Literal["s8s8", "u8s8", "u8s7"]
DeformForm = Literal["op", "gather"]


@dataclass(frozen=True)
class CheckpointOptions:
    """How a checkpoint is loaded, and what its graph is made with.

    Attributes:
        load: what `load_checkpoint` takes beside the file.
        imgsz, max_det: None for the preset's own.
        deform: None for the form that the target has.
    """

    ONLY: ClassVar = (CHECKPOINT_SOURCE,)

    load: Mapping[str, Any] = field(default_factory=dict)
    imgsz: tuple[int, int] | None = option(
        None,
        "--imgsz",
        "the artefact's default image size: short and long side in pixels",
        parse=int,
        count=2,
        metavar=("H", "W"),
    )
    max_det: int | None = option(
        None, "--max-det", "the most detections of an image (default: 100)", parse=int, metavar="N"
    )
    deform: DeformForm | None = option(
        None,
        "--deform",
        "deformable convolutions as ONNX's operator (ONNX Runtime, TensorRT) or as gathers "
        "(OpenVINO, TensorRT-RTX)",
        choices=("op", "gather"),
        never=(TORCH,),
    )


@dataclass(frozen=True)
class PrecisionOptions:
    """Which precision is asked for, and the images that it is chosen by.

    Attributes:
        fallback: None where not given: float32, in a search for an engine fp16.
        keep_fp32: patterns as of file names.
    """

    precision: Precision = option(
        "fp32",
        "--precision",
        "of convolutions and matrix products, written into the graph "
        "(default: fp32, or that of the .onnx); auto, for OpenVINO: the fastest on this machine "
        "that stays within its limits",
        choices=("fp32", "bf16", "fp16", "int8", "auto"),
        only=(GRAPH_SOURCE,),
        never=(SEARCH,),
    )
    autotune: bool = option(
        False,
        "--autotune-precision",
        "the fastest mixture whose quality drops by no more than --max-ap-drop or --max-drop, "
        "measured on this machine",
        parse=None,
        only=(GRAPH_SOURCE,),
        never=(TRITON, TORCH),
    )
    fallback: FloatPrecision | None = option(
        None,
        "--fallback-precision",
        "of what is not 8-bit, in an int8 model (default: fp32) or a search for an engine "
        "(default: fp16)",
        choices=("fp32", "bf16", "fp16"),
        old_flag="--rest",
        only=(INT8_OR_SEARCH, FALLBACK_OF_SEARCH, FALLBACK_TARGET),
        never=(AUTO,),
    )
    keep_fp32: tuple[str, ...] = option(
        (),
        "--keep-fp32",
        "patterns of layers that stay in float32, separated by commas",
        parse=comma_separated,
        metavar="NAMES",
        old_flag="--keep",
        only=(GRAPH_SOURCE,),
        never=(SEARCH, TORCH),
    )
    calib_data: Path | None = option(
        None,
        "--calib-data",
        "images to calibrate on, 64 or more; for fp16: to find what it cannot hold",
        parse=Path,
        metavar="DIR",
        group="int8",
        only=(GRAPH_SOURCE, CALIBRATED),
        required=(INT8, SEARCH),
        expected="DIR: a folder of 64 or more images like those to come",
    )
    calib_images: int = option(
        MAX_CALIBRATION_IMAGES,
        "--calib-images",
        f"at most so many images of --calib-data (default: {MAX_CALIBRATION_IMAGES})",
        parse=int,
        metavar="N",
        group="int8",
        old_flag="--calib-pictures",
        only=(CALIBRATED,),
    )
    calib_method: CalibrationMethod = option(
        "percentile",
        "--calib-method",
        "how ranges are chosen (default: percentile)",
        choices=("entropy", "percentile", "minmax"),
        group="int8",
        only=(INT8_OR_SEARCH,),
    )
    target_cpu: Literal["portable", "native"] = option(
        "portable",
        "--target-cpu",
        "int8 for CPUs: weights that every CPU adds up exactly, or all 8 bits, which need VNNI "
        "instructions (default: portable)",
        choices=("portable", "native"),
        group="int8",
        only=(INT8_OR_SEARCH, CPU_TARGET),
    )
    max_drop: float | None = option(
        None,
        "--max-drop",
        "keep the most sensitive layers in float until quality drops by no more: per cent of "
        "mismatched detections",
        parse=float,
        metavar="D",
        group="int8",
        only=(INT8_OR_SEARCH,),
        never=(AP_LIMIT,),
    )
    max_ap_drop: float | None = option(
        None,
        "--max-ap-drop",
        "the same in points of AP, 0 to 100, on annotated images",
        parse=float,
        metavar="D",
        group="int8",
        only=(INT8_OR_SEARCH,),
    )
    annotations: Path | None = option(
        None,
        "--annotations",
        "COCO annotations of the images in --images, to measure AP on",
        parse=Path,
        metavar="FILE",
        group="int8",
        only=(LOWERED,),
        never=(TORCH,),
        required=(AP_LIMIT,),
        expected="FILE: COCO annotations (--max-drop does without)",
    )

    def __post_init__(self) -> None:
        if (drop := self.largest_drop) is not None and not drop >= 0:
            raise ToodError(f"the largest drop is {drop}; expected 0 or more")
        if self.autotune and drop is None:
            raise ToodError(
                "--autotune-precision needs --max-ap-drop D with --annotations and --images, "
                "or --max-drop D without annotations"
            )

    @property
    def changes_graph(self) -> bool:
        """Tell whether a float32 graph becomes another one."""
        return self.autotune or self.precision != "fp32"

    @property
    def largest_drop(self) -> float | None:
        """Return the most that quality may drop, in points of AP if it is given so."""
        return self.max_drop if self.max_ap_drop is None else self.max_ap_drop


@dataclass(frozen=True)
class ExportConfig:
    """What is asked for.

    Attributes:
        source: a checkpoint, a preset's name, an .onnx of tood-export, or an engine to be served.
        output: the file, or for Triton the repository; None for `default_output`.
        checkpoint, precision, sizes, engine, triton: the options of each part.
        command: makes the same again; for the manifest.
        quiet: print nothing but warnings and errors.
    """

    source: str
    to: Target = option(
        "onnx", "--to", "what to make (default: onnx)", choices=(*TARGET_SUFFIXES, OVMS)
    )
    output: Path | None = option(
        None,
        "--output",
        "where to (default: the checkpoint's name, what it is made into, here)",
        parse=Path,
        metavar="PLACE",
    )
    verify_images: Path | None = option(
        None,
        "--verify-images",
        "images to verify on, in addition to the built-in ones (the first 16)",
        parse=Path,
        metavar="DIR",
        only=(GRAPH_SOURCE,),
    )
    images: Path | None = option(
        None,
        "--images",
        "images of --annotations, and whose sizes --shapes auto is chosen by; one folder for both",
        parse=Path,
        metavar="DIR",
        only=(IMAGE_USER,),
        required=(ANNOTATED, AUTO_SHAPES),
        expected="DIR: a folder of these images",
    )
    flavour: FlavourName | None = option(
        None,
        "--flavour",
        "which TensorRT, where both are installed (default: the one that is)",
        choices=("tensorrt", "tensorrt_rtx"),
        only=(ENGINE,),
    )
    list_layers: bool = option(
        False,
        "--list-layers",
        "print every layer of an engine with its precision",
        parse=None,
        only=(ENGINE,),
    )
    timings: bool = option(
        False, "--timings", "print where the time went, step by step", parse=None
    )
    quiet: bool = option(False, "--quiet", "print nothing but warnings and errors", parse=None)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    triton: TritonOptions = field(default_factory=TritonOptions)
    command: str = ""

    def __post_init__(self) -> None:
        if self.precision.precision == "auto" and self.to != "openvino":
            raise ToodError(
                f"--precision auto is for --to openvino, and --to is {self.to}; name a precision, "
                "or let --autotune-precision search"
            )
        if self.precision.precision == "int8" and self.to == "torch":
            raise ToodError(
                "--precision int8 is for the other targets, and --to is torch; give fp32, bf16 or "
                "fp16"
            )

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
        """Tell whether the source is an .onnx of an earlier export, proven equal to its network."""
        return self.source.lower().endswith(ONNX_SUFFIX)

    @property
    def served_as(self) -> TritonOptions:
        """Return how a model is served, with its name.

        Raises:
            ToodError: the name of the source cannot be one on a server.
        """
        return replace(self.triton, name=self.triton.name or Path(self.source).stem)

    @property
    def int8_scheme(self) -> Scheme:
        """Return how 8-bit numbers are held, by what will compute with them."""
        if self.builds_engine:
            return "s8s8"
        return "u8s8" if self.precision.target_cpu == "native" else "u8s7"

    @property
    def place(self) -> Path:
        """Return where the result goes: the output, else the source's name in the present folder.

        What is made from an .onnx says in its name what it is, as both have a manifest.
        """
        if self.output is not None:
            return self.output
        stem = Path(self.source).stem
        if self.from_onnx and self.to != "triton":
            chosen = "tuned" if self.precision.autotune else self.precision.precision
            parts = (stem, self.to if self.to != "onnx" else "", chosen if chosen != "fp32" else "")
            stem = "-".join(part for part in parts if part)
        return Path(f"{stem}{TARGET_SUFFIXES[self.to][0]}")


SECTIONS = (
    ExportConfig,
    CheckpointOptions,
    PrecisionOptions,
    SizeOptions,
    EngineOptions,
    TritonOptions,
)
