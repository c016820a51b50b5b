"""How long each frame took in each stage of the pipeline; kept for the last many thousand frames, so memory stays flat."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

STAGES = {"pre": "pre", "infer": "infer", "post": "post", "end_to_end": "end-to-end"}
KEPT_FRAMES = 100_000


class Timings:
    """Milliseconds per frame of every stage: scaling, engine, boxes back, and from the decoded frame to its result."""

    def __init__(self) -> None:
        self.frames = 0
        self.started_s = self.ended_s = time.perf_counter()
        self._ms: dict[str, deque[float]] = {stage: deque(maxlen=KEPT_FRAMES) for stage in STAGES}

    def add(self, stage: str, seconds: float, frames: int = 1) -> None:
        """Notes what a stage took for so many frames together."""
        self._ms[stage].extend([seconds * 1000 / frames] * frames)

    def finish_frame(self, decoded_s: float) -> None:
        """Notes that a frame that was decoded then has its result now."""
        self.ended_s = time.perf_counter()
        self.frames += 1
        self.add("end_to_end", self.ended_s - decoded_s)

    def percentile_ms(self, stage: str, percent: float) -> float:
        """Of a stage, per frame; 0 where nothing ran."""
        return float(np.percentile(list(self._ms[stage]), percent)) if self._ms[stage] else 0.0

    def mean_ms(self, stage: str) -> float:
        """Of a stage, per frame; 0 where nothing ran."""
        return float(np.mean(list(self._ms[stage]))) if self._ms[stage] else 0.0

    @property
    def fps(self) -> float:
        """Frames a second from the start to the last result."""
        return self.frames / max(self.ended_s - self.started_s, 1e-9)

    def summary(self) -> str:
        """All of it in one line: medians, 95th percentiles, frames a second."""
        stages = (f"{name} {self.percentile_ms(stage, 50):.1f} (p95 {self.percentile_ms(stage, 95):.1f})" for stage, name in STAGES.items())
        return f"{self.frames} frames in {self.ended_s - self.started_s:.1f} s, {self.fps:.1f} fps; ms per frame: {', '.join(stages)}"
