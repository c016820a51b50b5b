"""What a comparison with the reference must stay within, and what it means to fail. Knows no files and no runtimes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tood_deploy.errors import ToodError


@dataclass(frozen=True)
class Gates:
    """Limits of one artefact's deviation; those of maps are for a stage alone, as deployed 5 times as much is allowed.

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
                raise ToodError(f"--{name.replace('_', '-')} is {value}; expected a number, {expected}")


# For reduced precision the rounding of a 10-bit, 7-bit or 8-bit mantissa, passed through a network's depth.
PRECISION_GATES = {
    "fp32": Gates(),
    "fp16": Gates(1e-3, 1e-2, 1e-2, 0.05, 0.5, 0.97, 0.1, outliers=False),
    "bf16": Gates(1e-2, 5e-2, 3e-2, 0.3, 2.0, 0.9, 0.3, outliers=False),
    "int8": Gates(2e-2, 0.3, 0.1, 1.0, 5.0, 0.7, 1.0, outliers=False),
}


@dataclass(frozen=True)
class Failure:
    """One limit that was passed.

    Attributes:
        stage: "pixels" to "detections", "AP", "batch slots" or "sizes".
        what: the value and measure.
        found, allowed: numbers of that measure.
        carried: whether it was found with what the stages before handed on, not with the reference's values.
    """

    stage: str
    what: str
    found: float
    allowed: float
    carried: bool = False

    def __str__(self) -> str:
        how = " (with what the stages before it handed on)" if self.carried else ""
        return f"{self.stage}: {self.what} {self.found:.3g}, allowed {self.allowed:.3g}{how}"

    @property
    def ratio(self) -> float:
        """How far beyond the limit; above 1."""
        return self.found / self.allowed if self.allowed else float("inf")
