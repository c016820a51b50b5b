"""From a float32 .onnx to one in the precision that is asked for, compared with what the float32 one was compared with."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tood_deploy.data import MAX_CALIBRATION_IMAGES
from tood_deploy.data.image_set import photograph_crops
from tood_deploy.data.images import choose_images, read_image
from tood_deploy.engines.precision_support import half_precision_of
from tood_deploy.engines.self_test import self_test_from
from tood_deploy.errors import ToodError
from tood_deploy.export.precision.calibrate import (
    METHODS,
    RANGE_IMAGES,
    Method,
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
from tood_deploy.export.precision.quantize import (
    SCHEMES,
    Ranges,
    Scheme,
    calibrated_values,
    choose_layers,
    quantize,
)
from tood_deploy.export.precision.sensitivity import (
    DetectionMismatch,
    KeptLayers,
    Prepared,
    choose_kept,
    measure_sensitivity,
)
from tood_deploy.files import atomic_path, write_text
from tood_deploy.manifest import manifest_path
from tood_deploy.manifest_sections import Build, HalfBuild, Int8Build, Parity
from tood_deploy.onnx_file import OnnxArtefact, read_onnx, save_onnx
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.parity.verify import verify_detections, verify_float32
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.reporter import progress_bar

NEEDS: dict[Scheme, str] = {
    "u8s7": "any CPU",
    "u8s8": "a CPU with VNNI instructions",
    "s8s8": "TensorRT",
}
RANKING_IMAGES = 3
QUALITY_IMAGES = 16

Progress = Callable[[int, int], None]
Quality = Callable[[onnx.ModelProto], float]


@dataclass(frozen=True)
class Int8Options:
    """What an int8 artefact shall be.

    Attributes:
        scheme: "u8s7" for ONNX Runtime and OpenVINO on any CPU, "u8s8" on CPUs with VNNI instructions, "s8s8" for TensorRT.
        method: how ranges come from what was measured: "percentile", "entropy" or "minmax".
        keep: patterns (as of file names) of layers that stay float32.
        max_drop: the most that quality may drop: the most sensitive layers then stay float32, as many as it takes. None: all that can
            become 8-bit do.
        max_images: to calibrate on, evenly spread over the folder.
    """

    scheme: Scheme = "u8s7"
    method: Method = "percentile"
    keep: tuple[str, ...] = ()
    max_drop: float | None = None
    max_images: int = MAX_CALIBRATION_IMAGES

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("scheme", self.scheme, SCHEMES),
            ("method", self.method, METHODS),
        ):
            if value not in allowed:
                raise ToodError(f"{name} is {value}; expected one of {', '.join(allowed)}")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ToodError(f"the largest drop is {self.max_drop}; expected 0 or more")


def int8_from_onnx(
    onnx_path: Path,
    output: Path,
    calib_data: Path,
    options: Int8Options,
    *,
    quality: Quality | None = None,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Build:
    """Writes `output` (.onnx), its metadata included, or nothing at all. No manifest beside it: parity is yet to be shown.

    Args:
        onnx_path: an .onnx artefact of tood-export in float32.
        output: where to; a file that is there already is replaced in one step.
        calib_data: a folder of images like those to come, 64 or more.
        options: how.
        quality: for `max_drop`: how much worse than the float32 graph another one is, such as in points of AP; per cent of mismatched
            detections on some of the calibration images where not given.
        cache: the folder that keeps calibrations; the package's own where not given.
        progress: called with how much of the present step is done and how much there is.
        say: told warnings and what was tried, a line each.

    Returns:
        How it was built, for the manifest.

    Raises:
        ToodError: not such an artefact, a pattern that fits nothing, or images that cannot be read.
    """
    artefact = read_onnx(onnx_path)
    if artefact.manifest.precision != "fp32":
        raise ToodError(
            f"{onnx_path} is in {artefact.manifest.precision} already; start from the float32 artefact"
        )
    model, sizing = artefact.model, artefact.manifest.preset.sizing
    choose_layers(
        ir.from_proto(model).graph, options.keep
    )  # a wrong pattern is told before the images are run
    names, most = calibrated_values(model), options.max_images
    calibration = calibrate(
        model, names, calib_data, sizing, most=most, cache=cache, progress=progress, say=say
    )
    told = asdict(options) | {
        "needs": NEEDS[options.scheme],
        "images": calibration.images,
        "calibration": calibration.key,
    }
    ranges = calibration.ranges(options.method)
    if options.max_drop is not None:
        images = prepare_images(calib_data, sizing)
        found = _find_kept(
            model,
            ranges,
            images,
            options,
            quality or DetectionMismatch(model, images),
            progress,
            say,
        )
        told |= found.to_dict() | {"keep": (*options.keep, *found.keep)}
    manifest = replace(
        artefact.manifest,
        precision="int8",
        build=replace(artefact.manifest.build, int8=Int8Build.from_dict(told)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity=None,
        self_test=None,
    )
    with atomic_path(output) as temporary:
        save_onnx(
            quantize(model, ranges, scheme=options.scheme, keep=told["keep"]), manifest, temporary
        )
    return manifest.build


def prepare_images(folder: Path, sizing: ImageSize) -> list[Prepared]:
    """Some images of a folder to measure quality on, scaled and padded as for the network.

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
    progress: Progress,
    say: Callable[[str], None],
) -> KeptLayers:
    assert options.max_drop is not None

    @functools.cache
    def drop_of(patterns: Collection[str]) -> float:
        return quality(
            quantize(model, ranges, scheme=options.scheme, keep=[*options.keep, *patterns])
        )

    if (drop := drop_of(())) <= options.max_drop:  # the usual case needs no list
        say(f"all layers in 8 bits: {drop:.3f} worse, at most {options.max_drop:g} allowed")
        return KeptLayers((), drop, ((0, drop),))
    ranked = measure_sensitivity(
        model, ranges, images[:RANKING_IMAGES], scheme=options.scheme, progress=progress
    )
    return choose_kept(ranked, drop_of, options.max_drop, say)


