"""The typed sections of a manifest, and their JSON.

How an artefact was built, its verdict of parity, its self-test, what an engine was built for, and
the form that a server takes. The JSON keeps the names of version 0.1.0 ("picture_png" for an image,
"rest" for the fallback precision), and what a section does not know by name stays in its `details`,
so that manifests of other versions are written back whole. Knows no file and no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Self, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = Mapping[str, Json]


@dataclass(frozen=True)
class Int8Build:
    """How a graph got its 8-bit layers.

    Attributes:
        scheme: of activations and weights, such as "u8s7" or "s8s8"; "" where it is not stated.
        keep: patterns of the layers that are not in 8 bits.
        details: calibration, and what a search of the layers to keep came to.
    """

    scheme: str = ""
    keep: tuple[str, ...] = ()
    details: JsonObject = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {"scheme": self.scheme, "keep": list(self.keep), **self.details}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        details = _without(values, "scheme", "keep")
        return cls(str(values.get("scheme", "")), tuple(map(str, values.get("keep", ()))), details)


@dataclass(frozen=True)
class HalfBuild:
    """Which part of a graph is in half precision.

    Attributes:
        precision: "bf16" or "fp16".
        details: the layers, those that stay float32 and why.
    """

    precision: str
    details: JsonObject = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {"precision": self.precision, **self.details}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        return cls(str(values["precision"]), _without(values, "precision"))


@dataclass(frozen=True)
class Serving:
    """The form that a server takes: thresholds of their own for every image of a batch.

    Attributes:
        onnx_sha256: of the .onnx that it was made from.
        equal_detections: how many detections were compared with that one's and are equal.
        thresholds: the form, in words.
    """

    onnx_sha256: str = ""
    equal_detections: int = 0
    thresholds: str = "one of each for every image"

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        return cls(**values)


BUILD_NAMES = {  # in Python, and in the JSON's "options"
    "format": "format",
    "opset": "opset",
    "deform": "deform",
    "fallback_precision": "rest",
    "int8": "int8",
    "half": "half_precision",
    "mixture": "autotune",
    "serving": "serving",
    "onnx_sha256": "onnx_sha256",
    "nms": "nms",
    "nms_rounds": "nms_rounds",
    "runtimes": "runtimes",
    "rebuild": "rebuild",
}


@dataclass(frozen=True)
class Build:
    """How an artefact was built; None, "" or empty where that is not stated or does not apply.

    Attributes:
        format: "onnx", "openvino" or "engine".
        opset: of the ONNX graph.
        deform: form of the deformable convolutions: "op", "gather", or "none" without any.
        fallback_precision: of what is not in 8 bits, in OpenVINO: "fp32" or "bf16".
        int8: how the graph got its 8-bit layers.
        half: which part of the graph is in half precision.
        mixture: what a search of mixed precisions made of the graph, in place of `int8`.
        serving: where it has the form that a server takes.
        onnx_sha256: of the .onnx that it was built from.
        nms: form of the suppression in an engine: "loop" or "unrolled".
        nms_rounds: of the unrolled form.
        runtimes: that an .onnx in half precision is for.
        rebuild: the command that builds an engine again.
        details: what only people read, such as the builder's settings.
    """

    format: str = ""
    opset: int | None = None
    deform: str = ""
    fallback_precision: str = ""
    int8: Int8Build | None = None
    half: HalfBuild | None = None
    mixture: Int8Build | None = None
    serving: Serving | None = None
    onnx_sha256: str = ""
    nms: str = ""
    nms_rounds: int | None = None
    runtimes: tuple[str, ...] = ()
    rebuild: str = ""
    details: JsonObject = field(default_factory=dict)

    @property
    def int8_scheme(self) -> str:
        """How 8-bit activations and weights are held; "" where none are, or it is not stated."""
        part = self.int8 or self.mixture
        return part.scheme if part else ""

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON: those that are stated."""
        values: dict[str, Json] = {}
        for name, key in BUILD_NAMES.items():
            value = getattr(self, name)
            if isinstance(value, Int8Build | HalfBuild | Serving):
                values[key] = value.to_dict()
            elif value not in (None, "", ()):
                values[key] = list(value) if isinstance(value, tuple) else value
        return values | dict(self.details)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        read: dict[str, Callable[[Any], Any]] = {
            "int8": Int8Build.from_dict,
            "mixture": Int8Build.from_dict,
            "half": HalfBuild.from_dict,
            "serving": Serving.from_dict,
            "runtimes": lambda names: tuple(map(str, names)),
        }
        stated = {
            name: read.get(name, lambda value: value)(values[key])
            for name, key in BUILD_NAMES.items()
            if key in values
        }
        return cls(**stated, details=_without(values, *BUILD_NAMES.values()))


