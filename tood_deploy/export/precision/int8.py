"""From a float32 ONNX artefact to one in int8: calibration, the choice of what stays float32, Q/DQ pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from tood_deploy.errors import ToodError
from tood_deploy.export.onnx_artefact import read_onnx
from tood_deploy.export.pictures import read_picture
from tood_deploy.export.precision.calibration import MOST_PICTURES, calibrate, choose_pictures
from tood_deploy.export.precision.histogram import METHODS, Method
from tood_deploy.export.precision.mismatch import DetectionMismatch
from tood_deploy.export.precision.quantizable import choose_layers
from tood_deploy.export.precision.quantize import SCHEMES, Ranges, Scheme, calibrated_values, quantize
from tood_deploy.export.precision.sensitivity import KeptLayers, Prepared, choose_kept, measure_sensitivity
from tood_deploy.export.to_onnx import save_onnx
from tood_deploy.manifest import atomic_path
from tood_deploy.preprocess import ImageSize, resize_and_pad

NEEDS: dict[Scheme, str] = {"u8s7": "any CPU", "u8s8": "a CPU with VNNI instructions", "s8s8": "TensorRT"}
RANKING_PICTURES = 3
QUALITY_PICTURES = 16

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
        most_pictures: to calibrate on, evenly spread over the folder.
    """

    scheme: Scheme = "u8s7"
    method: Method = "percentile"
    keep: tuple[str, ...] = ()
    max_drop: float | None = None
    most_pictures: int = MOST_PICTURES

    def __post_init__(self) -> None:
        for name, value, allowed in (("scheme", self.scheme, SCHEMES), ("method", self.method, METHODS)):
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
) -> dict[str, Any]:
    """Writes `output` (.onnx), its metadata included, or nothing at all. No manifest beside it: parity is yet to be shown.

    Args:
        onnx_path: an .onnx artefact of tood-export in float32.
        output: where to; a file that is there already is replaced in one step.
        calib_data: a folder of pictures like those to come, 64 or more.
        options: how.
        quality: for `max_drop`: how much worse than the float32 graph another one is, such as in points of AP; per cent of mismatched
            detections on some of the calibration pictures where not given.
        cache: the folder that keeps calibrations; the package's own where not given.
        progress: called with how much of the present step is done and how much there is.
        say: told warnings and what was tried, a line each.

    Returns:
        What the manifest's options should say: those of the float32 artefact, and "int8".

    Raises:
        ToodError: not such an artefact, a pattern that fits nothing, or pictures that cannot be read.
    """
    artefact = read_onnx(onnx_path)
    if artefact.manifest.precision != "fp32":
        raise ToodError(f"{onnx_path} is in {artefact.manifest.precision} already; start from the float32 artefact")
    model, sizing = artefact.model, artefact.manifest.preset.sizing
    choose_layers(ir.from_proto(model).graph, options.keep)  # a wrong pattern is told before the pictures are run
    names, most = calibrated_values(model), options.most_pictures
    calibration = calibrate(model, names, calib_data, sizing, most=most, cache=cache, progress=progress, say=say)
    told = asdict(options) | {"needs": NEEDS[options.scheme], "pictures": calibration.pictures, "calibration": calibration.key}
    ranges = calibration.ranges(options.method)
    if options.max_drop is not None:
        pictures = prepare_pictures(calib_data, sizing)
        found = _find_kept(model, ranges, pictures, options, quality or DetectionMismatch(model, pictures), progress, say)
        told |= found.to_dict() | {"keep": (*options.keep, *found.keep)}
    manifest = replace(
        artefact.manifest,
        precision="int8",
        options=artefact.manifest.options | {"int8": told},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity={},
        self_test={},
    )
    with atomic_path(output) as temporary:
        save_onnx(quantize(model, ranges, scheme=options.scheme, keep=told["keep"]), manifest, temporary)
    return manifest.options


def prepare_pictures(folder: Path, sizing: ImageSize) -> list[Prepared]:
    """Some pictures of a folder to measure quality on, scaled and padded as for the network.

    Raises:
        InputError: fewer than two pictures, or one that cannot be read.
    """
    prepared = (resize_and_pad(read_picture(path), sizing) for path in choose_pictures(folder, QUALITY_PICTURES))
    return [(image, transform.resized_hw) for image, transform in prepared]


def _find_kept(
    model: onnx.ModelProto,
    ranges: Ranges,
    pictures: Sequence[Prepared],
    options: Int8Options,
    quality: Quality,
    progress: Progress,
    say: Callable[[str], None],
) -> KeptLayers:
    assert options.max_drop is not None

    @functools.cache
    def drop_of(patterns: Collection[str]) -> float:
        return quality(quantize(model, ranges, scheme=options.scheme, keep=[*options.keep, *patterns]))

    if (drop := drop_of(())) <= options.max_drop:  # the usual case needs no list
        say(f"all layers in 8 bits: {drop:.3f} worse, at most {options.max_drop:g} allowed")
        return KeptLayers((), drop, ((0, drop),))
    ranked = measure_sensitivity(model, ranges, pictures[:RANKING_PICTURES], scheme=options.scheme, progress=progress)
    return choose_kept(ranked, drop_of, options.max_drop, say)
