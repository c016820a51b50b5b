"""What an artefact says of itself: JSON beside it, and, for ONNX, the same in the file's metadata.

Comes in: an artefact's path, or JSON. Goes out: a `Manifest`, whose sections `manifest_sections`
types; the schemas hold the types and ranges that its JSON is checked against, once, when it is read
(what only people read is left alone). Manifests of version 0.1.0 open, and that version opens what
is written here. Knows no
runtime.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType, convert

from tood_deploy import __version__
from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.files import file_sha256
from tood_deploy.graph_io import ARTEFACT_SUFFIXES, OPENVINO_SUFFIX, OPENVINO_WEIGHTS_SUFFIX
from tood_deploy.manifest_sections import Build, EngineTarget, Parity, SelfTest
from tood_deploy.presets import MAX_CANDIDATES, MAX_IMGSZ, SIZE_DIVISOR, Preset

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


FORMAT = 1
METADATA_KEY = "tood_deploy"

Section = TypeVar("Section")


@dataclass(frozen=True)
class Manifest:
    """The description of one artefact.

    Attributes:
        preset: the detector.
        precision: of the network's arithmetic: "fp32", "bf16", "fp16" or "int8".
        max_det: rows D of the outputs.
        checkpoint_sha256: of the checkpoint the artefact was made from.
        build: how it was built.
        versions: of tood_deploy and of every tool that took part.
        created: date and time, ISO 8601, UTC.
        artefact_sha256: of the artefact itself; empty inside the artefact's own metadata.
        parity: the verdict of the comparison with PyTorch; None where there is none.
        target: what an engine was built for; None where the artefact runs anywhere.
        self_test: a stored input and the stored answers to it; None where there is none.
    """

    preset: Preset
    precision: str = "fp32"
    max_det: int = 100
    checkpoint_sha256: str = ""
    build: Build = field(default_factory=Build)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    artefact_sha256: str = ""
    parity: Parity | None = None
    target: EngineTarget | None = None
    self_test: SelfTest | None = None

    def to_json(self) -> str:
        """Return the manifest as a JSON object with sorted, stable keys."""
        values = {
            "format": FORMAT,
            "preset": self.preset.to_dict(),
            "precision": self.precision,
            "max_det": self.max_det,
            "checkpoint_sha256": self.checkpoint_sha256,
            "options": self.build.to_dict(),
            "versions": dict(self.versions),
            "created": self.created,
            "artefact_sha256": self.artefact_sha256,
            "parity": self.parity.to_dict() if self.parity else {},
            "target": self.target.to_dict() if self.target else {},
            "self_test": self.self_test.to_dict() if self.self_test else {},
        }
        return json.dumps(values, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> Manifest:
        """Return the manifest that `to_json` wrote; `origin` names the file in errors.

        Raises:
            ArtefactError: not a manifest, or one of another version.
        """
        try:
            values = json.loads(text)
            format_number = values.pop("format")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(origin, error) from error
        if format_number != FORMAT:
            raise ArtefactError(
                f"{origin}: manifest of format {format_number}, this version reads format "
                f"{FORMAT}; export the model again"
            )
        try:
            check_manifest(values)
            sections = {
                "build": _section(values, "options", Build.from_dict) or Build(),
                "parity": _section(values, "parity", Parity.from_dict),
                "target": _section(values, "target", EngineTarget.from_dict),
                "self_test": _section(values, "self_test", SelfTest.from_dict),
            }
            return cls(**values | sections | {"preset": Preset.from_dict(values["preset"])})
        except (ValueError, TypeError, KeyError, ToodError) as error:
            raise _damaged(origin, error) from error

    def check_outputs(self, inside: Manifest, origin: str) -> None:
        """Refuse a manifest that says another number of classes or rows than the graph has.

        Args:
            inside: the manifest in the graph's own metadata.
            origin: names this one in errors.

        Raises:
            ArtefactError: they differ.
        """
        for what, stated, actual in (
            ("class names", self.preset.num_classes, inside.preset.num_classes),
            ("rows of detections (max_det)", self.max_det, inside.max_det),
        ):
            if stated != actual:
                raise ArtefactError(
                    f"{origin}: states {stated} {what}, the model has {actual}; use the manifest "
                    "it was exported with"
                )

    def with_artefact(self, artefact: Path) -> Manifest:
        """Return the same, with the SHA-256 of this artefact."""
        return replace(self, artefact_sha256=artefact_sha256(artefact))


def _section(
    values: dict[str, Any], key: str, read: Callable[[Mapping[str, Any]], Section]
) -> Section | None:
    """Take a section out of a manifest's values; None where it is empty or not there."""
    section = values.pop(key, None)
    return read(section) if section else None


