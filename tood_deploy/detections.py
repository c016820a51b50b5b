"""What a detector found in one image, as NumPy arrays. Knows nothing of models or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.draw import draw_boxes
from tood_deploy.errors import ToodError

if TYPE_CHECKING:
    import supervision  # pyright: ignore[reportMissingImports] - optional


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects found in one image, best first.

    Attributes:
        boxes: (D, 4) float32 xyxy, in pixels of the original image, not clipped to it.
        scores: (D,) float32 probabilities.
        class_ids: (D,) int32 indices into the class names.
        class_names: the names of all classes the detector knows; may be empty.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int32]
    class_names: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.class_ids.shape != (count,):
            raise ToodError(
                f"boxes {self.boxes.shape}, scores {self.scores.shape} and class_ids "
                f"{self.class_ids.shape} "
                "do not belong together; expected (D, 4), (D,) and (D,)"
            )

    @classmethod
    def empty(cls, class_names: Sequence[str] = ()) -> Detections:
        """Return no objects at all."""
        return cls(
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int32),
            class_names,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int | slice | NDArray[Any]) -> Detections:
        """Return a subset, by position, slice, mask or array of positions.

        Always again `Detections`.
        """
        chosen = np.atleast_1d(np.arange(len(self))[index])
        return Detections(
            self.boxes[chosen], self.scores[chosen], self.class_ids[chosen], self.class_names
        )

    def filter(self, min_score: float = 0.0, class_ids: Sequence[int] | None = None) -> Detections:
        """Return those with a score above `min_score` and, if given, one of these classes."""
        mask = self.scores > min_score
        if class_ids is not None:
            mask &= np.isin(self.class_ids, list(class_ids))
        return self[mask]

    def names(self) -> list[str]:
        """Return the class name of every object; the class number where no names are known."""
        return [
            self.class_names[i] if i < len(self.class_names) else str(i)
            for i in map(int, self.class_ids)
        ]

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return COCO results: one dictionary an object, `bbox` as x, y, width, height in pixels.

        Args:
            image_id: the image's id in the annotations.
            category_ids: category id of each class; class number plus one where not given.
        """
        rows = []
        for (x1, y1, x2, y2), score, class_id in zip(
            self.boxes.tolist(), self.scores.tolist(), self.class_ids.tolist(), strict=True
        ):
            category = class_id + 1 if category_ids is None else category_ids[class_id]
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
        return rows

    def to_supervision(self) -> supervision.Detections:
        """Return the same as `supervision.Detections`.

        Raises:
            ToodError: the package supervision is not installed.
        """
        try:
            import supervision  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise ToodError(
                "to_supervision needs the package supervision; install it with: pip install "
                "supervision"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.class_ids.astype(int),
            data={"class_name": np.array(self.names())},
        )

    def plot(self, image_bgr: NDArray[Any]) -> NDArray[np.uint8]:
        """Return a copy of the image, (H, W, 3) uint8 BGR, with the detections drawn on it."""
        labels = [
            f"{name} {score:.2f}"
            for name, score in zip(self.names(), self.scores.tolist(), strict=True)
        ]
        return draw_boxes(image_bgr, self.boxes, self.class_ids, labels)
