"""What is compared: an artefact or checkpoint, opened so that its stages can be looked at.

A model argument comes in; what runs its stages, as far as its runtime lets one, goes out. Knows
nothing of limits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from tood_deploy.engines import Engine, open_engine
from tood_deploy.engines.onnx_engine import OnnxEngine
from tood_deploy.engines.open import CHECKPOINT_SUFFIXES
from tood_deploy.engines.openvino_engine import OpenVinoEngine
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.errors import ToodError
from tood_deploy.export.graph import inner_values
from tood_deploy.export.to_openvino import OpenVinoRunner
from tood_deploy.graph_io import MAP_NAMES, OUTPUTS, RANKING, graph_feeds, inner_value_names
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import Manifest, artefact_sha256
from tood_deploy.model.detector import FusedDetector
from tood_deploy.model.head import HeadOutput
from tood_deploy.model.postprocess import Candidates
from tood_deploy.onnx_file import cut_graph, open_session, with_outputs
from tood_deploy.parity.reference import Conditioning
from tood_deploy.parity.stages import STAGES, Stage, StageRunner, Values, only_inputs
from tood_deploy.parity.torch_reference import measure_conditioning
from tood_deploy.preprocess import ImageTransform
from tood_deploy.presets import PRESETS, STRIDES


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """A model and its stages.

    Attributes:
        name: as the user gave it.
        path: the file; None for a preset's name.
        engine: as deployed.
        runner: its stages.
        sha256: of the file; "" where there is none.
    """

    name: str
    path: Path | None
    engine: Engine
    runner: StageRunner
    sha256: str

    @property
    def manifest(self) -> Manifest:
        """Return what the model says of itself."""
        return self.engine.manifest

    def prepare(
        self, image_bgr: NDArray[np.uint8], imgsz: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], ImageTransform]:
        """Scale and pad an image as this model takes it.

        Args:
            image_bgr: (H, W, 3) uint8.
            imgsz: (short side, long side) that it is scaled to fit.

        Returns:
            (rows, columns, 3) uint8 RGB, and the transform that leads back.
        """
        prepared = Detector(self.engine, imgsz=imgsz).prepare(image_bgr)
        return prepared.image, prepared.transform

    def max_batch(self, inputs: Values) -> int | None:
        """Return the largest batch of images of this size that it takes; None for any."""
        return self.engine.batches_at(net_size(inputs))[1]


class DetectionsOnly(StageRunner):
    """A runtime that gives nothing but detections."""

    has_stages = False

    def __init__(self, engine: Engine) -> None:
        """Take the engine, which stays the caller's."""
        self.engine, self.name = engine, engine.name

    def run_all(self, inputs: Values) -> Values:
        """Return the detections.

        Where the engine takes no batch as small, it gets one that holds the images several times.
        """
        count, least = len(inputs["images"]), self.engine.batches_at(net_size(inputs))[0]
        filled = repeat_images(inputs, -(-least // count)) if count < least else inputs
        batch = self.engine.infer(filled["images"], filled["valid_hw"], *_thresholds(inputs))
        outputs = (batch.num_dets, batch.boxes_net, batch.scores, batch.labels)
        return inputs | {
            name: values[:count] for name, values in zip(OUTPUTS, outputs, strict=True)
        }

    def run(self, stage: Stage, values: Values) -> Values:
        """Raise ToodError, always."""
        raise ToodError(
            f"{self.name} gives detections alone; the stage {stage.name} cannot be looked at: "
            "use the .onnx it was made from"
        )


class OpenVinoMaps(DetectionsOnly):
    """A float32 .xml, whose maps OpenVINO gives where they are added as outputs, in memory."""

    def __init__(self, engine: Engine, path: Path) -> None:
        """Take the engine and the file that it has open."""
        super().__init__(engine)
        self.path = path

    @functools.cached_property
    def _with_maps(self) -> OpenVinoRunner:
        return OpenVinoRunner(self.path, maps=True)

    def run_with_maps(self, inputs: Values) -> Values:
        """Return the maps of all stages and the detections."""
        images, valid_hw = inputs["images"], inputs["valid_hw"]
        outputs = self._with_maps(images, valid_hw, *_thresholds(inputs))
        return inputs | dict(zip((*OUTPUTS, *MAP_NAMES), outputs, strict=True))


def open_compared(
    model: str,
    *,
    device: str,
    threads: int | None,
    stages: bool | None,
    artefact_options: Mapping[str, Any] | None = None,
    **load_options: Any,
) -> ComparedModel:
    """Open a model and, unless `stages` is False, its stages.

    Args:
        model: an artefact, a checkpoint, or a preset's name.
        device: "cpu" or "cuda".
        threads: of the CPU; the runtime's own choice where not given.
        stages: whether to look at the stages; None for: where the runtime lets one.
        artefact_options: for `open_engine`, of an artefact.
        **load_options: for `open_engine`, of a checkpoint.

    Raises:
        ToodError: it cannot be opened; or its stages were asked for (True) and its runtime does not
            give them.
    """
    options = dict(load_options if is_checkpoint(model) else artefact_options or {})
    if threads is not None:
        options["threads"] = threads
    engine = open_engine(model, device=device, **options)
    path = Path(model) if Path(model).is_file() else None
    runner = DetectionsOnly(engine) if stages is False else _open_stages(engine, path)
    if stages and not runner.has_stages:
        raise ToodError(
            f"{model}: {engine.name} gives detections alone; "
            "leave --stages out, or compare the .onnx it was made from"
        )
    sha256 = artefact_sha256(path) if path else engine.manifest.checkpoint_sha256
    return ComparedModel(model, path, engine, runner, sha256)


def is_checkpoint(model: str) -> bool:
    """Return whether a model argument names a checkpoint or preset, which PyTorch runs."""
    return Path(model).suffix.lower() in CHECKPOINT_SUFFIXES or (
        model in PRESETS and not Path(model).exists()
    )


def _open_stages(engine: Engine, path: Path | None) -> StageRunner:
    if isinstance(engine, TorchEngine):
        return TorchStages(engine.detector)
    if path is not None and isinstance(engine, OnnxEngine):
        return OnnxStages(engine, path)
    if path is not None and isinstance(engine, OpenVinoEngine) and engine.precision == "fp32":
        return OpenVinoMaps(engine, path)
    return DetectionsOnly(engine)


def net_size(inputs: Values) -> tuple[int, int]:
    """Return rows and columns of the images in the graph's inputs."""
    return inputs["images"].shape[1], inputs["images"].shape[2]


def repeat_images(inputs: Values, times: int) -> Values:
    """Return the graph's inputs with every image of the batch so many times, in turn."""
    return inputs | {
        name: np.concatenate([inputs[name]] * times) for name in ("images", "valid_hw")
    }


def network_inputs(
    image: NDArray[np.uint8], transform: ImageTransform, conf: float, iou: float
) -> Values:
    """Return the exported graph's inputs for one prepared image.

    Args:
        image: (H, W, 3) uint8 RGB, padded.
        transform: that leads back from it.
        conf: score that detections must exceed, 0 to 1.
        iou: overlap above which the weaker of two boxes goes, 0 to 1.
    """
    return graph_feeds(image[None], np.array([transform.resized_hw], np.int32), conf, iou)


TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


class OnnxStages(StageRunner):
    """The stages of an artefact that `OnnxEngine` has open."""

    has_stages = True

    def __init__(self, engine: OnnxEngine, path: Path) -> None:
        """Cut the graph into its stages, and open each.

        Args:
            engine: stays the caller's.
            path: the file that it has open.

        Raises:
            ArtefactError: the file does not name its inner values: it is of an older version.
        """
        self.engine, self.name = engine, engine.name
        model = onnx.load(path)
        self._names = inner_value_names(engine.manifest.preset)
        self._variant = self._open(with_outputs(model, self._names))
        typed = onnx.shape_inference.infer_shapes(model)
        ranking = tuple(name for name in RANKING if name in self._names)
        self._parts = {}
        for stage in STAGES:
            reads = stage.reads + (ranking if stage.name == "candidates" else ())
            gives = stage.gives + (ranking if stage.name == "head" else ())
            self._parts[stage.name] = self._open(cut_graph(typed, reads, gives))

    def run_all(self, inputs: Values) -> Values:
        """Run all stages; the detections are the shipped file's own."""
        inner = self._variant.run(list(self._names), only_inputs(inputs))
        shipped = self.engine.session.run(list(OUTPUTS), only_inputs(inputs))
        return inputs | _widened(self._names, inner) | _widened(OUTPUTS, shipped)

    def run(self, stage: Stage, values: Values) -> Values:
        """Run one stage."""
        part = self._parts[stage.name]
        inputs = {
            value.name: values[value.name].astype(TYPES[value.type], copy=False)
            for value in part.get_inputs()
        }
        gives = [value.name for value in part.get_outputs()]
        return _widened(gives, part.run(gives, inputs))

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        session = self.engine.session
        threads = session.get_session_options().intra_op_num_threads
        return open_session(
            model.SerializeToString(),
            provider=session.get_providers()[0],
            threads=threads,
            keeps_memory=False,
        )


def _widened(names: Sequence[str], arrays: Sequence[Any]) -> Values:
    """Return arrays under their names, half-precision ones as float32."""
    return {
        name: array.astype(np.float32) if array.dtype == np.float16 else array
        for name, array in zip(names, arrays, strict=True)
    }


REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStages(StageRunner):
    """The stages of a network in PyTorch.

    Float32 unless `autocast` says otherwise; decoding and what follows always are.
    """

    has_stages = True

    def __init__(self, detector: FusedDetector, autocast: torch.dtype | None = None) -> None:
        """Take a detector.

        Args:
            detector: in eval mode, on its device.
            autocast: the type of the network's arithmetic, None for float32.
        """
        self.detector, self.autocast = detector, autocast
        self.device = detector.mean.device
        self.name = f"PyTorch {torch.__version__}, eager"

    def with_max_det(self, max_det: int) -> TorchStages:
        """Return the same network with at most so many detections an image."""
        detector = FusedDetector(self.detector.model, max_det).to(self.device).eval()
        return TorchStages(detector, self.autocast)

    @torch.inference_mode()
    def run_all(self, inputs: Values) -> Values:
        """Run all stages."""
        with self._arithmetic():
            stages = self.detector(
                *self._tensors(inputs, "images", "valid_hw"), *_thresholds(inputs)
            )
        names = inner_value_names(self.detector.model.preset)
        return inputs | _arrays(names, inner_values(stages)) | _arrays(OUTPUTS, stages.detections)

    def measure_noise(self, inputs: Values) -> Conditioning:
        """Measure on the CPU how far float32 itself is off on these inputs."""
        on_cpu = self.device.type == "cpu"
        detector = self.detector if on_cpu else copy.deepcopy(self.detector).cpu()
        return measure_conditioning(
            detector, inputs["images"], inputs["valid_hw"], *_thresholds(inputs)
        )

    @torch.inference_mode()
    def run(self, stage: Stage, values: Values) -> Values:
        """Run one stage."""
        with self._arithmetic():
            outputs = self._outputs(stage, values)
        return _arrays((stage.gives + RANKING)[: len(outputs)], outputs)

    def _outputs(self, stage: Stage, values: Values) -> Sequence[Tensor]:
        """Return the stage's tensors, in the order of their names; a head's with its ranking."""
        inputs, model = self._tensors(values, *stage.reads), self.detector.model
        score_threshold, iou_threshold = _thresholds(values)
        images, valid_hw = self._tensors(values, "images", "valid_hw")
        match stage.name:
            case "pixels":
                return [self.detector.normalise(images, valid_hw)]
            case "backbone":
                return model.backbone(inputs[0])
            case "pyramid":
                return model.neck(inputs)
            case "head":
                head, ranking = model.bbox_head.predict(inputs)
                return [*head.scores, *head.boxes_strides, *ranking]
            case "candidates":
                head = HeadOutput(inputs[: len(STRIDES)], inputs[len(STRIDES) :])
                ranking = self._tensors(values, *self._ranking_names)
                return self.detector.select_candidates(head, valid_hw, score_threshold, ranking)
        return self.detector.suppress(Candidates(*inputs), iou_threshold)

    @property
    def _ranking_names(self) -> tuple[str, ...]:
        return RANKING if self.detector.model.preset.ranks_by_class_score else ()

    def _tensors(self, values: Values, *names: str) -> list[Tensor]:
        return [torch.from_numpy(values[name]).to(self.device) for name in names]

    def _arithmetic(self) -> Any:
        if self.autocast is not None:
            return torch.autocast(self.device.type, self.autocast)
        # PyTorch rounds float32 to 10 bits on a GPU unless this is set.
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _thresholds(values: Values) -> tuple[float, float]:
    return float(values["score_threshold"]), float(values["iou_threshold"])


def _arrays(names: Any, tensors: Any) -> Values:
    def array(tensor: Tensor) -> Any:
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()

    return {name: array(tensor) for name, tensor in zip(names, tensors, strict=True)}
