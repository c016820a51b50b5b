"""The one table of what "equal" means, by precision.

Used by tood-export, tood-bench parity and the self-test. Numbers go out; knows no arrays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tood_deploy.errors import ToodError

FEW_CELLS = 16
DEPLOYMENT_SCORE = 0.3  # that a user's detections exceed; the default of `Detector`


@dataclass(frozen=True)
class Failure:
    """A limit that was passed.

    Attributes:
        stage: "pixels" to "detections", "batch slots", or "AP".
        message: what was measured and what is allowed, without a full stop.
    """

    stage: str
    message: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.message}"


@dataclass(frozen=True)
class LimitRow:
    """What was measured beside its limit, for a table that goes with a verdict.

    Attributes:
        measure: what it is.
        value: as measured.
        limit: as allowed.
    """

    measure: str
    value: str
    limit: str


@dataclass(frozen=True)
class Float32Limits:
    """How far a float32 artefact may be from float64, in units of float32's own noise.

    The noise is how far other valid float32 computations of the network are off, see `MapNoise`.

    Attributes:
        rms: of a map, times the root mean square of the float32 noise.
        rms_of_few: the same of a map with fewer than `FEW_CELLS` cells, whose noise is measured on
            few numbers.
        largest: of a map, times the largest of the float32 noise.
        telling: share of a map's own spread; a map whose allowed deviation is larger says nothing
            and is judged by detections.
        scores: of a detection, where the noise of the maps does not explain more.
        boxes_px: the same of its coordinates, in pixels of the network's input.
        exchanges: detections of an image that a decision on the very edge of a threshold may
            exchange.
        exchanged: times as many as the valid float32 computations exchange among themselves, if
            that is more.
        ap_drop: points of AP (0 to 100) that may be lost on annotated images.
    """

    rms: float = 5.0
    rms_of_few: float = 12.0
    largest: float = 12.0
    telling: float = 1e-3
    scores: float = 1e-5
    boxes_px: float = 0.05
    exchanges: int = 2
    exchanged: float = 2.0
    ap_drop: float = 0.1

    def rms_of(self, cells: int) -> float:
        """Return the limit for a map of so many cells, rows times columns."""
        return self.rms if cells >= FEW_CELLS else self.rms_of_few


@dataclass(frozen=True)
class DetectionLimits:
    """What a user may see of a lower precision: detections that one side has alone.

    Counted are detections above the deployment score.

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
            largest = 100 if name == "ap_drop" else 1
            if not 0 <= value <= largest:
                raise ToodError(
                    f"the limit {name} is {value}; expected a number from 0 to {largest}"
                )


@dataclass(frozen=True)
class StageLimits:
    """From where on a stage of the network counts as the cause of a verdict.

    These decide nothing: whether an artefact passes, its maps' noise or its detections say. Of one
    that fails they name the guilty stage.

    Attributes:
        max_pixel: of the network's input, in its normalised units (a grey level is about 0.017).
        max_map: of a map of backbone or pyramid, L2 norm of the difference over the reference's.
        max_score: of the head's probabilities, and of a candidate's or detection's score.
        max_box_strides: of the head's boxes, in strides of their level.
        max_box_px: of a candidate's or detection's coordinates, in pixels of the network's input.
        outliers: whether every single number counts; otherwise 99 of 100 must stay within.
    """

    max_pixel: float = 1e-4
    max_map: float = 1e-4
    max_score: float = 1e-4
    max_box_strides: float = 5e-3
    max_box_px: float = 0.1
    outliers: bool = True


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


FLOAT32_LIMITS = Float32Limits()

# Each limit is a few times what a sound artefact of a trained network shows (docs/verification.md).
DETECTION_LIMITS = {
    "fp16": DetectionLimits(lost=0.01, added=0.01, score=0.02, iou=0.9, ap_drop=0.1),
    "bf16": DetectionLimits(lost=0.03, added=0.03, score=0.1, iou=0.75, ap_drop=0.3),
    "int8": DetectionLimits(lost=0.05, added=0.05, score=0.1, iou=0.75, ap_drop=0.5),
}

# The rounding of a mantissa of 10, 7 or 8 bits, passed through a network's depth.
STAGE_LIMITS = {
    "fp32": StageLimits(),
    "fp16": StageLimits(1e-3, 1e-2, 1e-2, 0.05, 0.5, outliers=False),
    "bf16": StageLimits(1e-2, 5e-2, 3e-2, 0.3, 2.0, outliers=False),
    "int8": StageLimits(2e-2, 0.3, 0.1, 1.0, 5.0, outliers=False),
}

# Self-tests. Measured: float32 of two runtimes within 1e-4; bf16 within 0.04, with an overlap of
# 0.94 and one detection of nine exchanged. 8 bits of one runtime are the same to four digits on
# every CPU that adds exactly, and 0.03 to 0.27 off on one that saturates; another runtime rounds
# elsewhere and is as far off as that. GPUs compute float32 convolutions with 10 bits of mantissa
# (TF32) unless the runtime is set otherwise.
SAME_FLOAT32 = AnswerTolerance(2e-3, 0.98, 0.9)
SAME_TF32 = AnswerTolerance(0.02, 0.95, 0.8)
SAME_INT8 = AnswerTolerance(0.01, 0.98, 0.9)
LOW_PRECISION = AnswerTolerance(0.25, 0.75, 0.6)


def base_precision(precision: str) -> str:
    """Return the precision that limits go by: "int8" of "int8, bf16"."""
    return precision.split(",")[0]


def answer_tolerance(precision: str, device: str, *, same_runtime: bool) -> AnswerTolerance:
    """Return how far an answer to a self-test may be off.

    Args:
        precision: that the engine runs in, such as "fp32" or "int8, bf16".
        device: "cpu" or "cuda".
        same_runtime: whether the stored answer is of the same runtime in the same version.
    """
    if precision == "fp32":
        return SAME_FLOAT32 if device == "cpu" else SAME_TF32
    exact = precision in ("int8", "int8, fp32") and device == "cpu" and same_runtime
    return SAME_INT8 if exact else LOW_PRECISION
