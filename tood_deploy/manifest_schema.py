"""The types and ranges of a manifest's JSON, checked once, when it is read.

Comes in: plain values of a JSON object. Goes out: nothing, or an error that names the place and
what was expected there. Values that only people read are left alone, so that manifests of other
versions open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, convert

from tood_deploy.presets import MAX_CANDIDATES, MAX_IMGSZ, SIZE_DIVISOR

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Side = Annotated[int, Meta(ge=SIZE_DIVISOR, le=MAX_IMGSZ, multiple_of=SIZE_DIVISOR)]
Coordinate = Annotated[float, Meta(ge=-1e6, le=1e6)]  # of a box, in pixels
Box = tuple[Coordinate, Coordinate, Coordinate, Coordinate]
Label = Annotated[int, Meta(ge=0, le=10**6)]
Image = Annotated[str, Meta(min_length=4, max_length=4 * 2**20)]  # a PNG file in base 64
SizeHW = tuple[Side, Side]
Precision = Literal["fp32", "bf16", "fp16", "int8"]


class Int8Schema(Struct):
    """Of `Int8Build`."""

    scheme: str = ""
    keep: list[str] = []


class HalfSchema(Struct):
    """Of `HalfBuild`."""

    precision: Literal["bf16", "fp16"]


class ServingSchema(Struct, forbid_unknown_fields=True):
    """Of `Serving`."""

    onnx_sha256: str = ""
    equal_detections: Count = 0
    thresholds: str = ""


class OptionsSchema(Struct):
    """Of `Build`, by the JSON's names."""

    format: str = ""
    opset: Annotated[int, Meta(ge=1, le=1000)] | None = None
    deform: str = ""
    rest: str = ""
    int8: Int8Schema | UnsetType = UNSET
    half_precision: HalfSchema | UnsetType = UNSET
    autotune: Int8Schema | UnsetType = UNSET
    serving: ServingSchema | UnsetType = UNSET
    onnx_sha256: str = ""
    nms: str = ""
    nms_rounds: Positive | None = None
    runtimes: list[str] = []
    rebuild: str = ""


class StatisticsSchema(Struct):
    """Of `ImageStatistics`."""

    images: Count
    conf: Share
    scores: list[Count]
    classes: list[Count]
    sizes: list[Count]


class ParitySchema(Struct):
    """Of `Parity`."""

    reference: str = ""
    runtime: str = ""
    judged_by: str = ""
    images: Count = 0
    pictures: Count = 0
    compared: str = ""
    onnx: ParitySchema | None = None
    benchmark: dict[str, Any] | UnsetType = UNSET
    statistics: StatisticsSchema | UnsetType = UNSET


class SelfTestCaseSchema(Struct):
    """Of `SelfTestCase`."""

    net_hw: SizeHW
    score_threshold: Share
    boxes: list[Box]
    scores: list[Share]
    labels: list[Label]

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.labels):
            raise ValueError(
                f"{len(self.boxes)} boxes, {len(self.scores)} scores and {len(self.labels)} labels"
            )


class SelfTestSchema(Struct):
    """Of `SelfTest`."""

    picture_png: Image
    iou_threshold: Share
    reference: str
    cases: Annotated[list[SelfTestCaseSchema], Meta(min_length=1, max_length=1000)]


class ProfileSchema(Struct, forbid_unknown_fields=True):
    """Of `OptimizationProfile`."""

    size_hw: SizeHW
    batch: tuple[Positive, Positive, Positive]

    def __post_init__(self) -> None:
        if list(self.batch) != sorted(self.batch):
            raise ValueError(f"batches {self.batch} are not in ascending order")


class TargetSchema(Struct, forbid_unknown_fields=True):
    """Of `EngineTarget`."""

    flavour: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    platform: str
    compute_capabilities: list[str]
    profiles: Annotated[list[ProfileSchema], Meta(min_length=1)]
    later_compute_capabilities: bool = False
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    gpu: str = ""
    driver: str = ""


class ManifestSchema(Struct):
    """Of `Manifest`; `preset` has types of its own, see `Preset.from_dict`."""

    preset: dict[str, Any]
    precision: Precision = "fp32"
    max_det: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)] = 100
    checkpoint_sha256: str = ""
    options: OptionsSchema | UnsetType = UNSET
    versions: dict[str, str] = {}
    created: str = ""
    artefact_sha256: str = ""
    parity: ParitySchema | UnsetType = UNSET
    target: TargetSchema | UnsetType = UNSET
    self_test: SelfTestSchema | UnsetType = UNSET


def check_manifest(values: Mapping[str, Any]) -> None:
    """Check the plain values of a manifest; sections that are empty are not there.

    Raises:
        ValueError: a value has another type than its place wants, or is out of range; the message
            ends in the place, such as `$.self_test.cases[0].boxes`.
    """
    sections = ("options", "parity", "target", "self_test")
    stated = {
        key: value
        for key, value in values.items()
        if key not in sections or (value is not None and value != {})
    }
    convert(stated, ManifestSchema)