LARGEST_REPORTED, MOST_TOLD = 5, 10

Say = Callable[[str], None]


def low_precision_onnx(
    onnx_path: Path,
    output: Path,
    precision: LowPrecision,
    *,
    keep: Collection[str] = (),
    calib_data: Path | None = None,
    max_images: int = RANGE_IMAGES,
    progress: Progress = lambda done, total: None,
    say: Say = lambda line: None,
) -> Build:
    """Writes `output` (.onnx), its metadata included, or nothing at all. No manifest beside it: parity is yet to be shown.

    Args:
        onnx_path: an .onnx artefact of tood-export in float32, or in int8: then what is not 8-bit becomes half precision.
        output: where to; a file that is there already is replaced in one step.
        precision: "fp16" or "bf16".
        keep: patterns of what stays float32, see `lower_precision`.
        calib_data: a folder of images. For fp16, values that it cannot hold on them stay float32; bf16 holds all.
        max_images: of the folder, evenly spread over it.
        progress: called after every image with how many are done and how many there are.
        say: told warnings, and what fp16 cannot hold, a line each.

    Returns:
        How it was built, for the manifest.

    Raises:
        ToodError: not such an artefact, a pattern that fits nothing, or images that cannot be read.
    """
    artefact = read_onnx(onnx_path)
    if artefact.manifest.precision not in ("fp32", "int8"):
        raise ToodError(
            f"{onnx_path} is in {artefact.manifest.precision} already; start from the float32 artefact"
        )
    wishes, found = dict.fromkeys(keep, "asked for"), {}
    if precision == "fp16" and calib_data is not None:
        if artefact.manifest.precision == "fp32":  # that of 8 bits has been told
            warn_of_few(calib_data, len(choose_images(calib_data, max_images)), say)
        risks, found = _find_risks(artefact, keep, calib_data, max_images, progress)
        _tell_risks(risks, found["values_measured"], say)
        wishes |= risks
    model, report = lower_precision(artefact.model, precision, keep=wishes)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    half = HalfBuild.from_dict(report.to_dict() | found)
    build = replace(artefact.manifest.build, opset=opset, half=half)
    named = artefact.manifest.precision if artefact.manifest.precision == "int8" else precision
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = replace(
        artefact.manifest,
        precision=named,
        build=build,
        created=created,
        artefact_sha256="",
        parity=None,
        self_test=None,
    )
    with atomic_path(output) as temporary:
        save_onnx(model, manifest, temporary)
    return build


