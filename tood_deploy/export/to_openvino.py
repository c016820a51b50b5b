"""An exported .onnx file in, OpenVINO's IR out: .xml, .bin and manifest, verified, all three or none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.openvino_runtime import (
    CPU,
    PLACE,
    TYPES,
    check_precision,
    load_openvino,
    read_model,
    shared_core,
)
from tood_deploy.engines.self_test import self_test_from
from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.export.precision.convert import AnnotatedAp
from tood_deploy.files import atomic_paths
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS, graph_feeds
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import Parity
from tood_deploy.parity.reference import Outputs, Reference
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.parity.verify import verify_detections, verify_float32

Rest = Literal["fp32", "bf16"]


class OpenVinoRunner:
    """An .xml or .onnx file in OpenVINO on the CPU, with the maps of all stages added as outputs in memory if wanted; a `Runner`."""

    def __init__(self, artefact: Path, rest: Rest = "fp32", *, maps: bool = True) -> None:
        """Opens the artefact; `rest` is the precision of what is not quantised.

        Raises:
            DeviceError: OpenVINO is not installed, or the CPU has no bf16.
            ArtefactError: OpenVINO cannot read it.
        """
        ov = load_openvino()
        core = shared_core()
        check_precision(core, rest)
        model = read_model(core, artefact)
        self.outputs = (*OUTPUTS, *(MAP_NAMES if maps else ()))
        model.add_outputs(list(self.outputs[len(OUTPUTS) :]))
        self._request = core.compile_model(
            model, CPU, {"INFERENCE_PRECISION_HINT": TYPES[rest]}
        ).create_infer_request()
        self.name = f"OpenVINO {ov.__version__.split('-')[0]}, {rest}, CPU"

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """See `Runner`."""
        self._request.infer(graph_feeds(images, valid_hw, score_threshold, iou_threshold))
        return [np.array(self._request.get_tensor(name).data) for name in self.outputs]


def openvino_from_onnx(
    onnx_path: Path,
    output: Path,
    *,
    reference: Reference,
    rest: Rest | None = None,
    images: Sequence[NDArray[np.uint8]] = (),
    ap: AnnotatedAp | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Writes `output` (.xml), its .bin and the manifest beside them, after proving them equal to the network.

    Weights are stored as they are in the .onnx, in float32 or int8; bf16 is a property of the run, pinned by the manifest.

    Args:
        onnx_path: an artefact of tood-export, in float32 or quantised, with deformable convolutions as gathers.
        output: where to; what is there already is replaced.
        reference: the network that the .onnx was made from, or an .onnx that was proven equal to it.
        rest: precision of all that is not quantised; as the .onnx file's manifest says where not given.
        images: (H, W, 3) uint8 BGR, to verify on: in float32 in addition to the built-in ones, in lower precision alone.
        ap: measures AP for the verdict; None without annotations.
        say: told what goes on, a line each.

    Raises:
        ToodError: an argument out of range, OpenVINO is missing or lacks an operator, or a place that cannot be written.
        CheckFailed: the artefact deviates from PyTorch; nothing is left behind.
    """
    if output.suffix.lower() != ".xml":
        raise ToodError(f"output is {output}; expected a name ending in .xml")
    ov = load_openvino()
    source = read_manifest(onnx_path)
    if source is None:
        raise ArtefactError(
            f"{onnx_path}: has no manifest beside it ({manifest_path(onnx_path).name}); export the checkpoint again"
        )
    manifest = _manifest(source, rest, ov)
    graph = read_model(shared_core(), onnx_path)
    graph.set_rt_info(manifest.to_json(), PLACE)
    # The .bin becomes itself first, and the manifest, which tells whether all three belong together, last.
    with atomic_paths(output.with_suffix(".bin"), output, manifest_path(output)) as (
        _,
        xml,
        described,
    ):
        ov.save_model(graph, xml, compress_to_fp16=False)
        in_float32 = manifest.precision == "fp32"
        fallback = "bf16" if manifest.build.fallback_precision == "bf16" else "fp32"
        run = OpenVinoRunner(xml, fallback, maps=in_float32)
        if in_float32:
            parity = verify_float32(reference, run, images=images, say=say)
        else:
            described.write_text(
                manifest.to_json(), encoding="utf-8"
            )  # as the engine that AP is measured with reads it
            measure_ap = None if ap is None else lambda: (ap.reference_ap, ap.file_ap(xml))
            parity = verify_detections(
                reference,
                run,
                images,
                DETECTION_LIMITS[manifest.precision],
                measure_ap=measure_ap,
                say=say,
            )
        if manifest.precision == "int8":  # whose right answer is what OpenVINO's own rounding gives
            manifest = replace(manifest, self_test=self_test_from(run))
        verdict = replace(Parity.from_dict(parity), onnx=source.parity)
        manifest = replace(manifest, parity=verdict).with_artefact(xml)
        described.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _manifest(source: Manifest, rest: Rest | None, ov: ModuleType) -> Manifest:
    """The manifest of the IR, as yet without verdict."""
    wanted = rest or (
        source.build.fallback_precision if source.precision == "int8" else source.precision
    )
    chosen = "bf16" if wanted == "bf16" else "fp32"
    return replace(
        source,
        precision=chosen if source.precision in TYPES else source.precision,
        build=replace(source.build, format="openvino", fallback_precision=chosen),
        versions=source.versions | {"openvino": ov.__version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity=None,
    )
