"""The one table of what "equal" means, by precision: used by tood-export, tood-bench parity and the self-test. Knows no arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tood_deploy.errors import ToodError

FEW_CELLS = 16
DEPLOYMENT_SCORE = 0.3  # that a user's detections exceed; the default of `Detector`


@dataclass(frozen=True)
class Float32Limits:
    """How far a float32 artefact may be from float64, in units of what valid float32 computations are (`conditioning`).

    Attributes:
        rms: of a map, times the root mean square of the float32 noise.
        rms_of_few: the same of a map with fewer than `FEW_CELLS` cells, whose noise is measured on few numbers.
        largest: of a map, times the largest of the float32 noise.
        telling: share of a map's own spread; a map whose allowed deviation is larger says nothing and is judged by detections.
        scores, boxes_px: of a detection, where the noise of the maps does not explain more; pixels of the network input.
        exchanges: detections an image that a decision on the very edge of a threshold may exchange.
        exchanged: times as many as the valid float32 computations exchange among themselves, if that is more.
    """

    rms: float = 5.0
    rms_of_few: float = 12.0
    largest: float = 12.0
    telling: float = 1e-3
    scores: float = 1e-5
    boxes_px: float = 0.05
    exchanges: int = 2
    exchanged: float = 2.0

    def rms_of(self, cells: int) -> float:
        """Return the limit for a map of so many cells, rows times columns."""
        return self.rms if cells >= FEW_CELLS else self.rms_of_few


@dataclass(frozen=True)
class DetectionLimits:
    """What a user may see of a lower precision: of the detections above the deployment score, those that one side has alone.

    Attributes:
        lost: share of the reference's detections that the artefact may lack, 0 to 1.
        added: share of the artefact's detections that the reference may lack, 0 to 1.
        score: by how much the scores of a pair may differ; further apart they are two detections.
        iou: overlap that a pair must have, 0 to 1.
        ap_drop: points of AP (0 to 100) that may be lost on annotated images.
    """

    lost: float
    added: float
    score: float
    iou: float
    ap_drop: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= (100 if name == "ap_drop" else 1):
                raise ToodError(
                    f"the limit {name} is {value}; expected a number from 0 to {100 if name == 'ap_drop' else 1}"
                )


@dataclass(frozen=True)
class AnswerTolerance:
    """How far the answer to a self-test, some ten detections, may be from the stored one.

    Attributes:
        score: of a detection, as a share of the best stored score.
        iou: overlap that a detection must have with the stored one.
        matched: share of the detections of either that must be in both.
    """

    score: float
    iou: float
    matched: float


@dataclass(frozen=True)
class Gates:
    """How far the stages of tood-bench parity may be off; of maps for a stage alone, as deployed 5 times as much is allowed.

    Attributes:
        max_pixel: of the network's input, in its normalised units (a grey level is about 0.017).
        max_map: of a map of backbone or pyramid, L2 norm of the difference over that of the reference.
        max_score: of the head's probabilities, and of a candidate's or detection's score.
        max_box_strides: of the head's boxes, in strides of their level.
        max_box_px: of a candidate's or detection's coordinates, in pixels of the network input.
        min_matched: share of the boxes of either run that both must have.
        max_ap_drop: points of AP (0 to 100).
        outliers: whether every single number counts; otherwise 99 of 100 must stay within.
    """

    max_pixel: float = 1e-4
    max_map: float = 1e-4
    max_score: float = 1e-4
    max_box_strides: float = 5e-3
    max_box_px: float = 0.1
    min_matched: float = 0.995
    max_ap_drop: float = 0.1
    outliers: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0 or (name == "min_matched" and value > 1):
                expected = "0 to 1" if name == "min_matched" else "0 or more"
                raise ToodError(
                    f"--{name.replace('_', '-')} is {value}; expected a number, {expected}"
                )


FLOAT32_LIMITS = Float32Limits()

# Each limit is a few times what a sound artefact of a trained network shows (docs/verification.md).
DETECTION_LIMITS = {
    "fp16": DetectionLimits(lost=0.01, added=0.01, score=0.02, iou=0.9, ap_drop=0.1),
    "bf16": DetectionLimits(lost=0.03, added=0.03, score=0.1, iou=0.75, ap_drop=0.3),
    "int8": DetectionLimits(lost=0.05, added=0.05, score=0.1, iou=0.75, ap_drop=0.5),
}

# For reduced precision the rounding of a 10-bit, 7-bit or 8-bit mantissa, passed through a network's depth.
PRECISION_GATES = {
    "fp32": Gates(),
    "fp16": Gates(1e-3, 1e-2, 1e-2, 0.05, 0.5, 0.97, 0.1, outliers=False),
    "bf16": Gates(1e-2, 5e-2, 3e-2, 0.3, 2.0, 0.9, 0.3, outliers=False),
    "int8": Gates(2e-2, 0.3, 0.1, 1.0, 5.0, 0.7, 1.0, outliers=False),
}

# Self-tests. Seen: float32 of two runtimes within 1e-4; bf16 within 0.04, with an overlap of 0.94 and one detection of nine exchanged.
# 8 bits of one runtime are the same to four digits on every CPU that adds exactly, and 0.03 to 0.27 off on one that saturates; another
# runtime rounds elsewhere and is as far off as that. GPUs compute float32
# convolutions with 10 bits of mantissa (TF32) unless told otherwise.
SAME_FLOAT32 = AnswerTolerance(2e-3, 0.98, 0.9)
SAME_TF32 = AnswerTolerance(0.02, 0.95, 0.8)
SAME_INT8 = AnswerTolerance(0.01, 0.98, 0.9)
LOW_PRECISION = AnswerTolerance(0.25, 0.75, 0.6)


def answer_tolerance(precision: str, device: str, *, same_runtime: bool) -> AnswerTolerance:
    """Return how far an answer may be off.

    Args:
        precision: that the engine runs in, such as "fp32" or "int8, bf16".
        device: "cpu" or "cuda".
        same_runtime: whether the stored answer is of the same runtime in the same version.
    """
    if precision == "fp32":
        return SAME_FLOAT32 if device == "cpu" else SAME_TF32
    return (
        SAME_INT8
        if precision in ("int8", "int8, fp32") and device == "cpu" and same_runtime
        else LOW_PRECISION
    )
