"""OpenVINO: runs an exported .onnx artefact or an OpenVINO IR (.xml with its .bin) on the CPU. No torch."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.base import BatchDetections, Engine, Hint, check_hint
from tood_deploy.engines.openvino_forms import Form, Forms
from tood_deploy.engines.self_test import tolerance_of
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.home import home_folder
from tood_deploy.int8_probe import saturates_in_openvino
from tood_deploy.manifest import Manifest, artefact_files, read_manifest
from tood_deploy.openvino_model import (
    TYPES,
    check_precision,
    load_openvino,
    make_cache_folder,
    manifest_inside,
    read_model,
    shared_core,
)

Precision = Literal["fp32", "bf16"]

# A call with dynamic shapes takes longer than one of a form compiled for its shape: `tiny` by a third, a ResNet-50 at 640 x 640 by 17% in
# int8, 6% in bf16, 3% in float32. A form takes some seconds to make, so it pays after some hundred calls, and holds the weights again.
CALLS_BEFORE_STATIC = 100
MOST_STATIC_BYTES = 64 * 2**20


class OpenVinoEngine(Engine):
    """An artefact in OpenVINO's CPU plugin. Calls of several threads run beside one another as far as streams allow."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precision: Precision | None = None,
        hint: Hint = "latency",
        cache: bool | str | PathLike[str] = True,
        calls_before_static: int | None = None,
    ) -> None:
        """Opens the artefact.

        Args:
            path: an .onnx file, or an .xml with its .bin beside it.
            device: "cpu".
            threads: of all inferences together; the number of cores where not given.
            precision: of what is not quantised, "fp32" or "bf16"; the artefact's own where not given, which is float32 unless its manifest
                says bf16. Never left to OpenVINO, which takes bf16 in silence where the CPU has it.
            hint: "latency": all threads work on one batch; "throughput": on several (`in_flight`).
            cache: whether to keep what was compiled for the next start: in `home_folder("openvino")`, or in this folder.
            calls_before_static: how many batches of one shape it takes until a form is compiled for that shape, beside the work that goes
                on; 100 where not given, for large networks never, since it hardly pays; 0: at once. `settle` does not wait for so many.

        Raises:
            ArtefactError: not a file of tood-export, cut, of another version, or with operators that OpenVINO lacks.
            DeviceError: OpenVINO, the device or the precision is not there.
            ToodError: a value out of range.
        """
        ov = load_openvino()
        if device != "cpu":
            raise DeviceError(f"device is {device}, OpenVINO runs on the CPU here; use --device cpu, or --runtime onnxruntime")
        _check_options(threads, precision, hint)
        core = shared_core()
        manifest = read_manifest(path)
        model = read_model(core, path) if manifest is None else None
        self.manifest = manifest or manifest_inside(model, path)
        self._rest: str = precision or _own_precision(self.manifest)
        check_precision(core, self._rest)
        self.device, self.name = device, f"OpenVINO {ov.__version__.split('-')[0]}"
        config = {"INFERENCE_PRECISION_HINT": TYPES[self._rest], "PERFORMANCE_HINT": hint.upper()}
        config |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._forms = Forms(
            core,
            path,
            config,
            model=model,
            cache=None if cache is False else make_cache_folder((home_folder("openvino") if cache is True else Path(cache)) / self._rest),
            static_after=_static_after(path, calls_before_static),
            tolerance=tolerance_of(self),
        )
        self.in_flight = self._forms.in_flight
        self.loaded_from = "cache" if self._forms.cached else "artefact"

    @property
    def precision(self) -> str:
        """As it runs here: "fp32", "bf16", or the artefact's own and that of the rest, such as "int8, bf16"."""
        own = self.manifest.precision
        if own in ("fp32", self._rest):
            return self._rest
        return own if own != "bf16" and self._rest == "fp32" else f"{own}, {self._rest}"

    def saturates(self) -> bool:
        """See `Engine.saturates`."""
        return saturates_in_openvino()

    def _run(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> BatchDetections:
        return self._collect(self._submit(images, valid_hw, score_threshold, iou_threshold))

    def _submit(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32], score_threshold: float, iou_threshold: float) -> Any:
        thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
        form = self._forms.of_shape(images.shape)
        return form, form.submit((np.ascontiguousarray(images), np.ascontiguousarray(valid_hw), *thresholds))

    def _collect(self, ticket: tuple[Form, Any]) -> BatchDetections:
        form, started = ticket
        return BatchDetections(*form.collect(started))

    def settle(self, batch: int, net_hw: tuple[int, int]) -> None:
        """Compiles the form of one shape now, unless it is there or none is wanted.

        Raises:
            ArtefactError: compiled for this shape the model gives other answers.
        """
        self._forms.settle((batch, *net_hw, 3))

    def close(self) -> None:
        """Frees the model; may be called again."""
        super().close()
        if (forms := vars(self).pop("_forms", None)) is not None:
            forms.close()


def _check_options(threads: int | None, precision: str | None, hint: str) -> None:
    if threads is not None and threads < 1:
        raise ToodError(f"threads is {threads}; expected a positive number")
    if precision is not None and precision not in TYPES:
        raise ToodError(f"precision is {precision!r}; OpenVINO on the CPU runs in {' or '.join(TYPES)}: int8 is made by tood-export")
    check_hint(hint)


def _own_precision(manifest: Manifest) -> str:
    """What the artefact was made to run in, beside its quantised part."""
    wanted = manifest.options.get("rest", "fp32") if manifest.precision == "int8" else manifest.precision
    return "bf16" if wanted == "bf16" else "fp32"


def _static_after(path: Path, calls: int | None) -> int | None:
    if calls is not None:
        return calls
    large = sum(file.stat().st_size for file in artefact_files(path)) > MOST_STATIC_BYTES
    return None if large else CALLS_BEFORE_STATIC
