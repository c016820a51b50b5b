"""Proves an ONNX artefact equal to the network in PyTorch, by running both on the same pictures.

The shipped file itself is run, with the head's maps added as outputs in memory.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from tood_deploy.errors import CheckFailed
from tood_deploy.export.compare import Match, Rows, map_deviation, match_detections
from tood_deploy.export.graph import HEAD_OUTPUTS, INPUTS, OUTPUTS
from tood_deploy.export.pictures import synthetic_picture
from tood_deploy.export.to_onnx import with_outputs
from tood_deploy.model.fused import FusedDetector
from tood_deploy.model.tood import Tood
from tood_deploy.preprocess import resize_and_pad

SIZES_HW = {"square": (320, 320), "portrait": (416, 256), "tiny": (64, 64)}
BATCH = 3
SCORE_THRESHOLD, IOU_THRESHOLD = 0.05, 0.6

Maps = list[NDArray[Any]]


@dataclass(frozen=True)
class Tolerances:
    """How far an artefact may be from PyTorch.

    Attributes:
        head_scores: of every score map, absolute.
        head_boxes: of every box map, in strides.
        noise: where a network is so ill-conditioned that float32 itself is further off (GroupNorm over two values that are nearly equal
            is), this many times the deviation of PyTorch's own float32 from float64 on the same pictures, if that is more.
        scores: of a detection.
        boxes_px: of a detection's coordinates, pixels of the network input.
        exchanges: detections a picture that a decision on the very edge of a threshold may exchange.
    """

    head_scores: float = 1e-5
    head_boxes: float = 1e-3
    noise: float = 10.0
    scores: float = 1e-5
    boxes_px: float = 0.05
    exchanges: int = 2


@dataclass
class Verdict:
    """What the comparison found, over all pictures.

    Attributes:
        head_scores, head_boxes: largest deviations of the head's maps, boxes in strides.
        head_scores_noise, head_boxes_noise: of float32 from float64 in PyTorch, measured only where a deviation asked for it.
        failed: what was outside its tolerance, a sentence each.
        detections: PyTorch against the artefact.
        batch_slots: the same picture alone against in every slot of a batch.
        most_exchanges: detections exchanged in the worst picture.
        pictures: how many there were; and the SHA-256 of all their pixels.
    """

    head_scores: float = 0.0
    head_boxes: float = 0.0
    head_scores_noise: float = 0.0
    head_boxes_noise: float = 0.0
    failed: list[str] = field(default_factory=list)
    detections: Match = field(default_factory=Match)
    batch_slots: Match = field(default_factory=Match)
    most_exchanges: int = 0
    pictures: int = 0
    pictures_sha256: str = ""

    def failures(self, tolerances: Tolerances) -> list[str]:
        """One sentence for every stage outside its tolerance."""
        checks = (
            ("detections exchanged in one picture", self.most_exchanges, tolerances.exchanges),
            ("detections that depend on the batch slot", self.batch_slots.exchanged, 0),
        )
        return self.failed + [f"{what}: {found}, at most {allowed} allowed" for what, found, allowed in checks if found > allowed]

    def to_dict(self, tolerances: Tolerances) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "reference": f"PyTorch {torch.__version__}, float32",
            "runtime": f"ONNX Runtime {ort.__version__}, CPU",
            "tolerances": asdict(tolerances),
            **asdict(self),
        }


class Verifier:
    """Runs the network and its artefact side by side."""

    def __init__(self, model: Tood, artefact: Path, max_det: int, tolerances: Tolerances) -> None:
        self.detector = FusedDetector(model, max_det).eval()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        extended = with_outputs(onnx.load(artefact), HEAD_OUTPUTS).SerializeToString()
        self.session = ort.InferenceSession(extended, options, providers=["CPUExecutionProvider"])
        self.tolerances = tolerances
        self.verdict = Verdict()
        self._pixels = hashlib.sha256()

    def compare(self, pictures: Sequence[NDArray[np.uint8]], imgsz: tuple[int, int]) -> None:
        """Adds a batch of pictures, (H, W, 3) uint8 BGR of one size, to the verdict."""
        prepared = [resize_and_pad(picture, imgsz) for picture in pictures]
        images = np.stack([image for image, _ in prepared])
        valid_hw = np.array([transform.resized_hw for _, transform in prepared], np.int32)
        self._pixels.update(images.tobytes())
        expected, found = self._run_torch(images, valid_hw), self._run_onnx(images, valid_hw)
        self._compare_maps(expected[len(OUTPUTS) :], found[len(OUTPUTS) :], images, valid_hw)
        for first, second in zip(_rows(expected), _rows(found), strict=True):
            match = self._match(first, second)
            self.verdict.detections += match
            self.verdict.most_exchanges = max(self.verdict.most_exchanges, match.exchanged)
        self.verdict.pictures += len(pictures)
        self.verdict.pictures_sha256 = self._pixels.hexdigest()

    def compare_slots(self, picture: NDArray[np.uint8], imgsz: tuple[int, int], batch: int = BATCH) -> None:
        """Adds to the verdict whether the artefact gives a picture the same rows alone and in every slot of a batch."""
        image, transform = resize_and_pad(picture, imgsz)
        images, valid_hw = image[None].repeat(batch, 0), np.array([transform.resized_hw], np.int32).repeat(batch, 0)
        alone = _rows(self._run_onnx(images[:1], valid_hw[:1]))[0]
        for slot in _rows(self._run_onnx(images, valid_hw)):
            self.verdict.batch_slots += self._match(alone, slot)

    def _compare_maps(self, expected: Maps, found: Maps, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> None:
        half = len(HEAD_OUTPUTS) // 2
        exact: Maps | None = None
        for name, part in (("head_scores", slice(half)), ("head_boxes", slice(half, None))):
            deviation, allowed = _largest_deviation(expected[part], found[part]), getattr(self.tolerances, name)
            setattr(self.verdict, name, max(getattr(self.verdict, name), deviation))
            if deviation <= allowed:
                continue
            exact = exact or self._run_float64(images, valid_hw)
            noise = _largest_deviation(exact[part], expected[part])
            setattr(self.verdict, f"{name}_noise", max(getattr(self.verdict, f"{name}_noise"), noise))
            allowed = max(allowed, self.tolerances.noise * noise)
            if deviation > allowed:
                self.verdict.failed.append(
                    f"{name.replace('_', ' ')} of pictures {images.shape[1:3]} deviate: {deviation:.3g}, at most {allowed:.3g} allowed"
                )

    def _match(self, reference: Rows, found: Rows) -> Match:
        return match_detections(reference, found, self.tolerances.scores, self.tolerances.boxes_px)

    @torch.inference_mode()
    def _run_torch(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> Maps:
        stages = self.detector(torch.from_numpy(images), torch.from_numpy(valid_hw), SCORE_THRESHOLD, IOU_THRESHOLD)
        return [tensor.numpy() for tensor in (*stages.detections, *stages.head.scores, *stages.head.boxes_strides)]

    @torch.inference_mode()
    def _run_float64(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> Maps:
        pixels = self.detector.normalise(torch.from_numpy(images), torch.from_numpy(valid_hw))
        head = copy.deepcopy(self.detector.model).double()(pixels.double())
        return [tensor.float().numpy() for tensor in (*head.scores, *head.boxes_strides)]

    def _run_onnx(self, images: NDArray[np.uint8], valid_hw: NDArray[np.int32]) -> Maps:
        values = (images, valid_hw, np.array(SCORE_THRESHOLD, np.float32), np.array(IOU_THRESHOLD, np.float32))
        found: Any = self.session.run([*OUTPUTS, *HEAD_OUTPUTS], dict(zip(INPUTS, values, strict=True)))
        return found


def _largest_deviation(first: Maps, second: Maps) -> float:
    return max(map_deviation(one, other) for one, other in zip(first, second, strict=True))


def _rows(outputs: Sequence[NDArray[Any]]) -> list[Rows]:
    """Per picture, the rows of `num_dets`, `boxes`, `scores`, `labels` that hold detections."""
    return [
        Rows(boxes[:count], scores[:count], labels[:count]) for count, boxes, scores, labels in zip(*outputs[: len(OUTPUTS)], strict=True)
    ]


def verify_onnx(
    model: Tood,
    artefact: Path,
    *,
    max_det: int,
    pictures: Sequence[NDArray[np.uint8]] = (),
    tolerances: Tolerances | None = None,
) -> dict[str, Any]:
    """Compares an artefact with its network: at three sizes, in batches of one and three, and on the user's pictures.

    Args:
        model: the network that was exported.
        artefact: the shipped .onnx file.
        max_det: rows of the outputs.
        pictures: (H, W, 3) uint8 BGR, compared at the model's own picture size in addition to the built-in ones.
        tolerances: the published ones where not given.

    Returns:
        The parity verdict for the manifest.

    Raises:
        CheckFailed: the artefact is outside a tolerance; the message names the stage and the deviation.
    """
    tolerances = tolerances or Tolerances()
    verifier = Verifier(model, artefact, max_det, tolerances)
    for number, (height, width) in enumerate(SIZES_HW.values()):
        # A few rows and columns fewer than the padded size, so that padding takes part.
        batch = [synthetic_picture(height - 10, width - 6, seed=BATCH * number + i) for i in range(BATCH)]
        imgsz = min(height - 10, width - 6), max(height - 10, width - 6)
        verifier.compare(batch[:1], imgsz)
        verifier.compare(batch, imgsz)
        verifier.compare_slots(batch[0], imgsz)
    for picture in pictures:
        verifier.compare([picture], model.preset.imgsz)
    if failures := verifier.verdict.failures(tolerances):
        raise CheckFailed(f"the artefact is not equal to the PyTorch reference: {'; '.join(failures)}")
    return verifier.verdict.to_dict(tolerances)
