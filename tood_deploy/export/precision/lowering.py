"""From a float32 .onnx to one in the precision that is asked for, compared with what the float32 one was compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from tood_deploy.errors import ToodError
from tood_deploy.export.onnx_artefact import OnnxArtefact, read_onnx
from tood_deploy.export.pictures import read_picture
from tood_deploy.export.precision.calibration import choose_pictures
from tood_deploy.export.precision.emulation import emulate_low_precision
from tood_deploy.export.precision.int8 import QUALITY_PICTURES, Int8Options, Quality, int8_from_onnx
from tood_deploy.export.precision.to_half_precision import low_precision_onnx
from tood_deploy.export.progress import progress_bar
from tood_deploy.export.runners import OnnxRunner
from tood_deploy.export.self_test import self_test_from
from tood_deploy.export.to_onnx import save_onnx
from tood_deploy.half_precision import half_precision_of
from tood_deploy.manifest import atomic_path, manifest_path, write_text
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.sample_images import photograph_crops
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.parity.verify import verify_detections, verify_float32

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Rest = Literal["fp32", "bf16", "fp16"]
Say = Callable[[str], None]
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
        options: what the manifest's options say beside those of the float32 artefact.
    """

    model: onnx.ModelProto
    precision: str
    options: dict[str, Any]


Lower = Callable[[OnnxArtefact, Tell], Lowered]


@dataclass(frozen=True)
class PrecisionOptions:
    """How a float32 graph becomes one of lower precision.

    Attributes:
        precision: of convolutions and matrix products.
        rest: int8 alone: of what is not 8-bit.
        keep: patterns of layers that stay float32.
        calib_data: pictures to calibrate on; for fp16 to find values that it cannot hold.
        int8: how 8-bit layers are made; what stays float32 is in `keep`.
        quality: int8 alone: makes from the float32 artefact what tells how much worse another graph is; per cent of mismatched
            detections where not given.
        measure_ap: makes from the float32 artefact what measures AP for the verdict; None without annotations.
        lower: chooses precisions itself, in place of all of the above but the pictures; gives lines and tables to its second argument.
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
            raise ToodError("precision int8 needs pictures to calibrate on; give --calib-data a folder of 64 or more like those to come")

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
    pictures: Sequence[NDArray[np.uint8]] = (),
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
        pictures: (H, W, 3) uint8 BGR, to verify on in addition to the built-in ones.
        ap: measures AP for the verdict; None without annotations.
        tell: given warnings and what was tried, a line each, and tables to print.
        quiet: no progress bars.

    Raises:
        ToodError: an option out of range, or pictures that cannot be read.
        CheckFailed: it deviates from the reference by more than its precision explains.
    """
    if options.lower is not None:
        path = _write(options.lower(read_onnx(float_onnx), tell), float_onnx, folder / "mixed.onnx")
    else:
        path = _to_precision(float_onnx, folder, options, tell, quiet)
    _describe(path, float_onnx, reference, images_to_verify(options.calib_data, pictures), ap, tell)
    return path


def _write(lowered: Lowered, float_onnx: Path, output: Path) -> Path:
    """An artefact with its metadata; parity is yet to be shown."""
    source = read_onnx(float_onnx).manifest
    opset = next(entry.version for entry in lowered.model.opset_import if not entry.domain)
    manifest = replace(
        source,
        precision=lowered.precision,
        options={**source.options, "opset": opset, **lowered.options},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity={},
        self_test={},
    )
    with atomic_path(output) as temporary:
        save_onnx(lowered.model, manifest, temporary)
    return output


def _to_precision(float_onnx: Path, folder: Path, options: PrecisionOptions, say: Say, quiet: bool) -> Path:
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
                most_pictures=options.int8.most_pictures,
                progress=progress,
                say=say,
            )
        path = output
    return path


def _to_int8(float_onnx: Path, output: Path, options: PrecisionOptions, say: Say, quiet: bool) -> Path:
    assert options.calib_data is not None
    wanted = replace(options.int8, keep=options.keep)
    quality = options.quality and options.quality(read_onnx(float_onnx))
    with progress_bar("calibrating", quiet) as progress:
        int8_from_onnx(float_onnx, output, options.calib_data, wanted, quality=quality, progress=progress, say=say)
    return output


def _describe(
    path: Path, float_onnx: Path, reference: Reference, images: Sequence[NDArray[np.uint8]], ap: AnnotatedAp | None, say: Say
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
    measure_ap = None if ap is None else lambda: (ap.reference_ap, ap.reference_ap - ap(lowered.model))
    if precision == "fp32":  # what a search of mixtures may come to
        parity = verify_float32(reference, OnnxRunner(lowered.model), pictures=images, say=say)
    else:
        parity = verify_detections(reference, run, images, DETECTION_LIMITS[precision], measure_ap=measure_ap, say=say)
    self_test = self_test_from(run) if precision == "int8" else source.self_test
    manifest = replace(lowered.manifest, parity=parity, self_test=self_test).with_artefact(path)
    write_text(manifest_path(path), manifest.to_json())


def images_to_verify(calib_data: Path | None, pictures: Sequence[NDArray[np.uint8]] = ()) -> Sequence[NDArray[np.uint8]]:
    """Images of the user's kind, (H, W, 3) uint8 BGR: of calibration, and those given to verify on; crops of a photograph without any."""
    calibrated = [read_picture(path) for path in choose_pictures(calib_data, QUALITY_PICTURES)] if calib_data is not None else []
    return [*calibrated, *pictures] or photograph_crops(QUALITY_PICTURES)
