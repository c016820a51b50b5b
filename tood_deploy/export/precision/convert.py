"""Convert a float32 artefact to the precision that is asked for, in memory.

The result is compared with what the float32 artefact was compared with. Calibrates, quantises and
lowers through the other modules of this folder; writes no file and knows no target.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.data import MAX_CALIBRATION_IMAGES
from tood_deploy.data.image_set import photograph_crops
from tood_deploy.data.images import choose_images, read_image
from tood_deploy.distributions import COUNTED_CONF, ImageCounter
from tood_deploy.engines.precision_support import half_precision_of
from tood_deploy.engines.self_test import self_test_from
from tood_deploy.errors import ToodError
from tood_deploy.export.config import CalibrationMethod, PrecisionOptions, Scheme
from tood_deploy.export.precision.calibrate import (
    RANGE_IMAGES,
    calibrate,
    measure_ranges,
    values_at_risk,
    warn_of_few,
)
from tood_deploy.export.precision.half import (
    LowPrecision,
    emulate_low_precision,
    half_values,
    lower_precision,
)
from tood_deploy.export.precision.quantize import Ranges, calibrated_values, choose_layers, quantize
from tood_deploy.export.precision.sensitivity import (
    DetectionMismatch,
    KeptLayers,
    Prepared,
    choose_kept,
    measure_sensitivity,
)
from tood_deploy.manifest_sections import HalfBuild, ImageStatistics, Int8Build, SelfTest
from tood_deploy.matching import split_batch
from tood_deploy.onnx_file import OnnxArtefact, artefact_in_memory
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.parity.verify import verify_detections, verify_float32
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.reporter import Reporter

NEEDS: dict[Scheme, str] = {
    "u8s7": "any CPU",
    "u8s8": "a CPU with VNNI instructions",
    "s8s8": "TensorRT",
}
RANKING_IMAGES, QUALITY_IMAGES = 3, 16
REPORTED_RANGES, REPORTED_RISKS = 5, 10  # in the manifest; as lines

Quality = Callable[[onnx.ModelProto], float]
QualityOf = Callable[[OnnxArtefact], Quality]


class AnnotatedAp(Protocol):
    """AP on annotated images, in points, 0 to 100."""

    @property
    def reference_ap(self) -> float:
        """Return the AP of the float32 artefact."""
        ...

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return by how much a graph that was made from the float32 one is worse."""
        ...

    def file_ap(self, path: Path, **engine_options: Any) -> float:
        """Return the AP of an artefact in its own runtime."""
        ...


@dataclass(frozen=True, eq=False)
class ConvertedGraph:
    """A graph made from a float32 one.

    Attributes:
        model: the graph.
        precision: what the manifest calls it.
        int8: how it got its 8-bit layers.
        half: which part of it is in half precision.
        mixture: what a search of mixed precisions made of it, in place of these.
    """

    model: onnx.ModelProto
    precision: str
    int8: Int8Build | None = None
    half: HalfBuild | None = None
    mixture: Int8Build | None = None


Search = Callable[[OnnxArtefact, Reporter], ConvertedGraph]


@dataclass(frozen=True)
class Int8Options:
    """What an int8 artefact shall be.

    Attributes:
        scheme: "u8s7" for ONNX Runtime and OpenVINO on any CPU, "u8s8" on CPUs with VNNI
            instructions, "s8s8" for TensorRT.
        method: how ranges come from what was measured.
        keep: patterns (as of file names) of layers that stay float32.
        max_drop: the most that quality may drop: the most sensitive layers then stay float32, as
            many as it takes. None: all that can become 8-bit do.
        max_images: to calibrate on, evenly spread over the folder.
    """

    scheme: Scheme = "u8s7"
    method: CalibrationMethod = "percentile"
    keep: tuple[str, ...] = ()
    max_drop: float | None = None
    max_images: int = MAX_CALIBRATION_IMAGES

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("scheme", self.scheme, get_args(Scheme)),
            ("method", self.method, get_args(CalibrationMethod)),
        ):
            if value not in allowed:
                raise ToodError(f"{name} is {value}; expected one of {', '.join(allowed)}")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ToodError(f"the largest drop is {self.max_drop}; expected 0 or more")


