"""Convert an .onnx artefact to OpenVINO's IR.

Comes in: an artefact, in memory or its file. Goes out: .xml, .bin and manifest, compared with the
reference, all three or none. Knows nothing of checkpoints.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.engines.openvino_runtime import (
    CPU,
    PLACE,
    TYPES,
    check_precision,
    load_openvino,
    read_model,
    reason_of,
    refusal,
    shared_core,
)
from tood_deploy.engines.self_test import self_test_from
from tood_deploy.errors import ArtefactError, OutputError, ToodError
from tood_deploy.export.precision.convert import AnnotatedAp
from tood_deploy.files import atomic_paths
from tood_deploy.graph_io import (
    MAP_NAMES,
    OPENVINO_SUFFIX,
    OPENVINO_WEIGHTS_SUFFIX,
    OUTPUTS,
    graph_feeds,
)
from tood_deploy.manifest import Manifest, manifest_path
from tood_deploy.onnx_file import OnnxArtefact, read_onnx
from tood_deploy.parity.reference import Outputs, Reference
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.parity.verify import verify_detections, verify_float32
from tood_deploy.reporter import Reporter

RunPrecision = Literal["fp32", "bf16"]


class OpenVinoRunner:
    """An .xml or .onnx file in OpenVINO on the CPU; a `Runner`.

    The maps of all stages are added as outputs in memory if they are asked for.
    """

    def __init__(
        self, artefact: Path, fallback: RunPrecision = "fp32", *, maps: bool = True
    ) -> None:
        """Open the artefact; `fallback` is the precision of what is not quantised.

        Raises:
            DeviceError: OpenVINO is not installed, or the CPU has no bf16.
            ArtefactError: OpenVINO cannot read it.
        """
        ov = load_openvino()
        core = shared_core()
        check_precision(core, fallback)
        model = read_model(core, artefact)
        self.outputs = (*OUTPUTS, *(MAP_NAMES if maps else ()))
        model.add_outputs(list(self.outputs[len(OUTPUTS) :]))
        self._request = core.compile_model(
            model, CPU, {"INFERENCE_PRECISION_HINT": TYPES[fallback]}
        ).create_infer_request()
        self.name = f"OpenVINO {ov.__version__.split('-')[0]}, {fallback}, CPU"

    def __call__(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Outputs:
        """Return the outputs on a batch; see `Runner`."""
        self._request.infer(graph_feeds(images, valid_hw, score_threshold, iou_threshold))
        return [np.array(self._request.get_tensor(name).data) for name in self.outputs]


def openvino_from_onnx(
    source: Path | OnnxArtefact,
    output: Path,
    *,
    reference: Reference,
    fallback: RunPrecision | None = None,
    images: Sequence[NDArray[np.uint8]] = (),
    ap: AnnotatedAp | None = None,
    reporter: Reporter | None = None,
) -> Manifest:
    """Write an .xml, its .bin and the manifest beside them, after comparing them with the network.

    Weights are stored as they are in the .onnx, in float32 or int8; bf16 is a property of the run,
    pinned by the manifest.

    Args:
        source: an .onnx artefact of tood-export, or its file, in float32 or quantised, with
            deformable convolutions as gathers.
        output: an .xml file; what is there already is replaced.
        reference: the network that the .onnx was made from, or an .onnx proven equal to it.
        fallback: precision of all that is not quantised; as the .onnx states where not given.
        images: (H, W, 3) uint8 BGR, to verify on: in float32 in addition to the built-in ones, in
            lower precision alone.
        ap: measures AP for the verdict; None without annotations.
        reporter: of what is being compared.

    Raises:
        ToodError: an argument out of range, OpenVINO is missing or lacks an operator, or a place
            that cannot be written.
        CheckFailed: the artefact deviates from PyTorch; nothing is left behind.
    """
    if output.suffix.lower() != OPENVINO_SUFFIX:
        raise ToodError(f"output is {output}; expected a name ending in {OPENVINO_SUFFIX}")
    ov = load_openvino()
    reporter = reporter or Reporter.silent()
    artefact = _read_source(source) if isinstance(source, Path) else source
    manifest = _manifest(artefact.manifest, fallback, ov)
    model = _read_graph(artefact)
    model.set_rt_info(manifest.to_json(), PLACE)
    # The .bin becomes itself first, and the manifest, which says that all three belong together,
    # last.
    weights = output.with_suffix(OPENVINO_WEIGHTS_SUFFIX)
    with atomic_paths(weights, output, manifest_path(output)) as (_, xml, described):
        try:
            ov.save_model(model, xml, compress_to_fp16=False)
        except RuntimeError as error:  # of every kind, also for a full disk
            raise OutputError(
                f"{output}: OpenVINO cannot write it ({reason_of(error)}); make room, or choose "
                "another --output"
            ) from error
        # The engine that AP is measured with reads the manifest.
        described.write_text(manifest.to_json(), encoding="utf-8")
        proven = _verify(xml, manifest, reference, images, ap, reporter)
        assert proven.parity is not None
        parity = replace(proven.parity, onnx=artefact.manifest.parity)
        manifest = replace(proven, parity=parity).with_artefact(xml)
        described.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _read_source(path: Path) -> OnnxArtefact:
    """Return an artefact that has its verdict beside it.

    Raises:
        ArtefactError: it has none, or is not an artefact of ours.
    """
    artefact = read_onnx(path)
    if not manifest_path(path).is_file():
        raise ArtefactError(
            f"{path}: has no manifest beside it ({manifest_path(path).name}); "
            "export the checkpoint again"
        )
    return artefact


def _read_graph(artefact: OnnxArtefact) -> Any:
    """Return the graph of an artefact as OpenVINO reads it.

    Raises:
        ArtefactError: it has operators that OpenVINO lacks.
    """
    try:
        return shared_core().read_model(artefact.model.SerializeToString())
    except RuntimeError as error:
        raise refusal(artefact.path, error) from error


def _verify(
    xml: Path,
    manifest: Manifest,
    reference: Reference,
    images: Sequence[NDArray[np.uint8]],
    ap: AnnotatedAp | None,
    reporter: Reporter,
) -> Manifest:
    """Return the manifest with the verdict on a written IR.

    Args:
        xml: its file, the .bin beside it.
        manifest: of it, as yet without verdict.
        reference: what it is compared with.
        images: (H, W, 3) uint8 BGR.
        ap: measures AP; None without annotations.
        reporter: of what is being compared.
    """
    in_float32 = manifest.precision == "fp32"
    fallback = "bf16" if manifest.build.fallback_precision == "bf16" else "fp32"
    run = OpenVinoRunner(xml, fallback, maps=in_float32)
    if in_float32:
        parity = verify_float32(reference, run, images=images, reporter=reporter)
        return replace(manifest, parity=parity)
    parity = verify_detections(
        reference,
        run,
        images,
        DETECTION_LIMITS[manifest.precision],
        measure_ap=None if ap is None else lambda: (ap.reference_ap, ap.file_ap(xml)),
        reporter=reporter,
    )
    if manifest.precision == "int8":  # whose right answer is what OpenVINO's own rounding gives
        manifest = replace(manifest, self_test=self_test_from(run))
    return replace(manifest, parity=parity)


def _manifest(source: Manifest, fallback: RunPrecision | None, ov: ModuleType) -> Manifest:
    """Return the manifest of the IR, as yet without verdict."""
    own = source.build.fallback_precision
    stated = own if source.precision == "int8" else source.precision
    chosen = "bf16" if (fallback or stated) == "bf16" else "fp32"
    return replace(
        source,
        precision=chosen if source.precision in TYPES else source.precision,
        build=replace(source.build, format="openvino", fallback_precision=chosen),
        versions=source.versions | {"openvino": ov.__version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefact_sha256="",
        parity=None,
    )