@dataclass(frozen=True)
class BenchmarkVerdict:
    """What `tood-bench parity` found.

    Attributes:
        report: all of it, for people.
    """

    report: JsonObject = field(default_factory=dict)

    @property
    def failing_stage(self) -> str:
        """The first stage that deviates too much; "" where none does."""
        return str(self.report.get("failing_stage") or "")

    @property
    def reference_sha256(self) -> str:
        """Of the checkpoint that the artefact was compared with."""
        reference = self.report.get("reference")
        return str(reference.get("sha256", "")) if isinstance(reference, Mapping) else ""

    def ap(self, whose: str) -> float | None:
        """Return AP (0 to 100) of the "reference" or the "artefact"; None where not measured."""
        points = self.report.get("ap")
        value = points.get(whose) if isinstance(points, Mapping) else None
        return value if isinstance(value, float) and isfinite(value) else None


@dataclass(frozen=True)
class ImageStatistics:
    """How images like those to come, and the reference's detections in them, were distributed.

    Bins are those of `distributions`.

    Attributes:
        images: how many there were.
        conf: detections have a score above it.
        scores: detections in every bin of the score.
        classes: detections of every class.
        sizes: images in every bin of the size.
    """

    images: int
    conf: float
    scores: tuple[int, ...]
    classes: tuple[int, ...]
    sizes: tuple[int, ...]

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        scores, classes, sizes = (
            tuple(map(int, values[key])) for key in ("scores", "classes", "sizes")
        )
        return cls(int(values["images"]), float(values["conf"]), scores, classes, sizes)


@dataclass(frozen=True)
class Parity:
    """The verdict of a comparison with the reference.

    Attributes:
        reference: what it was compared with.
        runtime: what ran the artefact.
        judged_by: "float32 noise" or "detections"; "" in manifests that did not state it.
        images: how many were compared.
        compared: what was compared, if it was not this artefact itself.
        onnx: the verdict on the .onnx that this artefact was made from.
        benchmark: what `tood-bench parity` found later.
        statistics: of the calibration images that were compared; None where there were none.
        details: limits and deviations; `parity` writes and reads them.
    """

    reference: str = ""
    runtime: str = ""
    judged_by: str = ""
    images: int = 0
    compared: str = ""
    onnx: Parity | None = None
    benchmark: BenchmarkVerdict | None = None
    statistics: ImageStatistics | None = None
    details: JsonObject = field(default_factory=dict)

    @property
    def image_statistics(self) -> ImageStatistics | None:
        """Return the statistics, those of the .onnx where an artefact made from it has none."""
        return self.statistics or (self.onnx.image_statistics if self.onnx else None)

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON: those that are stated."""
        names = ("reference", "runtime", "judged_by", "images", "compared")
        values: dict[str, Json] = {
            name: getattr(self, name) for name in names if getattr(self, name)
        }
        if "pictures" in self.details:
            del values["images"]
        values |= {"onnx": self.onnx.to_dict()} if self.onnx else {}
        values |= {"benchmark": dict(self.benchmark.report)} if self.benchmark else {}
        values |= {"statistics": self.statistics.to_dict()} if self.statistics else {}
        return values | dict(self.details)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        names = ("reference", "runtime", "judged_by", "images", "compared")
        stated = {name: values[name] for name in names if name in values}
        if "pictures" in values:  # as version 0.1.0 called them
            stated["images"] = values["pictures"]
        return cls(
            **stated,
            onnx=cls.from_dict(values["onnx"]) if values.get("onnx") else None,
            benchmark=BenchmarkVerdict(values["benchmark"]) if "benchmark" in values else None,
            statistics=ImageStatistics.from_dict(values["statistics"])
            if values.get("statistics")
            else None,
            details=_without(values, *names, "onnx", "benchmark", "statistics"),
        )


@dataclass(frozen=True)
class SelfTestCase:
    """The stored answer on one canvas, best first.

    Attributes:
        net_hw: rows and columns of the canvas.
        score_threshold: lies in a gap between the scores.
        boxes: xyxy in pixels of the canvas.
        scores, labels: of the boxes.
    """

    net_hw: tuple[int, int]
    score_threshold: float
    boxes: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]
    labels: tuple[int, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `asdict` gave."""
        rows, columns = map(int, values["net_hw"])
        boxes = tuple(tuple(map(float, box)) for box in values["boxes"])
        scores = tuple(map(float, values["scores"]))
        labels = tuple(map(int, values["labels"]))
        return cls((rows, columns), float(values["score_threshold"]), boxes, scores, labels)