def int8_options(options: PrecisionOptions, scheme: Scheme) -> Int8Options:
    """Return how 8-bit layers are made, of all that is asked for.

    Args:
        options: the options of precision.
        scheme: of what will compute with them.
    """
    return Int8Options(
        scheme, options.calib_method, options.keep_fp32, options.largest_drop, options.calib_images
    )


def convert_precision(
    artefact: OnnxArtefact,
    options: PrecisionOptions,
    scheme: Scheme,
    *,
    quality: QualityOf | None = None,
    search: Search | None = None,
    reporter: Reporter,
) -> OnnxArtefact:
    """Return a float32 artefact in the precision that is asked for; it is yet to be verified.

    Args:
        artefact: in float32.
        options: the options of precision.
        scheme: of 8-bit numbers, by what will compute with them.
        quality: makes from the float32 artefact what measures how much worse an int8 graph is; per
            cent of mismatched detections where not given.
        search: chooses precisions itself, in place of the options.
        reporter: of warnings, trials and progress.

    Raises:
        ToodError: a pattern that fits nothing, or images that cannot be read.
    """
    if search is not None:
        return _restate(artefact, search(artefact, reporter))
    converted = artefact
    if options.precision == "int8":
        assert options.calib_data is not None  # a rule of the options
        int8 = int8_options(options, scheme)
        converted = quantize_artefact(
            artefact,
            options.calib_data,
            int8,
            quality=quality and quality(artefact),
            reporter=reporter,
        )
    half = options.fallback if options.precision == "int8" else options.precision
    if half == "fp16" or half == "bf16":
        converted = lower_artefact(
            converted,
            half,
            keep=options.keep_fp32,
            calib_data=options.calib_data,
            max_images=options.calib_images,
            reporter=reporter,
        )
    return converted


def _restate(artefact: OnnxArtefact, converted: ConvertedGraph) -> OnnxArtefact:
    """Return the converted graph as an artefact; parity is yet to be shown."""
    opset = next(entry.version for entry in converted.model.opset_import if not entry.domain)
    source = artefact.manifest.build
    build = replace(
        source,
        opset=opset,
        int8=converted.int8 or source.int8,
        half=converted.half or source.half,
        mixture=converted.mixture or source.mixture,
    )
    manifest = replace(
        artefact.manifest,
        precision=converted.precision,
        build=build,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity=None,
        self_test=None,
    )
    return artefact_in_memory(artefact.path, converted.model, manifest)