def _find_risks(
    artefact: OnnxArtefact, keep: Collection[str], images: Path, most: int, progress: Progress
) -> tuple[dict[str, str], dict[str, Any]]:
    """Patterns of the values that fp16 cannot hold, with the reasons; and what the manifest says of the ranges."""
    names = half_values(artefact.model, keep=keep)
    ranges = measure_ranges(
        artefact.model, names, images, artefact.manifest.preset.sizing, most=most, progress=progress
    )
    risks = values_at_risk(ranges)
    largest = sorted(ranges, key=lambda name: -ranges[name].largest)[:LARGEST_REPORTED]
    told = {
        name: asdict(ranges[name]) | {"risk": risks.get(name, "")} for name in (*largest, *risks)
    }
    return {glob.escape(name): reason for name, reason in risks.items()}, {
        "values_measured": len(names),
        "ranges": told,
    }


def _tell_risks(risks: Mapping[str, str], measured: int, say: Say) -> None:
    if not risks:
        say(f"fp16 holds all {measured} values that it is given on these images")
        return
    say(
        f"fp16 cannot hold {len(risks)} of {measured} values, which stay float32; the manifest has the whole list"
    )
    for name, reason in list(risks.items())[:MOST_TOLD]:
        say(f"stays float32: {name} {reason}")


Precision = Literal["fp32", "bf16", "fp16", "int8"]
Rest = Literal["fp32", "bf16", "fp16"]
Tell = Callable[[Any], None]
QualityOf = Callable[[OnnxArtefact], Quality]


class AnnotatedAp(Protocol):
    """AP on annotated images, in points, 0 to 100."""

    @property
    def reference_ap(self) -> float:
        """Of the float32 artefact."""
        ...

    def __call__(self, model: onnx.ModelProto) -> float:
        """Return by how much a graph that was made from the float32 one is worse."""
        ...

    def file_ap(self, path: Path, **engine_options: Any) -> float:
        """Return the AP of an artefact in its own runtime."""
        ...


