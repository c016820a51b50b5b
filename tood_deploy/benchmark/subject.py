"""What is compared: an artefact or checkpoint, opened so that its stages can be looked at as far as its runtime lets one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.stages import Stage, StageRunner, Values
from tood_deploy.engines import Engine, open_engine
from tood_deploy.engines.opening import CHECKPOINT_SUFFIXES
from tood_deploy.errors import ToodError
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import Manifest, artefact_sha256
from tood_deploy.preprocess import ImageTransform
from tood_deploy.presets import PRESETS


@dataclass(frozen=True, eq=False)
class Subject:
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
        """What the model says of itself."""
        return self.engine.manifest

    def prepare(self, image_bgr: NDArray[np.uint8], imgsz: tuple[int, int]) -> tuple[NDArray[np.uint8], ImageTransform]:
        """The network's input for a picture, padded as this model takes it, and the transform that leads back."""
        prepared = Detector(self.engine, imgsz=imgsz).prepare(image_bgr)
        return prepared.image, prepared.transform

    def most_batch(self, inputs: Values) -> int | None:
        """The largest batch that it takes of pictures of this size; None where there is no bound."""
        return self.engine.batches_at(net_size(inputs))[1]


class DetectionsOnly(StageRunner):
    """A runtime that lets nobody look inside."""

    has_stages = False

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name

    def run_all(self, inputs: Values) -> Values:
        """The detections; where the engine takes no batch as small, of the first pictures of one that holds them several times."""
        count, least = len(inputs["images"]), self.engine.batches_at(net_size(inputs))[0]
        filled = repeat_pictures(inputs, -(-least // count)) if count < least else inputs
        thresholds = float(inputs["score_threshold"]), float(inputs["iou_threshold"])
        found = self.engine.infer(filled["images"], filled["valid_hw"], *thresholds)
        outputs = (found.num_dets, found.boxes_net, found.scores, found.labels)
        return inputs | {name: values[:count] for name, values in zip(OUTPUTS, outputs, strict=True)}

    def run(self, stage: Stage, values: Values) -> Values:
        """Raises ToodError, always."""
        raise ToodError(f"{self.name} gives detections alone; the stage {stage.name} cannot be looked at: use the .onnx it was made from")


def open_subject(
    model: str,
    *,
    device: str,
    threads: int | None,
    stages: bool | None,
    artefact_options: dict[str, Any] | None = None,
    **load_options: Any,
) -> Subject:
    """Opens a model, with `artefact_options` or `load_options`, and, unless `stages` is False, its stages.

    Raises:
        ToodError: it cannot be opened; or its stages were asked for (True) and its runtime does not give them.
    """
    options = dict(load_options if is_checkpoint(model) else artefact_options or {})
    if threads is not None:
        options["threads"] = threads
    engine = open_engine(model, device=device, **options)
    path = Path(model) if Path(model).is_file() else None
    runner = DetectionsOnly(engine) if stages is False else _open_stages(engine, path)
    if stages and not runner.has_stages:
        raise ToodError(f"{model}: {engine.name} gives detections alone; leave --stages out, or compare the .onnx it was made from")
    return Subject(model, path, engine, runner, artefact_sha256(path) if path else engine.manifest.checkpoint_sha256)


def is_checkpoint(model: str) -> bool:
    """Whether a model argument names a checkpoint or preset, which PyTorch runs."""
    return Path(model).suffix.lower() in CHECKPOINT_SUFFIXES or (model in PRESETS and not Path(model).exists())


def _open_stages(engine: Engine, path: Path | None) -> StageRunner:
    if path is None or is_checkpoint(str(path)):
        from tood_deploy.benchmark.torch_stages import TorchStages
        from tood_deploy.engines.torch_engine import TorchEngine

        if isinstance(engine, TorchEngine):
            return TorchStages(engine.detector)
    if path is not None and path.suffix.lower() == ".onnx":
        from tood_deploy.benchmark.onnx_stages import OnnxStages
        from tood_deploy.engines.onnx_engine import OnnxEngine

        if isinstance(engine, OnnxEngine):
            return OnnxStages(engine, path)
    return DetectionsOnly(engine)


def net_size(inputs: Values) -> tuple[int, int]:
    """Rows and columns of the pictures in the graph's inputs."""
    return inputs["images"].shape[1], inputs["images"].shape[2]


def repeat_pictures(inputs: Values, times: int) -> Values:
    """The graph's inputs with every picture of the batch so many times, in turn."""
    return inputs | {name: np.concatenate([inputs[name]] * times) for name in ("images", "valid_hw")}


def network_inputs(image: NDArray[np.uint8], transform: ImageTransform, conf: float, iou: float) -> Values:
    """The exported graph's inputs for one prepared picture (H, W, 3) uint8 RGB."""
    values = (image[None], np.array([transform.resized_hw], np.int32), np.array(conf, np.float32), np.array(iou, np.float32))
    return dict(zip(INPUTS, values, strict=True))
