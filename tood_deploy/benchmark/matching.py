"""What became of the boxes of a run in another one on the same pictures. NumPy alone; knows no thresholds of detectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.deviation import Deviation
from tood_deploy.rows import Rows, pair_rows


@dataclass
class RowDeviation:
    """What became of the reference's boxes, over all pictures.

    Attributes:
        score, box_px: shifts of the paired boxes' scores and coordinates (pixels).
        reference: boxes of the reference.
        matched: of these, found again.
        added: boxes that only the other has.
        not_numbers: boxes with a NaN or infinite coordinate or score.
    """

    score: Deviation = field(default_factory=Deviation)
    box_px: Deviation = field(default_factory=Deviation)
    reference: int = 0
    matched: int = 0
    added: int = 0
    not_numbers: int = 0

    def add(self, reference: Rows, found: Rows) -> NDArray[np.intp]:
        """Adds one picture; gives the pairs, as `pair_rows` does."""
        self.not_numbers += int((~np.isfinite(found.scores) | ~np.isfinite(found.boxes).all(axis=1)).sum())
        pairs = pair_rows(reference, found)
        self.score.add(reference.scores[pairs[:, 0]], found.scores[pairs[:, 1]])
        self.box_px.add(reference.boxes[pairs[:, 0]], found.boxes[pairs[:, 1]])
        self.reference += len(reference)
        self.matched += len(pairs)
        self.added += len(found) - len(pairs)
        return pairs

    @property
    def lost(self) -> int:
        """Boxes that only the reference has."""
        return self.reference - self.matched

    @property
    def matched_share(self) -> float:
        """Of the boxes of either run, those that both have: 0 to 1; 1 where there are none."""
        either = self.reference + self.added
        return self.matched / either if either else 1.0

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {
            "reference": self.reference,
            "matched": self.matched,
            "lost": self.lost,
            "added": self.added,
            "matched_share": self.matched_share,
            "not_numbers": self.not_numbers,
            "score": self.score.to_dict(),
            "box_px": self.box_px.to_dict(),
        }