def _damaged(origin: str, error: Exception) -> ArtefactError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ArtefactError(
        f"{origin}: not a manifest of tood_deploy, or a damaged one ({reason}); export the model "
        "again with tood-export"
    )


def client_parameters(manifest: Manifest) -> dict[str, str]:
    """Return what clients need to know of a served model and cannot see in its tensors, as text."""
    preset = manifest.preset
    return {
        METADATA_KEY: __version__,
        "preset": preset.name,
        "precision": manifest.precision,
        "class_names": json.dumps(preset.class_names, ensure_ascii=False),
        "imgsz": f"{preset.imgsz[0]} {preset.imgsz[1]}",
        "sizing": json.dumps(asdict(preset.sizing)),
        "size_divisor": str(SIZE_DIVISOR),
        "model_sha256": manifest.artefact_sha256,
        "checkpoint_sha256": manifest.checkpoint_sha256,
    }


def saturating_weights(manifest: Manifest) -> bool:
    """Return whether 8-bit weights give wrong sums on CPUs without VNNI instructions.

    See `export.precision.quantize`.
    """
    return manifest.precision == "int8" and manifest.build.int8_scheme in ("u8s8", "s8s8")


def manifest_path(artefact: Path) -> Path:
    """Return where the manifest of an artefact lies: model.onnx -> model.json."""
    return artefact.with_suffix(".json")


def neighbour(artefact: Path) -> Path | None:
    """Return an artefact of another kind beside this one whose manifest has the same name."""
    others = (
        artefact.with_suffix(suffix)
        for suffix in ARTEFACT_SUFFIXES
        if suffix != artefact.suffix.lower()
    )
    return next((other for other in others if other.is_file()), None)


def read_manifest(artefact: Path) -> Manifest | None:
    """Return the manifest beside an artefact, None where there is none.

    Raises:
        ArtefactError: there is one, and it cannot be read.
    """
    path = manifest_path(artefact)
    if not path.is_file():
        return None
    return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


def artefact_files(artefact: Path) -> tuple[Path, ...]:
    """Return the files that an artefact consists of, its manifest left out.

    It is one, but an OpenVINO .xml has its weights in a .bin beside it.
    """
    if artefact.suffix.lower() == OPENVINO_SUFFIX:
        return artefact, artefact.with_suffix(OPENVINO_WEIGHTS_SUFFIX)
    return (artefact,)


def artefact_sha256(artefact: Path) -> str:
    """Return the SHA-256 of all bytes of an artefact.

    Raises:
        ArtefactError: a file of it is missing.
    """
    files = artefact_files(artefact)
    for path in files:
        if not path.is_file():
            raise ArtefactError(
                f"{path}: is missing; {artefact.name} consists of "
                f"{' and '.join(file.name for file in files)}: copy them all"
            )
    return file_sha256(*files)


def mismatch(artefact: Path, manifest: Manifest | None) -> str:
    """Return how an artefact's bytes differ from its manifest, in one line, else "".

    Nothing differs where the manifest states no SHA-256, or there is none.

    Raises:
        ArtefactError: a file of the artefact is missing.
    """
    if manifest is None or manifest.artefact_sha256 in ("", artefact_sha256(artefact)):
        return ""
    return (
        f"{artefact}: is not the file its manifest describes (another SHA-256): damaged, or "
        "replaced without its manifest; copy both again, or export it again with tood-export"
    )


def doubts(artefact: Path, manifest: Manifest) -> str:
    """Return why an artefact's answers should not be trusted blindly, in one line, else ""."""
    if differs := mismatch(artefact, manifest):
        return differs
    if manifest.parity is None:
        return (
            f"{artefact}: was never compared with PyTorch (its manifest has no parity verdict); "
            "export it again with tood-export"
        )
    if manifest.parity.benchmark and (stage := manifest.parity.benchmark.failing_stage):
        return (
            f"{artefact}: failed its comparison with PyTorch at the stage {stage}; see tood-bench "
            "parity, or export it again"
        )
    return ""