AnnotatedApOf = Callable[[OnnxArtefact], AnnotatedAp]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A graph made from a float32 one.

    Attributes:
        model: the graph.
        precision: what the manifest calls it.
        mixture: what a search of mixed precisions came to, for the manifest.
    """

    model: onnx.ModelProto
    precision: str
    mixture: Int8Build | None = None


Lower = Callable[[OnnxArtefact, Tell], Lowered]


@dataclass(frozen=True)
class PrecisionOptions:
    """How a float32 graph becomes one of lower precision.

    Attributes:
        precision: of convolutions and matrix products.
        rest: int8 alone: of what is not 8-bit.
        keep: patterns of layers that stay float32.
        calib_data: images to calibrate on; for fp16 to find values that it cannot hold.
        int8: how 8-bit layers are made; what stays float32 is in `keep`.
        quality: int8 alone: makes from the float32 artefact what tells how much worse another graph is; per cent of mismatched
            detections where not given.
        measure_ap: makes from the float32 artefact what measures AP for the verdict; None without annotations.
        lower: chooses precisions itself, in place of all of the above but the images; gives lines and tables to its second argument.
    """

    precision: Precision = "fp32"
    rest: Rest = "fp32"
    keep: tuple[str, ...] = ()
    calib_data: Path | None = None
    int8: Int8Options = field(default_factory=Int8Options)
    quality: QualityOf | None = None
    measure_ap: AnnotatedApOf | None = None
    lower: Lower | None = None

    def __post_init__(self) -> None:
        if self.precision == "int8" and self.calib_data is None:
            raise ToodError(
                "precision int8 needs images to calibrate on; give --calib-data a folder of 64 or more like those to come"
            )

    @property
    def wanted(self) -> str:
        """What becomes of a float32 graph, in words; empty where it stays as it is."""
        if self.lower is not None:
            return "the best mixture of precisions"
        return "" if self.precision == "fp32" else self.precision


def lower_onnx(
    float_onnx: Path,
    folder: Path,
    options: PrecisionOptions,
    reference: Reference,
    *,
    images: Sequence[NDArray[np.uint8]] = (),
    ap: AnnotatedAp | None = None,
    tell: Tell = lambda part: None,
    quiet: bool = False,
) -> Path:
    """Writes the .onnx in lower precision and its manifest into `folder`.

    Args:
        float_onnx: the float32 artefact.
        folder: exists, and is the caller's.
        options: what to make.
        reference: what the result is compared with.
        images: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        ap: measures AP for the verdict; None without annotations.
        tell: given warnings and what was tried, a line each, and tables to print.
        quiet: no progress bars.

    Raises:
        ToodError: an option out of range, or images that cannot be read.
        CheckFailed: it deviates from the reference by more than its precision explains.
    """
    if options.lower is not None:
        path = _write(options.lower(read_onnx(float_onnx), tell), float_onnx, folder / "mixed.onnx")
    else:
        path = _to_precision(float_onnx, folder, options, tell, quiet)
    _describe(path, float_onnx, reference, images_to_verify(options.calib_data, images), ap, tell)
    return path


def _write(lowered: Lowered, float_onnx: Path, output: Path) -> Path:
    """An artefact with its metadata; parity is yet to be shown."""
    source = read_onnx(float_onnx).manifest
    opset = next(entry.version for entry in lowered.model.opset_import if not entry.domain)
    manifest = replace(
        source,
        precision=lowered.precision,
        build=replace(source.build, opset=opset, mixture=lowered.mixture),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity=None,
        self_test=None,
    )
    with atomic_path(output) as temporary:
        save_onnx(lowered.model, manifest, temporary)
    return output


def _to_precision(
    float_onnx: Path, folder: Path, options: PrecisionOptions, say: Say, quiet: bool
) -> Path:
    path = float_onnx
    if options.precision == "int8":
        path = _to_int8(path, folder / "int8.onnx", options, say, quiet)
    half = options.rest if options.precision == "int8" else options.precision
    if half == "fp16" or half == "bf16":
        with progress_bar("measuring ranges", quiet) as progress:
            output = folder / f"{path.stem}-{half}.onnx"
            low_precision_onnx(
                path,
                output,
                half,
                keep=options.keep,
                calib_data=options.calib_data,
                max_images=options.int8.max_images,
                progress=progress,
                say=say,
            )
        path = output
    return path


def _to_int8(
    float_onnx: Path, output: Path, options: PrecisionOptions, say: Say, quiet: bool
) -> Path:
    assert options.calib_data is not None
    wanted = replace(options.int8, keep=options.keep)
    quality = options.quality and options.quality(read_onnx(float_onnx))
    with progress_bar("calibrating", quiet) as progress:
        int8_from_onnx(
            float_onnx,
            output,
            options.calib_data,
            wanted,
            quality=quality,
            progress=progress,
            say=say,
        )
    return output


def _describe(
    path: Path,
    float_onnx: Path,
    reference: Reference,
    images: Sequence[NDArray[np.uint8]],
    ap: AnnotatedAp | None,
    say: Say,
) -> None:
    """Compares a lowered artefact with the reference, and writes its manifest. The float32 answer to the self-test stays the right one.

    Half precision is emulated: ONNX Runtime has no bf16 on CPUs, and leaves out casts to fp16, which would hide what overflows. 8 bits
    run as they will, on calibration images: the self-test's image lies outside the ranges that these have, so its right answer is then
    what the 8 bits themselves give here.
    """
    lowered, source = read_onnx(path), read_onnx(float_onnx).manifest
    precision = lowered.manifest.precision
    run = OnnxRunner(emulate_low_precision(lowered.model), maps=False)
    if half := half_precision_of(lowered.manifest):
        run.name += f", {half} emulated"
    measure_ap = (
        None if ap is None else lambda: (ap.reference_ap, ap.reference_ap - ap(lowered.model))
    )
    if precision == "fp32":  # what a search of mixtures may come to
        parity = verify_float32(reference, OnnxRunner(lowered.model), images=images, say=say)
    else:
        parity = verify_detections(
            reference, run, images, DETECTION_LIMITS[precision], measure_ap=measure_ap, say=say
        )
    self_test = self_test_from(run) if precision == "int8" else source.self_test
    manifest = replace(
        lowered.manifest, parity=Parity.from_dict(parity), self_test=self_test
    ).with_artefact(path)
    write_text(manifest_path(path), manifest.to_json())


def images_to_verify(
    calib_data: Path | None, images: Sequence[NDArray[np.uint8]] = ()
) -> Sequence[NDArray[np.uint8]]:
    """Images of the user's kind, (H, W, 3) uint8 BGR: of calibration, and those given to verify on; crops of a photograph without any."""
    calibrated = (
        [read_image(path) for path in choose_images(calib_data, QUALITY_IMAGES)]
        if calib_data is not None
        else []
    )
    return [*calibrated, *images] or photograph_crops(QUALITY_IMAGES)