def quantize_artefact(
    artefact: OnnxArtefact,
    calib_data: Path,
    options: Int8Options,
    *,
    quality: Quality | None = None,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> OnnxArtefact:
    """Return a float32 artefact in int8; it is yet to be verified.

    Args:
        artefact: in float32.
        calib_data: a folder of images like those to come, 64 or more.
        options: how.
        quality: for `max_drop`: how much worse than the float32 graph another one is, such as in
            points of AP; per cent of mismatched detections on some of the calibration images where
            not given.
        cache: the folder that keeps calibrations; the package's own where not given.
        reporter: of warnings, trials and progress.

    Raises:
        ToodError: not float32, a pattern that fits nothing, or images that cannot be read.
    """
    _check_precision(artefact, ("fp32",))
    reporter = reporter or Reporter.silent()
    model, sizing = artefact.model, artefact.manifest.preset.sizing
    # A wrong pattern is refused before the images are run.
    choose_layers(ir.from_proto(model).graph, options.keep)
    calibration = calibrate(
        model,
        calibrated_values(model),
        calib_data,
        sizing,
        max_images=options.max_images,
        cache=cache,
        reporter=reporter,
    )
    described = asdict(options) | {
        "needs": NEEDS[options.scheme],
        "images": calibration.images,
        "calibration": calibration.key,
    }
    ranges = calibration.ranges(options.method)
    if options.max_drop is not None:
        images = prepare_images(calib_data, sizing)
        quality = quality or DetectionMismatch(model, images)
        kept = _find_kept(model, ranges, images, options, quality, reporter)
        described |= kept.to_dict() | {"keep": (*options.keep, *kept.keep)}
    quantized = quantize(model, ranges, scheme=options.scheme, keep=described["keep"])
    return _restate(
        artefact, ConvertedGraph(quantized, "int8", int8=Int8Build.from_dict(described))
    )


def _check_precision(artefact: OnnxArtefact, allowed: Collection[str]) -> None:
    """Refuse an artefact that has been converted already."""
    if artefact.manifest.precision not in allowed:
        raise ToodError(
            f"{artefact.path} is in {artefact.manifest.precision} already; "
            "start from the float32 artefact"
        )


def prepare_images(folder: Path, sizing: ImageSize) -> list[Prepared]:
    """Return some images of a folder to measure quality on, scaled and padded for the network.

    Raises:
        InputError: fewer than two images, or one that cannot be read.
    """
    prepared = (
        resize_and_pad(read_image(path), sizing) for path in choose_images(folder, QUALITY_IMAGES)
    )
    return [(image, transform.resized_hw) for image, transform in prepared]


def _find_kept(
    model: onnx.ModelProto,
    ranges: Ranges,
    images: Sequence[Prepared],
    options: Int8Options,
    quality: Quality,
    reporter: Reporter,
) -> KeptLayers:
    """Return the fewest layers that must stay float32 for the quality that is asked for."""
    assert options.max_drop is not None

    @functools.cache
    def drop_of(patterns: Collection[str]) -> float:
        return quality(
            quantize(model, ranges, scheme=options.scheme, keep=[*options.keep, *patterns])
        )

    if (drop := drop_of(())) <= options.max_drop:  # the usual case needs no list
        reporter.info(
            f"all layers in 8 bits: {drop:.3f} worse, at most {options.max_drop:g} allowed"
        )
        return KeptLayers((), drop, ((0, drop),))
    ranked = measure_sensitivity(
        model, ranges, images[:RANKING_IMAGES], scheme=options.scheme, reporter=reporter
    )
    return choose_kept(ranked, drop_of, options.max_drop, reporter)


def lower_artefact(
    artefact: OnnxArtefact,
    precision: LowPrecision,
    *,
    keep: Collection[str] = (),
    calib_data: Path | None = None,
    max_images: int = RANGE_IMAGES,
    reporter: Reporter | None = None,
) -> OnnxArtefact:
    """Return an artefact in half precision; it is yet to be verified.

    Args:
        artefact: in float32, or in int8: then what is not 8-bit becomes half precision.
        precision: "fp16" or "bf16".
        keep: patterns of what stays float32, see `lower_precision`.
        calib_data: a folder of images. For fp16, values that it cannot hold on them stay float32;
            bf16 holds all.
        max_images: of the folder, evenly spread over it.
        reporter: of warnings, of what fp16 cannot hold, and of progress.

    Raises:
        ToodError: in half precision already, a pattern that fits nothing, or images that cannot be
            read.
    """
    _check_precision(artefact, ("fp32", "int8"))
    reporter = reporter or Reporter.silent()
    reasons, measured = dict.fromkeys(keep, "asked for"), {}
    if precision == "fp16" and calib_data is not None:
        if artefact.manifest.precision == "fp32":  # the calibration of int8 has warned already
            warn_of_few(calib_data, len(choose_images(calib_data, max_images)), reporter)
        risks, measured = _find_risks(artefact, keep, calib_data, max_images, reporter)
        _report_risks(risks, measured["values_measured"], reporter)
        reasons |= {glob.escape(name): reason for name, reason in risks.items()}
    model, report = lower_precision(artefact.model, precision, keep=reasons)
    described = HalfBuild.from_dict(report.to_dict() | measured)
    name = "int8" if artefact.manifest.precision == "int8" else precision
    return _restate(artefact, ConvertedGraph(model, name, half=described))


def _find_risks(
    artefact: OnnxArtefact, keep: Collection[str], images: Path, max_images: int, reporter: Reporter
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the values that fp16 cannot hold, with the reasons; and what to note of ranges."""
    names = half_values(artefact.model, keep=keep)
    ranges = measure_ranges(
        artefact.model,
        names,
        images,
        artefact.manifest.preset.sizing,
        max_images=max_images,
        reporter=reporter,
    )
    risks = values_at_risk(ranges)
    largest = sorted(ranges, key=lambda name: -ranges[name].largest)[:REPORTED_RANGES]
    described = {
        name: asdict(ranges[name]) | {"risk": risks.get(name, "")} for name in (*largest, *risks)
    }
    return risks, {"values_measured": len(names), "ranges": described}


def _report_risks(risks: Mapping[str, str], measured: int, reporter: Reporter) -> None:
    """Report which values stay float32 because fp16 cannot hold them."""
    if not risks:
        reporter.info(f"fp16 holds all {measured} values that it is given on these images")
        return
    reporter.info(
        f"fp16 cannot hold {len(risks)} of {measured} values, which stay float32; "
        "the manifest has the whole list"
    )
    for name, reason in list(risks.items())[:REPORTED_RISKS]:
        reporter.info(f"stays float32: {name} {reason}")


def verify_converted(
    artefact: OnnxArtefact,
    reference: Reference,
    images: Sequence[NDArray[np.uint8]],
    *,
    self_test: SelfTest | None,
    ap: AnnotatedAp | None = None,
    reporter: Reporter,
) -> OnnxArtefact:
    """Compare a converted artefact with the reference; return it with the verdict in its manifest.

    Half precision is emulated: ONNX Runtime has no bf16 on CPUs, and leaves out casts to fp16,
    which would hide what overflows. 8 bits run as they will, on calibration images: the self-test's
    image lies outside the ranges that these have, so its right answer is then what the 8 bits
    themselves give here. Else the float32 answer to the self-test stays the right one.

    Args:
        artefact: as `convert_precision` gives it.
        reference: the float32 network, or an .onnx that was proven equal to it.
        images: (H, W, 3) uint8 BGR, of the user's kind.
        self_test: of the float32 artefact.
        ap: measures AP for the verdict; None without annotations.
        reporter: of what is being compared.

    Raises:
        CheckFailed: it deviates from the reference by more than its precision explains.
    """
    precision = artefact.manifest.precision
    if precision == "fp32":  # what a search of mixtures may come to
        run = OnnxRunner(artefact.model)
        parity = verify_float32(reference, run, images=images, reporter=reporter)
        manifest = replace(artefact.manifest, parity=parity, self_test=self_test)
        return replace(artefact, manifest=manifest)
    run = OnnxRunner(emulate_low_precision(artefact.model), maps=False)
    if half := half_precision_of(artefact.manifest):
        run.name += f", {half} emulated"

    def measure_ap() -> tuple[float, float]:
        assert ap is not None
        return ap.reference_ap, ap.reference_ap - ap(artefact.model)

    parity = verify_detections(
        reference,
        run,
        images,
        DETECTION_LIMITS[precision],
        measure_ap=measure_ap if ap else None,
        reporter=reporter,
    )
    if precision == "int8":
        self_test = self_test_from(run)
        classes = artefact.manifest.preset.num_classes
        parity = replace(parity, statistics=image_statistics(reference, classes, images))
    manifest = replace(artefact.manifest, parity=parity, self_test=self_test)
    return replace(artefact, manifest=manifest)


def image_statistics(
    reference: Reference, classes: int, images: Sequence[NDArray[np.uint8]]
) -> ImageStatistics:
    """Return how images like those to come are distributed, and what the reference detects.

    A server compares with it what it is sent.

    Args:
        reference: the float32 network.
        classes: how many it has.
        images: (H, W, 3) uint8 BGR, of calibration.
    """
    counter = ImageCounter(classes)
    for image in images:
        padded, transform = resize_and_pad(image, reference.sizing)
        valid_hw = np.array([transform.resized_hw], np.int32)
        outputs = reference.run(padded[None], valid_hw, COUNTED_CONF, reference.iou_threshold)
        (rows,) = split_batch(outputs)
        counter.add(transform.image_hw, rows.scores, rows.labels)
    return counter.statistics()


def images_to_verify(
    calib_data: Path | None, images: Sequence[NDArray[np.uint8]] = ()
) -> Sequence[NDArray[np.uint8]]:
    """Return images of the user's kind; crops of a photograph where there are none.

    Args:
        calib_data: a folder of images to calibrate on.
        images: (H, W, 3) uint8 BGR, given to verify on.
    """
    calibrated = (
        [read_image(path) for path in choose_images(calib_data, QUALITY_IMAGES)]
        if calib_data is not None
        else []
    )
    return [*calibrated, *images] or photograph_crops(QUALITY_IMAGES)