@dataclass(frozen=True)
class SelfTest:
    """A stored input, and the stored answers to it.

    Attributes:
        image_png: the image, a PNG file in base 64.
        iou_threshold: of the suppression.
        reference: what gave the answers.
        cases: an answer for each canvas.
    """

    image_png: str
    iou_threshold: float
    reference: str
    cases: tuple[SelfTestCase, ...]

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {
            "picture_png": self.image_png,  # as version 0.1.0 called it, which can read it too
            "iou_threshold": self.iou_threshold,
            "reference": self.reference,
            "cases": [asdict(case) for case in self.cases],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        cases = tuple(map(SelfTestCase.from_dict, values["cases"]))
        image, reference = str(values["picture_png"]), str(values["reference"])
        return cls(image, float(values["iou_threshold"]), reference, cases)


@dataclass(frozen=True)
class OptimizationProfile:
    """One padded size that an engine takes, and the batches it was tuned for.

    Attributes:
        size_hw: rows and columns.
        min_batch, opt_batch, max_batch: images of the smallest batch it takes, of the one it is
            fastest at, and of the largest.
    """

    size_hw: tuple[int, int]
    min_batch: int
    opt_batch: int
    max_batch: int

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        batches = [self.min_batch, self.opt_batch, self.max_batch]
        return {"size_hw": list(self.size_hw), "batch": batches}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        rows, columns = map(int, values["size_hw"])
        return cls((rows, columns), *map(int, values["batch"]))


@dataclass(frozen=True)
class EngineTarget:
    """What a TensorRT plan was built for, and must meet again when it is opened.

    Attributes:
        flavour: "tensorrt" or "tensorrt_rtx".
        version: of that TensorRT.
        platform: such as "linux-x86_64".
        compute_capabilities: such as ("8.9",).
        profiles: in the plan's order, at least one.
        later_compute_capabilities: those above them are for TensorRT to judge.
        hardware_compatibility: "none", or "ampere_plus" for any GPU from 8.0 on.
        version_compatible: later versions of the same major version open it too.
        gpu: that its kernels were measured on; empty where none was.
        driver: that they were measured with, such as "CUDA 13.0".
    """

    flavour: str
    version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[OptimizationProfile, ...]
    later_compute_capabilities: bool = False
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    gpu: str = ""
    driver: str = ""

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("an engine takes at least one size, profiles are empty")

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        values = asdict(self) | {"compute_capabilities": list(self.compute_capabilities)}
        values["profiles"] = [profile.to_dict() for profile in self.profiles]
        return {key: value for key, value in values.items() if value != ""}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        read: dict[str, Callable[[Any], Any]] = {
            "compute_capabilities": lambda names: tuple(map(str, names)),
            "profiles": lambda profiles: tuple(map(OptimizationProfile.from_dict, profiles)),
            "later_compute_capabilities": bool,
            "version_compatible": bool,
        }
        return cls(**{key: read.get(key, str)(value) for key, value in values.items()})


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}
