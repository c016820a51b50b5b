"""The pictures on which two runs differ most, and the scores of all their boxes side by side."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.picture_set import Picture
from tood_deploy.detections import Detections

MOST_PICTURES = 20
MOST_SCORES = 50_000


@dataclass(frozen=True, order=True)
class Difference:
    """One picture and what the two runs made of it; ordered by how much they differ.

    Attributes:
        exchanged: boxes that only one of the two has.
        shift: the largest difference of a paired box's scores.
        number: of the picture, negative, so that of equals the first counts as the more different.
        picture: the picture.
        reference, found: detections, boxes in the picture's pixels.
        pairs: (P, 2) positions of paired boxes.
    """

    exchanged: int
    shift: float
    number: int
    picture: Picture = field(compare=False)
    reference: Detections = field(compare=False)
    found: Detections = field(compare=False)
    pairs: NDArray[np.intp] = field(compare=False)


class Differences:
    """Keeps the most different pictures, and the first many scores."""

    def __init__(self) -> None:
        self._heap: list[Difference] = []
        self._scores: list[NDArray[np.float32]] = []
        self._kept_scores = 0
        self._seen = 0

    def add(self, picture: Picture, reference: Detections, found: Detections, pairs: NDArray[np.intp]) -> None:
        """Adds one picture; `pairs` are positions of paired boxes in both."""
        both = np.stack([reference.scores[pairs[:, 0]], found.scores[pairs[:, 1]]], axis=1)
        lost, added = np.delete(reference.scores, pairs[:, 0]), np.delete(found.scores, pairs[:, 1])
        shift = float(np.abs(both[:, 0] - both[:, 1]).max(initial=0))
        difference = Difference(len(lost) + len(added), shift, -self._seen, picture, reference, found, pairs)
        self._seen += 1
        push = heapq.heappush if len(self._heap) < MOST_PICTURES else heapq.heappushpop
        push(self._heap, difference)
        if self._kept_scores < MOST_SCORES:
            zeros = np.zeros_like
            self._scores += [both, np.stack([lost, zeros(lost)], axis=1), np.stack([zeros(added), added], axis=1)]
            self._kept_scores += len(both) + len(lost) + len(added)

    @property
    def pictures(self) -> list[Difference]:
        """The most different pictures, most different first."""
        return sorted(self._heap, reverse=True)

    @property
    def scores(self) -> NDArray[np.float32]:
        """(N, 2) scores of the reference's and the other's box, 0 for the one that has none."""
        return np.concatenate([np.zeros((0, 2), np.float32), *self._scores])
